/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is IPv4's own: header, fragments, ICMP, hop count.
 *
 * Parsing has two steps, because nothing of a packet may be remembered (fragments are) before its source
 * address was checked:
 *
 *   ipv4_parse      version, lengths, addresses
 *   ipv4_parse_l4   protocol, ports, TCP flags, ICMP type and identifier; a later fragment has them from
 *                   the first one
 */
#pragma once

#include <linux/ip.h>

#include "config.h"
#include "flow.h"
#include "maps.h"

/* From linux/icmp.h, which needs a C library. */
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12

struct icmp_header {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be16 echo_id; /* echo and its reply only */
	__be16 echo_sequence;
};

#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_FRAGMENT_OFFSET 0x1fff
#define TCP_FLAGS_AT 13 /* the byte of a TCP header that holds FIN to CWR */

static __always_inline int ipv4_parse(struct __sk_buff *ctx, struct addresses *ends)
{
	const struct iphdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));
	__u32 header, total;

	if (unlikely(!ip))
		return -DROP_INVALID;
	header = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (unlikely(!total && ctx->gso_segs)) /* larger than the field can say */
		total = ctx->len - ETH_HLEN;
	if (unlikely(ip->version != 4 || header < sizeof(*ip) || total < header || ETH_HLEN + total > ctx->len))
		return -DROP_INVALID;
	ends->source.v4 = ip->saddr;
	ends->destination.v4 = ip->daddr;
	return 0;
}

/* ipv4_addresses reads what an earlier program has checked. */
static __always_inline int ipv4_addresses(struct __sk_buff *ctx, struct addresses *ends)
{
	const struct iphdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));

	if (unlikely(!ip))
		return -DROP_INVALID;
	ends->source.v4 = ip->saddr;
	ends->destination.v4 = ip->daddr;
	return 0;
}

/* icmp_ports fills in ports from an ICMP header so that a reply is the request reversed. */
static __always_inline void icmp_ports(__u8 type, __be16 id, __be16 *sport, __be16 *dport)
{
	*sport = type == ICMP_ECHO ? id : 0;
	*dport = type == ICMP_ECHOREPLY ? id : 0;
}

static __always_inline bool icmp_is_error(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

static __always_inline void ipv4_fragment_key(struct ipv4_frag_id *key, const struct iphdr *ip)
{
	key->daddr = ip->daddr;
	key->saddr = ip->saddr;
	key->id = ip->id;
	key->proto = ip->protocol;
	key->pad = 0;
}

static __always_inline void ipv4_remember_fragment(struct __sk_buff *ctx, const struct ipv4_frag_id *key)
{
	struct ipv4_frag_l4ports ports __attribute__((aligned(4))) = {
		.sport = flow_get(ctx, sport),
		.dport = flow_get(ctx, dport),
	};

	bpf_map_update_elem(&cilium_ipv4_frag_datagrams, key, &ports, BPF_ANY);
}

static __always_inline int ipv4_recall_fragment(struct __sk_buff *ctx, const struct ipv4_frag_id *key)
{
	const struct ipv4_frag_l4ports *ports;

	if (!config.track_fragments) {
		flow_set(ctx, traits, FLOW_PORTLESS);
		return 0;
	}
	ports = bpf_map_lookup_elem(&cilium_ipv4_frag_datagrams, key);
	if (!ports)
		return -DROP_FRAGMENT_NOT_FOUND;
	flow_set(ctx, sport, ports->sport);
	flow_set(ctx, dport, ports->dport);
	/* Of ICMP only echo is ever long enough: a request has no dport. */
	flow_set(ctx, icmp_type, ports->dport ? ICMP_ECHOREPLY : ICMP_ECHO);
	return 0;
}

static __always_inline int ipv4_load_icmp(struct __sk_buff *ctx, __u32 off, __u32 length)
{
	const struct icmp_header *icmp = packet_at(ctx, off, sizeof(*icmp));
	__be16 sport, dport;

	if (!icmp || length < sizeof(*icmp))
		return -DROP_CT_INVALID_HEADER;
	icmp_ports(icmp->type, icmp->echo_id, &sport, &dport);
	flow_set(ctx, sport, sport);
	flow_set(ctx, dport, dport);
	flow_set(ctx, icmp_type, icmp->type);
	flow_set(ctx, traits, icmp_is_error(icmp->type) ? FLOW_ICMP_ERROR : 0);
	return 0;
}

static __always_inline int ipv4_load_ports(struct __sk_buff *ctx, __u32 off, __u32 length, bool tcp)
{
	const __u32 needed = tcp ? TCP_FLAGS_AT + 1 : 8;
	const __u8 *l4 = packet_at(ctx, off, needed);

	if (!l4 || length < needed)
		return -DROP_CT_INVALID_HEADER;
	flow_set(ctx, sport, *(const __be16 *)l4);
	flow_set(ctx, dport, *(const __be16 *)(l4 + 2));
	if (tcp)
		flow_set(ctx, tcp_flags, l4[TCP_FLAGS_AT]);
	return 0;
}

/* ipv4_load_l4 reads the L4 header at `off`; `length`: bytes that the IP header says are there, because a
 * frame may be padded with anything. */
static __always_inline int ipv4_load_l4(struct __sk_buff *ctx, __u32 off, __u32 length, __u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		return ipv4_load_ports(ctx, off, length, true);
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		return ipv4_load_ports(ctx, off, length, false);
	case IPPROTO_ICMP:
		return ipv4_load_icmp(ctx, off, length);
	default:
		return -DROP_CT_UNKNOWN_L4;
	}
}

static __always_inline int ipv4_parse_fragment(struct __sk_buff *ctx, const struct iphdr *ip, __u32 off,
					       __u32 length, bool later)
{
	struct ipv4_frag_id key __attribute__((aligned(8)));
	int ret;

	ipv4_fragment_key(&key, ip);
	if (later)
		return ipv4_recall_fragment(ctx, &key);
	ret = ipv4_load_l4(ctx, off, length, key.proto);
	if (!ret && config.track_fragments)
		ipv4_remember_fragment(ctx, &key);
	return ret;
}

static __always_inline int ipv4_parse_l4(struct __sk_buff *ctx)
{
	const struct iphdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));
	__u32 off, length;

	if (unlikely(!ip))
		return -DROP_INVALID;
	off = ETH_HLEN + ip->ihl * 4;
	length = bpf_ntohs(ip->tot_len) - ip->ihl * 4; /* of one larger than its field: wraps, is large */
	flow_set(ctx, proto, ip->protocol);
	flow_set(ctx, tcp_flags, 0);
	flow_set(ctx, traits, 0);
	flow_set(ctx, l4_off, off);
	if (unlikely(ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS)))
		return ipv4_parse_fragment(ctx, ip, off, length, ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET));
	return ipv4_load_l4(ctx, off, length, ip->protocol);
}

/* ipv4_embedded_key makes the tuple of the packet that an ICMP error is about, from its header and eight
 * bytes; false when they say nothing about a connection. */
static __always_inline bool ipv4_embedded_key(struct __sk_buff *ctx, struct ipv4_ct_tuple *key)
{
	struct addresses ends;
	__u32 off = flow_get(ctx, l4_off) + sizeof(struct icmp_header);
	struct iphdr ip;
	__be16 l4[4];

	if (ipv4_addresses(ctx, &ends) < 0 || bpf_skb_load_bytes(ctx, off, &ip, sizeof(ip)))
		return false;
	if (ip.version != 4 || ip.ihl < 5)
		return false;
	/* An error goes to whoever sent the packet that it is about. */
	if (ip.frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET) || ip.saddr != ends.destination.v4)
		return false;
	if (bpf_skb_load_bytes(ctx, off + ip.ihl * 4, l4, sizeof(l4)))
		return false;
	key->daddr = ip.saddr;
	key->saddr = ip.daddr;
	key->nexthdr = ip.protocol;
	key->sport = l4[0];
	key->dport = l4[1];
	if (ip.protocol == IPPROTO_ICMP)
		icmp_ports(bpf_ntohs(l4[0]) >> 8, l4[2], &key->sport, &key->dport);
	return true;
}

/* ipv4_unroutable says that a destination must never reach the host's stack from an endpoint: its
 * loopback, which is reachable on these devices (route_localnet) for the sake of published ports. */
static __always_inline bool ipv4_unroutable(const union address *destination)
{
	return (destination->v4 & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

/* ipv4_hop takes one off the hop count; false leaves the packet as it is: the stack will tell the sender
 * that its time is exceeded. */
static __always_inline bool ipv4_hop(struct __sk_buff *ctx)
{
	struct iphdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));
	__u32 sum;

	if (!ip || ip->ttl <= 1)
		return false;
	sum = ip->check + bpf_htons(0x0100);
	ip->check = sum + (sum >= 0xffff);
	ip->ttl--;
	return true;
}
