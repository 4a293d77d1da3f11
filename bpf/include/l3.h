/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The address family that an object is compiled for: both headers define the same l3_… names. */
#pragma once

#if IP_VERSION == 4
#include "ipv4.h"
#else
#include "ipv6.h"
#endif

static __always_inline bool l3_is_ours(const struct __sk_buff *ctx)
{
	return ctx->protocol == bpf_htons(L3_PROTOCOL);
}

/* l3_is_own says whether an address is this endpoint's. */
static __always_inline bool l3_is_own(const union address *ip)
{
	return l3_equal(ip, &config.address);
}
