/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Connections: cilium_ct4_global (TCP) and cilium_ct_any4_global (all else), layouts of Cilium 1.11.
 *
 * Each endpoint makes its own entry: OUT where a connection leaves the sender, IN where it arrives at the
 * receiver.  A packet may belong to an entry made for its own direction (ESTABLISHED) or to one made for
 * the other (REPLY).  Both are looked for, likelier first: clients have the higher port.  The order can
 * not change a verdict: a packet that policy denies is still looked up as a reply (policy.h), and a bare
 * SYN is never a reply, so an endpoint cannot open connections from the port it serves on.
 *
 * An entry past its lifetime counts as absent, whether or not user space has collected it.
 */
#pragma once

#include "config.h"
#include "conntrack_state.h"
#include "ipv4.h"

/* TCP flags that are worth a trace event when first seen. */
#define REPORT_FLAGS (TCP_FIN | TCP_SYN | TCP_RST)

static __always_inline __u32 clock_seconds(void)
{
	__u64 now = config.coarse_clock ? bpf_ktime_get_coarse_ns() : bpf_ktime_get_ns();

	return now / 1000000000;
}

static __always_inline void ct_key(struct ipv4_ct_tuple *key, const struct flow *flow, enum direction dir, bool reply)
{
	key->daddr = reply ? flow->daddr.v4 : flow->saddr.v4;
	key->saddr = reply ? flow->saddr.v4 : flow->daddr.v4;
	key->dport = reply ? flow->sport : flow->dport;
	key->sport = reply ? flow->dport : flow->sport;
	key->nexthdr = flow->proto;
	key->flags = dir ^ reply;
}

/* ct_find returns the live entry that was made for `flow` in `dir` or, as a `reply`, for its opposite. */
static __always_inline struct ct_entry *ct_find(const struct flow *flow, enum direction dir, bool reply, __u32 now)
{
	struct ipv4_ct_tuple key __attribute__((aligned(8)));
	struct ct_entry *entry;

	ct_key(&key, flow, dir, reply);
	if (flow->proto == IPPROTO_TCP)
		entry = bpf_map_lookup_elem(&cilium_ct4_global, &key);
	else
		entry = bpf_map_lookup_elem(&cilium_ct_any4_global, &key);
	return entry && entry->lifetime >= now ? entry : NULL;
}

static __always_inline bool ct_related(struct __sk_buff *ctx, const struct flow *error, enum direction dir, __u32 now)
{
	struct flow inner = {};

	if (!ipv4_parse_embedded(ctx, error, &inner))
		return false;
	return ct_find(&inner, !dir, false, now) || ct_find(&inner, !dir, true, now);
}

/* ct_lookup says what a packet is; *found is its entry, NULL for CT_NEW and CT_RELATED. */
static __always_inline enum ct_state ct_lookup(struct __sk_buff *ctx, const struct flow *flow, enum direction dir,
					       __u32 now, struct ct_entry **found)
{
	bool reply = bpf_ntohs(flow->sport) < bpf_ntohs(flow->dport);
	struct ct_entry *entry;

	*found = NULL;
	if (unlikely(flow->icmp_error))
		return ct_related(ctx, flow, dir, now) ? CT_RELATED : CT_NEW;
	if (flow_opens_tcp(flow)) {
		entry = ct_find(flow, dir, false, now);
		if (!entry || entry->rx_closing || entry->tx_closing)
			return CT_NEW;
		*found = entry;
		return CT_ESTABLISHED;
	}
	entry = ct_find(flow, dir, reply, now);
	if (!entry) {
		reply = !reply;
		entry = ct_find(flow, dir, reply, now);
	}
	*found = entry;
	if (!entry)
		return CT_NEW;
	return reply ? CT_REPLY : CT_ESTABLISHED;
}

static __always_inline __u32 ct_timeout(const struct ct_entry *entry, const struct flow *flow)
{
	if (flow->proto != IPPROTO_TCP)
		return config.timeout_any;
	if (entry->rx_closing && entry->tx_closing)
		return config.timeout_tcp_fin;
	return entry->seen_non_syn ? config.timeout_tcp : config.timeout_tcp_syn;
}

/* ct_follow moves the TCP state on.  A reset closes both ways; packets that still come (a forged reset
 * ends nothing) keep the entry alive for the short timeout each. */
static __always_inline void ct_follow(struct ct_entry *entry, const struct flow *flow, enum direction dir)
{
	bool reset = flow->tcp_flags & TCP_RST;

	if (!(flow->tcp_flags & TCP_SYN) && !entry->seen_non_syn)
		entry->seen_non_syn = 1;
	if (likely(!(flow->tcp_flags & (TCP_FIN | TCP_RST))))
		return;
	if (reset || dir == INGRESS)
		entry->rx_closing = 1;
	if (reset || dir == EGRESS)
		entry->tx_closing = 1;
}

/* ct_report decides whether this packet is worth a trace event, and remembers that it was. */
static __always_inline bool ct_report(struct ct_entry *entry, const struct flow *flow, enum direction dir, __u32 now)
{
	__u8 *seen = dir == INGRESS ? &entry->rx_flags_seen : &entry->tx_flags_seen;
	__u32 *last = dir == INGRESS ? &entry->last_rx_report : &entry->last_tx_report;
	__u8 flags = *seen | (flow->tcp_flags & REPORT_FLAGS);

	if (likely(flags == *seen && *last + config.report_interval >= now))
		return false;
	*seen = flags;
	*last = now;
	return true;
}

static __always_inline void ct_account(struct ct_entry *entry, enum direction dir, __u32 bytes)
{
	if (dir == INGRESS) {
		__sync_fetch_and_add(&entry->rx_packets, 1);
		__sync_fetch_and_add(&entry->rx_bytes, bytes);
	} else {
		__sync_fetch_and_add(&entry->tx_packets, 1);
		__sync_fetch_and_add(&entry->tx_bytes, bytes);
	}
}

/* ct_update carries a packet into its entry; true when it is worth a trace event. */
static __always_inline bool ct_update(struct ct_entry *entry, const struct flow *flow, enum direction dir, __u32 now,
				      __u32 bytes)
{
	__u32 lifetime;

	ct_account(entry, dir, bytes);
	ct_follow(entry, flow, dir);
	lifetime = now + ct_timeout(entry, flow);
	if (entry->lifetime != lifetime)
		entry->lifetime = lifetime;
	return ct_report(entry, flow, dir, now);
}

/* ct_create makes the entry of a new connection.  `source`: identity of who opened it. */
static __always_inline int ct_create(const struct flow *flow, enum direction dir, __u32 now, __u32 bytes, __u32 source,
				     bool from_stack)
{
	struct ipv4_ct_tuple key __attribute__((aligned(8)));
	struct ct_entry entry = {.src_sec_id = source, .from_stack = from_stack};
	long failed;

	ct_key(&key, flow, dir, false);
	if (dir == INGRESS) {
		entry.rx_packets = 1;
		entry.rx_bytes = bytes;
	} else {
		entry.tx_packets = 1;
		entry.tx_bytes = bytes;
	}
	ct_follow(&entry, flow, dir);
	ct_report(&entry, flow, dir, now);
	entry.lifetime = now + ct_timeout(&entry, flow);
	if (flow->proto == IPPROTO_TCP)
		failed = bpf_map_update_elem(&cilium_ct4_global, &key, &entry, BPF_ANY);
	else
		failed = bpf_map_update_elem(&cilium_ct_any4_global, &key, &entry, BPF_ANY);
	return failed ? -DROP_CT_CREATE : 0;
}
