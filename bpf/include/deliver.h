/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where packets go once they are judged, and where they end when they are refused. */
#pragma once

#include "events.h"
#include "identity.h"
#include "l3.h"
#include "metrics.h"

static __always_inline int drop(struct __sk_buff *ctx, int error, enum direction dir, const struct parties *who)
{
	count(-error, dir, ctx->len);
	notify_drop(ctx, -error, who);
	return TC_ACT_SHOT;
}

/* judge_ingress hands a packet, and what is known of it in skb->cb, to the ingress policy of an endpoint;
 * it returns only when that endpoint has no program. */
static __always_inline int judge_ingress(struct __sk_buff *ctx, __u32 endpoint_id, __u32 sender)
{
	flow_set(ctx, sender, sender);
	bpf_tail_call(ctx, &CALL_POLICY, endpoint_id);
	return -DROP_MISSED_TAIL_CALL;
}

/* deliver_local sends a packet to an endpoint of this host. */
static __always_inline int deliver_local(struct __sk_buff *ctx, const struct endpoint_info *to, __u32 sender)
{
	struct ethhdr *eth = packet_at(ctx, 0, sizeof(*eth));

	if (!eth)
		return -DROP_INVALID;
	copy_mac(eth->h_dest, &to->mac);
	copy_mac(eth->h_source, &to->node_mac);
	return judge_ingress(ctx, to->lxc_id, sender);
}
