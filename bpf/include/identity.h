/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who an address is: its identity (cilium_ipcache) and, on this host, its endpoint (cilium_lxc). */
#pragma once

#include "maps.h"

/* Who an address is, and behind which host of the tunnel it lives; 0 when it is not reached that way. */
struct peer {
	__u32 identity;
	__be32 host;
};

static __always_inline struct peer peer_of(const union address *ip)
{
	struct ipcache_key key __attribute__((aligned(8))) = {
		.prefixlen = IPCACHE_STATIC_PREFIX + ADDRESS_BITS,
		.family = FAMILY,
		.ip = *ip,
	};
	const struct remote_endpoint_info *info = bpf_map_lookup_elem(&cilium_ipcache, &key);

	return (struct peer){
		.identity = info && info->sec_label ? info->sec_label : IDENTITY_WORLD,
		.host = info ? info->tunnel_endpoint : 0,
	};
}

static __always_inline __u32 identity_of(const union address *ip)
{
	return peer_of(ip).identity;
}

static __always_inline const struct endpoint_info *endpoint_of(const union address *ip)
{
	struct endpoint_key key __attribute__((aligned(8))) = {.ip = *ip, .family = FAMILY};

	return bpf_map_lookup_elem(&cilium_lxc, &key);
}

static __always_inline bool is_workload(const struct endpoint_info *endpoint)
{
	return endpoint && !(endpoint->flags & ENDPOINT_IS_HOST);
}

/* is_forged says that a packet from the stack claims the address of an endpoint of this host, but did not
 * come in by that endpoint's device, where its address was checked: by a bridge, say, or a device that
 * nobody watches.  What an endpoint sends to a published port comes back this way, and is not. */
static __always_inline bool is_forged(struct __sk_buff *ctx, const union address *source)
{
	const struct endpoint_info *claimed = endpoint_of(source);

	return is_workload(claimed) && claimed->ifindex != ctx->ingress_ifindex;
}
