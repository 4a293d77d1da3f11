// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The program on the host's own devices (tc ingress): where the rest of the world comes in.
 *
 *   wire ──▶ from_netdev ─┬─ for an endpoint of this host ─▶ tail call: its policy_ingress ─▶ its namespace
 *                         └─ all else ─▶ the host's stack, untouched
 *
 * The host must stay reachable: what is not for an endpoint is never dropped here.
 */
#include "conntrack.h"
#include "deliver.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* identity_from_wire never believes that the host itself speaks from outside. */
static __always_inline __u32 identity_from_wire(const union address *ip)
{
	__u32 identity = identity_of(ip);

	return identity == IDENTITY_HOST ? IDENTITY_WORLD : identity;
}

/* enter delivers a packet to the endpoint it is for; TC_ACT_OK leaves it to the stack. */
static __always_inline int enter(struct __sk_buff *ctx, struct parties *who)
{
	struct addresses ends = {};
	const struct endpoint_info *to;
	int ret;

	packet_gather(ctx, HEADERS);
	if (l3_parse(ctx, &ends) < 0)
		return TC_ACT_OK;
	to = endpoint_of(&ends.destination);
	if (!is_workload(to))
		return TC_ACT_OK;
	who->source = identity_from_wire(&ends.source);
	who->receiver = to->lxc_id;
	if (is_workload(endpoint_of(&ends.source)))
		return -DROP_INVALID_SOURCE;
	notify_arrival(ctx, TRACE_FROM_NETWORK, who);
	ret = l3_parse_l4(ctx);
	if (ret < 0)
		return ret;
	if (!l3_hop(ctx))
		return TC_ACT_OK;
	flow_set(ctx, now, clock_seconds());
	return deliver_local(ctx, to, who->source);
}

SEC("tc")
int from_netdev(struct __sk_buff *ctx)
{
	struct parties who = {};
	int ret = TC_ACT_OK;

	/* Tagged frames are met again, untagged, on their VLAN's device; frames for other hosts are seen
	 * only because somebody listens to everything. */
	if (ctx->vlan_present || ctx->pkt_type != PACKET_HOST)
		return TC_ACT_OK;
	if (l3_is_ours(ctx))
		ret = enter(ctx, &who);
	return ret < 0 ? drop(ctx, ret, INGRESS, &who) : ret;
}
