# SPDX-License-Identifier: Apache-2.0
"""Fan-out of datapath events to any number of readers, none of whom can hold up the agent.

The agent publishes; each listener has a bounded queue of encoded lines.  A listener that does not keep up
loses the oldest lines, is told how many (an event of type ``lost``), and nobody else notices.  While nobody
listens `publish` costs one comparison, and `on_listeners` lets the agent switch the kernel's events off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from agent.api.models import MonitorEvent

LOST = "lost"

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True)
class MonitorFilter:
    """Which events a listener wants; an empty set means all.  `related` is either side."""

    types: frozenset[str] = frozenset()
    source: frozenset[int] = frozenset()
    destination: frozenset[int] = frozenset()
    related: frozenset[int] = frozenset()

    def wants(self, kind: str, source: int, destination: int) -> bool:
        """Tell by an event's type and endpoints.  Everybody is told of a loss: any may have been theirs."""
        if kind == LOST:
            return True
        return (
            (not self.types or kind in self.types)
            and (not self.source or source in self.source)
            and (not self.destination or destination in self.destination)
            and (not self.related or source in self.related or destination in self.related)
        )


@dataclass(eq=False)
class Listener:
    """One reader's queue.  Owner: the hub fills it, the one handler that asked for it empties it."""

    filter: MonitorFilter
    limit: int
    lost: int = 0
    _lines: deque[bytes] = field(default_factory=deque)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, line: bytes) -> bool:
        """Queue one line; False when the oldest had to go for it."""
        kept = len(self._lines) < self.limit
        if not kept:
            self._lines.popleft()
            self.lost += 1
        self._lines.append(line)
        self._ready.set()
        return kept

    async def take(self) -> bytes:
        """Wait for lines and return all that are queued, first of all how many were lost."""
        await self._ready.wait()
        self._ready.clear()
        lost, self.lost = self.lost, 0
        lines = list(self._lines)
        self._lines.clear()
        if lost:
            lines.insert(0, _lost_line(lost))
        return b"".join(lines)

    def close(self) -> None:
        """Wake the reader up: the hub is going away."""
        self._ready.set()


def _lost_line(number: int) -> bytes:
    summary = f"CPU 00: Lost {number} events: this reader is too slow"
    event = MonitorEvent(time=time.time(), type=LOST, summary=summary, details={"lost": number})
    return _encoder.encode(event) + b"\n"


class MonitorHub:
    """Takes events from the agent's loop and hands them to the listeners of that moment."""

    def __init__(self, queue_size: int, on_listeners: Callable[[int], None] = lambda _: None) -> None:
        self.queue_size = queue_size  # events a listener may fall behind
        self.seen = 0
        self.lost = 0
        self.closed = False
        self._listeners: set[Listener] = set()
        self._on_listeners = on_listeners  # called with the number of listeners whenever it changes

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def readers(self, kind: str, source: int, destination: int) -> list[Listener]:
        """Return who wants such an event, so that nobody says what nobody reads; the event counts as seen."""
        self.seen += bool(self._listeners)
        return [each for each in self._listeners if each.filter.wants(kind, source, destination)]

    def hand(self, event: MonitorEvent, readers: Sequence[Listener]) -> None:
        """Give one event to these.  Call from the loop; never blocks, never raises."""
        line = _encoder.encode(event) + b"\n"
        for listener in readers:
            self.lost += not listener.offer(line)

    def publish(self, event: MonitorEvent) -> None:
        """Hand one event to everybody who wants it."""
        readers = self.readers(event.type, event.source, event.destination)
        if readers:
            self.hand(event, readers)

    @contextlib.contextmanager
    def listen(self, wanted: MonitorFilter) -> Iterator[Listener]:
        """Register a listener for the length of the block."""
        listener = Listener(wanted, self.queue_size)
        self._listeners.add(listener)
        self._on_listeners(len(self._listeners))
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            self._on_listeners(len(self._listeners))

    def close(self) -> None:
        """End every stream: the API is shutting down."""
        self.closed = True
        for listener in self._listeners:
            listener.close()
