# SPDX-License-Identifier: Apache-2.0
"""Garbage collection of conntrack: expired entries go, and all entries of an address that goes.

Responsible for: scanning in batches and deleting chunk by chunk, so that little time passes between
reading an entry and deleting it.  The programs take an expired entry for absent already; this gives its
room back.  A flush matters more: the next container with the address must not inherit connections.
Called by: the agent, in a thread; a full map of 524 288 entries takes about half a second.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from datapath.addresses import pack_ip
from datapath.layouts import CT_ENTRY
from datapath.maps import CtMap

# Every that many seconds at first; halved while a scan finds much to delete, stretched while it finds
# little.  The maps are LRU: a late collection costs old connections their entry, not new ones theirs.
FIRST_INTERVAL_S = 300.0
SHORTEST_S = 10.0
LONGEST_S = 43_200.0
_MUCH, _LITTLE = 0.25, 0.05  # of the entries scanned

_LIFETIME = struct.Struct(
    f"={CT_ENTRY.offsets['lifetime']}xI{CT_ENTRY.size - CT_ENTRY.offsets['lifetime'] - 4}x"
)


class Scan(NamedTuple):
    """What one scan saw and did, in entries."""

    scanned: int
    deleted: int

    def __str__(self) -> str:
        return f"{self.deleted} of {self.scanned} connections deleted"


def collect(connections: CtMap, now: float | None = None) -> Scan:
    """Delete entries whose lifetime ended before `now` (s of CLOCK_MONOTONIC).  Raises MapError."""
    moment = int(time.monotonic() if now is None else now)

    def expired(_: bytes, values: bytes) -> Iterable[int]:
        return [index for index, (end,) in enumerate(_LIFETIME.iter_unpack(values)) if end < moment]

    return _sweep(connections, expired)


def flush(connections: CtMap, addresses: Iterable[str]) -> Scan:
    """Delete every entry from or to one of `addresses`.  Raises MapError, OSError for no address."""
    wanted = {pack_ip(address) for address in addresses}
    key_size = connections.handle.info.key_size
    size = (key_size - 6) // 2  # of an address: ports, protocol and flags are six bytes
    ours = {address for address in wanted if len(address) == size}

    def concerned(keys: bytes, _: bytes) -> Iterable[int]:
        if not any(address in keys for address in ours):
            return []  # one search by C over the chunk spares most of them
        starts = range(0, len(keys), key_size)
        return [
            start // key_size
            for start in starts
            if keys[start : start + size] in ours or keys[start + size : start + 2 * size] in ours
        ]

    return _sweep(connections, concerned)


def next_interval(previous_s: float, scan: Scan) -> float:
    """Return how long to wait after `scan`, given how long the wait before it was."""
    share = scan.deleted / scan.scanned if scan.scanned else 0.0
    factor = 0.5 if share > _MUCH else 1.5 if share < _LITTLE else 1.0
    return min(max(previous_s * factor, SHORTEST_S), LONGEST_S)


def _sweep(connections: CtMap, choose: Callable[[bytes, bytes], Iterable[int]]) -> Scan:
    """Delete the entries that `choose` picks (by index) from each chunk of packed keys and values."""
    handle, scanned, deleted = connections.handle, 0, 0
    size = handle.info.key_size
    for keys, values, count in handle.chunks():
        scanned += count
        chosen = [keys[index * size : (index + 1) * size] for index in choose(keys, values)]
        deleted += handle.delete_many(chosen)
    return Scan(scanned, deleted)
