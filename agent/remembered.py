# SPDX-License-Identifier: Apache-2.0
"""What this agent knew of policies and identities, kept beside the endpoints' checkpoint.

A restarted agent must not take "etcd has no policies" for the truth: a store that was wiped while it was
away looks just like that, and enforcing it would let everything pass.  So the last view is restored, and
the watch goes on from its revision: what was deleted meanwhile is delivered as a deletion and counts at
once.  Where that history is gone (compacted, another cluster), a list is compared with the restored view,
and what it lacks stays for the grace period, as everywhere.

Addresses need no file: cilium_ipcache is pinned and is the checkpoint of itself.  It does not say all that
etcd does, so addresses are listed again; of those that the list lacks, the ones that etcd's history since the
node's `addresses_at` says were deleted go at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from ipaddress import ip_network

import msgspec
from loguru import logger

from agent.ipcache import NOWHERE, Record
from agent.policy_sources import PolicyKeys
from core.errors import HoldfastError, shorten
from core.table import Source
from datapath.addresses import pack_ip
from datapath.errors import DatapathError
from datapath.maps import IpcacheMap
from datapath.records import IpcacheEntry
from identity.cache import IdentityCache
from identity.labels import Labels
from identity.numbers import is_global
from kvstore.watcher import Follower

VERSION = 1
# Identities restored before anybody else may run: some ten milliseconds.
IDENTITIES_AT_ONCE = 2000


class Place(msgspec.Struct, frozen=True):
    """Where in etcd's history a view stands; revision 0 means that nothing is known."""

    revision: int = 0
    cluster_id: int = 0


class View(msgspec.Struct, frozen=True):
    """Policies by key (their text), identities by number (their labels), each with its place."""

    policies: dict[str, str] = {}
    identities: dict[int, str] = {}
    policies_at: Place = Place()
    identities_at: Place = Place()
    version: int = VERSION


def place_of(follower: Follower) -> Place:
    return Place(follower.revision, follower.cursor.cluster_id)


def view_of(
    policies: PolicyKeys, identities: IdentityCache, policies_at: Place, identities_at: Place
) -> View:
    """Return what is known now; call it in the loop, where nothing changes meanwhile."""
    source = identities.table.source("kvstore")
    return View(
        policies=policies.texts(),
        identities={number: labels.serialized for number, labels in source.entries().items()},
        policies_at=policies_at,
        identities_at=identities_at,
    )


async def restore(view: View, policies: PolicyKeys, identities: IdentityCache) -> None:
    """Take a view as if etcd had delivered it; entries that can not be used are left out and named."""
    for key, text in view.policies.items():
        item = (key, text.encode())
        await policies.prepare([item])
        policies.take([item])
        await asyncio.sleep(0)
    known = list(view.identities.items())
    for start in range(0, len(known), IDENTITIES_AT_ONCE):
        identities.restore(dict(_labels(known[start : start + IDENTITIES_AT_ONCE])))
        await asyncio.sleep(0)


def _labels(identities: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Labels]]:
    for number, text in identities:
        try:
            yield number, Labels.parse(text)
        except HoldfastError as error:
            logger.warning("identity {} of the checkpoint is left out: {}", number, shorten(str(error)))


async def restore_addresses(source: Source[str, Record], ipcache: IpcacheMap, pools: Iterable[str]) -> int:
    """Take the pinned map's entries of other machines as if etcd had delivered them; return how many."""
    chunks, own = ipcache.item_chunks(), [_bounds(pool) for pool in pools]
    restored = 0
    try:
        while (entries := await asyncio.to_thread(next, chunks, None)) is not None:
            records = [
                (prefix, Record(entry.identity, _behind(entry), entry.key))
                for prefix, entry in entries
                if is_global(entry.identity) and not _within(prefix, own)
            ]
            source.upsert_many(records)
            restored += len(records)
    except DatapathError as error:
        logger.warning("addresses can not be restored from the pinned map: {}", error)
    return restored


def _bounds(pool: str) -> tuple[bytes, bytes]:
    network = ip_network(pool)
    return network.network_address.packed, network.broadcast_address.packed


def _behind(entry: IpcacheEntry) -> str:
    """Return the host that an entry of the map says its address is behind."""
    return "" if entry.tunnel_endpoint == NOWHERE else entry.tunnel_endpoint


def _within(prefix: str, pools: Iterable[tuple[bytes, bytes]]) -> bool:
    address = pack_ip(prefix.partition("/")[0])
    return any(len(first) == len(address) and first <= address <= last for first, last in pools)
