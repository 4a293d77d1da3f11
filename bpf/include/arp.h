/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The gateway that endpoints route to exists only here: its ARP requests are answered in place. */
#pragma once

#include "config.h"

/* From linux/if_arp.h, which needs a C library. */
#define ARPHRD_ETHER 1
#define ARPOP_REQUEST 1
#define ARPOP_REPLY 2

struct arp_ipv4 {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__be16 operation;
	__u8 sender_mac[ETH_ALEN];
	__u8 sender_ip[4];
	__u8 target_mac[ETH_ALEN];
	__u8 target_ip[4];
} __attribute__((packed));

struct arp_frame {
	struct ethhdr eth;
	struct arp_ipv4 arp;
} __attribute__((packed));

static __always_inline bool arp_asks_for_gateway(const struct arp_ipv4 *arp)
{
	__be32 target;

	memcpy(&target, arp->target_ip, sizeof(target));
	return arp->hardware == bpf_htons(ARPHRD_ETHER) && arp->protocol == bpf_htons(ETH_P_IP) &&
	       arp->hardware_length == ETH_ALEN && arp->protocol_length == sizeof(target) &&
	       arp->operation == bpf_htons(ARPOP_REQUEST) && target == config.gateway.v4;
}

/* neighbour_pass: the host's questions and our answers pass, whichever they are. */
static __always_inline int neighbour_pass(struct __sk_buff *ctx)
{
	return ctx->protocol == bpf_htons(ETH_P_ARP) ? NEIGHBOUR_PASSES : 0;
}

/* neighbour_answer sends a request for the gateway back as its answer; any other is dropped.  0: this is
 * none. */
static __always_inline int neighbour_answer(struct __sk_buff *ctx)
{
	struct arp_frame *frame;
	struct arp_ipv4 *arp;
	__be32 gateway;

	if (ctx->protocol != bpf_htons(ETH_P_ARP))
		return 0;
	frame = packet_at(ctx, 0, sizeof(*frame));
	if (!frame || !arp_asks_for_gateway(&frame->arp))
		return -DROP_UNSUPPORTED_L2;
	arp = &frame->arp;
	gateway = config.gateway.v4;
	arp->operation = bpf_htons(ARPOP_REPLY);
	copy_mac(arp->target_mac, arp->sender_mac);
	memcpy(arp->target_ip, arp->sender_ip, 4);
	copy_mac(arp->sender_mac, config.host_mac);
	memcpy(arp->sender_ip, &gateway, sizeof(gateway));
	copy_mac(frame->eth.h_dest, arp->target_mac);
	copy_mac(frame->eth.h_source, config.host_mac);
	return send_back(ctx);
}
