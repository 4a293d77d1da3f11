/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where packets go once they are judged, and where they end when they are refused. */
#pragma once

#include "events.h"
#include "identity.h"
#include "ipv4.h"
#include "metrics.h"

/* Words of skb->cb that a tail call into policy_ingress carries. */
#define CB_SOURCE 0 /* identity of the sender */
#define CB_NOW 1    /* clock_seconds() */

static __always_inline int drop(struct __sk_buff *ctx, int error, enum direction dir, const struct parties *who)
{
	count(-error, dir, ctx->len);
	notify_drop(ctx, -error, who);
	return TC_ACT_SHOT;
}

/* deliver_local hands a packet to the ingress policy of an endpoint of this host; it returns only when
 * that endpoint has no program. */
static __always_inline int deliver_local(struct __sk_buff *ctx, const struct endpoint_info *to, __u32 source,
					 __u32 now)
{
	__u32 id = to->lxc_id;
	struct ethhdr *eth = packet_at(ctx, 0, sizeof(*eth));

	if (!eth)
		return -DROP_INVALID;
	memcpy(eth->h_dest, &to->mac, ETH_ALEN);
	memcpy(eth->h_source, &to->node_mac, ETH_ALEN);
	ctx->cb[CB_SOURCE] = source;
	ctx->cb[CB_NOW] = now;
	bpf_tail_call(ctx, &cilium_call_policy, id);
	return -DROP_MISSED_TAIL_CALL;
}
