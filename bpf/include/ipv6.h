/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is IPv6's own, in the steps of ipv4.h: header, extension headers, fragments, hop limit.
 *
 * Headers between the IPv6 header and L4 are rare and are read by a function of their own.  A routing
 * header is refused: policy judges the destination in the header, and that would not be the last one.
 */
#pragma once

#include <linux/ipv6.h>

#include "base.h"

#define L3_PROTOCOL ETH_P_IPV6

/* From linux/icmpv6.h and linux/in6.h, which need a C library. */
#define ICMP_PROTOCOL 58
#define ICMP_ECHO 128
#define ICMP_ECHOREPLY 129
#define ICMPV6_FIRST_ERROR 1 /* destination unreachable */
#define ICMPV6_LAST_ERROR 4  /* parameter problem */

static __always_inline bool icmp_is_error(__u8 type)
{
	return type >= ICMPV6_FIRST_ERROR && type <= ICMPV6_LAST_ERROR;
}

#include "l4.h"

/* Extension headers, by the number in the header before. */
#define IPV6_NEXT_HOP_BY_HOP 0
#define IPV6_NEXT_ROUTING 43
#define IPV6_NEXT_FRAGMENT 44
#define IPV6_NEXT_AUTH 51
#define IPV6_NEXT_DESTINATION 60

#define IPV6_FRAGMENT_OFFSET 0xfff8
#define IPV6_MORE_FRAGMENTS 0x0001
#define IPV6_IS_FRAGMENT (IPV6_FRAGMENT_OFFSET | IPV6_MORE_FRAGMENTS)
#define IPV6_BEHIND (ETH_HLEN + sizeof(struct ipv6hdr)) /* where the next header begins */
#define IPV6_EXTENSIONS 4 /* more are refused, as in Cilium */
#define IPV6_L4_FARTHEST 200 /* flow.l4_off has eight bits */

/* The first eight bytes of an extension header; the last two members are a fragment header's. */
struct ipv6_extension {
	__u8 next;
	__u8 length;
	__be16 fragment;
	__be32 id;
};

static __always_inline void ipv6_take(const struct in6_addr *from, union address *to)
{
	memcpy(to, from, sizeof(*to));
}

static __always_inline bool l3_equal(const union address *one, const volatile union address *other)
{
	return !((one->words[0] ^ other->words[0]) | (one->words[1] ^ other->words[1]) |
		 (one->words[2] ^ other->words[2]) | (one->words[3] ^ other->words[3]));
}

/* l3_addresses reads what an earlier program has checked. */
static __always_inline int l3_addresses(struct __sk_buff *ctx, struct addresses *ends)
{
	const struct ipv6hdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));

	if (unlikely(!ip))
		return -DROP_INVALID;
	ipv6_take(&ip->saddr, &ends->source);
	ipv6_take(&ip->daddr, &ends->destination);
	return 0;
}

/* ipv6_payload returns how many bytes the header says follow it; of a packet larger than its field can
 * say, all that there are. */
static __always_inline __u32 ipv6_payload(struct __sk_buff *ctx, const struct ipv6hdr *ip)
{
	__u32 payload = bpf_ntohs(ip->payload_len);

	return unlikely(!payload && ctx->gso_segs) ? ctx->len - IPV6_BEHIND : payload;
}

static __always_inline int l3_parse(struct __sk_buff *ctx, struct addresses *ends)
{
	const struct ipv6hdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));

	if (unlikely(!ip || ip->version != 6 || IPV6_BEHIND + ipv6_payload(ctx, ip) > ctx->len))
		return -DROP_INVALID;
	return l3_addresses(ctx, ends);
}

static __always_inline bool ipv6_is_extension(__u8 header)
{
	return header == IPV6_NEXT_HOP_BY_HOP || header == IPV6_NEXT_DESTINATION || header == IPV6_NEXT_AUTH ||
	       header == IPV6_NEXT_ROUTING || header == IPV6_NEXT_FRAGMENT;
}

/* ipv6_skip passes one extension header, which `head` is the beginning of; -(drop reason) for one that is
 * not to be passed.  What is left of the way is in flow.l4_off and flow.proto. */
static __always_inline int ipv6_skip(struct __sk_buff *ctx, struct ipv6_extension *head)
{
	__u32 off = flow_get(ctx, l4_off);
	__u8 header = flow_get(ctx, proto);
	__u32 units = header == IPV6_NEXT_FRAGMENT ? 0 : head->length;

	if (header == IPV6_NEXT_ROUTING)
		return -DROP_INVALID_EXTENSION;
	off += sizeof(*head) + units * (header == IPV6_NEXT_AUTH ? 4 : 8);
	if (off > IPV6_L4_FARTHEST)
		return -DROP_INVALID_EXTENSION;
	flow_set(ctx, l4_off, off);
	flow_set(ctx, proto, head->next);
	return 0;
}

/* ipv6_load_fragment reads what is behind a fragment header. */
static __always_inline int ipv6_load_fragment(struct __sk_buff *ctx, const struct ipv6_extension *head,
					      __u32 length)
{
	struct frag_id key __attribute__((aligned(8))) = {.id = head->id, .proto = head->next};
	struct addresses ends;

	if (l3_addresses(ctx, &ends) < 0)
		return -DROP_INVALID;
	key.daddr = ends.destination;
	key.saddr = ends.source;
	if (head->fragment & bpf_htons(IPV6_FRAGMENT_OFFSET))
		return l4_recall(ctx, &key);
	return l4_load_first(ctx, flow_get(ctx, l4_off), length, &key);
}

/* ipv6_extended reads a packet that has headers before L4. */
SEPARATE int ipv6_extended(struct __sk_buff *ctx)
{
	const struct ipv6hdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));
	struct ipv6_extension head = {};
	__u32 off, end;
	int ret;

	if (!ip)
		return -DROP_INVALID;
	end = IPV6_BEHIND + ipv6_payload(ctx, ip);
	for (int i = 0; i < IPV6_EXTENSIONS; i++) {
		head.fragment = 0;
		if (!ipv6_is_extension(flow_get(ctx, proto)))
			break;
		if (bpf_skb_load_bytes(ctx, flow_get(ctx, l4_off), &head, sizeof(head)))
			return -DROP_INVALID;
		head.fragment &= flow_get(ctx, proto) == IPV6_NEXT_FRAGMENT ? bpf_htons(IPV6_IS_FRAGMENT) : 0;
		ret = ipv6_skip(ctx, &head);
		if (ret < 0)
			return ret;
		if (head.fragment)
			break;
	}
	off = flow_get(ctx, l4_off);
	if (ipv6_is_extension(flow_get(ctx, proto)))
		return -DROP_INVALID_EXTENSION;
	if (off > end)
		return -DROP_INVALID;
	packet_gather(ctx, off + L4_HEADER);
	if (head.fragment)
		return ipv6_load_fragment(ctx, &head, end - off);
	return l4_load(ctx, off, end - off, flow_get(ctx, proto));
}

static __always_inline int l3_parse_l4(struct __sk_buff *ctx)
{
	const struct ipv6hdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));

	if (unlikely(!ip))
		return -DROP_INVALID;
	flow_set(ctx, proto, ip->nexthdr);
	flow_set(ctx, tcp_flags, 0);
	flow_set(ctx, traits, 0);
	flow_set(ctx, l4_off, IPV6_BEHIND);
	if (likely(ip->nexthdr == IPPROTO_TCP || ip->nexthdr == IPPROTO_UDP || ip->nexthdr == ICMP_PROTOCOL))
		return l4_load(ctx, IPV6_BEHIND, ipv6_payload(ctx, ip), ip->nexthdr);
	return ipv6_extended(ctx);
}

/* l3_embedded reads the packet that an ICMPv6 error is about, as that of ipv4.h does.  It may be a fragment:
 * one that is too big for the way. */
static __always_inline bool l3_embedded(struct __sk_buff *ctx, struct embedded *inner)
{
	struct addresses ends;
	__u32 off = flow_get(ctx, l4_off) + sizeof(struct icmp_header);
	struct ipv6_extension head;
	struct ipv6hdr ip;

	if (l3_addresses(ctx, &ends) < 0 || bpf_skb_load_bytes(ctx, off, &ip, sizeof(ip)))
		return false;
	ipv6_take(&ip.saddr, &inner->ends.source);
	ipv6_take(&ip.daddr, &inner->ends.destination);
	if (ip.version != 6 || !l3_equal(&inner->ends.source, &ends.destination))
		return false;
	off += sizeof(ip);
	inner->proto = ip.nexthdr;
	if (inner->proto == IPV6_NEXT_FRAGMENT) {
		if (bpf_skb_load_bytes(ctx, off, &head, sizeof(head)) ||
		    head.fragment & bpf_htons(IPV6_FRAGMENT_OFFSET))
			return false;
		off += sizeof(head);
		inner->proto = head.next;
	}
	return l4_embedded(ctx, off, inner);
}

/* l3_key is an address as the keys of conntrack hold it. */
static __always_inline ip_address l3_key(const union address *ip)
{
	return *ip;
}

/* l3_unroutable says that a destination must never reach the host's stack from an endpoint: what means
 * something only on the device it was sent by, and what is nobody's on any wire: loopback, none, and IPv4
 * addresses in disguise (::/32; NAT64's 64:ff9b::/96 is behind that). */
static __always_inline bool l3_unroutable(const union address *destination)
{
	return destination->bytes[0] == 0xff || !destination->words[0] ||
	       (destination->words[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* l3_hop takes one off the hop limit, as ipv4_hop does. */
static __always_inline bool l3_hop(struct __sk_buff *ctx)
{
	struct ipv6hdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));

	if (!ip || ip->hop_limit <= 1)
		return false;
	ip->hop_limit--;
	return true;
}
