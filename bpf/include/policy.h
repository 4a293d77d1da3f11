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

struct verdict {
	enum ct_state state;
	bool report;	 /* worth a trace event */
	bool from_stack; /* the connection came through the host's stack */
};

/* policy_port is what stands in the key's port: ICMP has its type there, in the upper byte. */
static __always_inline __be16 policy_port(const struct flow *flow)
{
	return flow->proto == IPPROTO_ICMP ? bpf_htons(flow->icmp_type << 8) : flow->dport;
}

static __always_inline struct policy_entry *policy_find(const struct flow *flow, __u32 remote, enum direction dir,
							enum policy_match *match)
{
	struct policy_key key = {.sec_label = remote, .egress = dir == EGRESS};
	struct policy_entry *entry;

	if (likely(!flow->portless)) {
		key.dport = policy_port(flow);
		key.protocol = flow->proto;
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

static __always_inline int policy_decide(const struct flow *flow, __u32 remote, enum direction dir, __u32 bytes,
					 enum policy_match *match)
{
	struct policy_entry *entry = policy_find(flow, remote, dir, match);

	if (!entry) {
		*match = MATCH_NONE;
		return -DROP_POLICY;
	}
	__sync_fetch_and_add(&entry->packets, 1);
	__sync_fetch_and_add(&entry->bytes, bytes);
	return unlikely(entry->deny) ? -DROP_POLICY_DENY : 0;
}

static __always_inline void notify_verdict(struct __sk_buff *ctx, const struct flow *flow, __u32 remote,
					   enum direction dir, int verdict, enum policy_match match)
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
	event->dst_port = bpf_ntohs(flow->dport);
	event->proto = flow->proto;
	event->flags = METRIC_DIRECTION(dir) | match << 3;
	event->pad = 0;
	bpf_ringbuf_submit(event, 0);
}

/* judge_by_policy decides about a packet that is no reply by right; it may turn out to be one after all
 * when an entry was found for its own direction first. */
static __always_inline int judge_by_policy(struct __sk_buff *ctx, const struct flow *flow, enum direction dir,
					   __u32 remote, __u32 now, struct verdict *verdict)
{
	enum policy_match match;
	int ret = policy_decide(flow, remote, dir, ctx->len, &match);

	if (unlikely(ret < 0) && verdict->state == CT_ESTABLISHED && !flow_opens_tcp(flow) &&
	    ct_find(flow, dir, true, now)) {
		verdict->state = CT_REPLY;
		return 0;
	}
	if (unlikely(ret < 0 || verdict->state == CT_NEW))
		notify_verdict(ctx, flow, remote, dir, ret, match);
	return ret;
}

/* judge says whether `flow` may pass in `dir`, and keeps conntrack.  `remote` is the other side's
 * identity, `via_stack` that the host's stack delivered the packet. */
static __always_inline int judge(struct __sk_buff *ctx, const struct flow *flow, enum direction dir, __u32 remote,
				 __u32 now, bool via_stack, struct verdict *verdict)
{
	struct ct_entry *entry;
	int ret;

	verdict->state = ct_lookup(ctx, flow, dir, now, &entry);
	verdict->report = true;
	verdict->from_stack = false;
	if (verdict->state == CT_NEW || verdict->state == CT_ESTABLISHED) {
		ret = judge_by_policy(ctx, flow, dir, remote, now, verdict);
		if (ret < 0)
			return ret;
	}
	if (!entry) {
		if (verdict->state == CT_RELATED || flow->icmp_error)
			return 0;
		return ct_create(flow, dir, now, ctx->len, dir == EGRESS ? config.identity : remote, via_stack);
	}
	if (via_stack && unlikely(!entry->from_stack))
		entry->from_stack = 1;
	verdict->from_stack = entry->from_stack;
	verdict->report = ct_update(entry, flow, dir, now, ctx->len);
	return 0;
}
