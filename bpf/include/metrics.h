/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* cilium_metrics: packets and bytes by reason and direction, one counter per CPU. */
#pragma once

#include "maps.h"

static __always_inline void count(__u8 reason, enum direction dir, __u32 bytes)
{
	struct metrics_key key = {.reason = reason, .dir = METRIC_DIRECTION(dir)};
	struct metrics_value first = {.count = 1, .bytes = bytes};
	struct metrics_value *value = bpf_map_lookup_elem(&cilium_metrics, &key);

	if (likely(value)) {
		value->count += 1;
		value->bytes += bytes;
	} else {
		bpf_map_update_elem(&cilium_metrics, &key, &first, BPF_ANY);
	}
}
