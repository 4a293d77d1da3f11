/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Drop, trace and policy-verdict events: Cilium 1.11's notifications, in our ring buffer.
 *
 * Nothing is built while nobody reads (holdfast_monitor).  A record has room for EVENT_PAYLOAD bytes of
 * the packet; `len_cap` says how many are filled.
 */
#pragma once

#include "config.h"
#include "conntrack_state.h"
#include "flow.h"
#include "maps.h"

#define EVENT_PAYLOAD 128
#define EVENT_VERSION 1

enum event_type {
	EVENT_DROP = 1,
	EVENT_TRACE = 4,
	EVENT_POLICY_VERDICT = 5,
};

enum trace_point {
	TRACE_TO_ENDPOINT = 0,
	TRACE_TO_HOST = 2,
	TRACE_TO_STACK = 3,
	TRACE_TO_OVERLAY = 4,
	TRACE_FROM_ENDPOINT = 5,
	TRACE_FROM_OVERLAY = 9,
	TRACE_FROM_NETWORK = 10,
};

/* Which kind of policy entry decided. */
enum policy_match {
	MATCH_NONE = 0,
	MATCH_L3_ONLY = 1,
	MATCH_L3_L4 = 2,
	MATCH_L4_ONLY = 3,
	MATCH_ALL = 4,
};

/* Who speaks to whom: what drop and trace events say besides their reason. */
struct parties {
	__u32 source;	   /* identity */
	__u32 destination; /* identity */
	__u32 receiver;	   /* endpoint id, 0 when it is none of this host's */
};

struct event_header {
	__u8 type;
	__u8 subtype;
	__u16 source; /* endpoint id */
	__u32 hash;
	__u32 len_orig;
	__u16 len_cap;
	__u16 version;
};

struct drop_event {
	struct event_header header;
	__u32 src_label;
	__u32 dst_label;
	__u32 dst_id;
	__u32 unused;
	__u8 payload[EVENT_PAYLOAD];
};

struct trace_event {
	struct event_header header;
	__u32 src_label;
	__u32 dst_label;
	__u16 dst_id;
	__u8 reason; /* enum ct_state */
	__u8 ipv6 : 1, pad : 7;
	__u32 ifindex;
	union address orig_ip;
	__u8 payload[EVENT_PAYLOAD];
};

struct verdict_event {
	struct event_header header;
	__u32 remote_label;
	__s32 verdict; /* 0 or -(drop reason) */
	__u16 dst_port;
	__u8 proto;
	__u8 flags; /* direction, IPv6 << 2, enum policy_match << 3 */
	__u32 pad;
	__u8 payload[EVENT_PAYLOAD];
};

static __always_inline bool events_wanted(void)
{
	__u32 zero = 0;
	__u32 *readers = bpf_map_lookup_elem(&holdfast_monitor, &zero);

	return unlikely(readers && *readers);
}

static __always_inline void *event_reserve(__u64 size)
{
	__u32 zero = 0;
	void *event = bpf_ringbuf_reserve(&cilium_events, size, 0);
	__u64 *lost;

	if (unlikely(!event)) {
		lost = bpf_map_lookup_elem(&holdfast_events_lost, &zero);
		if (lost)
			*lost += 1;
	}
	return event;
}

/* event_capture copies the packet's first bytes and returns how many. */
static __always_inline __u32 event_capture(struct __sk_buff *ctx, void *payload)
{
	__u32 length = ctx->len;

	if (length > config.payload_length)
		length = config.payload_length;
	opaque(length);
	if (length - 1 >= EVENT_PAYLOAD) /* 0 too: the helper wants at least one byte */
		return 0;
	return bpf_skb_load_bytes(ctx, 0, payload, length) ? 0 : length;
}

static __always_inline void event_head(struct __sk_buff *ctx, struct event_header *header, __u8 type,
				       __u8 subtype, void *payload)
{
	header->type = type;
	header->subtype = subtype;
	header->source = config.endpoint_id;
	header->hash = bpf_get_hash_recalc(ctx);
	header->len_orig = ctx->len;
	header->len_cap = event_capture(ctx, payload);
	header->version = EVENT_VERSION;
}

SEPARATE int emit_drop(struct __sk_buff *ctx, __u32 reason, __u32 source, __u32 destination, __u32 receiver)
{
	struct drop_event *event = event_reserve(sizeof(*event));

	if (!event)
		return 0;
	event_head(ctx, &event->header, EVENT_DROP, reason, event->payload);
	event->src_label = source;
	event->dst_label = destination;
	event->dst_id = receiver;
	event->unused = 0;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

SEPARATE int emit_trace(struct __sk_buff *ctx, __u32 point, __u32 source, __u32 destination, __u32 receiver)
{
	struct trace_event *event = event_reserve(sizeof(*event));

	if (!event)
		return 0;
	event_head(ctx, &event->header, EVENT_TRACE, point, event->payload);
	event->src_label = source;
	event->dst_label = destination;
	event->dst_id = receiver;
	event->reason = flow_get(ctx, state);
	event->ipv6 = IP_VERSION == 6;
	event->pad = 0;
	event->ifindex = point == TRACE_TO_ENDPOINT ? config.ifindex : ctx->ifindex;
	event->orig_ip = (union address){};
	bpf_ringbuf_submit(event, 0);
	return 0;
}

SEPARATE int emit_verdict(struct __sk_buff *ctx, __u32 remote, __u32 direction, int verdict, __u32 match)
{
	struct verdict_event *event = event_reserve(sizeof(*event));

	if (!event)
		return 0;
	event_head(ctx, &event->header, EVENT_POLICY_VERDICT, 0, event->payload);
	event->remote_label = remote;
	event->verdict = verdict;
	event->dst_port = bpf_ntohs(flow_get(ctx, dport));
	event->proto = flow_get(ctx, proto);
	event->flags = direction | (IP_VERSION == 6) << 2 | match << 3;
	event->pad = 0;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

static __always_inline void notify_drop(struct __sk_buff *ctx, __u8 reason, const struct parties *who)
{
	if (events_wanted())
		emit_drop(ctx, reason, who->source, who->destination, who->receiver);
}

/* notify_trace reports a packet at `point`, from AGGREGATE_MEDIUM on only if conntrack found it worth that. */
static __always_inline void notify_trace(struct __sk_buff *ctx, enum trace_point point, const struct parties *who)
{
	if (config.aggregation > AGGREGATE_LOW && !(flow_get(ctx, traits) & FLOW_REPORT))
		return;
	if (events_wanted())
		emit_trace(ctx, point, who->source, who->destination, who->receiver);
}

/* notify_arrival reports a packet before anything is known of it, when every packet is wanted. */
static __always_inline void notify_arrival(struct __sk_buff *ctx, enum trace_point point, const struct parties *who)
{
	if (config.aggregation != AGGREGATE_NONE)
		return;
	flow_set(ctx, state, CT_NEW);
	notify_trace(ctx, point, who);
}

static __always_inline void notify_verdict(struct __sk_buff *ctx, __u32 remote, enum direction dir, int verdict,
					   enum policy_match match)
{
	if (events_wanted())
		emit_verdict(ctx, remote, METRIC_DIRECTION(dir), verdict, match);
}
