/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What every other header here stands on: kernel types, numbers that user space knows too, and how
 * bytes of a packet are reached.
 *
 * Every object is compiled twice, with IP_VERSION 4 and 6 (Makefile): ipv4.h and ipv6.h define the same
 * names, and nothing else differs.
 *
 * Functions that judge a packet return 0 or more to go on and -(drop reason) to end; the program at the
 * top turns a negative result into counters, an event and TC_ACT_SHOT, in one place.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#ifndef memcpy
#define memcpy(d, s, n) __builtin_memcpy((d), (s), (n))
#endif

/* Keeps the compiler from merging or reordering what the verifier wants to see apart. */
#define opaque(x) asm volatile("" : "+r"(x))

/* Drop reasons: the `reason` of cilium_metrics and the subtype of a drop event. */
enum drop_reason {
	DROP_INVALID_SOURCE = 132,
	DROP_POLICY = 133,
	DROP_INVALID = 134,
	DROP_CT_INVALID_HEADER = 135,
	DROP_FRAGMENTATION_NEEDED = 136,
	DROP_CT_UNKNOWN_L4 = 137,
	DROP_UNSUPPORTED_L3 = 139,
	DROP_MISSED_TAIL_CALL = 140,
	DROP_TUNNEL_KEY = 147,
	DROP_UNROUTABLE = 151,
	DROP_CT_CREATE = 155,
	DROP_INVALID_EXTENSION = 156,
	DROP_UNSUPPORTED_L2 = 166,
	DROP_FRAGMENT_NOT_FOUND = 175,
	DROP_POLICY_DENY = 181,
};
#define REASON_FORWARDED 0

/* Which way a packet goes, seen from the endpoint; also the flag of a conntrack tuple. */
enum direction {
	EGRESS = 0,
	INGRESS = 1,
};

/* The same in cilium_metrics and in policy-verdict events. */
#define METRIC_DIRECTION(dir) ((dir) == EGRESS ? 2 : 1)

/* `family` in keys of maps, how many bits an address has, and how many bytes the least header. */
#if IP_VERSION == 4
#define FAMILY 1
#define ADDRESS_BITS 32
#define L3_HEADER 20
#elif IP_VERSION == 6
#define FAMILY 2
#define ADDRESS_BITS 128
#define L3_HEADER 40
#else
#error "IP_VERSION must be 4 or 6"
#endif

/* Reserved identities that the data path itself needs. */
enum identity {
	IDENTITY_HOST = 1,
	IDENTITY_WORLD = 2,
	IDENTITY_REMOTE_NODE = 6,
};

/* On packets for the stack whose first half never met the host's netfilter: nft must not masquerade
 * them.  Outside the mask 0x0f00 in which Cilium keeps its own marks. */
#define HOLDFAST_MARK_NO_MASQ 0x00080000

/* An IPv4 address lies in the first four bytes, the other twelve are zero; as in the maps. */
union address {
	__be32 v4;
	__be32 words[4];
	__u8 bytes[16];
};

/* Packet pointers are 32-bit fields for C, and a compiler that narrows them to 32 bits loses what the
 * verifier knows of them: so they are loaded as what they are. */
#define CTX_POINTER(ctx, field)                                                                      \
	({                                                                                           \
		void *pointer;                                                                       \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                                \
			     : "=r"(pointer)                                                         \
			     : "r"(ctx), "i"(offsetof(struct __sk_buff, field)));                    \
		pointer;                                                                             \
	})

/* What is read of the longest L4 header; and up to there when nothing unusual comes before it.  No more than
 * that: the kernel's own TCP keeps just its headers outside of page fragments. */
#define L4_HEADER 20
#define HEADERS (ETH_HLEN + L3_HEADER + L4_HEADER)

/* packet_gather brings the first `needed` bytes into reach when they lie in page fragments; before their
 * first packet_at, because it moves the packet. */
static __always_inline void packet_gather(struct __sk_buff *ctx, __u64 needed)
{
	__u64 length = ctx->len;

	if (length > needed)
		length = needed;
	if (unlikely(CTX_POINTER(ctx, data) + length > CTX_POINTER(ctx, data_end)))
		bpf_skb_pull_data(ctx, length);
}

/* packet_at returns `len` bytes at `off` within the headers; NULL when the packet is shorter. */
static __always_inline void *packet_at(struct __sk_buff *ctx, __u32 off, __u32 len)
{
	void *found = CTX_POINTER(ctx, data) + off;

	if (unlikely(found + len > CTX_POINTER(ctx, data_end)))
		return NULL;
	__builtin_assume(found != NULL); /* saves callers another comparison */
	return found;
}

/* copy_mac copies a MAC address by halves of words: each lies at an even place. */
static __always_inline void copy_mac(void *to, const volatile void *from)
{
	for (int i = 0; i < ETH_ALEN / 2; i++)
		((__u16 *)to)[i] = ((const volatile __u16 *)from)[i];
}

/* send_back hands a frame to the endpoint that it came from, past the host's side of the pair: in the first
 * milliseconds of a pair the kernel has not put that side's queue in place, and an answer lost there would
 * be asked for again only after a second. */
static __always_inline int send_back(struct __sk_buff *ctx)
{
	bpf_skb_change_type(ctx, PACKET_HOST); /* the question may have been a broadcast */
	return bpf_redirect_peer(ctx->ifindex, 0);
}

/* A function that the verifier looks at once, and at its callers as if nothing were behind the call; only
 * global ones are treated so.  Arguments are the context and numbers. */
#define SEPARATE __attribute__((noinline))
