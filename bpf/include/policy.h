/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Verdicts: conntrack first, then the endpoint's policy map.
 *
 *   REPLY, RELATED      pass, because what they belong to was allowed
 *   ESTABLISHED, NEW    the policy map decides, at every packet: a rule taken back ends connections
 *
 * The map is asked in Cilium 1.11's order (identity and port; port; identity; all) and the first hit
 * decides.  No hit is a denial; a direction without rules carries an entry that allows all.  So does one that
 * an operator has opened, for a time (`holdfast allow-all`).
 */
#pragma once

#include "conntrack.h"
#include "events.h"

/* Stands for the endpoint's own cilium_policy_<id>. */
MAP(cilium_policy, BPF_MAP_TYPE_HASH, struct policy_key, struct policy_entry, 16384, 0);

volatile __u32 own_identity SEC(IDENTITY_SECTION) = 0;

/* policy_port is what stands in the key's port; ICMP has its type there. */
static __always_inline __be16 policy_port(struct __sk_buff *ctx)
{
	return flow_get(ctx, proto) == ICMP_PROTOCOL ? bpf_htons(flow_get(ctx, icmp_type)) : flow_get(ctx, dport);
}

/* policy_ended says whether an entry was written for a time that is over: an operator's order to allow all ends
 * in the kernel, so that it ends with nobody there to end it. */
static __always_inline bool policy_ended(const struct policy_entry *entry)
{
	__u32 until = entry->pad1 | (__u32)entry->pad2 << 16;

	return unlikely(until) && clock_seconds() >= until;
}

static __always_inline struct policy_entry *policy_find(struct __sk_buff *ctx, __u32 remote, enum direction dir,
							enum policy_match *match)
{
	struct policy_key key = {
		.sec_label = remote,
		.dport = policy_port(ctx),
		.protocol = flow_get(ctx, proto),
		.egress = dir == EGRESS,
	};
	struct policy_entry *entry;

	if (likely(!(flow_get(ctx, traits) & FLOW_PORTLESS))) {
		*match = MATCH_L3_L4;
		entry = bpf_map_lookup_elem(&cilium_policy, &key);
		if (entry)
			return entry;
		key.sec_label = 0;
		*match = MATCH_L4_ONLY;
		entry = bpf_map_lookup_elem(&cilium_policy, &key);
		if (entry)
			return entry;
	}
	key.sec_label = remote;
	key.dport = 0;
	key.protocol = 0;
	*match = MATCH_L3_ONLY;
	entry = bpf_map_lookup_elem(&cilium_policy, &key);
	if (entry)
		return entry;
	key.sec_label = 0;
	*match = MATCH_ALL;
	entry = bpf_map_lookup_elem(&cilium_policy, &key);
	return entry && !policy_ended(entry) ? entry : NULL;
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

/* judge_by_policy decides about a packet that is no reply by right; it may turn out to be one after all
 * when an entry was found for its own direction first. */
SEPARATE int judge_by_policy(struct __sk_buff *ctx, __u32 direction, __u32 remote)
{
	enum policy_match match;
	int ret = policy_decide(ctx, remote, direction, &match);

	if (likely(ret == 0)) {
		if (flow_get(ctx, state) == CT_NEW)
			notify_verdict(ctx, remote, direction, 0, match);
		return 0;
	}
	if (flow_get(ctx, state) == CT_ESTABLISHED && ct_is_reply(ctx, direction)) {
		flow_set(ctx, state, CT_REPLY);
		return 0;
	}
	notify_verdict(ctx, remote, direction, ret, match);
	return ret;
}

/* judge says whether a packet may pass in `dir`, and keeps conntrack.  `remote` is the other side's
 * identity. */
static __always_inline int judge(struct __sk_buff *ctx, const struct addresses *ends, enum direction dir, __u32 remote)
{
	struct ct_entry *entry = ct_lookup(ctx, ends, dir);
	int ret;

	if (flow_get(ctx, state) <= CT_ESTABLISHED) {
		ret = judge_by_policy(ctx, dir, remote);
		if (ret < 0)
			return ret;
	}
	if (!entry) {
		flow_mark(ctx, FLOW_REPORT);
		if (flow_get(ctx, traits) & FLOW_ICMP_ERROR) /* begins nothing */
			return 0;
		return ct_create(ctx, dir, dir == EGRESS ? own_identity : remote);
	}
	if (dir == EGRESS)
		flow_mark(ctx, entry->from_stack * FLOW_FROM_STACK);
	else
		entry->from_stack |= flow_get(ctx, traits) / FLOW_VIA_STACK & 1;
	ct_update(ctx, entry, dir);
	return 0;
}
