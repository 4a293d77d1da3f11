# SPDX-License-Identifier: Apache-2.0
"""Probes the nodes of the cluster, this one among them, and keeps what became of each node's last probe.

    nodes table ──▶ Schedule (who is due) ──▶ agent.probes (TCP, HTTP, ICMP) ──▶ Results
                                                                   who answered ──▶ agent.path_mtu

What is found here is shown (`holdfast health`, a line of `status`, metrics), and decides one thing: whether a
node that etcd has no record of any more is gone (`agent.departures`).  A node is probed once a period, which
grows with the logarithm of the cluster's size; the nodes are spread over the period, and so are the agents
that a new node is probed by.  Run as a supervised task.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import heapq
import random
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

import msgspec
from loguru import logger

from agent import probes
from agent.clocks import Clocks
from agent.path_mtu import PathProber
from agent.probes import Outcome, family_of
from core import metrics
from core.backoff import cluster_interval, jittered
from core.table import Subscription, Table
from kvstore import schema

# Nodes that are probed at the same time: those that do not answer take five seconds each.
IN_FLIGHT_MAX = 32
# A new node is probed within two seconds, and by not more than so many agents a second.
FIRST_S = 2.0
FIRST_PER_S = 20.0
# Changes of the table that are taken at once: a few milliseconds.
BATCH = 500
# A record may name any number of addresses.
ADDRESSES_MAX = 8


class State(enum.Enum):
    """What is known of a node; the words are Cilium's."""

    REACHABLE = "reachable"  # every probe of its last round was answered
    UNREACHABLE = "unreachable"  # one was not
    UNKNOWN = "unknown"  # not probed yet, or it has no address that this host could reach


class Path(msgspec.Struct, frozen=True, gc=False):
    """The probes of one address; `icmp` is None where no socket for it is granted."""

    ip: str
    tcp: Outcome
    http: Outcome
    icmp: Outcome | None = None

    @property
    def error(self) -> str:
        """What failed first, empty when nothing did."""
        if self.http.error:
            return f"{'TCP' if self.tcp.error else 'HTTP'}: {self.http.error}"
        return f"ICMP: {self.icmp.error}" if self.icmp is not None and self.icmp.error else ""


class Answer(NamedTuple):
    """The latency of one probe, and the labels that metrics give it."""

    ip: str
    protocol: str  # http, icmp
    address_type: str  # primary, secondary
    latency: float


class NodeHealth(msgspec.Struct, frozen=True, gc=False):
    """A node's last probes, and when they ended (Unix seconds; 0: never probed)."""

    paths: tuple[Path, ...] = ()
    time: float = 0.0

    @property
    def state(self) -> State:
        if not self.paths:
            return State.UNKNOWN
        return State.UNREACHABLE if any(path.error for path in self.paths) else State.REACHABLE

    @property
    def ahead(self) -> float | None:
        """By how many seconds the node's clock is ahead of this host's; None when no answer said it."""
        return next((path.http.ahead for path in self.paths if path.http.ahead is not None), None)

    def answers(self) -> Iterator[Answer]:
        """Yield the probes that were answered, of the protocols that Cilium has."""
        for number, path in enumerate(self.paths):
            kind = "secondary" if number else "primary"
            for protocol, outcome in (("http", path.http), ("icmp", path.icmp)):
                if outcome is not None and not outcome.error:
                    yield Answer(path.ip, protocol, kind, outcome.latency)


UNKNOWN = NodeHealth()


class Results:
    """Node → what became of its last probes; who did not answer is known without looking through them."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeHealth] = {}
        self.unreachable: dict[str, NodeHealth] = {}
        self.last = 0.0  # when the last probe ended, Unix seconds

    def put(self, name: str, found: NodeHealth) -> None:
        self.nodes[name] = found
        self.last = found.time
        if found.state is State.UNREACHABLE:
            self.unreachable[name] = found
        else:
            self.unreachable.pop(name, None)

    def forget(self, name: str) -> None:
        self.nodes.pop(name, None)
        self.unreachable.pop(name, None)


def addresses(record: schema.NodeRecord, families: frozenset[int]) -> tuple[str, ...]:
    """Return the addresses to probe a node at, IPv4 first.  Pure.

    Families that this host has none of are left out, and so is what is no other host's: a record is another
    one's word.
    """
    found = {each.ip for each in record.addresses or () if each.type == "InternalIP"}
    usable = [ip for ip in found if family_of(ip) in families and _of_a_host(ip_address(ip))]
    return tuple(sorted(usable, key=lambda ip: (family_of(ip), ip))[:ADDRESSES_MAX])


def _of_a_host(ip: IPv4Address | IPv6Address) -> bool:
    return not (ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_link_local)


class Schedule:
    """When each node is probed next.  Pure: times are handed in, chance too."""

    def __init__(self, base: float, rng: random.Random | None = None) -> None:
        self._base = base
        self._rng = rng or random.Random()
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, name: str) -> bool:
        return name in self._due

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._due))

    @property
    def period(self) -> float:
        """Return the seconds between two probes of a node."""
        return cluster_interval(self._base, len(self._due))

    def join(self, names: Iterable[str], now: float, *, nodes: int = 0) -> None:
        """Take new nodes in, spread over the time that `first_within` says; known ones stay as they are.

        `nodes` is the cluster's size where not all come at once.
        """
        new = [name for name in names if name not in self._due]
        nodes = max(nodes, len(self._due) + len(new))
        within = min(cluster_interval(self._base, nodes), first_within(nodes))
        for name in new:
            self._put(name, now + self._rng.uniform(0, within))

    def leave(self, name: str) -> None:
        self._due.pop(name, None)

    def take(self, now: float) -> list[str]:
        """Return who is due, and set their next time a jittered period ahead."""
        due = []
        while self._first() <= now:
            due.append(heapq.heappop(self._heap)[1])
        for name in due:
            self._put(name, now + jittered(self.period, rng=self._rng))
        return due

    def wait(self, now: float) -> float | None:
        """Return the seconds until somebody is due, None while there is nobody."""
        return max(0.0, self._first() - now) if self._due else None

    def _put(self, name: str, at: float) -> None:
        self._due[name] = at
        heapq.heappush(self._heap, (at, name))

    def _first(self) -> float:
        """Return the first time that still counts; entries of nodes that left, or that moved, are dropped."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else float("inf")


def first_within(nodes: int) -> float:
    """Return the seconds within which a new node is probed for the first time.

    All agents hear of it in the same moment; it is to see so many of them a second and not more.
    """
    return max(FIRST_S, nodes / FIRST_PER_S)


class Prober:
    """Owner of the results and the schedule; other threads look at copies of them.

    `own` is this node's name in the table (cluster/name); it is probed at `own_addresses` like the others.
    """

    def __init__(
        self,
        nodes: Table[str, schema.NodeRecord],
        own: str,
        own_addresses: Sequence[str],
        *,
        port: int,
        base: float,
        sizes: PathProber | None = None,
    ) -> None:
        self.own = own
        self.sizes = sizes
        self.clocks = Clocks()
        self._own_clock_wrong = False
        self.schedule = Schedule(base)
        self.results = Results()
        self.icmp: dict[int, socket.SocketKind | None] = {}
        self._nodes = nodes
        self._own_addresses = tuple(own_addresses)
        self._families = frozenset(map(family_of, own_addresses))
        self._port = port
        self._slots = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._under_way: dict[str, asyncio.Event] = {}
        self._round = asyncio.Lock()
        self._round_began = 0.0

    def addresses(self, name: str) -> tuple[str, ...]:
        """Return where a node is probed; nothing of one that is gone."""
        if name == self.own:
            return self._own_addresses
        record = self._nodes.get(name)
        return addresses(record, self._families) if record is not None else ()

    async def run(self) -> None:
        """Probe whoever is due until cancelled."""
        self.icmp = {family: probes.granted(family) for family in self._families}
        changes = self._nodes.subscribe()
        complete = False
        try:
            # What left while this task was down has no change that would say so.
            self._heed([*self.schedule, self.own])
            async with asyncio.TaskGroup() as group:
                while True:
                    self._heed(changes.take(BATCH))
                    complete = complete or self._complete()
                    await asyncio.sleep(0)  # also while more of them wait
                    for name in self.schedule.take(time.monotonic()):
                        await self._slots.acquire()
                        probe = group.create_task(self._probe(name))
                        probe.add_done_callback(lambda _: self._slots.release())
                    await _changed(changes, self.schedule.wait(time.monotonic()))
        finally:
            self._nodes.unsubscribe(changes)

    def _complete(self) -> bool:
        """Once all nodes are known, end what a former life found of others; return whether they are."""
        if self.sizes is not None and self._nodes.in_sync:
            self.sizes.keep_only({ip for name, _ in self._nodes.items() for ip in self.addresses(name)})
        return self._nodes.in_sync

    async def probe_all(self) -> None:
        """Probe every node now.  Who asks while a round is under way waits for the next one."""
        asked = time.monotonic()
        async with self._round:
            if self._round_began < asked:
                self._round_began = time.monotonic()
                names = iter(self.schedule)
                async with asyncio.TaskGroup() as group:
                    for _ in range(IN_FLIGHT_MAX):
                        group.create_task(self._each(names))

    async def who_answers(self, names: Sequence[str]) -> set[str]:
        """Probe these nodes now; return those whose own agents answer at one of their addresses."""
        before = {name: self.results.nodes.get(name) for name in names}
        rest = iter(names)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(len(names), IN_FLIGHT_MAX)):
                group.create_task(self._each(rest))
        return {name for name in names if self._answered(name, before[name])}

    def _answered(self, name: str, before: NodeHealth | None) -> bool:
        found = self.results.nodes.get(name, UNKNOWN)
        return found is not before and any(not (path.http.error or path.http.other) for path in found.paths)

    async def _each(self, names: Iterator[str]) -> None:
        for name in names:
            async with self._slots:
                await self._probe(name)

    def _heed(self, names: Sequence[str]) -> None:
        """Take in nodes that came, forget those that left, begin anew with those that moved."""
        for name in names:
            known = self.results.nodes.get(name)
            moved = known is not None and tuple(path.ip for path in known.paths) != self.addresses(name)
            if moved or (name != self.own and name not in self._nodes):
                self.schedule.leave(name)
                self.results.forget(name)
                self.clocks.forget(name)
                if self.sizes is not None:
                    self.sizes.forget(name)
        there = [name for name in names if self._is_there(name)]
        self.schedule.join(there, time.monotonic(), nodes=len(self._nodes))

    def _is_there(self, name: str) -> bool:
        return name == self.own or name in self._nodes

    async def _probe(self, name: str) -> None:
        """Probe one node at all its addresses; where that is under way, wait for its end."""
        if name in self._under_way:
            await self._under_way[name].wait()
            return
        ips = self.addresses(name)
        if not ips:
            return
        ended = self._under_way[name] = asyncio.Event()
        try:
            paths = tuple(await asyncio.gather(*(self._path(ip, name) for ip in ips)))
        finally:
            del self._under_way[name]
            ended.set()
        if name in self.schedule and ips == self.addresses(name):
            found = NodeHealth(paths, time.time())
            self.results.put(name, found)
            self._observe(found)
            if name != self.own:
                self._compare_clock(name, found)
            if self.sizes is not None and name != self.own:
                self.sizes.answered(name, [path.ip for path in paths if not path.http.error])

    def _compare_clock(self, name: str, found: NodeHealth) -> None:
        self.clocks.put(name, found.ahead)
        verdict = self.clocks.verdict()
        if bool(verdict.ahead) != self._own_clock_wrong:
            self._own_clock_wrong = bool(verdict.ahead)
            logger.warning(
                "this host's clock is {:.0f} s ahead of most, and differs from {} of {} other nodes",
                *(verdict.ahead, verdict.differing, verdict.others),
            )

    async def _path(self, ip: str, name: str) -> Path:
        kind = self.icmp.get(family_of(ip))
        if kind is None:
            return Path(ip, *await probes.hello(ip, self._port, name))
        (tcp, http), icmp = await asyncio.gather(probes.hello(ip, self._port, name), probes.echo(ip, kind))
        return Path(ip, tcp, http, icmp)

    def _observe(self, found: NodeHealth) -> None:
        cluster, _, name = self.own.partition("/")
        for _, *labels, latency in found.answers():
            metrics.NODE_HEALTH_LATENCY.labels(cluster, name, "node", *labels).observe(latency)


async def _changed(changes: Subscription[str], timeout: float | None) -> None:
    """Return when a node has changed, or after `timeout` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await changes.wait()
