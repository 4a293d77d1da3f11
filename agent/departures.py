# SPDX-License-Identifier: Apache-2.0
"""What etcd has no record of any more, and is not gone all the same.

A host that has no etcd for longer than its lease, or whose keys a stranger deletes, works as before: its
containers run, and its data path enforces.  Whoever forgot it would break every connection with it.  So a
deletion that may be such a loss is held for some seconds (`core.table.Source.hold`), in which an owner writes
its keys again; and what is held, or missing in a list, is looked at here when its time has ended:

    a node        stays while its agent answers probes, unless another node has its address or its pool
    an address    stays while the node that it is behind is held or missing
    an identity   stays while an address has it
    a policy      goes

What stays is missing from then on, and `status` counts it.  While etcd is away, and until everybody has come
back to it, nothing goes: no owner could write anything again.  Nor does anything that is held before etcd has
spoken to its view after the end of that time: what its owner wrote may be under way.

Owner: the task in `run`.  Called by: agent.tasks.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain

from loguru import logger

from agent.health import IN_FLIGHT_MAX, first_within
from agent.ipcache import KVSTORE_SOURCE, IpTable, Record
from agent.nodes import NodeTable
from agent.policies import Document
from agent.sinks import is_machine
from core.backoff import jittered
from core.table import K, Source, V
from identity.labels import Labels
from kvstore import schema
from kvstore.sink import HOLD_S
from kvstore.watcher import Follower, State

LOOK_S = 2.0
# What is missing in a list, and identities, are looked at less often: both may be many.
THOROUGH_S = 15.0
# Addresses and nodes looked at before anybody else may run: some milliseconds.
ADDRESSES_AT_ONCE, NODES_AT_ONCE = 2000, 500
# A node, and an identity, that stays is looked at again after so long, a node of a large cluster later; what
# is behind a node sooner, to go soon after it.
AGAIN_S, BEHIND_S = 60.0, 15.0
# So often in a row, and so far apart, a node does not answer before the next silence says that it is gone.
TRIES, SOON_S = 2, 5.0
# One that had answered after etcd had lost it may only be starting anew: so long it may be silent.
STAYING_S = 300.0
# So many other nodes are asked as well: a host that hears none of them judges nobody, for so long.
WITNESSES, DEAF_S = 3, 3600.0
# An etcd that was away for longer than the first has to be there again for the second: every host tries it
# after half a minute at most, and connects in a few seconds.  After a shorter one all are back in seconds.
BRIEF_S, SETTLED_S = 2.0, 45.0


class Presence:
    """Whether etcd is there, by the followers of it."""

    def __init__(self, followers: Sequence[Follower], clock: Callable[[], float]) -> None:
        self._followers = {follower.prefix: follower for follower in followers}
        self._clock = clock
        self._away_since: float | None = None
        self._back_at = -SETTLED_S  # after an absence that was not brief

    def heard(self, prefix: str) -> float:
        """Return when etcd last spoke of what is under a prefix, monotonic seconds."""
        return self._followers[prefix].fresh_at

    def has_whole_view(self, prefix: str) -> bool:
        """False while a list is still to come: what the last one lacked may be in it."""
        return self._followers[prefix].state is State.WATCHING

    def is_settled(self) -> bool:
        """Return whether etcd is there, and everybody has had time to come back to it."""
        now, away = self._clock(), {State.LISTING, State.CATCHING_UP, State.RETRYING}
        if any(follower.state in away for follower in self._followers.values()):
            if self._away_since is None:
                self._away_since = now
            return False
        if self._away_since is not None and now - self._away_since > BRIEF_S:
            self._back_at = now
        self._away_since = None
        return now - self._back_at >= SETTLED_S


@dataclass
class _Silence:
    """How often in a row a node has not answered, since when, and when it was asked last.

    `stays`: it did answer once.  `until` is when it is asked next.
    """

    since: float
    count: int = 0
    asked_at: float = 0.0
    stays: bool = False
    until: float = 0.0

    @property
    def is_long(self) -> bool:
        return self.count >= TRIES and (not self.stays or self.asked_at - self.since >= STAYING_S)


class Departures:
    """See the module's text.

    `who_answers` probes nodes and returns those whose agents answer.  Without, nothing is known of any: what
    is not written again goes.  `own` is this node's name, cluster/name.
    """

    def __init__(
        self,
        nodes: NodeTable,
        addresses: IpTable,
        identities: Source[int, Labels],
        policies: Source[str, Document],
        followers: Sequence[Follower],
        *,
        own: str,
        who_answers: Callable[[Sequence[str]], Awaitable[set[str]]] | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes = nodes.source("kvstore")
        self._addresses = addresses
        self._identities = identities
        self._policies = policies
        self._etcd = Presence(followers, clock)
        self._own = own
        self._who_answers = who_answers
        self._rng = rng or random.Random()
        self._clock = clock
        self._silences: dict[str, _Silence] = {}  # of nodes that are asked
        self._lost: dict[str, float] = {}  # address of a host whose node is not there → when that was last so
        self._thorough_at = 0.0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(jittered(LOOK_S))
            ended = await self.look()
            if ended:
                logger.warning("{} records have been missing in etcd for so long that they go", ended)

    async def look(self) -> int:
        """Remove what is gone, if etcd is there; return how many of that had been missing, not only held."""
        if not self._etcd.is_settled():
            return 0
        ended = await self._look_at_nodes()
        thorough = self._clock() >= self._thorough_at
        if not self._etcd.is_settled():  # it took seconds to ask
            return ended
        ended += await self._look_at_addresses(self._due(self._behind, schema.IPS, missing=thorough))
        if thorough:
            self._thorough_at = self._clock() + THOROUGH_S
            ended += _end(self._policies, self._due(self._policies, schema.POLICIES))
            ended += await self._look_at_identities()
        return ended

    @property
    def _behind(self) -> Source[str, Record]:
        return self._addresses.source(KVSTORE_SOURCE)

    def _due(self, source: Source[K, V], prefix: str, *, missing: bool = True) -> list[K]:
        """Return what is held too long, and missing too long unless a list is still to come."""
        now, heard = self._clock(), self._etcd.heard(prefix)
        return source.due(now, heard=heard, missing=missing and self._etcd.has_whole_view(prefix))

    # --- nodes

    async def _look_at_nodes(self) -> int:
        source, prefix = self._nodes, schema.NODES
        due = self._due(source, prefix)
        if not due:
            return 0
        replaced = await self._replaced(due)
        ended = _end(source, [name for name in self._due(source, prefix) if name in replaced])
        now = self._clock()
        # One whose time is another came back since, and went again.
        silences = self._silences.items()
        self._silences = {name: each for name, each in silences if source.missing.get(name) == each.until}
        # Everybody notices in the same moment: not all ask in it.
        spread = first_within(len(source))
        for name in self._due(source, prefix):
            if name not in self._silences:
                self._put_off(name, _Silence(since=now), now + self._rng.uniform(0.0, spread))
        # Who has waited longest comes first: those that stay are due again and again.
        asked = heapq.nsmallest(IN_FLIGHT_MAX, self._due(source, prefix), key=source.missing.__getitem__)
        return ended + (await self._ask(asked) if asked else 0)

    async def _ask(self, names: Sequence[str]) -> int:
        """Probe nodes that are due, and put off those that answer, or may only be slow to; end the others."""
        source, asked_at = self._nodes, self._clock()
        # Whose own network is down hears nobody: the last question is one after etcd has spoken again.
        heard = self._etcd.heard(schema.NODES)
        answering, hears = await self._answering(names)
        now, gone = self._clock(), []
        # All hosts ask: not more often than one of them can answer.
        again = jittered(max(AGAIN_S, first_within(len(source))))
        for name in set(source.due(now)) & set(names):  # its record may have come back meanwhile
            silence = self._silences[name]
            if name in answering:
                if not silence.stays:
                    logger.warning("node {} has no record in etcd any more, but answers: it stays", name)
                self._put_off(name, _Silence(since=now, stays=True), now + again)
            elif not hears and now - silence.since < DEAF_S:
                self._put_off(name, silence, now + again)
            elif silence.is_long and heard > silence.asked_at:
                gone.append(name)
            else:
                if not silence.is_long:
                    silence.count, silence.asked_at = silence.count + 1, asked_at
                self._put_off(name, silence, now + (again if silence.stays else SOON_S))
        return _end(source, gone)

    def _put_off(self, name: str, silence: _Silence, until: float) -> None:
        silence.until = until
        self._silences[name] = silence
        self._nodes.keep([name], until)

    async def _answering(self, names: Sequence[str]) -> tuple[set[str], bool]:
        """Return which of these nodes answer, and whether this host hears others that must be there."""
        if self._who_answers is None:
            return set(), True
        lost = self._nodes.held.keys() | self._nodes.missing.keys() | {self._own}
        present = [name for name in self._nodes.entries() if name not in lost]
        witnesses = self._rng.sample(present, min(WITNESSES, len(present)))
        answering = await self._who_answers([*names, *witnesses])
        return answering, not witnesses or not answering.isdisjoint(witnesses)

    async def _replaced(self, names: Collection[str]) -> set[str]:
        """Return those nodes of which another one has the address, or a pool."""
        things: dict[str, set[str]] = {}
        for name in names:
            for thing in _things(self._nodes.entries()[name]):
                things.setdefault(thing, set()).add(name)
        found: set[str] = set()
        for number, (name, record) in enumerate(list(self._nodes.entries().items()), 1):
            if name not in self._nodes.held and name not in self._nodes.missing:
                found.update(*(things.get(thing, ()) for thing in _things(record)))
            if number % NODES_AT_ONCE == 0:
                await asyncio.sleep(0)
        return found

    # --- what is behind them

    async def _look_at_addresses(self, due: Sequence[str]) -> int:
        for name in chain(self._nodes.held, self._nodes.missing):
            if host := self._nodes.entries()[name].address():
                self._lost[host] = self._clock()
        ended = 0
        for at in range(0, len(due), ADDRESSES_AT_ONCE):
            now = self._clock()
            # A host that is back writes its addresses behind its node.
            self._lost = {host: seen for host, seen in self._lost.items() if now - seen < HOLD_S}
            ended += self._end_addresses(due[at : at + ADDRESSES_AT_ONCE])
            await asyncio.sleep(0)
        return ended

    def _end_addresses(self, due: Sequence[str]) -> int:
        source, now = self._behind, self._clock()
        entries = source.entries()
        there = [key for key in due if source.doubted_until(key) <= now]  # it may have come back meanwhile
        stay = {key for key in there if entries[key].host_ip in self._lost and not is_machine(entries[key])}
        source.keep(stay, now + jittered(BEHIND_S))
        return _end(source, [key for key in there if key not in stay])

    async def _look_at_identities(self) -> int:
        source = self._identities
        asked = frozenset(self._due(source, schema.IDENTITY_IDS))
        if not asked:
            return 0
        used = await self._used(asked)
        still = self._due(source, schema.IDENTITY_IDS)  # who came back meanwhile is not due any more
        due = asked.intersection(still)
        source.keep(due & used, self._clock() + jittered(AGAIN_S))
        return _end(source, due - used)

    async def _used(self, numbers: frozenset[int]) -> set[int]:
        """Return which of these identities an address has."""
        used: set[int] = set()
        for source in self._addresses.sources:
            records = list(source.entries().values())
            for at in range(0, len(records), ADDRESSES_AT_ONCE):
                used |= numbers.intersection(each.identity for each in records[at : at + ADDRESSES_AT_ONCE])
                await asyncio.sleep(0)
        return used


def _things(record: schema.NodeRecord) -> list[str]:
    """Return what only one node can have: its address, and its pools as they are written."""
    pools = (record.ipv4_alloc_cidr, record.ipv6_alloc_cidr)
    found = [f"{pool.ip}/{pool.mask}" for pool in pools if pool is not None]
    return [*found, record.address()] if record.address() else found


def _end(source: Source[K, V], keys: Collection[K]) -> int:
    """Remove records; return how many of them had been missing."""
    missing = sum(key in source.missing for key in keys)
    source.remove(keys)
    return missing
