/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Verdicts: conntrack first, then the endpoint's policy map.
 *
 *   REPLY, RELATED      pass, because what they belong to was allowed
 *   ESTABLISHED, NEW    the policy map decides, at every packet: a rule taken back ends connections
 *
 * The map is asked in Cilium 1.11's order (identity and port; port; identity; all) and the first hit
 * decides.  No hit is a denial; a direction without rules carries an entry that allows all.
 */
#pragma once

#include "conntrack.h"
#include "events.h"

/* policy_port is what stands in the key's port: ICMP has its type there, in the upper byte. */
static __always_inline __be16 policy_port(struct __sk_buff *ctx)
{
	return flow_get(ctx, proto) == IPPROTO_ICMP ? bpf_htons(flow_get(ctx, icmp_type) << 8) : flow_get(ctx, dport);
}

static __always_inline struct policy_entry *policy_find(struct __sk_buff *ctx, __u32 remote, enum direction dir,
							enum policy_match *match)
{
	struct policy_key key = {.sec_label = remote, .egress = dir == EGRESS};
	struct policy_entry *entry;

	if (likely(!(flow_get(ctx, traits) & FLOW_PORTLESS))) {
		key.dport = policy_port(ctx);
		key.protocol = flow_get(ctx, proto);
		*match = MATCH_L3_L4;
		entry = bpf_map_lookup_elem(&cilium_policy, &key);
		if (entry)
			return entry;
		key.sec_label = 0;
		*match = MATCH_L4_ONLY;
		entry = bpf_map_lookup_elem(&cilium_policy, &key);
		if (entry)
			return entry;
		key.sec_label = remote;
		key.dport = 0;
		key.protocol = 0;
	}
	*match = MATCH_L3_ONLY;
	entry = bpf_map_lookup_elem(&cilium_policy, &key);
	if (entry)
		return entry;
	key.sec_label = 0;
	*match = MATCH_ALL;
	return bpf_map_lookup_elem(&cilium_policy, &key);
}

static __always_inline int policy_decide(struct __sk_buff *ctx, __u32 remote, enum direction dir,
					 enum policy_match *match)
{
	struct policy_entry *entry = policy_find(ctx, remote, dir, match);

	if (!entry) {
		*match = MATCH_NONE;
		return -DROP_POLICY;
	}
	__sync_fetch_and_add(&entry->packets, 1);
	__sync_fetch_and_add(&entry->bytes, ctx->len);
	return unlikely(entry->deny) ? -DROP_POLICY_DENY : 0;
}

static __always_inline void notify_verdict(struct __sk_buff *ctx, __u32 remote, enum direction dir, int verdict,
					   enum policy_match match)
{
	struct verdict_event *event;

	if (!events_wanted())
		return;
	event = event_reserve(sizeof(*event));
	if (!event)
		return;
	event_head(ctx, &event->header, EVENT_POLICY_VERDICT, 0, event->payload);
	event->remote_label = remote;
	event->verdict = verdict;
	event->dst_port = bpf_ntohs(flow_get(ctx, dport));
	event->proto = flow_get(ctx, proto);
	event->flags = METRIC_DIRECTION(dir) | match << 3;
	event->pad = 0;
	bpf_ringbuf_submit(event, 0);
}

/* judge_by_policy decides about a packet that is no reply by right; it may turn out to be one after all
 * when an entry was found for its own direction first. */
static __always_inline int judge_by_policy(struct __sk_buff *ctx, const struct addresses *ends, enum direction dir,
					   __u32 remote)
{
	enum policy_match match;
	int ret = policy_decide(ctx, remote, dir, &match);

	if (unlikely(ret < 0) && flow_get(ctx, state) == CT_ESTABLISHED && ct_is_reply(ctx, ends, dir)) {
		flow_set(ctx, state, CT_REPLY);
		return 0;
	}
	if (unlikely(ret < 0 || flow_get(ctx, state) == CT_NEW))
		notify_verdict(ctx, remote, dir, ret, match);
	return ret;
}

/* judge says whether a packet may pass in `dir`, and keeps conntrack.  `remote` is the other side's
 * identity, `via_stack` that the host's stack delivered the packet. */
static __always_inline int judge(struct __sk_buff *ctx, const struct addresses *ends, enum direction dir, __u32 remote,
				 bool via_stack)
{
	struct ct_entry *entry = ct_lookup(ctx, ends, dir);
	int ret;

	if (flow_get(ctx, state) <= CT_ESTABLISHED) {
		ret = judge_by_policy(ctx, ends, dir, remote);
		if (ret < 0)
			return ret;
	}
	if (!entry) {
		flow_mark(ctx, FLOW_REPORT);
		if (flow_get(ctx, traits) & FLOW_ICMP_ERROR) /* begins nothing */
			return 0;
		return ct_create(ctx, ends, dir, dir == EGRESS ? config.identity : remote, via_stack);
	}
	if (via_stack && unlikely(!entry->from_stack))
		entry->from_stack = 1;
	if (dir == EGRESS && entry->from_stack)
		flow_mark(ctx, FLOW_FROM_STACK);
	ct_update(ctx, entry, dir);
	return 0;
}
