# SPDX-License-Identifier: Apache-2.0
"""Garbage collection of conntrack: expired entries go, and all entries of an address that goes.

Responsible for: scanning in batches and deleting chunk by chunk, so that little time passes between
reading an entry and deleting it; and for when the next scan is due.  The programs take an expired entry for
absent already; this gives its room back before the map is full.  The maps are LRU: a full one gives away
the room of what was used least recently, which may be a live connection that is silent at the moment, while
expired ones of many short flows stay.  A flush matters more: the next container with the address must not
inherit connections.
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

# The interval, in seconds, that the first scan's result is applied to.
FIRST_INTERVAL_S = 300.0
SHORTEST_S = 10.0
# Of an empty map a scan takes 2 ms, so it is looked at often enough to be seen filling.
LONGEST_S = 1800.0
# Stretched while the map has much room or a scan finds little to delete, halved while it finds much, …
_ROOMY = 0.25  # of the map
_LITTLE, _MUCH = 0.05, 0.25  # of the entries scanned
# … but never longer than this, once the map is as full as that.
_AT_MOST = ((0.9, SHORTEST_S), (0.75, 60.0), (0.5, FIRST_INTERVAL_S), (_ROOMY, 900.0))

_LIFETIME = struct.Struct(
    f"={CT_ENTRY.offsets['lifetime']}xI{CT_ENTRY.size - CT_ENTRY.offsets['lifetime'] - 4}x"
)


class Scan(NamedTuple):
    """What one scan saw and did, in entries; `capacity` is what the map can hold."""

    scanned: int
    deleted: int
    capacity: int

    @property
    def fill(self) -> float:
        """How full the map was when it was scanned, 0 to 1."""
        return self.scanned / self.capacity

    def __str__(self) -> str:
        return f"{self.deleted} of {self.scanned} connections deleted, the map was {self.fill:.0%} full"


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
    """Return how long to wait after `scan`, given how long the wait before it was.

    What was deleted says how fast entries come and go, the fill level how much room there is for an error.
    """
    share = scan.deleted / scan.scanned if scan.scanned else 0.0
    stretched = scan.fill < _ROOMY or share < _LITTLE
    factor = 1.5 if stretched else 0.5 if share > _MUCH else 1.0
    longest = next((interval for level, interval in _AT_MOST if scan.fill >= level), LONGEST_S)
    return min(max(previous_s * factor, SHORTEST_S), longest)


def _sweep(connections: CtMap, choose: Callable[[bytes, bytes], Iterable[int]]) -> Scan:
    """Delete the entries that `choose` picks (by index) from each chunk of packed keys and values."""
    handle, scanned, deleted = connections.handle, 0, 0
    size = handle.info.key_size
    for keys, values, count in handle.chunks():
        scanned += count
        chosen = [keys[index * size : (index + 1) * size] for index in choose(keys, values)]
        deleted += handle.delete_many(chosen)
    return Scan(scanned, deleted, handle.info.max_entries)
