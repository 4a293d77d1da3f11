/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Every map of the programs.  User space makes and pins them (datapath/mapspec.py) and hands descriptors
 * to the loader; sizes here are only the defaults that tools show.  policy.h has the one map more that an
 * endpoint has for itself.
 */
#pragma once

#include "layouts.h"

#define MAP(map_name, map_type, key_type, value_type, entries, flags) \
	struct {                                                      \
		__uint(type, map_type);                               \
		__type(key, key_type);                                \
		__type(value, value_type);                            \
		__uint(max_entries, entries);                         \
		__uint(map_flags, flags);                             \
	} map_name SEC(".maps")

MAP(cilium_lxc, BPF_MAP_TYPE_HASH, struct endpoint_key, struct endpoint_info, 65535, 0);
MAP(cilium_ipcache, BPF_MAP_TYPE_LPM_TRIE, struct ipcache_key, struct remote_endpoint_info, 512000,
    BPF_F_NO_PREALLOC);
MAP(cilium_metrics, BPF_MAP_TYPE_PERCPU_HASH, struct metrics_key, struct metrics_value, 1024, 0);

/* The maps that each family has for itself. */
#if IP_VERSION == 4
#define CT_TCP cilium_ct4_global
#define CT_ANY cilium_ct_any4_global
#define FRAGMENTS cilium_ipv4_frag_datagrams
#define CALL_POLICY cilium_call_policy
#else
#define CT_TCP cilium_ct6_global
#define CT_ANY cilium_ct_any6_global
#define FRAGMENTS cilium_ipv6_frag_datagrams
#define CALL_POLICY holdfast_call_policy6
#endif
MAP(CT_TCP, BPF_MAP_TYPE_LRU_HASH, struct ct_tuple, struct ct_entry, 524288, 0);
MAP(CT_ANY, BPF_MAP_TYPE_LRU_HASH, struct ct_tuple, struct ct_entry, 262144, 0);
MAP(FRAGMENTS, BPF_MAP_TYPE_LRU_HASH, struct frag_id, struct frag_l4ports, 8192, 0);

/* Ingress policy programs by endpoint id: how a local packet reaches its receiver. */
MAP(CALL_POLICY, BPF_MAP_TYPE_PROG_ARRAY, __u32, __u32, 65535, 0);

/* What arrives at another host, from its IP header on, where that is less than this host's devices send. */
MAP(holdfast_path_mtu, BPF_MAP_TYPE_HASH, struct endpoint_key, __u32, 65536, BPF_F_NO_PREALLOC);

/* One word: not 0 while somebody reads events. */
MAP(holdfast_monitor, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1, 0);

/* Events that found the ring full. */
MAP(holdfast_events_lost, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, 1, 0);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} cilium_events SEC(".maps");
