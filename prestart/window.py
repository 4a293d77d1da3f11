# SPDX-License-Identifier: Apache-2.0
"""How long the window is, and which moment of it belongs to a host.  Pure functions of numbers.

**Length.**  A host has to keep out of the way of the n - 1 others, and what each of them asks of etcd
grows with the cluster too, so the window must grow, but hosts should not wait in proportion.  A power
law through the two points that the largest known fleet settled on (1 000 nodes: 20 min, 5 000: 60 min)::

    window(n) = 20 min · ((n - 1) / 999) ^ e      e = ln 3 / ln (4999 / 999) = 0.682

is continuous and monotone, is nothing for a host that is alone (n = 1), and seconds for a handful:
11 s for 2, 28 s for 5, 48 s for 10, 4 min for 100, 96 min for 10 000.  Starts per second grow only as
n^0.32: 0.2 with 10 nodes, 0.8 with 1 000, 1.4 with 5 000, 1.7 with 10 000.

**Moment.**  Windows are laid end to end on the wall clock, and a host owns one instant in each: its *slot*.
It starts at the next one.  However the hosts come back (all at once, rack by rack, one after another), no
more than one host starts per slot, so the rate never exceeds the even one; a random delay from each
host's own boot would pile up.  The same rule gives "one start per window" for nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

REFERENCE_NODES = 1_000
REFERENCE_WINDOW_S = 20 * 60.0
SECOND_NODES = 5_000
SECOND_WINDOW_S = 60 * 60.0
SMALLEST_WINDOW_S = 0.001
EXPONENT = math.log(SECOND_WINDOW_S / REFERENCE_WINDOW_S) / math.log(
    (SECOND_NODES - 1) / (REFERENCE_NODES - 1)
)


def window_length(nodes: int) -> float:
    """Return the window in seconds for a cluster of `nodes` hosts (this one included)."""
    others = max(nodes, 1) - 1
    return REFERENCE_WINDOW_S * math.pow(others / (REFERENCE_NODES - 1), EXPONENT)


def slot_fraction(name: str, names: Sequence[str] = ()) -> float:
    """Return where in the window host `name` starts, in [0, 1).

    With the cluster's names it is the host's rank, in the middle of its share: perfectly even.  Without
    them, or when the host is not among them, a hash: even on average.
    """
    unique = set(names)
    if name in unique:
        rank = sum(map(name.__gt__, unique))
        return _middle(rank, len(unique))
    return _mixed(zlib.crc32(name.encode("utf-8", "surrogateescape"))) / 2**32


def slot_fractions(names: Sequence[str]) -> dict[str, float]:
    """Return `slot_fraction` of every host among `names`, sorting once instead of comparing all with all."""
    unique = sorted(set(names))
    return {name: _middle(rank, len(unique)) for rank, name in enumerate(unique)}


def next_slot(moment: float, window: float, fraction: float) -> float:
    """Return the first instant at or after `moment` (unix seconds) that is this host's slot."""
    if window < SMALLEST_WINDOW_S:
        return moment
    offset = fraction * window
    # A moment that is the slot itself but for rounding must not cost a whole window.
    turn = math.ceil((moment - offset) / window - 1e-9)
    return max(moment, offset + turn * window)


def _middle(rank: int, count: int) -> float:
    return (rank + 0.5) / count


def _mixed(value: int) -> int:
    """Spread the bits of a CRC: it is linear, and host names mostly differ in their last digits.

    The finalizer of MurmurHash3 (public domain).  hashlib would cost 3 MB and OpenSSL's start.
    """
    value ^= value >> 16
    value = value * 0x85EBCA6B & 0xFFFFFFFF
    value ^= value >> 13
    value = value * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ value >> 16
