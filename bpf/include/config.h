/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Constants that user space writes before a program is loaded.
 *
 * The section is frozen at load, so the verifier knows every value and removes the branches that they
 * close.  datapath/constants.py holds the same table; the loader compares both through BTF.
 */
#pragma once

#include "base.h"

/* How many packets of a connection are traced. */
enum aggregation {
	AGGREGATE_NONE = 0,    /* every packet, at every point */
	AGGREGATE_LOW = 1,     /* every packet, where it goes: not where it arrives */
	AGGREGATE_MEDIUM = 2,  /* new connections, first sight of a TCP flag, one per interval */
	AGGREGATE_MAXIMUM = 3, /* new connections, first sight of a TCP flag */
};

struct config {
	union address address; /* the endpoint's own */
	union address gateway; /* who answers ARP or neighbour discovery; it is nobody's address */
	__u32 endpoint_id;
	__u32 ifindex; /* of the host-side veth */
	__u32 aggregation;
	__u32 payload_length;	/* bytes of a packet that an event carries, at most EVENT_PAYLOAD */
	__u32 report_interval;	/* s between traces of one connection */
	__u32 timeout_tcp;	/* s, as all timeouts */
	__u32 timeout_any;
	__u32 timeout_tcp_syn;
	__u32 timeout_tcp_fin;
	__u32 tunnel_ifindex; /* of the VXLAN device; 0: other hosts are reached by the stack */
	__u8 host_mac[6]; /* of the host-side veth */
	__u8 coarse_clock; /* bpf_ktime_get_coarse_ns exists (kernel 5.11) */
	__u8 track_fragments;
};

volatile const struct config config SEC(".rodata.config") = {};

/* The endpoint's own identity is no constant: it is known later than the interface, and moves when labels
 * do.  User space writes the word while the programs run, instead of loading them anew. */
#define IDENTITY_SECTION ".data.identity"
