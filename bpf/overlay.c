// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The program on the tunnel device (tc ingress): what other hosts have encapsulated.
 *
 *   VXLAN device ──▶ from_overlay ─┬─ for an endpoint of this host ─▶ tail call: its policy_ingress ─▶ its namespace
 *                                  ├─ for an address of this host ──▶ the stack
 *                                  └─ all else ─────────────────────▶ dropped: nobody has it any more
 *
 * Who speaks is what the sender's host wrote into the tunnel's key: right from the first packet, before this
 * host has learned the address from anywhere.
 */
#include "conntrack.h"
#include "deliver.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* identity_from_key: `host` is the sender's host itself, which is another one to us. */
static __always_inline __u32 identity_from_key(__u32 id)
{
	if (id == IDENTITY_HOST)
		return IDENTITY_REMOTE_NODE;
	return id ? id : IDENTITY_WORLD;
}

/* to_host hands a packet to the stack, which believes what is addressed to the device. */
static __always_inline int to_host(struct __sk_buff *ctx)
{
	bpf_skb_change_type(ctx, PACKET_HOST);
	return TC_ACT_OK;
}

static __always_inline int enter(struct __sk_buff *ctx, struct parties *who)
{
	struct addresses ends = {};
	struct bpf_tunnel_key key = {};
	const struct endpoint_info *to;
	int ret;

	packet_gather(ctx, HEADERS);
	ret = l3_parse(ctx, &ends);
	if (ret < 0)
		return ret;
	if (bpf_skb_get_tunnel_key(ctx, &key, sizeof(key), 0) < 0)
		return -DROP_TUNNEL_KEY;
	who->source = identity_from_key(key.tunnel_id);
	to = endpoint_of(&ends.destination);
	if (!to)
		return -DROP_UNROUTABLE;
	who->receiver = to->lxc_id;
	if (is_workload(endpoint_of(&ends.source)))
		return -DROP_INVALID_SOURCE;
	notify_arrival(ctx, TRACE_FROM_OVERLAY, who);
	if (!is_workload(to))
		return to_host(ctx);
	ret = l3_parse_l4(ctx);
	if (ret < 0)
		return ret;
	if (!l3_hop(ctx))
		return to_host(ctx); /* the stack tells the sender that its time is exceeded */
	flow_set(ctx, now, clock_seconds());
	return deliver_local(ctx, to, who->source);
}

SEC("tc")
int from_overlay(struct __sk_buff *ctx)
{
	struct parties who = {};
	int ret = -DROP_UNSUPPORTED_L3;

	if (l3_is_ours(ctx))
		ret = enter(ctx, &who);
	return ret < 0 ? drop(ctx, ret, INGRESS, &who) : ret;
}
