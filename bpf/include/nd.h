/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Neighbour discovery (RFC 4861), as far as endpoints need it: who is the gateway?  See arp.h. */
#pragma once

#include "l3.h"

#define ND_FIRST 130 /* multicast listener query; up to redirect, all is for one link */
#define ND_LAST 137
#define ND_LISTENER_REPORT 143
#define ND_SOLICITATION 135
#define ND_ADVERTISEMENT 136
#define ND_HOP_LIMIT 255
#define ND_SOURCE_LINK 1
#define ND_TARGET_LINK 2
#define ND_ROUTER_SOLICITED_OVERRIDE 0xe0000000

struct nd_message {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be32 flags;
	union address target;
	__u8 option; /* the link-layer address of who speaks */
	__u8 option_length; /* in units of eight bytes */
	__u8 mac[ETH_ALEN];
} __attribute__((packed));

struct nd_frame {
	struct ethhdr eth;
	struct ipv6hdr ip;
	struct nd_message nd;
} __attribute__((packed));

struct nd_pseudo_header {
	union address source;
	union address destination;
	__be32 length;
	__be32 next;
};

static __always_inline bool nd_asks_for_gateway(const struct nd_frame *frame)
{
	union address target = frame->nd.target;

	return frame->ip.version == 6 && frame->ip.nexthdr == ICMP_PROTOCOL &&
	       frame->ip.hop_limit == ND_HOP_LIMIT && frame->ip.payload_len == bpf_htons(sizeof(struct nd_message)) &&
	       frame->nd.type == ND_SOLICITATION && !frame->nd.code && frame->nd.option == ND_SOURCE_LINK &&
	       frame->nd.option_length == 1 && l3_equal(&target, &config.gateway);
}

static __always_inline __sum16 nd_checksum(struct nd_frame *frame)
{
	struct nd_pseudo_header pseudo = {
		.length = bpf_htonl(sizeof(struct nd_message)),
		.next = bpf_htonl(ICMP_PROTOCOL),
	};
	__u64 sum;

	ipv6_take(&frame->ip.saddr, &pseudo.source);
	ipv6_take(&frame->ip.daddr, &pseudo.destination);
	frame->nd.checksum = 0;
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&frame->nd, sizeof(frame->nd), sum);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* nd_type returns the type of an ICMPv6 message that is for a link alone (neighbour discovery, router
 * discovery, multicast listeners), 0 for everything else.  Listeners' reports come behind a hop-by-hop
 * header. */
static __always_inline __u8 nd_type(struct __sk_buff *ctx)
{
	const struct ipv6hdr *ip = packet_at(ctx, ETH_HLEN, sizeof(*ip));
	__u32 off = IPV6_BEHIND;
	const __u8 *next;
	__u8 proto;

	if (!ip)
		return 0;
	proto = ip->nexthdr;
	if (proto == IPV6_NEXT_HOP_BY_HOP) {
		next = packet_at(ctx, off, sizeof(struct ipv6_extension));
		if (!next || next[1])
			return 0;
		proto = next[0];
		off += sizeof(struct ipv6_extension);
	}
	if (proto != ICMP_PROTOCOL)
		return 0;
	next = packet_at(ctx, off, 1);
	if (!next)
		return 0;
	return (*next >= ND_FIRST && *next <= ND_LAST) || *next == ND_LISTENER_REPORT ? *next : 0;
}

/* neighbour_answer sends a solicitation for the gateway back as the advertisement.  What else is for a link
 * alone ends here, uncounted: there is nobody else on it, and systems say such things by themselves.
 * 0: this is none of it. */
SEPARATE int neighbour_answer(struct __sk_buff *ctx)
{
	union address gateway;
	struct nd_frame *frame;

	if (!nd_type(ctx))
		return 0;
	frame = packet_at(ctx, 0, sizeof(*frame));
	if (!frame || !nd_asks_for_gateway(frame))
		return TC_ACT_SHOT;
	gateway = frame->nd.target;
	memcpy(&frame->ip.daddr, &frame->ip.saddr, sizeof(gateway));
	memcpy(&frame->ip.saddr, &gateway, sizeof(gateway));
	frame->nd.type = ND_ADVERTISEMENT;
	frame->nd.flags = bpf_htonl(ND_ROUTER_SOLICITED_OVERRIDE);
	frame->nd.option = ND_TARGET_LINK;
	copy_mac(frame->eth.h_dest, frame->nd.mac);
	copy_mac(frame->nd.mac, config.host_mac);
	copy_mac(frame->eth.h_source, config.host_mac);
	frame->nd.checksum = nd_checksum(frame);
	return send_back(ctx);
}

/* neighbour_pass says what becomes of a packet for the endpoint that is for a link alone: our answers pass,
 * what the host's kernel says by itself does not.  0: this is none. */
static __always_inline int neighbour_pass(struct __sk_buff *ctx)
{
	struct addresses ends;

	if (!nd_type(ctx))
		return 0;
	if (l3_addresses(ctx, &ends) < 0 || !l3_equal(&ends.source, &config.gateway))
		return TC_ACT_SHOT;
	return NEIGHBOUR_PASSES;
}
