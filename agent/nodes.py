# SPDX-License-Identifier: Apache-2.0
"""Other nodes of the cluster: what their records mean for this host.

    nodes/v1 record ──▶ its own addresses      remote-node in the ip→identity table
                        its pools              world there until an endpoint's own entry comes, but known to
                                               lie behind that host; a route for this host's own packets
                        its InternalIP         a host that packets may be encapsulated to

A record is somebody else's word: a pool that would swallow what is this host's own is refused and named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Generic, TypeVar

from loguru import logger

from agent.ipcache import NODES_SOURCE, IpTable, Record
from agent.sinks import with_length
from core.table import Source, Table
from identity.numbers import REMOTE_NODE, WORLD
from kvstore import schema

V = TypeVar("V")
NodeTable = Table[str, schema.NodeRecord]
PoolTable = Table[str, "NodePool"]
Network = IPv4Network | IPv6Network

# Where other machines reach a node, and its address among its own endpoints, which is behind the tunnel.
OUTER_TYPES, INNER_TYPE = frozenset({"InternalIP", "ExternalIP"}), "CiliumInternalIP"
# Records looked at before anybody else may run: some milliseconds.
NODES_AT_ONCE = 50
# Entries written to a source likewise.
WRITTEN_AT_ONCE = 2000
# The shortest prefix that a pool may have, by family: a typing error must not attract everything.
SHORTEST_POOL = {4: 8, 6: 32}


def node_names(nodes: NodeTable, own: str) -> list[str]:
    """Return the names of all nodes, this one's among them, in order: what slots are counted by."""
    return sorted({record.name for _, record in nodes.items()} | {own})


@dataclass(frozen=True)
class NodePool:
    """Who has a pool: the name of the node, and its addresses (IPv6: empty without one)."""

    node: str
    host: str
    host6: str = ""


@dataclass(frozen=True)
class Own:
    """What is this host's: `key` is its <cluster>/<name>."""

    key: str
    networks: tuple[Network, ...]  # pools
    addresses: frozenset[str] = frozenset()

    @property
    def cluster(self) -> str:
        return self.key.partition("/")[0]


class Claims(Generic[V]):
    """Which nodes say that something is theirs, and what they say of it.  Pure.

    Of a host that was renamed or installed again there are two records, until the old one's lease ends; a
    thing stays as long as one of them names it, and of their words the last one counts.
    """

    def __init__(self) -> None:
        self._by_thing: dict[str, dict[str, V]] = {}
        self._by_node: dict[str, frozenset[str]] = {}

    def changed(self, node: str, now: Mapping[str, V]) -> set[str]:
        """Take all that a node claims now; return the things that this may concern."""
        before = self._by_node.pop(node, frozenset())
        for thing in before - now.keys():
            self._by_thing[thing].pop(node)
        if now:
            self._by_node[node] = frozenset(now)
        for thing, word in now.items():
            words = self._by_thing.setdefault(thing, {})
            if node not in words or words[node] != word:  # who says the same again has not the last word
                words.pop(node, None)
                words[node] = word
        return {*before, *now}

    def word(self, thing: str) -> V | None:
        """Return what counts of a thing, None when nobody has it."""
        claims = self._by_thing.get(thing)
        if claims:
            return next(reversed(claims.values()))
        self._by_thing.pop(thing, None)
        return None

    def __contains__(self, thing: str) -> bool:
        return bool(self._by_thing.get(thing))


@dataclass
class _Turned:
    """What a round of changes may concern."""

    prefixes: set[str] = field(default_factory=set)
    pools: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)


class NodeFollower:
    """Derives everything from the table of nodes.  Owner of `hosts`, which is what packets may be sent to.

    `hosts` begins with what a former life knew and is exact once the nodes are in sync; `caught_up` is set
    once every record of a whole view, be it a checkpoint's, has been looked at.  `moved` is told of
    hosts that came or went, after `hosts` has changed: entries of addresses behind them are to be written.
    """

    def __init__(
        self,
        nodes: NodeTable,
        addresses: IpTable,
        pools: PoolTable,
        own: Own,
        *,
        hosts: set[str],
        moved: Callable[[set[str]], Awaitable[None]],
    ) -> None:
        self.refused: dict[str, str] = {}  # key in etcd → why
        self.caught_up = asyncio.Event()
        self._nodes = nodes
        self._addresses = addresses.source(NODES_SOURCE)
        self._pools = pools.source("nodes")
        self._own = own
        self._hosts = hosts
        self._moved = moved
        self._claimed_prefixes: Claims[Record] = Claims()
        self._claimed_pools: Claims[NodePool] = Claims()
        self._claimed_hosts: Claims[None] = Claims()

    async def run(self) -> None:
        """Follow until cancelled; started again, it makes good what it missed."""
        turned = _Turned(set(self._addresses.entries()), set(self._pools.entries()), set(self._hosts))
        self._claimed_prefixes, self._claimed_pools, self._claimed_hosts = Claims(), Claims(), Claims()
        changes = self._nodes.subscribe()
        changes.poke()
        try:
            while True:
                await changes.wait()
                for _ in range(0, max(len(changes), 1), NODES_AT_ONCE):
                    for name in changes.take(NODES_AT_ONCE):
                        self._take(name, turned)
                    await asyncio.sleep(0)
                exact = self._nodes.in_sync and not len(changes)
                await self._write(turned, exact=exact)
                turned = _Turned(hosts=set() if exact else turned.hosts)
                if self._nodes.complete and not len(changes):
                    self.caught_up.set()
        finally:
            self._nodes.unsubscribe(changes)

    def _take(self, name: str, turned: _Turned) -> None:
        record = self._accepted(name)
        prefixes, pools = ({}, {}) if record is None else self._words(name, record)
        host = record.address() if record is not None else ""
        turned.prefixes |= self._claimed_prefixes.changed(name, prefixes)
        turned.pools |= self._claimed_pools.changed(name, pools)
        turned.hosts |= self._claimed_hosts.changed(name, {host: None} if host else {})

    def _accepted(self, name: str) -> schema.NodeRecord | None:
        """Return a node's record; None without one, for this host's own, and for another cluster's."""
        key = schema.NODES + name
        record = self._nodes.get(name)
        self.refused.pop(key, None)
        if record is None or name == self._own.key:
            return None
        if record.cluster != self._own.cluster:
            self._refuse(key, f"it is a node of cluster {record.cluster}, this is {self._own.cluster}")
            return None
        return record

    def _words(self, name: str, record: schema.NodeRecord) -> tuple[dict[str, Record], dict[str, NodePool]]:
        """Return what a node says of prefixes and of pools, as far as it can be believed."""
        pools = [pool for pool in node_pools(record) if self._believed(schema.NODES + name, pool)]
        prefixes = node_addresses(record, pools)
        prefixes |= {str(pool): Record(WORLD, record.address()) for pool in pools}
        holder = NodePool(record.name, record.address(), record.address(ipv6=True))
        return prefixes, {str(pool): holder for pool in pools}

    def _believed(self, key: str, pool: Network) -> bool:
        reason = why_unusable(pool, self._own)
        if reason:
            self._refuse(key, f"its pool {pool} {reason}")
        return not reason

    def _refuse(self, key: str, reason: str) -> None:
        self.refused[key] = reason
        logger.warning("node {}: {}; ignored", key, reason)

    async def _write(self, turned: _Turned, *, exact: bool) -> None:
        """Write what has turned; `exact` says that every node's record of now has been looked at."""
        moved = self._move_hosts(turned.hosts, exact=exact)
        await _put(self._addresses, turned.prefixes, self._claimed_prefixes)
        await _put(self._pools, turned.pools, self._claimed_pools)
        if moved:
            await self._moved(moved)
        if exact:
            self._addresses.mark_in_sync()
            self._pools.mark_in_sync()

    def _move_hosts(self, turned: Iterable[str], *, exact: bool) -> set[str]:
        """Bring `hosts` up to date; return what came or went.  Before all nodes are known nothing goes."""
        moved = set()
        for host in turned:
            if host in self._claimed_hosts and host not in self._hosts:
                self._hosts.add(host)
                moved.add(host)
            elif host not in self._claimed_hosts and host in self._hosts and exact:
                self._hosts.discard(host)
                moved.add(host)
        return moved


async def _put(source: Source[str, V], things: Iterable[str], claims: Claims[V]) -> None:
    """Make a source say what counts of some things; the loop gets its turn meanwhile."""
    names = list(things)
    for at in range(0, len(names), WRITTEN_AT_ONCE):
        words = {name: claims.word(name) for name in names[at : at + WRITTEN_AT_ONCE]}
        source.upsert_many([(name, word) for name, word in words.items() if word is not None])
        for name, word in words.items():
            if word is None:
                source.delete(name)
        await asyncio.sleep(0)


def node_addresses(record: schema.NodeRecord, pools: Iterable[Network]) -> dict[str, Record]:
    """Return the entries of a node's own addresses; a host is named where the tunnel leads to it.  Pure.

    What it calls its address among its endpoints must lie in one of its `pools`.
    """
    found = {}
    for each in record.addresses or ():
        if each.type in OUTER_TYPES:
            found[with_length(each.ip)] = Record(REMOTE_NODE)
        elif each.type == INNER_TYPE and any(ip_address(each.ip) in pool for pool in pools):
            found[with_length(each.ip)] = Record(REMOTE_NODE, record.address())
    return found


def node_pools(record: schema.NodeRecord) -> list[Network]:
    """Return the pools of a node's endpoints.  Pure."""
    given = (record.ipv4_alloc_cidr, record.ipv6_alloc_cidr)
    return [ip_network(each.prefix) for each in given if each is not None]


_parsed = lru_cache(maxsize=256)(ip_address)  # this host's own, again for each of 10 000 records


def why_unusable(pool: Network, own: Own) -> str:
    """Return why another node's pool can not be believed, empty when it can.  Pure."""
    if pool.prefixlen < SHORTEST_POOL[pool.version]:
        return f"is shorter than /{SHORTEST_POOL[pool.version]}"
    for network in own.networks:
        if network.version == pool.version and network.overlaps(pool):
            return f"overlaps this host's {network}"
    for address in map(_parsed, own.addresses):
        if address in pool:
            return f"holds this host's address {address}"
    return ""
