/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who is the gateway?  Both headers define neighbour_answer. */
#pragma once

#if IP_VERSION == 4
#include "arp.h"
#else
#include "nd.h"
#endif
