/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The address family as a parameter: programs say l3_…, constant folding leaves one branch.
 *
 * IPv6 is refused for now; it comes as ipv6.h and a second branch in each function here, and the
 * programs stay as they are.
 */
#pragma once

#include "ipv4.h"

/* l3_parse checks the L3 header and takes the addresses from it. */
static __always_inline int l3_parse(struct __sk_buff *ctx, enum family family, struct addresses *ends)
{
	return family == FAMILY_IPV4 ? ipv4_parse(ctx, ends) : -DROP_UNSUPPORTED_L3;
}

/* l3_parse_l4 takes from the L4 header what conntrack and policy ask about. */
static __always_inline int l3_parse_l4(struct __sk_buff *ctx, enum family family)
{
	return family == FAMILY_IPV4 ? ipv4_parse_l4(ctx) : -DROP_UNSUPPORTED_L3;
}

/* l3_addresses takes the addresses from a header that an earlier program has checked. */
static __always_inline int l3_addresses(struct __sk_buff *ctx, enum family family, struct addresses *ends)
{
	return family == FAMILY_IPV4 ? ipv4_addresses(ctx, ends) : -DROP_UNSUPPORTED_L3;
}

/* l3_is_own says whether an address is this endpoint's. */
static __always_inline bool l3_is_own(const union address *ip, enum family family)
{
	return family == FAMILY_IPV4 && ip->v4 == config.ipv4.v4;
}

static __always_inline bool l3_unroutable(const union address *destination, enum family family)
{
	return family == FAMILY_IPV4 && ipv4_unroutable(destination);
}

/* l3_hop takes one off the hop count; false when none is left to take. */
static __always_inline bool l3_hop(struct __sk_buff *ctx, enum family family)
{
	return family == FAMILY_IPV4 && ipv4_hop(ctx);
}
