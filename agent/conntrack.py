# SPDX-License-Identifier: Apache-2.0
"""Conntrack of this host: expired entries are collected, those of an address that goes are flushed.

There are two: the programs' maps, and the kernel's own, which translates published ports.

An address may be handed out again; whoever gets it must not inherit the connections of who had it.
"""

from __future__ import annotations

import asyncio
import socket
import time

from loguru import logger

from core import metrics
from core.backoff import jittered
from core.errors import HoldfastError
from datapath import ctgc, layouts
from datapath.hostflows import HostFlows
from datapath.maps import CtMap


class Conntrack:
    """Owner of the collection of the programs' maps: TCP and everything else, of each family.

    `interval` is the time between two collections in seconds; 0 is what `ctgc.next_interval` says.
    """

    def __init__(self, maps: tuple[CtMap, ...], interval: float = 0.0) -> None:
        self._maps = maps
        self._interval = interval

    async def run(self) -> None:
        """Collect for ever, each map in its own time."""
        await asyncio.gather(*(self._follow(each) for each in self._maps))

    async def _follow(self, connections: CtMap) -> None:
        # A pinned map may be full already, and nothing says so before the first scan.
        await asyncio.sleep(jittered(self._interval or ctgc.SHORTEST_S))
        pause = ctgc.FIRST_INTERVAL_S
        while True:
            pause = await self.collect(connections, pause)
            await asyncio.sleep(jittered(pause))

    async def collect(self, connections: CtMap, waited: float) -> float:
        """Delete what has expired in one map; return when to do it again.  `waited` is how long that was."""
        try:
            scan = await asyncio.to_thread(_collected, connections)
        except HoldfastError as error:
            logger.error("conntrack map {} can not be collected: {}", connections.name, error)
            return self._interval or waited
        pause = self._interval or ctgc.next_interval(waited, scan)
        logger.debug("conntrack map {}: {}; next in {:.0f} s", connections.name, scan, pause)
        return pause

    async def flush(self, address: str) -> None:
        """Delete every connection of an address.  Raises DatapathError."""
        for each in self._maps:
            await asyncio.to_thread(ctgc.flush, each, [address])
        async with HostFlows(socket.AF_INET6 if ":" in address else socket.AF_INET) as flows:
            await flows.forget_address(address)


def _collected(connections: CtMap) -> ctgc.Scan:
    """Collect one map, and count it under Cilium's names."""
    family = "ipv6" if connections.handle.info.key_size == layouts.CT6_TUPLE.size else "ipv4"
    protocol = "non-TCP" if "_any" in connections.name else "TCP"
    began, outcome = time.perf_counter(), "uncompleted"
    try:
        scan = ctgc.collect(connections)
        outcome = "completed"
    finally:
        metrics.CONNTRACK_GC_RUNS.labels(family, protocol, outcome).inc()
        metrics.CONNTRACK_GC_SECONDS.labels(family, protocol, outcome).observe(time.perf_counter() - began)
    metrics.CONNTRACK_GC_ENTRIES.labels(family, protocol, "alive").set(scan.scanned - scan.deleted)
    metrics.CONNTRACK_GC_ENTRIES.labels(family, protocol, "deleted").set(scan.deleted)
    return scan
