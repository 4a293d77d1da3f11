# SPDX-License-Identifier: Apache-2.0
"""The ring of events, read from mapped memory: no system call and no callback a record.

    ring = EventRing.create()
    programs = template.load(constants, {**maps, **ring.descriptors})
    loop.add_reader(ring.fd, lambda: handle(ring.read()))

Responsible for: handing records over in batches, in order, each once.  A record is the bytes of one event;
`datapath.events` knows what is in them.  What finds the ring full is counted by the programs, in
`datapath.maps.EventsLost`.  The ring is unpinned: programs keep it alive, an agent that starts anew loads
its programs on a new one.

Called by: the agent's monitor.  One task reads; the kernel writes.
"""

from __future__ import annotations

import mmap
import struct
from types import TracebackType
from typing import Self

from datapath.handle import MapHandle
from datapath.mapspec import create, events_ring

EVENTS = "cilium_events"
DEFAULT_SIZE = 1 << 20  # bytes: 5 000 events, 25 ms of the fastest reader's work
BATCH = 4096  # records a read hands over at most, so that the loop gets its turn

_HEADER = struct.Struct("=II")  # length and flags, page offset; the kernel's BPF_RINGBUF_HDR_SZ
_BUSY, _DISCARD = 1 << 31, 1 << 30
_LENGTH = _DISCARD - 1


class EventRing:
    """A mapped ring; `close` it or use it as a context manager."""

    def __init__(self, ring: MapHandle) -> None:
        self._ring = ring
        self._size = ring.info.max_entries
        page = mmap.PAGESIZE
        # One writable page with the reader's position; then read-only one page with the writer's, and
        # the data twice in a row, so that no record is cut at the end.
        self._ours = mmap.mmap(ring.fd, page)
        self._kernels = mmap.mmap(ring.fd, page + 2 * self._size, prot=mmap.PROT_READ, offset=page)
        self._read_to = memoryview(self._ours)[:8].cast("Q")
        self._written_to = memoryview(self._kernels)[:8].cast("Q")

    @classmethod
    def create(cls, size: int = DEFAULT_SIZE) -> Self:
        """Make a ring of `size` bytes, a power of two.  Raises MapError."""
        return cls(create(events_ring(size)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close; programs that hold the ring go on writing until it is full."""
        for view in (self._read_to, self._written_to):
            view.release()
        for mapping in (self._ours, self._kernels):
            mapping.close()
        self._ring.close()

    @property
    def fd(self) -> int:
        """Readable for poll and epoll while there are records."""
        return self._ring.fd

    @property
    def descriptors(self) -> dict[str, int]:
        """The map that programs need for events, by the name the loader asks for."""
        return {EVENTS: self._ring.fd}

    def read(self, limit: int = BATCH) -> list[bytes]:
        """Return up to `limit` records and free their room; empty when there are none.

        A record that a CPU is still writing ends the batch: the ones after it keep their order.
        """
        position, end, mask = self._read_to[0], self._written_to[0], self._size - 1
        data, first = self._kernels, mmap.PAGESIZE
        records: list[bytes] = []
        while position < end and len(records) < limit:
            start = first + (position & mask)
            length, _ = _HEADER.unpack_from(data, start)
            if length & _BUSY:
                break
            body = start + _HEADER.size
            discarded, length = length & _DISCARD, length & _LENGTH
            if not discarded:
                records.append(data[body : body + length])
            position += (length + _HEADER.size + 7) & ~7
        self._read_to[0] = position
        return records
