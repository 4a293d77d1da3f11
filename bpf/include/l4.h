/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What conntrack and policy ask of the L4 header: ports, TCP flags, ICMP type and identifier.
 *
 * Included by ipv4.h and ipv6.h, which say what ICMP's numbers are.
 *
 * `length` is how many bytes the L3 header says are there, because a frame may be padded with anything.
 */
#pragma once

#include "config.h"
#include "flow.h"
#include "maps.h"

struct icmp_header {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be16 echo_id; /* echo and its reply only */
	__be16 echo_sequence;
};

#define TCP_FLAGS_AT 13 /* the byte of a TCP header that holds FIN to CWR */

/* icmp_ports fills in ports from an ICMP header so that a reply is the request reversed. */
static __always_inline void icmp_ports(__u8 type, __be16 id, __be16 *sport, __be16 *dport)
{
	*sport = type == ICMP_ECHO ? id : 0;
	*dport = type == ICMP_ECHOREPLY ? id : 0;
}

static __always_inline int l4_load_icmp(struct __sk_buff *ctx, __u32 off, __u32 length)
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

static __always_inline int l4_load_ports(struct __sk_buff *ctx, __u32 off, __u32 length, bool tcp)
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

/* l4_load reads the L4 header at `off`. */
static __always_inline int l4_load(struct __sk_buff *ctx, __u32 off, __u32 length, __u8 proto)
{
	switch (proto) {
	case IPPROTO_TCP:
		return l4_load_ports(ctx, off, length, true);
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		return l4_load_ports(ctx, off, length, false);
	case ICMP_PROTOCOL:
		return l4_load_icmp(ctx, off, length);
	default:
		return -DROP_CT_UNKNOWN_L4;
	}
}

/* l4_load_first does the same for the first fragment of a datagram, which later ones are told by. */
static __always_inline int l4_load_first(struct __sk_buff *ctx, __u32 off, __u32 length, const struct frag_id *key)
{
	struct frag_l4ports ports __attribute__((aligned(4)));
	int ret = l4_load(ctx, off, length, key->proto);

	if (ret < 0 || !config.track_fragments)
		return ret;
	ports.sport = flow_get(ctx, sport);
	ports.dport = flow_get(ctx, dport);
	bpf_map_update_elem(&FRAGMENTS, key, &ports, BPF_ANY);
	return 0;
}

/* l4_recall takes for a later fragment what the first one had. */
static __always_inline int l4_recall(struct __sk_buff *ctx, const struct frag_id *key)
{
	const struct frag_l4ports *ports;

	if (!config.track_fragments) {
		flow_set(ctx, sport, 0);
		flow_set(ctx, dport, 0);
		flow_set(ctx, icmp_type, 0);
		flow_set(ctx, traits, FLOW_PORTLESS);
		return 0;
	}
	ports = bpf_map_lookup_elem(&FRAGMENTS, key);
	if (!ports)
		return -DROP_FRAGMENT_NOT_FOUND;
	flow_set(ctx, sport, ports->sport);
	flow_set(ctx, dport, ports->dport);
	/* Of ICMP only echo is ever long enough: a request has no dport. */
	flow_set(ctx, icmp_type, ports->dport ? ICMP_ECHOREPLY : ICMP_ECHO);
	return 0;
}

/* The packet that an ICMP error is about, as far as a connection is known by it. */
struct embedded {
	struct addresses ends;
	__be16 sport;
	__be16 dport;
	__u8 proto;
};

/* l4_embedded reads the first eight bytes of the L4 header inside an ICMP error. */
static __always_inline bool l4_embedded(struct __sk_buff *ctx, __u32 off, struct embedded *inner)
{
	__be16 l4[4];

	if (bpf_skb_load_bytes(ctx, off, l4, sizeof(l4)))
		return false;
	inner->sport = l4[0];
	inner->dport = l4[1];
	if (inner->proto == ICMP_PROTOCOL)
		icmp_ports(bpf_ntohs(l4[0]) >> 8, l4[2], &inner->sport, &inner->dport);
	return true;
}
