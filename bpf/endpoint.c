// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The three programs of one endpoint; E's are shown, R is another endpoint of the same host.
 *
 *   E's namespace                      host                                     R's namespace
 *   eth0 ──▶ veth of E
 *            from_endpoint             (tc ingress)
 *              ARP for the gateway ──▶ answered at once
 *              source address, conntrack OUT, identity of the destination, E's egress policy
 *              ├─ R is local ─────────▶ tail call: R's policy_ingress
 *              │                          conntrack IN, R's ingress policy
 *              │                          bpf_redirect_peer ──────────────────▶ eth0
 *              └─ anything else ──────▶ the host's stack (routes, netfilter)
 *                                         └─ for an endpoint: R's to_endpoint (tc egress of its veth)
 *                                            conntrack IN + from_stack, R's ingress policy ─▶ eth0
 *
 * A reply to a connection that came through the stack goes back there (from_stack): a published port is
 * translated there, so its answers must be too.
 */
#include "arp.h"
#include "deliver.h"
#include "policy.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline void parties_egress(struct parties *who, __u32 remote)
{
	*who = (struct parties){.source = config.identity, .destination = remote};
}

static __always_inline void parties_ingress(struct parties *who, __u32 remote)
{
	*who = (struct parties){
		.source = remote,
		.destination = config.identity,
		.receiver = config.endpoint_id,
	};
}

/* to_stack leaves a packet to the host. */
static __always_inline int to_stack(struct __sk_buff *ctx, enum trace_point point, const struct parties *who,
				    const struct verdict *verdict)
{
	if (verdict->state == CT_REPLY || verdict->state == CT_RELATED)
		ctx->mark |= HOLDFAST_MARK_NO_MASQ;
	count(REASON_FORWARDED, EGRESS, ctx->len);
	notify_trace(ctx, point, who, verdict->state, verdict->report, 0);
	return TC_ACT_OK;
}

/* forward sends an allowed packet on its way. */
static __always_inline int forward(struct __sk_buff *ctx, const struct flow *flow, enum family family, __u32 now,
				   const struct parties *who, const struct verdict *verdict)
{
	const struct endpoint_info *to;

	if (verdict->from_stack)
		return to_stack(ctx, TRACE_TO_STACK, who, verdict);
	to = endpoint_of(&flow->daddr, family);
	if (!to)
		return to_stack(ctx, TRACE_TO_STACK, who, verdict);
	if (to->flags & ENDPOINT_IS_HOST)
		return to_stack(ctx, TRACE_TO_HOST, who, verdict);
	if (!ipv4_hop(ctx))
		return to_stack(ctx, TRACE_TO_STACK, who, verdict);
	return deliver_local(ctx, to, config.identity, now);
}

static __always_inline int egress(struct __sk_buff *ctx, enum family family, struct parties *who)
{
	struct verdict verdict;
	struct flow flow = {};
	__u32 now, remote;
	int ret = ipv4_parse(ctx, &flow);

	if (ret < 0)
		return ret;
	if (flow.saddr.v4 != config.ipv4.v4)
		return -DROP_INVALID_SOURCE;
	if (ipv4_unroutable(&flow.daddr))
		return -DROP_UNROUTABLE;
	ret = ipv4_parse_l4(ctx, &flow);
	if (ret < 0)
		return ret;
	now = clock_seconds();
	remote = identity_of(&flow.daddr, family);
	parties_egress(who, remote);
	ret = judge(ctx, &flow, EGRESS, remote, now, false, &verdict);
	if (ret < 0)
		return ret;
	return forward(ctx, &flow, family, now, who, &verdict);
}

/* ingress judges a packet for this endpoint. */
static __always_inline int ingress(struct __sk_buff *ctx, const struct flow *flow, __u32 remote, __u32 now,
				   bool via_stack, struct parties *who)
{
	struct verdict verdict;
	int ret;

	parties_ingress(who, remote);
	ret = judge(ctx, flow, INGRESS, remote, now, via_stack, &verdict);
	if (ret < 0)
		return ret;
	count(REASON_FORWARDED, INGRESS, ctx->len);
	notify_trace(ctx, TRACE_TO_ENDPOINT, who, verdict.state, verdict.report, config.ifindex);
	return 0;
}

static __always_inline int parse(struct __sk_buff *ctx, struct flow *flow)
{
	int ret = ipv4_parse(ctx, flow);

	return ret < 0 ? ret : ipv4_parse_l4(ctx, flow);
}

SEC("tc")
int from_endpoint(struct __sk_buff *ctx)
{
	struct parties who = {.source = config.identity};
	int ret = -DROP_UNSUPPORTED_L3;

	if (config.aggregation == AGGREGATE_NONE)
		notify_trace(ctx, TRACE_FROM_ENDPOINT, &who, CT_NEW, true, 0);
	if (ctx->protocol == bpf_htons(ETH_P_IP))
		ret = egress(ctx, FAMILY_IPV4, &who);
	else if (ctx->protocol == bpf_htons(ETH_P_ARP))
		ret = arp_answer(ctx);
	return ret < 0 ? drop(ctx, ret, EGRESS, &who) : ret;
}

SEC("tc")
int policy_ingress(struct __sk_buff *ctx)
{
	struct flow flow = {};
	struct parties who;
	__u32 remote = ctx->cb[CB_SOURCE], now = ctx->cb[CB_NOW];
	int ret = -DROP_UNSUPPORTED_L3;

	parties_ingress(&who, remote);
	if (ctx->protocol == bpf_htons(ETH_P_IP))
		ret = parse(ctx, &flow);
	if (ret >= 0)
		ret = ingress(ctx, &flow, remote, now, false, &who);
	return ret < 0 ? drop(ctx, ret, INGRESS, &who) : bpf_redirect_peer(config.ifindex, 0);
}

SEC("tc")
int to_endpoint(struct __sk_buff *ctx)
{
	struct flow flow = {};
	struct parties who;
	int ret = -DROP_UNSUPPORTED_L3;

	if (ctx->protocol == bpf_htons(ETH_P_ARP))
		return TC_ACT_OK;
	parties_ingress(&who, 0);
	if (ctx->protocol == bpf_htons(ETH_P_IP))
		ret = parse(ctx, &flow);
	if (ret >= 0)
		ret = ingress(ctx, &flow, identity_of(&flow.saddr, FAMILY_IPV4), clock_seconds(), true, &who);
	return ret < 0 ? drop(ctx, ret, INGRESS, &who) : TC_ACT_OK;
}
