// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* For bench.datapath_ns: gives the packet of a test run another source port each time, so that every run is
 * the first packet of a connection, and hands it on to the program under test; or makes a connection's two
 * entries and nothing else. */
#include "config.h"
#include "conntrack_state.h"
#include "maps.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define TTL_AT (ETH_HLEN + 8)
#define PORT_AT (ETH_HLEN + 20)

static __always_inline __be16 next_port(__u8 *frame)
{
	__be16 *port = (__be16 *)(frame + PORT_AT);

	*port = bpf_htons(bpf_ntohs(*port) + 1);
	return *port;
}

SEC("tc")
int next_flow(struct __sk_buff *ctx)
{
	__u8 *frame = packet_at(ctx, 0, PORT_AT + sizeof(__be16));

	if (!frame)
		return TC_ACT_SHOT;
	frame[TTL_AT] = 64; /* the program under test takes one off */
	next_port(frame);
	bpf_tail_call(ctx, &CALL_POLICY, config.endpoint_id);
	return TC_ACT_SHOT;
}

SEC("tc")
int next_entries(struct __sk_buff *ctx)
{
	__u8 *frame = packet_at(ctx, 0, PORT_AT + sizeof(__be16));
	struct ct_tuple key __attribute__((aligned(8))) = {.nexthdr = IPPROTO_TCP};
	struct ct_entry entry = {};

	if (!frame)
		return TC_ACT_SHOT;
	key.sport = next_port(frame);
	if (bpf_map_update_elem(&CT_TCP, &key, &entry, BPF_ANY))
		return TC_ACT_SHOT;
	key.flags = 1;
	return bpf_map_update_elem(&CT_TCP, &key, &entry, BPF_ANY) ? TC_ACT_SHOT : TC_ACT_REDIRECT;
}
