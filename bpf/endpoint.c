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
 *              ├─ R is behind the tunnel ▶ the VXLAN device, E's identity in the tunnel's key ─▶ R's host
 *              │                          or, too big for the way there: back to E, saying what is not
 *              └─ anything else ──────▶ the host's stack (routes, netfilter)
 *                                         └─ for an endpoint: R's to_endpoint (tc egress of its veth)
 *                                            tail call: R's policy_ingress, as above
 *                                            but + from_stack, and on its way ─▶ eth0
 *
 * A reply to a connection that came through the stack goes back there (from_stack): a published port is
 * translated there, so its answers must be too.
 */
#include "deliver.h"
#include "neighbour.h"
#include "policy.h"
#include "toobig.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline void parties_ingress(struct parties *who, __u32 remote)
{
	*who = (struct parties){
		.source = remote,
		.destination = own_identity,
		.receiver = config.endpoint_id,
	};
}

/* to_stack leaves a packet to the host. */
static __always_inline int to_stack(struct __sk_buff *ctx, enum trace_point point, const struct parties *who)
{
	if (flow_get(ctx, state) >= CT_REPLY)
		ctx->mark |= HOLDFAST_MARK_NO_MASQ;
	count(REASON_FORWARDED, EGRESS, ctx->len);
	notify_trace(ctx, point, who);
	return TC_ACT_OK;
}

#define TUNNEL_TTL 64 /* of the packets between hosts */

/* encapsulate sends a packet to the host that its destination lives on, which is told who speaks. */
static __always_inline int encapsulate(struct __sk_buff *ctx, __be32 host, const struct parties *who)
{
	struct bpf_tunnel_key key = {
		.tunnel_id = own_identity,
		.remote_ipv4 = bpf_ntohl(host),
		.tunnel_ttl = TUNNEL_TTL,
	};

	__u32 mtu = too_big_for(ctx, host);

	if (unlikely(mtu)) {
		count(DROP_FRAGMENTATION_NEEDED, EGRESS, ctx->len);
		notify_drop(ctx, DROP_FRAGMENTATION_NEEDED, who);
		return answer_too_big(ctx, mtu);
	}
	if (bpf_skb_set_tunnel_key(ctx, &key, sizeof(key), BPF_F_ZERO_CSUM_TX) < 0)
		return -DROP_TUNNEL_KEY;
	count(REASON_FORWARDED, EGRESS, ctx->len);
	notify_trace(ctx, TRACE_TO_OVERLAY, who);
	return bpf_redirect(config.tunnel_ifindex, 0);
}

/* forward sends an allowed packet on its way; `host` is the one behind the tunnel, 0 for none. */
static __always_inline int forward(struct __sk_buff *ctx, const struct addresses *ends, __be32 host,
				   const struct parties *who)
{
	const struct endpoint_info *to = NULL;
	enum trace_point point = TRACE_TO_STACK;

	if (!(flow_get(ctx, traits) & FLOW_FROM_STACK)) {
		to = endpoint_of(&ends->destination);
		if (config.tunnel_ifindex && host && !to)
			return encapsulate(ctx, host, who);
	}
	if (to && to->flags & ENDPOINT_IS_HOST)
		point = TRACE_TO_HOST;
	else if (to && l3_hop(ctx))
		return deliver_local(ctx, to, own_identity);
	return to_stack(ctx, point, who);
}

static __always_inline int egress(struct __sk_buff *ctx, struct parties *who)
{
	struct addresses ends = {};
	int ret = l3_parse(ctx, &ends);
	struct peer peer;

	if (ret < 0)
		return ret;
	if (!l3_is_own(&ends.source))
		return -DROP_INVALID_SOURCE;
	if (l3_unroutable(&ends.destination))
		return -DROP_UNROUTABLE;
	ret = l3_parse_l4(ctx);
	if (ret < 0)
		return ret;
	flow_set(ctx, now, clock_seconds());
	peer = peer_of(&ends.destination);
	who->destination = peer.identity;
	ret = judge(ctx, &ends, EGRESS, peer.identity);
	return ret < 0 ? ret : forward(ctx, &ends, peer.host, who);
}

SEC("tc")
int from_endpoint(struct __sk_buff *ctx)
{
	struct parties who = {.source = own_identity};
	int ret;

	packet_gather(ctx, HEADERS);
	notify_arrival(ctx, TRACE_FROM_ENDPOINT, &who);
	ret = neighbour_answer(ctx);
	if (!ret)
		ret = l3_is_ours(ctx) ? egress(ctx, &who) : -DROP_UNSUPPORTED_L3;
	return ret < 0 ? drop(ctx, ret, EGRESS, &who) : ret;
}

static __always_inline int ingress(struct __sk_buff *ctx, const struct parties *who)
{
	struct addresses ends = {};
	int ret = l3_addresses(ctx, &ends);

	if (ret < 0)
		return ret;
	ret = judge(ctx, &ends, INGRESS, who->source);
	if (ret < 0)
		return ret;
	count(REASON_FORWARDED, INGRESS, ctx->len);
	notify_trace(ctx, TRACE_TO_ENDPOINT, who);
	return 0;
}

SEC("tc")
int policy_ingress(struct __sk_buff *ctx)
{
	struct parties who;
	int ret = -DROP_UNSUPPORTED_L3;

	/* The rest was said of the sender's half. */
	flow_set(ctx, traits, flow_get(ctx, traits) & (FLOW_PORTLESS | FLOW_ICMP_ERROR | FLOW_VIA_STACK));
	parties_ingress(&who, flow_get(ctx, sender));
	if (l3_is_ours(ctx))
		ret = ingress(ctx, &who);
	if (ret < 0)
		return drop(ctx, ret, INGRESS, &who);
	return flow_get(ctx, traits) & FLOW_VIA_STACK ? TC_ACT_OK : bpf_redirect_peer(config.ifindex, 0);
}

static __always_inline int ingress_from_stack(struct __sk_buff *ctx, struct parties *who)
{
	struct addresses ends = {};
	int ret = l3_parse(ctx, &ends);

	if (ret < 0)
		return ret;
	if (is_forged(ctx, &ends.source))
		return -DROP_INVALID_SOURCE;
	ret = l3_parse_l4(ctx);
	if (ret < 0)
		return ret;
	flow_set(ctx, now, clock_seconds());
	flow_mark(ctx, FLOW_VIA_STACK);
	who->source = identity_of(&ends.source);
	return judge_ingress(ctx, config.endpoint_id, who->source);
}

SEC("tc")
int to_endpoint(struct __sk_buff *ctx)
{
	struct parties who;
	int ret;

	packet_gather(ctx, HEADERS);
	ret = neighbour_pass(ctx);
	if (ret)
		return ret == NEIGHBOUR_PASSES ? TC_ACT_OK : ret;
	ret = -DROP_UNSUPPORTED_L3;
	parties_ingress(&who, 0);
	if (l3_is_ours(ctx))
		ret = ingress_from_stack(ctx, &who);
	return drop(ctx, ret, INGRESS, &who);
}
