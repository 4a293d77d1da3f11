/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Keys and values of the maps, byte for byte as Cilium 1.11 has them.
 *
 * datapath/layouts.py holds the same tables; a test compares both through BTF.
 */
#pragma once

#include "base.h"

struct endpoint_key {
	union address ip;
	__u8 family;
	__u8 key;
	__u16 pad5;
} __attribute__((packed));

#define ENDPOINT_IS_HOST 1 /* in `flags`: an address of the host itself */

struct endpoint_info {
	__u32 ifindex;
	__u16 unused;
	__u16 lxc_id;
	__u32 flags;
	__u32 pad_align;
	__u64 mac;	/* of the container's device, in the first six bytes */
	__u64 node_mac; /* of the host-side veth */
	__u32 pad[4];
};

struct ipcache_key {
	__u32 prefixlen;
	__u16 pad1;
	__u8 pad2;
	__u8 family;
	union address ip;
} __attribute__((packed));

#define IPCACHE_STATIC_PREFIX 32 /* bits before `ip` that count towards the prefix */

struct remote_endpoint_info {
	__u32 sec_label;
	__be32 tunnel_endpoint;
	__u8 key;
	__u8 pad[3];
};

struct policy_key {
	__u32 sec_label;
	__be16 dport;
	__u8 protocol;
	__u8 egress : 1, pad : 7;
};

/* pad1 and, as the upper half, pad2 of an entry for all traffic are the second of CLOCK_MONOTONIC from which it
 * counts for nothing, or 0; to Cilium they are padding. */
struct policy_entry {
	__be16 proxy_port;
	__u8 deny : 1, pad : 7;
	__u8 pad0;
	__u16 pad1;
	__u16 pad2;
	__u64 packets;
	__u64 bytes;
};

struct metrics_key {
	__u8 reason;
	__u8 dir : 2, pad : 6;
	__u16 reserved0;
	__u16 reserved1;
	__u16 reserved2;
};

struct metrics_value {
	__u64 count;
	__u64 bytes;
};

#if IP_VERSION == 4
#define ct_tuple ipv4_ct_tuple
#define frag_id ipv4_frag_id
#define frag_l4ports ipv4_frag_l4ports
typedef __be32 ip_address;
typedef __be16 frag_ident;
#define FRAG_PAD 1
#else
#define ct_tuple ipv6_ct_tuple
#define frag_id ipv6_frag_id
#define frag_l4ports ipv6_frag_l4ports
typedef union address ip_address;
typedef __be32 frag_ident;
#define FRAG_PAD 3
#endif

/* Addresses are those of the first packet swapped, ports are as it has them. */
struct ct_tuple {
	ip_address daddr;
	ip_address saddr;
	__be16 dport;
	__be16 sport;
	__u8 nexthdr;
	__u8 flags; /* enum direction, at the endpoint that made the entry */
} __attribute__((packed));

/* rx: packets that came to the endpoint which made the entry; tx: packets it sent. */
struct ct_entry {
	__u64 rx_packets;
	__u64 rx_bytes;
	__u64 tx_packets;
	__u64 tx_bytes;
	__u32 lifetime; /* second of CLOCK_MONOTONIC after which the entry is void */
	__u16 rx_closing : 1, tx_closing : 1, nat46 : 1, lb_loopback : 1, seen_non_syn : 1, node_port : 1,
		proxy_redirect : 1, dsr : 1,
		from_stack : 1, /* the host's stack delivered the packets: replies go back there */
		reserved : 7;
	__be16 rev_nat_index;
	__u16 ifindex;
	__u8 tx_flags_seen;
	__u8 rx_flags_seen;
	__u32 src_sec_id;
	__u32 last_tx_report;
	__u32 last_rx_report;
};

/* A fragmented datagram; Cilium 1.11 has this for IPv4 only. */
struct frag_id {
	ip_address daddr;
	ip_address saddr;
	frag_ident id;
	__u8 proto;
	__u8 pad[FRAG_PAD];
} __attribute__((packed));

struct frag_l4ports {
	__be16 sport;
	__be16 dport;
} __attribute__((packed));
