/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Packets that are too big for the way to another host: their sender is told how large they may be.
 *
 * The device's MTU says what leaves this host, not what arrives: a network that carries less and keeps silent
 * is found out by user space (agent/path_mtu.py), which names such hosts in holdfast_path_mtu.  A router on
 * the way would answer so; between hosts that encapsulate there is none who could.
 */
#pragma once

#include "l3.h"

/* What a packet grows by in the tunnel: outer IPv4 header, UDP, VXLAN, inner Ethernet. */
#define TUNNEL_OVERHEAD 50
/* What every path is believed to carry; user space names no less (IPv6 forbids it). */
#define PATH_MTU_LEAST 1280
#define TCP_LENGTH_AT 12 /* the byte whose upper half is the header's length in words */
#define UDP_HEADER 8
#define QUOTED 68 /* bytes of the packet: the longest IPv4 header, and eight behind it */
#define TTL_OF_ERRORS 64

#if IP_VERSION == 4
#define L3_ANSWER iphdr
#define TOO_BIG_TYPE ICMP_DEST_UNREACH
#define TOO_BIG_CODE 4 /* fragmentation needed */
#define LEAST_TO_TELL 0
#else
#define L3_ANSWER ipv6hdr
#define TOO_BIG_TYPE 2
#define TOO_BIG_CODE 0
#define LEAST_TO_TELL 1280 /* nobody sends less: what is told otherwise is ignored, so it has to pass */
#endif

struct too_big {
	struct ethhdr eth;
	struct L3_ANSWER ip;
	struct {
		__u8 type;
		__u8 code;
		__sum16 checksum;
		__be32 mtu;
		__u8 packet[QUOTED];
	} __attribute__((packed)) icmp;
} __attribute__((packed));

/* segment_size returns the length, from the IP header on, of the largest packet that this one becomes. */
static __always_inline __u32 segment_size(struct __sk_buff *ctx)
{
	__u32 l4_off = flow_get(ctx, l4_off), header = UDP_HEADER;
	const __u8 *length;

	if (!ctx->gso_size)
		return ctx->len - ETH_HLEN;
	if (flow_get(ctx, proto) == IPPROTO_TCP) {
		length = packet_at(ctx, l4_off + TCP_LENGTH_AT, 1);
		header = length ? (*length >> 4) * 4 : L4_HEADER;
	}
	return l4_off - ETH_HLEN + header + ctx->gso_size;
}

/* too_big_for returns what may be sent to endpoints of a host when this packet is larger than that, else 0.
 * Most packets are small, and cost a comparison. */
static __always_inline __u32 too_big_for(struct __sk_buff *ctx, __be32 host)
{
	struct endpoint_key key = {.ip.v4 = host, .family = 1};
	__u32 *path, inside;

	if (ctx->len <= ETH_HLEN + PATH_MTU_LEAST - TUNNEL_OVERHEAD)
		return 0;
	path = bpf_map_lookup_elem(&holdfast_path_mtu, &key);
	if (likely(!path || *path < PATH_MTU_LEAST))
		return 0;
	inside = *path - TUNNEL_OVERHEAD;
	if (inside < LEAST_TO_TELL)
		inside = LEAST_TO_TELL;
	return segment_size(ctx) > inside ? inside : 0;
}

static __always_inline __u16 folded(__s64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

#if IP_VERSION == 4
static __always_inline void address_answer(struct too_big *answer, const struct addresses *ends)
{
	answer->ip = (struct iphdr){
		.version = 4,
		.ihl = sizeof(answer->ip) / 4,
		.tot_len = bpf_htons(sizeof(*answer) - ETH_HLEN),
		.ttl = TTL_OF_ERRORS,
		.protocol = ICMP_PROTOCOL,
		.saddr = config.gateway.v4,
		.daddr = ends->source.v4,
	};
	answer->ip.check = folded(bpf_csum_diff(NULL, 0, (__be32 *)&answer->ip, sizeof(answer->ip), 0));
	answer->icmp.checksum = folded(bpf_csum_diff(NULL, 0, (__be32 *)&answer->icmp, sizeof(answer->icmp), 0));
}
#else
static __always_inline void address_answer(struct too_big *answer, const struct addresses *ends)
{
	struct {
		union address source;
		union address destination;
		__be32 length;
		__be32 next;
	} pseudo = {
		.destination = ends->source,
		.length = bpf_htonl(sizeof(answer->icmp)),
		.next = bpf_htonl(ICMP_PROTOCOL),
	};
	__s64 sum;

	for (int i = 0; i < 4; i++)
		pseudo.source.words[i] = config.gateway.words[i];
	answer->ip = (struct ipv6hdr){
		.version = 6,
		.payload_len = bpf_htons(sizeof(answer->icmp)),
		.nexthdr = ICMP_PROTOCOL,
		.hop_limit = TTL_OF_ERRORS,
	};
	memcpy(&answer->ip.saddr, &pseudo.source, sizeof(pseudo.source));
	memcpy(&answer->ip.daddr, &pseudo.destination, sizeof(pseudo.destination));
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
	answer->icmp.checksum = folded(bpf_csum_diff(NULL, 0, (__be32 *)&answer->icmp, sizeof(answer->icmp), sum));
}
#endif

/* answer_too_big turns a packet into the answer of the gateway: no more than `mtu` bytes.  Where the kernel
 * refuses that the packet is dropped, and its sender will try again. */
SEPARATE int answer_too_big(struct __sk_buff *ctx, __u32 mtu)
{
	struct too_big answer = {
		.icmp = {.type = TOO_BIG_TYPE, .code = TOO_BIG_CODE, .mtu = bpf_htonl(mtu)},
	};
	struct addresses ends = {};

	if (l3_addresses(ctx, &ends) < 0)
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(ctx, ETH_HLEN, answer.icmp.packet, QUOTED))
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(ctx, ETH_ALEN, answer.eth.h_dest, ETH_ALEN))
		return TC_ACT_SHOT;
	copy_mac(answer.eth.h_source, config.host_mac);
	answer.eth.h_proto = bpf_htons(L3_PROTOCOL);
	address_answer(&answer, &ends);
	if (bpf_skb_change_tail(ctx, sizeof(answer), 0))
		return TC_ACT_SHOT;
	if (bpf_skb_store_bytes(ctx, 0, &answer, sizeof(answer), BPF_F_INVALIDATE_HASH))
		return TC_ACT_SHOT;
	return send_back(ctx);
}
