/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Connections: CT_TCP and CT_ANY (all else), which are cilium_ct4_global, cilium_ct_any4_global and the like
 * for IPv6; layouts of Cilium 1.11.
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
#include "l3.h"

/* TCP flags that are worth a trace event when first seen. */
#define REPORT_FLAGS (TCP_FIN | TCP_SYN | TCP_RST)

static __always_inline __u32 clock_seconds(void)
{
	__u64 now = config.coarse_clock ? bpf_ktime_get_coarse_ns() : bpf_ktime_get_ns();

	return now / 1000000000;
}

/* ct_key makes the tuple of the entry that a packet in `dir` would create. */
static __always_inline void ct_key(struct __sk_buff *ctx, const struct addresses *ends, enum direction dir,
				   struct ct_tuple *key)
{
	key->daddr = l3_key(&ends->source);
	key->saddr = l3_key(&ends->destination);
	key->dport = flow_get(ctx, dport);
	key->sport = flow_get(ctx, sport);
	key->nexthdr = flow_get(ctx, proto);
	key->flags = dir;
}

/* ct_reverse turns a tuple into that of the same connection opened from the other end. */
static __always_inline void ct_reverse(struct ct_tuple *key)
{
	ip_address address = key->daddr;
	__be16 port = key->dport;

	key->daddr = key->saddr;
	key->saddr = address;
	key->dport = key->sport;
	key->sport = port;
	key->flags ^= 1;
}

/* ct_find returns the live entry of a tuple.  Its calls are kept apart because the compiler would make one of
 * them, for either map: the kernel replaces a call by the lookup itself only where it knows the map. */
static __always_inline struct ct_entry *ct_find(struct __sk_buff *ctx, const struct ct_tuple *key, bool tcp)
{
	struct ct_entry *entry;

	if (tcp) {
		entry = bpf_map_lookup_elem(&CT_TCP, key);
		opaque(entry);
	} else {
		entry = bpf_map_lookup_elem(&CT_ANY, key);
	}
	return entry && entry->lifetime >= flow_get(ctx, now) ? entry : NULL;
}

static __always_inline bool is_tcp(struct __sk_buff *ctx)
{
	return flow_get(ctx, proto) == IPPROTO_TCP;
}

/* ct_may_answer: a bare SYN answers nothing, and of the messages of ICMP that are no errors only an echo reply
 * does.  All others have no ports, or the same as another message: who sends one begins something. */
static __always_inline bool ct_may_answer(struct __sk_buff *ctx)
{
	if (unlikely(flow_get(ctx, proto) == ICMP_PROTOCOL))
		return flow_get(ctx, icmp_type) == ICMP_ECHOREPLY;
	return !flow_opens_tcp(ctx);
}

enum related {
	NOT_RELATED = 0,
	RELATED = 1,
	RELATED_FROM_STACK = 2, /* to a connection that came through the host's stack */
};

/* ct_related says whether an ICMP error is about a packet of a connection: one that went the other way. */
SEPARATE int ct_related(struct __sk_buff *ctx, __u32 direction)
{
	struct ct_tuple key __attribute__((aligned(8)));
	struct embedded inner = {};
	const struct ct_entry *entry;

	if (!l3_embedded(ctx, &inner))
		return NOT_RELATED;
	/* An endpoint is no router: it tells of packets that it got itself. */
	if (direction == EGRESS && !l3_is_own(&inner.ends.destination))
		return NOT_RELATED;
	key.daddr = l3_key(&inner.ends.source);
	key.saddr = l3_key(&inner.ends.destination);
	key.dport = inner.dport;
	key.sport = inner.sport;
	key.nexthdr = inner.proto;
	key.flags = direction == EGRESS ? INGRESS : EGRESS;
	entry = ct_find(ctx, &key, key.nexthdr == IPPROTO_TCP);
	if (!entry) {
		ct_reverse(&key);
		entry = ct_find(ctx, &key, key.nexthdr == IPPROTO_TCP);
	}
	if (!entry)
		return NOT_RELATED;
	return entry->from_stack ? RELATED_FROM_STACK : RELATED;
}

static __always_inline void ct_relate(struct __sk_buff *ctx, enum direction dir)
{
	int related = ct_related(ctx, dir);

	if (related == NOT_RELATED)
		return;
	flow_set(ctx, state, CT_RELATED);
	if (related == RELATED_FROM_STACK)
		flow_mark(ctx, FLOW_FROM_STACK);
}

/* ct_reopens says that a bare SYN meets a connection that is closing: it opens a new one. */
static __always_inline bool ct_reopens(struct __sk_buff *ctx, const struct ct_entry *entry)
{
	return flow_opens_tcp(ctx) && (entry->rx_closing || entry->tx_closing);
}

static __always_inline void ct_turn(struct __sk_buff *ctx, struct ct_tuple *key)
{
	ct_reverse(key);
	flow_set(ctx, reply, flow_get(ctx, reply) ^ 1);
}

/* ct_find_either looks a packet up in its own direction and as a reply; flow.reply says which it was. */
static __always_inline struct ct_entry *ct_find_either(struct __sk_buff *ctx, struct ct_tuple *key)
{
	bool may_answer = ct_may_answer(ctx);
	struct ct_entry *entry;

	flow_set(ctx, reply, 0);
	if (may_answer && bpf_ntohs(key->sport) < bpf_ntohs(key->dport))
		ct_turn(ctx, key);
	entry = ct_find(ctx, key, is_tcp(ctx));
	if (entry || !may_answer)
		return entry;
	ct_turn(ctx, key);
	return ct_find(ctx, key, is_tcp(ctx));
}

/* ct_lookup finds out what a packet is (flow.state); it returns its entry, NULL for CT_NEW and
 * CT_RELATED. */
static __always_inline struct ct_entry *ct_lookup(struct __sk_buff *ctx, const struct addresses *ends,
						  enum direction dir)
{
	struct ct_tuple key __attribute__((aligned(8)));
	struct ct_entry *entry;

	flow_set(ctx, state, CT_NEW);
	if (unlikely(flow_get(ctx, traits) & FLOW_ICMP_ERROR)) {
		ct_relate(ctx, dir);
		return NULL;
	}
	ct_key(ctx, ends, dir, &key);
	entry = ct_find_either(ctx, &key);
	if (!entry || ct_reopens(ctx, entry))
		return NULL;
	flow_set(ctx, state, CT_ESTABLISHED + flow_get(ctx, reply));
	return entry;
}

/* ct_is_reply says whether a packet that was found in its own direction is a reply as well. */
static __always_inline bool ct_is_reply(struct __sk_buff *ctx, enum direction dir)
{
	struct ct_tuple key __attribute__((aligned(8)));
	struct addresses ends;

	if (!ct_may_answer(ctx) || l3_addresses(ctx, &ends) < 0)
		return false;
	ct_key(ctx, &ends, dir, &key);
	ct_reverse(&key);
	return ct_find(ctx, &key, is_tcp(ctx));
}

static __always_inline __u32 ct_timeout(struct __sk_buff *ctx, const struct ct_entry *entry)
{
	if (!is_tcp(ctx))
		return config.timeout_any;
	if (entry->rx_closing && entry->tx_closing)
		return config.timeout_tcp_fin;
	return entry->seen_non_syn ? config.timeout_tcp : config.timeout_tcp_syn;
}

/* ct_follow moves the TCP state on.  A reset closes both ways; packets that still come (a forged reset
 * ends nothing) keep the entry alive for the short timeout each.  In arithmetic, not in branches, because
 * each of those is a way more for the verifier. */
static __always_inline void ct_follow(struct __sk_buff *ctx, struct ct_entry *entry, enum direction dir)
{
	__u32 flags = flow_get(ctx, tcp_flags);
	__u32 reset = flags / TCP_RST & 1;
	__u32 ends = (flags / TCP_FIN & 1) | reset;

	entry->seen_non_syn |= ~flags / TCP_SYN & 1;
	entry->rx_closing |= dir == INGRESS ? ends : reset;
	entry->tx_closing |= dir == EGRESS ? ends : reset;
}

/* ct_report decides whether this packet is worth a trace event, and remembers that it was. */
static __always_inline void ct_report(struct __sk_buff *ctx, struct ct_entry *entry, enum direction dir)
{
	__u8 *seen = dir == INGRESS ? &entry->rx_flags_seen : &entry->tx_flags_seen;
	__u32 *last = dir == INGRESS ? &entry->last_rx_report : &entry->last_tx_report;
	__u8 flags = *seen | (flow_get(ctx, tcp_flags) & REPORT_FLAGS);

	if (likely(flags == *seen && (config.aggregation == AGGREGATE_MAXIMUM ||
				      *last + config.report_interval >= flow_get(ctx, now))))
		return;
	*seen = flags;
	*last = flow_get(ctx, now);
	flow_mark(ctx, FLOW_REPORT);
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

/* ct_update carries a packet into its entry. */
static __always_inline void ct_update(struct __sk_buff *ctx, struct ct_entry *entry, enum direction dir)
{
	ct_account(entry, dir, ctx->len);
	ct_follow(ctx, entry, dir);
	entry->lifetime = flow_get(ctx, now) + ct_timeout(ctx, entry);
	ct_report(ctx, entry, dir);
}

static __always_inline void ct_first_packet(struct __sk_buff *ctx, struct ct_entry *entry, __u32 direction)
{
	__u8 flags = flow_get(ctx, tcp_flags) & REPORT_FLAGS;

	if (direction == INGRESS) {
		entry->rx_packets = 1;
		entry->rx_bytes = ctx->len;
		entry->rx_flags_seen = flags;
		entry->last_rx_report = flow_get(ctx, now);
	} else {
		entry->tx_packets = 1;
		entry->tx_bytes = ctx->len;
		entry->tx_flags_seen = flags;
		entry->last_tx_report = flow_get(ctx, now);
	}
}

/* ct_create makes the entry of a new connection.  `opener`: identity of who opened it. */
SEPARATE int ct_create(struct __sk_buff *ctx, __u32 direction, __u32 opener)
{
	struct ct_tuple key __attribute__((aligned(8)));
	struct ct_entry entry = {.src_sec_id = opener};
	struct addresses ends;
	long failed;

	if (l3_addresses(ctx, &ends) < 0)
		return -DROP_INVALID;
	ct_key(ctx, &ends, direction, &key);
	ct_first_packet(ctx, &entry, direction);
	ct_follow(ctx, &entry, direction);
	entry.from_stack = !!(flow_get(ctx, traits) & FLOW_VIA_STACK);
	entry.lifetime = flow_get(ctx, now) + ct_timeout(ctx, &entry);
	if (is_tcp(ctx)) {
		failed = bpf_map_update_elem(&CT_TCP, &key, &entry, BPF_ANY);
		opaque(failed); /* as in ct_find */
	} else {
		failed = bpf_map_update_elem(&CT_ANY, &key, &entry, BPF_ANY);
	}
	return failed ? -DROP_CT_CREATE : 0;
}
