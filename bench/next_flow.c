// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* For bench.datapath_ns: gives the packet of a test run another source port each time, so that every run is
 * the first packet of a connection, and hands it on to the program under test. */
#include "config.h"
#include "maps.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define TTL_AT (ETH_HLEN + 8)
#define PORT_AT (ETH_HLEN + 20)

SEC("tc")
int next_flow(struct __sk_buff *ctx)
{
	__u8 *frame = packet_at(ctx, 0, PORT_AT + sizeof(__be16));
	__be16 *port;

	if (!frame)
		return TC_ACT_SHOT;
	frame[TTL_AT] = 64; /* the program under test takes one off */
	port = (__be16 *)(frame + PORT_AT);
	*port = bpf_htons(bpf_ntohs(*port) + 1);
	bpf_tail_call(ctx, &CALL_POLICY, config.endpoint_id);
	return TC_ACT_SHOT;
}
