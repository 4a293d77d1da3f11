/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is IPv4's own: header, fragments, ICMP, hop count.
 *
 * Parsing has two steps, because nothing of a packet may be remembered (fragments are) before its source
 * address was checked:
 *
 *   ipv4_parse      version, lengths, addresses, protocol, which fragment it is
 *   ipv4_parse_l4   ports, TCP flags, ICMP type and identifier; for later fragments from the first one
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

static __always_inline int ipv4_parse(struct __sk_buff *ctx, struct flow *flow)
{
	const struct iphdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));
	__u32 header, total, fragment;

	if (unlikely(!ip))
		return -DROP_INVALID;
	header = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (unlikely(!total && ctx->gso_segs)) /* larger than the field can say */
		total = ctx->len - ETH_HLEN;
	if (unlikely(ip->version != 4 || header < sizeof(*ip) || total < header || ETH_HLEN + total > ctx->len))
		return -DROP_INVALID;
	flow->saddr.v4 = ip->saddr;
	flow->daddr.v4 = ip->daddr;
	flow->proto = ip->protocol;
	flow->l4_off = ETH_HLEN + header;
	flow->fragment_id = ip->id;
	fragment = bpf_ntohs(ip->frag_off);
	flow->later_fragment = (fragment & IPV4_FRAGMENT_OFFSET) != 0;
	flow->first_fragment = (fragment & (IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS)) == IPV4_MORE_FRAGMENTS;
	return 0;
}

static __always_inline void ipv4_fragment_key(struct ipv4_frag_id *key, const struct flow *flow)
{
	key->daddr = flow->daddr.v4;
	key->saddr = flow->saddr.v4;
	key->id = flow->fragment_id;
	key->proto = flow->proto;
	key->pad = 0;
}

static __always_inline void ipv4_remember_fragment(const struct flow *flow)
{
	struct ipv4_frag_id key __attribute__((aligned(8)));
	struct ipv4_frag_l4ports ports __attribute__((aligned(4))) = {.sport = flow->sport, .dport = flow->dport};

	ipv4_fragment_key(&key, flow);
	bpf_map_update_elem(&cilium_ipv4_frag_datagrams, &key, &ports, BPF_ANY);
}

static __always_inline int ipv4_recall_fragment(struct flow *flow)
{
	struct ipv4_frag_id key __attribute__((aligned(8)));
	const struct ipv4_frag_l4ports *ports;

	if (!config.track_fragments) {
		flow->portless = 1;
		return 0;
	}
	ipv4_fragment_key(&key, flow);
	ports = bpf_map_lookup_elem(&cilium_ipv4_frag_datagrams, &key);
	if (!ports)
		return -DROP_FRAGMENT_NOT_FOUND;
	flow->sport = ports->sport;
	flow->dport = ports->dport;
	if (flow->proto == IPPROTO_ICMP) /* only echo is ever long enough: a request has no dport */
		flow->icmp_type = flow->dport ? ICMP_ECHOREPLY : ICMP_ECHO;
	return 0;
}

/* icmp_ports fills in ports from an ICMP header so that a reply is the request reversed. */
static __always_inline void icmp_ports(struct flow *flow, __u8 type, __be16 id)
{
	flow->icmp_type = type;
	flow->sport = type == ICMP_ECHO ? id : 0;
	flow->dport = type == ICMP_ECHOREPLY ? id : 0;
	flow->icmp_error = type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

static __always_inline int ipv4_load_l4(struct __sk_buff *ctx, struct flow *flow)
{
	const struct icmp_header *icmp;
	const __u8 *tcp;
	const __be16 *ports;

	switch (flow->proto) {
	case IPPROTO_TCP:
		tcp = packet_at(ctx, flow->l4_off, TCP_FLAGS_AT + 1);
		if (!tcp)
			return -DROP_CT_INVALID_HEADER;
		flow->tcp_flags = tcp[TCP_FLAGS_AT];
		ports = (const __be16 *)tcp;
		break;
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		ports = packet_at(ctx, flow->l4_off, 8);
		if (!ports)
			return -DROP_CT_INVALID_HEADER;
		break;
	case IPPROTO_ICMP:
		icmp = packet_at(ctx, flow->l4_off, sizeof(*icmp));
		if (!icmp)
			return -DROP_CT_INVALID_HEADER;
		icmp_ports(flow, icmp->type, icmp->echo_id);
		return 0;
	default:
		return -DROP_CT_UNKNOWN_L4;
	}
	flow->sport = ports[0];
	flow->dport = ports[1];
	return 0;
}

static __always_inline int ipv4_parse_l4(struct __sk_buff *ctx, struct flow *flow)
{
	int ret;

	if (unlikely(flow->later_fragment))
		return ipv4_recall_fragment(flow);
	ret = ipv4_load_l4(ctx, flow);
	if (!ret && unlikely(flow->first_fragment) && config.track_fragments)
		ipv4_remember_fragment(flow);
	return ret;
}

/* ipv4_parse_embedded reads the packet that an ICMP error is about: its header and eight bytes.
 * It returns false when they say nothing about a connection. */
static __always_inline bool ipv4_parse_embedded(struct __sk_buff *ctx, const struct flow *error, struct flow *inner)
{
	__u32 off = error->l4_off + sizeof(struct icmp_header);
	struct iphdr ip;
	__be16 l4[4];

	if (bpf_skb_load_bytes(ctx, off, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return false;
	if (ip.frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET))
		return false;
	if (bpf_skb_load_bytes(ctx, off + ip.ihl * 4, l4, sizeof(l4)))
		return false;
	inner->saddr.v4 = ip.saddr;
	inner->daddr.v4 = ip.daddr;
	inner->proto = ip.protocol;
	inner->sport = l4[0];
	inner->dport = l4[1];
	if (ip.protocol == IPPROTO_ICMP)
		icmp_ports(inner, bpf_ntohs(l4[0]) >> 8, l4[2]);
	/* An error goes to whoever sent the packet it is about, and never answers an error. */
	return ip.saddr == error->daddr.v4 && !inner->icmp_error;
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
