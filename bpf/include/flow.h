/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet reduced to what conntrack and policy ask about; the same for both address families.
 *
 * Addresses lie on the stack, all else in skb->cb, for two reasons.  A tail call keeps cb, so the
 * receiver's program need not parse again.  And the verifier does not follow values through cb: it
 * walks both sides of a branch once, where for a value on the stack it would walk everything that
 * follows once for each combination of earlier branches (with it a load takes 50 ms, without it 5).
 * That is why every access is a fresh one.
 */
#pragma once

#include "base.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* `traits` of a packet. */
#define FLOW_PORTLESS 0x01   /* a later fragment that nobody tracks: only entries without port match */
#define FLOW_ICMP_ERROR 0x02 /* carries the head of the packet it is about */
#define FLOW_REPORT 0x04     /* conntrack: worth a trace event */
#define FLOW_FROM_STACK 0x08 /* conntrack: the connection came through the host's stack */
#define FLOW_VIA_STACK 0x10  /* the packet itself did: it goes on where it is */

struct addresses {
	union address source;
	union address destination;
};

/* The 20 bytes of skb->cb. */
struct flow {
	__u32 sender; /* identity, for the receiver's program */
	__u32 now;    /* second of CLOCK_MONOTONIC: one reading a packet */
	__be16 sport; /* ICMP echo request: its identifier, and 0 in dport; a reply the other way round */
	__be16 dport;
	__u8 proto;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 traits;
	__u8 l4_off;
	__u8 state; /* enum ct_state */
	__u8 reply; /* being looked up as one */
	__u8 unused;
};

/* Members are read and written by their offset in the context: the verifier wants the context's own
 * pointer in every access, and a compiler would rather compute the address of cb once.  It is told how
 * large a value can be that was loaded so, or it would cut it to its size again. */
#define FLOW_AT(field) (offsetof(struct __sk_buff, cb) + offsetof(struct flow, field))
#define FLOW_SIZE(field) sizeof(((struct flow *)0)->field)

#define flow_get(ctx, field)                                                                          \
	({                                                                                            \
		__u64 value;                                                                          \
		if (FLOW_SIZE(field) == 1)                                                            \
			asm volatile("%0 = *(u8 *)(%1 + %2)" : "=r"(value) : "r"(ctx), "i"(FLOW_AT(field)));  \
		else if (FLOW_SIZE(field) == 2)                                                       \
			asm volatile("%0 = *(u16 *)(%1 + %2)" : "=r"(value) : "r"(ctx), "i"(FLOW_AT(field))); \
		else                                                                                  \
			asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(value) : "r"(ctx), "i"(FLOW_AT(field))); \
		__builtin_assume(value <= (typeof(((struct flow *)0)->field))-1); \
		(typeof(((struct flow *)0)->field))value;                                             \
	})

#define flow_set(ctx, field, to)                                                                      \
	({                                                                                            \
		__u64 value = (to);                                                                   \
		if (FLOW_SIZE(field) == 1)                                                            \
			asm volatile("*(u8 *)(%0 + %1) = %2" : : "r"(ctx), "i"(FLOW_AT(field)), "r"(value));  \
		else if (FLOW_SIZE(field) == 2)                                                       \
			asm volatile("*(u16 *)(%0 + %1) = %2" : : "r"(ctx), "i"(FLOW_AT(field)), "r"(value)); \
		else                                                                                  \
			asm volatile("*(u32 *)(%0 + %1) = %2" : : "r"(ctx), "i"(FLOW_AT(field)), "r"(value)); \
	})

static __always_inline void flow_mark(struct __sk_buff *ctx, __u8 trait)
{
	flow_set(ctx, traits, flow_get(ctx, traits) | trait);
}

static __always_inline bool flow_opens_tcp(struct __sk_buff *ctx)
{
	return (flow_get(ctx, tcp_flags) & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}
