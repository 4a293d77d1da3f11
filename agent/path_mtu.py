# SPDX-License-Identifier: Apache-2.0
"""What arrives at other hosts: finds networks that lose large packets in silence, and says what passes.

    agent.health (who answered) ──▶ PathProber ──▶ table ──▶ holdfast_path_mtu: endpoints are told
                                                         ──▶ node routes: the host's own packets

The MTU of a device says what leaves a host.  A network between hosts that carries less should say so by ICMP,
and often does not: small packets pass, connections open, and every bulk transfer stands still.  So each node
that answers is sent a packet as long as the device allows, once a period.  Only where small ones arrive and
that one does not, several times in turn, is the longest that does searched for; it is written where it is
less than the device's and never above it, and goes when the full length arrives again.  A node that does not
answer changes nothing.  This is one way: what comes back is the other host's to find out.

Run as a supervised task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from loguru import logger

from agent.probes import arrives, hello
from core.table import Table
from datapath.tunnel import OVERHEAD

PathMtus = Table[str, int]  # another host's address → bytes, from the IP header on; full length: no entry
SOURCE = "probes"

# IPv6 wants every path to carry this; a path that does not is not taken for one.
LEAST = 1280
# The longest packet that is tried: of longer ones (InfiniBand, loopback) nothing is said.
LONGEST = 9216
# Each is sent by the kernel four times or so before it counts as lost (agent.probes).
TRIES = 3
IN_FLIGHT_MAX = 32


def new_table() -> PathMtus:
    return Table("path-mtu", (SOURCE,))


def carried_inside(path_mtu: int, version: int) -> int:
    """Return what a path carries within the tunnel.  IPv6 believes in no less than 1280."""
    return max(path_mtu - OVERHEAD, LEAST if version == 6 else 0)


# True when a packet of that many bytes arrives.
Fits = Callable[[int], Awaitable[bool]]


async def measure(fits: Fits, small: Callable[[], Awaitable[bool]], full: int, known: int) -> int:
    """Return how long a packet may be, `full` at most; 0 when nothing can be said.

    `known` is what was found before, 0 for nothing.  `small` asks whether the node answers at all: without
    that, a packet that is lost says nothing.
    """
    if await fits(full):
        return full
    if known and await _still(fits, full, known):
        return known
    for attempt in range(TRIES):
        if not await small() or (attempt and await fits(full)):
            return 0
    if not await fits(LEAST):
        return 0
    low, high = LEAST, full  # `low` arrives, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        if await fits(middle):
            low = middle
        elif await small():
            high = middle
        else:
            return 0
    return low


async def _still(fits: Fits, full: int, known: int) -> bool:
    """True when what was found is as it was: that length arrives, one byte more does not."""
    if known >= full:
        return False
    here, beyond = await asyncio.gather(fits(known), fits(known + 1))
    return here and not beyond


class PathProber:
    """Owner of the table's source.  `restored` is what the kernel's map has of a former life."""

    def __init__(self, table: PathMtus, *, port: int, full: int, restored: Iterable[tuple[str, int]]) -> None:
        self.full = full  # bytes that this host's devices send
        self.found: dict[str, int] = {}  # address → bytes, of what was measured in this life
        self.names: dict[str, str] = {}  # address → node
        self._addresses: dict[str, set[str]] = {}  # node → where it has answered
        self._port = port
        self._source = table.source(SOURCE)
        self._source.upsert_many([(ip, mtu) for ip, mtu in restored if LEAST <= mtu < full])
        self._due: asyncio.Queue[str] = asyncio.Queue()
        self._under_way: set[str] = set()
        self._slots = asyncio.Semaphore(IN_FLIGHT_MAX)

    @property
    def lowered(self) -> dict[str, int]:
        """Return address → bytes, of paths that carry less than this host's devices send."""
        return dict(self._source.entries())

    def answered(self, node: str, ips: Iterable[str]) -> None:
        """Measure the way to a node that has just answered at these addresses, unless that is under way."""
        for ip in ips:
            self.names[ip] = node
            self._addresses.setdefault(node, set()).add(ip)
            if ip not in self._under_way and LEAST < self.full <= LONGEST:
                self._under_way.add(ip)
                self._due.put_nowait(ip)

    def forget(self, node: str) -> None:
        """A node left, or moved to other addresses."""
        for ip in self._addresses.pop(node, ()):
            if self.names.get(ip) == node:  # not another's by now
                del self.names[ip]
                self.found.pop(ip, None)
                self._source.delete(ip)

    def keep_only(self, ips: set[str]) -> None:
        """All nodes are known: what a former life found of others goes."""
        for ip in self.lowered.keys() - ips:
            self._source.delete(ip)
        self._source.mark_in_sync()

    async def run(self) -> None:
        """Measure who has answered until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                ip = await self._due.get()
                looking = group.create_task(self._look(ip))
                looking.add_done_callback(partial(self._looked, ip))

    def _looked(self, ip: str, _: asyncio.Task[None]) -> None:
        self._under_way.discard(ip)

    async def _look(self, ip: str) -> None:
        fits, small = partial(arrives, ip, self._port), partial(self._small, ip)
        async with self._slots:
            found = await measure(fits, small, self.full, self._source.entries().get(ip, 0))
        if found and ip in self.names:
            self.found[ip] = found
            self._note(ip, found)

    async def _small(self, ip: str) -> bool:
        _, http = await hello(ip, self._port)
        return not http.error

    def _note(self, ip: str, found: int) -> None:
        known, node = self._source.entries().get(ip), self.names[ip]
        if found < self.full and found != known:
            logger.warning(
                "node {} {}: packets of more than {} bytes do not arrive, this host sends {}: lowered",
                *(node, ip, found, self.full),
            )
            self._source.upsert(ip, found)
        elif found == self.full and known is not None:
            logger.info("packets of {} bytes arrive at node {} {} again", found, node, ip)
            self._source.delete(ip)
