/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who an address is: its identity (cilium_ipcache) and, on this host, its endpoint (cilium_lxc). */
#pragma once

#include "maps.h"

static __always_inline __u32 identity_of(const union address *ip, enum family family)
{
	struct ipcache_key key __attribute__((aligned(8))) = {
		.prefixlen = IPCACHE_STATIC_PREFIX + (family == FAMILY_IPV4 ? 32 : 128),
		.family = family,
		.ip = *ip,
	};
	const struct remote_endpoint_info *info = bpf_map_lookup_elem(&cilium_ipcache, &key);

	return info && info->sec_label ? info->sec_label : IDENTITY_WORLD;
}

static __always_inline const struct endpoint_info *endpoint_of(const union address *ip, enum family family)
{
	struct endpoint_key key __attribute__((aligned(8))) = {.ip = *ip, .family = family};

	return bpf_map_lookup_elem(&cilium_lxc, &key);
}
