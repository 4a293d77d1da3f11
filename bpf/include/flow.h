/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet reduced to what conntrack and policy ask about; the same for both address families. */
#pragma once

#include "base.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct flow {
	union address saddr;
	union address daddr;
	__be16 sport; /* ICMP echo request: its identifier, and 0 in dport; a reply the other way round */
	__be16 dport;
	__u16 l4_off;
	__be16 fragment_id;
	__u8 proto;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 later_fragment : 1, /* has no L4 header */
		first_fragment : 1,
		portless : 1,	/* a later fragment that nobody tracks: only entries without port match */
		icmp_error : 1; /* carries the head of the packet it is about */
};

static __always_inline bool flow_opens_tcp(const struct flow *flow)
{
	return (flow->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}
