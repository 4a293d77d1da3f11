/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is IPv4's own: header, fragments, what an ICMP error carries, hop count.
 *
 * Parsing has two steps, because nothing of a packet may be remembered (fragments are) before its source
 * address was checked:
 *
 *   l3_parse        version, lengths, addresses
 *   l3_parse_l4     protocol, ports, TCP flags, ICMP type and identifier; a later fragment has them from
 *                   the first one
 */
#pragma once

#include <linux/ip.h>

#include "base.h"

#define L3_PROTOCOL ETH_P_IP

/* From linux/icmp.h, which needs a C library. */
#define ICMP_PROTOCOL IPPROTO_ICMP
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12

static __always_inline bool icmp_is_error(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

#include "l4.h"

#define IPV4_LONGEST 60
#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_FRAGMENT_OFFSET 0x1fff

static __always_inline int l3_parse(struct __sk_buff *ctx, struct addresses *ends)
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

/* l3_addresses reads what an earlier program has checked. */
static __always_inline int l3_addresses(struct __sk_buff *ctx, struct addresses *ends)
{
	const struct iphdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));

	if (unlikely(!ip))
		return -DROP_INVALID;
	ends->source.v4 = ip->saddr;
	ends->destination.v4 = ip->daddr;
	return 0;
}

static __always_inline int ipv4_parse_fragment(struct __sk_buff *ctx, const struct iphdr *ip, __u32 off,
					       __u32 length, bool later)
{
	struct frag_id key __attribute__((aligned(8))) = {
		.daddr = ip->daddr,
		.saddr = ip->saddr,
		.id = ip->id,
		.proto = ip->protocol,
	};

	return later ? l4_recall(ctx, &key) : l4_load_first(ctx, off, length, &key);
}

static __always_inline int l3_parse_l4(struct __sk_buff *ctx)
{
	const struct iphdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));
	__u32 off, length;

	if (unlikely(!ip))
		return -DROP_INVALID;
	if (unlikely(ip->ihl * 4 > L3_HEADER)) { /* options */
		packet_gather(ctx, ETH_HLEN + IPV4_LONGEST + L4_HEADER);
		ip = packet_at(ctx, ETH_HLEN, sizeof(*ip)); /* anew: gathering moves it */
		if (!ip)
			return -DROP_INVALID;
	}
	off = ETH_HLEN + ip->ihl * 4;
	length = bpf_ntohs(ip->tot_len) - ip->ihl * 4; /* of one larger than its field: wraps, is large */
	flow_set(ctx, proto, ip->protocol);
	flow_set(ctx, tcp_flags, 0);
	flow_set(ctx, traits, 0);
	flow_set(ctx, l4_off, off);
	if (unlikely(ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS)))
		return ipv4_parse_fragment(ctx, ip, off, length, ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET));
	return l4_load(ctx, off, length, ip->protocol);
}

/* l3_embedded reads the packet that an ICMP error is about, from its header and eight bytes; false when
 * they say nothing about a connection. */
static __always_inline bool l3_embedded(struct __sk_buff *ctx, struct embedded *inner)
{
	struct addresses ends;
	__u32 off = flow_get(ctx, l4_off) + sizeof(struct icmp_header);
	struct iphdr ip;

	if (l3_addresses(ctx, &ends) < 0 || bpf_skb_load_bytes(ctx, off, &ip, sizeof(ip)))
		return false;
	if (ip.version != 4 || ip.ihl < 5)
		return false;
	/* An error goes to whoever sent the packet that it is about. */
	if (ip.frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET) || ip.saddr != ends.destination.v4)
		return false;
	inner->ends.source.v4 = ip.saddr;
	inner->ends.destination.v4 = ip.daddr;
	inner->proto = ip.protocol;
	return l4_embedded(ctx, off + ip.ihl * 4, inner);
}

/* l3_key is an address as the keys of conntrack hold it. */
static __always_inline ip_address l3_key(const union address *ip)
{
	return ip->v4;
}

static __always_inline bool l3_equal(const union address *one, const volatile union address *other)
{
	return one->v4 == other->v4;
}

/* l3_unroutable says that a destination must never reach the host's stack from an endpoint: its
 * loopback, which is reachable on these devices (route_localnet) for the sake of published ports. */
static __always_inline bool l3_unroutable(const union address *destination)
{
	return (destination->v4 & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

/* l3_hop takes one off the hop count; false leaves the packet as it is: the stack will tell the sender
 * that its time is exceeded. */
static __always_inline bool l3_hop(struct __sk_buff *ctx)
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
