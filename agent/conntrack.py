# SPDX-License-Identifier: Apache-2.0
"""Conntrack of this host: expired entries are collected, those of an address that goes are flushed.

There are two: the programs' maps, and the kernel's own, which translates published ports.

An address may be handed out again; whoever gets it must not inherit the connections of who had it.
"""

from __future__ import annotations

import asyncio
import socket

from loguru import logger

from core.backoff import jittered
from core.errors import HoldfastError
from datapath import ctgc
from datapath.hostflows import HostFlows
from datapath.maps import CtMap


class Conntrack:
    """Owner of the collection of both maps (TCP, and everything else)."""

    def __init__(self, maps: tuple[CtMap, ...]) -> None:
        self._maps = maps

    async def run(self) -> None:
        """Collect for ever, each map at intervals that follow what its last scan found."""
        await asyncio.gather(*(self._collect(each) for each in self._maps))

    async def flush(self, address: str) -> None:
        """Delete every connection of an address.  Raises DatapathError."""
        for each in self._maps:
            await asyncio.to_thread(ctgc.flush, each, [address])
        async with HostFlows(socket.AF_INET6 if ":" in address else socket.AF_INET) as flows:
            await flows.forget_address(address)

    async def _collect(self, connections: CtMap) -> None:
        interval = ctgc.FIRST_INTERVAL_S
        while True:
            await asyncio.sleep(jittered(interval))
            try:
                scan = await asyncio.to_thread(ctgc.collect, connections)
            except HoldfastError as error:
                logger.error("conntrack map {} can not be collected: {}", connections.name, error)
                continue
            interval = ctgc.next_interval(interval, scan)
            logger.debug("conntrack map {}: {}; next in {:.0f} s", connections.name, scan, interval)
