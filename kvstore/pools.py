# SPDX-License-Identifier: Apache-2.0
"""Pools of addresses: each belongs to one node, from the first start of that node until it is released.

A claim is one key, written on conditions under which nobody else can have claimed the same or an
overlapping pool since the claims were read:

    a block of the cluster's range   its key does not exist; no claim of another size came meanwhile
    any other pool                   no claim at all came meanwhile; the counter tells later blocks of it

So a thousand hosts that start at once only meet where they choose the same block.  Claims have no lease: a
host that is away, for however long, finds its pool again.  With users in etcd agents may not write here;
the operator does it (`holdfast node add`), together with the host's certificate.

`decide` is pure; `Registrar` reads and writes.  Used by: the agent's registration, `holdfast node`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from loguru import logger

from core.backoff import Backoff
from kvstore import schema
from kvstore.client import Client
from kvstore.errors import NodeConflict, PermissionDenied, RecordError
from kvstore.ops import absent, delete_op, mod_is, older_than, put_op, range_older_than

# So often somebody else may be faster before a claim is given up for now.
ATTEMPTS = 16
# Seconds between them: who was slower than somebody else should not meet the same ones again.
RETRY_BASE_S, RETRY_CAP_S = 0.02, 2.0


@dataclass(frozen=True)
class Claim:
    """A claim as it stands in etcd."""

    pool: IPv4Network
    node: str
    revision: int


@dataclass(frozen=True)
class Registered:
    """A node's record as it stands in etcd: its addresses, its pool, and the lease it hangs on."""

    name: str
    address: str
    pool: IPv4Network | None
    lease: int


@dataclass(frozen=True)
class Wish:
    """What a node asks for: a fixed pool, or a block of `length` bits of the cluster's range.

    `former` is the name by which this very node was known before, `lease` its own one, of now or of then.
    `avoid` are networks that the host reaches by other ways.
    """

    node: str
    address: str
    fixed: IPv4Network | None = None
    cluster_range: IPv4Network | None = None
    length: int = 24
    former: str = ""
    lease: int = 0
    avoid: tuple[IPv4Network, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.node, self.former or self.node})


@dataclass(frozen=True)
class Known:
    """The claims and nodes of a cluster as of one moment."""

    revision: int
    claims: tuple[Claim, ...]
    nodes: Mapping[str, Registered]


def other_self(wish: Wish, known: Known) -> Registered | None:
    """Return the record of a node that has this one's lease at another address.  Pure.

    That is this node before its address changed, or another whose disk was copied: only whether it still
    speaks can tell.
    """
    for name in wish.names:
        found = known.nodes.get(name)
        if found is not None and wish.lease and found.lease == wish.lease and found.address != wish.address:
            return found
    return None


def decide(wish: Wish, known: Known) -> tuple[IPv4Network, Claim | None]:
    """Return the pool a node is to have, and the claim that already says so for it.  Pure.

    Raises NodeConflict naming the node that has the name or the pool.
    """
    _check_name(wish, known)
    own = [claim for claim in known.claims if claim.node in wish.names]
    pool = wish.fixed or (own[0].pool if own else None)
    if pool is None:
        return next(_free_blocks(wish, known)), None
    _check_pool(pool, wish, known)
    return pool, next((claim for claim in own if claim.pool == pool), None)


def _check_name(wish: Wish, known: Known) -> None:
    there = known.nodes.get(wish.node)
    if there is None or there.address == wish.address or (wish.lease and there.lease == wish.lease):
        return
    raise NodeConflict(
        f"the name {wish.node} belongs to the node at {there.address} (pool {there.pool or 'unknown'})",
        hint="give this host another node-name; if that one is gone: holdfast node release " + wish.node,
    )


def _check_pool(pool: IPv4Network, wish: Wish, known: Known) -> None:
    for claim in known.claims:
        if claim.pool.overlaps(pool) and claim.node not in wish.names:
            raise _taken(pool, claim.node, claim.pool)
    for node in known.nodes.values():
        if node.name not in wish.names and node.pool is not None and node.pool.overlaps(pool):
            raise _taken(pool, node.name, node.pool)


def _taken(pool: IPv4Network, node: str, other: IPv4Network) -> NodeConflict:
    what = "belongs to" if pool == other else f"overlaps {other} of"
    return NodeConflict(
        f"pool {pool} {what} node {node}",
        hint=f"set ipv4-range to another network; if {node} is gone for good: holdfast node release {node}",
    )


def _free_blocks(wish: Wish, known: Known) -> Iterator[IPv4Network]:
    """Yield free blocks, beginning somewhere that depends on the name: hosts rarely try the same one."""
    whole = wish.cluster_range
    if whole is None:
        raise NodeConflict(
            f"node {wish.node} has no pool and may choose none",
            hint="set ipv4-range or cluster-pool-ipv4-cidr, or have the operator run: holdfast node add",
        )
    taken = [claim.pool for claim in known.claims]
    taken += [node.pool for node in known.nodes.values() if node.pool is not None]
    taken += wish.avoid
    # Nearly all are blocks themselves: those need no comparison with every candidate.
    blocks = {each for each in taken if each.prefixlen == wish.length}
    others = [each for each in taken if each.prefixlen != wish.length and each.overlaps(whole)]
    count = 1 << (wish.length - whole.prefixlen)
    start = int.from_bytes(hashlib.sha256(wish.node.encode()).digest()[:8]) % count
    size = 1 << (32 - wish.length)
    for step in range(count):
        first = int(whole.network_address) + (start + step) % count * size
        block = IPv4Network((first, wish.length))
        if block not in blocks and not any(block.overlaps(each) for each in others):
            yield block
    raise NodeConflict(
        f"no block of /{wish.length} is free in {whole}: {len(known.claims)} are claimed",
        hint="release nodes that are gone (holdfast node list, holdfast node release) or widen the range",
    )


class Registrar:
    """Reads and writes the claims of one cluster."""

    def __init__(self, client: Client, cluster: str) -> None:
        self._client = client
        self.cluster = cluster

    async def known(self) -> Known:
        """Read all claims and nodes; what can not be used is left out and named in the log."""
        listing = await self._client.list(schema.pool_cluster_prefix(self.cluster))
        nodes = await self._client.list(schema.node_cluster_prefix(self.cluster))
        claims, registered = [], {}
        for kv in listing.items:
            try:
                record = schema.parse_pool(kv.key, kv.value)
            except RecordError as error:
                logger.warning("{}", error)
                continue
            claims.append(Claim(IPv4Network(record.pool), record.node, kv.mod_revision))
        for kv in nodes.items:
            try:
                node = schema.parse_node(kv.key, kv.value)
            except RecordError as error:
                logger.warning("{}", error)
                continue
            cidr = node.ipv4_alloc_cidr
            pool = IPv4Network(cidr.prefix) if cidr is not None else None
            registered[node.name] = Registered(node.name, node.address(), pool, kv.lease)
        return Known(listing.revision, tuple(claims), registered)

    async def claim(self, wish: Wish) -> IPv4Network:
        """Claim a pool and return it; what is this node's already is only confirmed.

        Raises NodeConflict when it is to be had by nobody else's leave, PermissionDenied where only the
        operator may claim, and other KvstoreErrors.
        """
        backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
        for _ in range(ATTEMPTS):
            known = await self.known()
            pool, claim = decide(wish, known)
            if claim is not None and claim.node == wish.node:
                return pool
            try:
                written = await self._write(pool, wish, known, claim)
            except PermissionDenied as error:
                raise NodeConflict(
                    f"node {wish.node} has no claim on a pool, and etcd lets only the operator write one",
                    hint=f"where the operator's certificate is: holdfast node add {wish.node} --pool {pool}",
                ) from error
            if written:
                logger.info("pool {} is claimed for node {}", pool, wish.node)
                return pool
            await asyncio.sleep(backoff.next())
        raise NodeConflict(f"node {wish.node} got no pool: others were faster {ATTEMPTS} times")

    async def claim_for(self, wish: Wish) -> IPv4Network:
        """Claim a pool for another node, by whoever may; the node itself may be registered already."""
        known = await self.known()
        there = known.nodes.get(wish.node)
        return await self.claim(replace(wish, address=there.address) if there is not None else wish)

    async def stands(self, wish: Wish, pool: IPv4Network) -> bool:
        """Tell, from two keys, that the claim and the node's record are as `claim` would leave them."""
        claim = await self._client.get(schema.pool_key(self.cluster, str(pool)))
        node = await self._client.get(schema.node_key(self.cluster, wish.node))
        if claim is None or schema.parse_pool(claim.key, claim.value).node != wish.node:
            return False
        if node is None:
            return True
        return schema.parse_node(node.key, node.value).address() == wish.address

    async def _write(self, pool: IPv4Network, wish: Wish, known: Known, claim: Claim | None) -> bool:
        key, counter = schema.pool_key(self.cluster, str(pool)), schema.pool_counter_key(self.cluster)
        value = schema.encode_pool(schema.PoolRecord(str(pool), wish.node))
        if claim is not None:  # this node's under its former name
            return (await self._client.txn([mod_is(key, claim.revision)], [put_op(key, value)])).succeeded
        if wish.fixed is None:
            conditions = [absent(key), older_than(counter, known.revision)]
            return (await self._client.txn(conditions, [put_op(key, value)])).succeeded
        prefix = schema.pool_cluster_prefix(self.cluster)
        conditions = [
            range_older_than(prefix, known.revision),
            older_than(counter, known.revision),
        ]
        ops = [put_op(key, value), put_op(counter, wish.node)]
        return (await self._client.txn(conditions, ops)).succeeded

    async def release(self, node: str) -> list[IPv4Network]:
        """Give up the pools of a node that is gone; return them.

        Raises NodeConflict while the node is registered: its lease must have ended first.
        """
        known = await self.known()
        there = known.nodes.get(node)
        if there is not None:
            raise NodeConflict(
                f"node {node} at {there.address} is registered: its pool can not be released",
                hint="stop its agent with `holdfast cleanup --all`, or wait until its lease has ended "
                "(kvstore-lease-ttl after its last sign of life)",
            )
        released = []
        for claim in known.claims:
            if claim.node != node:
                continue
            key = schema.pool_key(self.cluster, str(claim.pool))
            done = await self._client.txn([mod_is(key, claim.revision)], [delete_op(key)])
            released += [claim.pool] if done.succeeded else []
        return released
