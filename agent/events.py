# SPDX-License-Identifier: Apache-2.0
"""From the kernel's ring of events to everybody who watches (`holdfast monitor`).

Programs emit events only while somebody listens: the first listener switches them on, the last one off.
"""

from __future__ import annotations

import asyncio
import time

from loguru import logger

from agent.api.models import MonitorEvent
from agent.api.monitor import LOST, MonitorHub
from core import metrics
from core.errors import HoldfastError
from datapath.errors import EventError
from datapath.events import decode, heading
from datapath.format import Described, describe
from datapath.maps import EventsLost, MonitorFlag
from datapath.ring import EventRing

# To decode and filter an event takes 2 µs, to make a line of it 8 (bench.events): the loop gets its turn
# every 10 ms.
AT_ONCE = 1000


class EventPump:
    """Owner of the hub; `attach` gives it the ring once the maps are open."""

    def __init__(self, queue_size: int) -> None:
        self.hub = MonitorHub(queue_size, self._listeners_changed)
        self._ring: EventRing | None = None
        self._flag: MonitorFlag | None = None
        self._counter: EventsLost | None = None
        self._lost = 0

    def attach(self, ring: EventRing, flag: MonitorFlag, lost: EventsLost) -> None:
        """Read this ring from now on; call it in the loop."""
        self._ring, self._flag, self._counter = ring, flag, lost
        self._lost = lost.total()
        asyncio.get_running_loop().add_reader(ring.fd, self._readable)
        self._listeners_changed(self.hub.listeners)

    def detach(self) -> None:
        if self._ring is not None:
            asyncio.get_running_loop().remove_reader(self._ring.fd)

    def _listeners_changed(self, listeners: int) -> None:
        if self._flag is None:
            return
        try:
            self._flag.set(1 if listeners else 0)
        except HoldfastError as error:
            logger.error("events of the data path can not be switched: {}", error)

    def _readable(self) -> None:
        if self._ring is None or self._counter is None:
            return
        publish_records(self._ring.read(AT_ONCE), self.hub)
        lost = self._counter.total()
        if lost > self._lost:
            metrics.EVENTS_LOST.inc(lost - self._lost)
            self.hub.publish(_lost_event(lost - self._lost))
            self._lost = lost


def publish_records(records: list[bytes], hub: MonitorHub) -> None:
    """Read a batch, and decode and say those events that somebody wants."""
    now, unreadable = time.time(), 0
    for record in records:
        try:
            readers = hub.readers(*heading(record))
            if readers:
                hub.hand(_shown(describe(decode(record)), now), readers)
        except EventError:
            unreadable += 1
    if unreadable:
        logger.warning("{} events of the data path could not be read", unreadable)


def _shown(event: Described, now: float) -> MonitorEvent:
    return MonitorEvent(
        time=now,
        type=event.kind,
        summary=event.line,
        source=event.source_endpoint,
        destination=event.destination_endpoint,
        source_identity=event.source_identity,
        destination_identity=event.destination_identity,
        reason=event.reason,
        details=event.details,
    )


def _lost_event(number: int) -> MonitorEvent:
    summary = f"CPU 00: Lost {number} events: the ring was full"
    return MonitorEvent(time=time.time(), type=LOST, summary=summary, details={"lost": number})
