/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who is the gateway?  Both headers define neighbour_answer and neighbour_pass, which return the verdict on
 * what is about neighbours and 0 for everything else. */
#pragma once

#define NEIGHBOUR_PASSES TC_ACT_PIPE /* TC_ACT_OK is 0 */

#if IP_VERSION == 4
#include "arp.h"
#else
#include "nd.h"
#endif
