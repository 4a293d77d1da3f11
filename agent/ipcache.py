# SPDX-License-Identifier: Apache-2.0
"""The table ip → identity, and its way into cilium_ipcache.

Where several sources speak of one prefix, the first of `SOURCES` wins: an address of this host is the
host, whatever etcd says; an own endpoint is what this agent says; a record in etcd beats a prefix that a
policy named (Cilium: a host entry beats a CIDR of the same /32).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from core.errors import HoldfastError
from core.reconciler import Reconciler
from core.table import Table
from datapath.addresses import host_prefix
from datapath.maps import IpcacheMap
from identity.numbers import HOST, WORLD

# Highest precedence first.
HOST_SOURCE = "host"  # addresses of this host
LOCAL_SOURCE = "local"  # endpoints of this host
NODES_SOURCE = "nodes"  # addresses of other nodes
KVSTORE_SOURCE = "kvstore"  # ip/v1 records of everybody
CIDR_SOURCE = "cidr"  # prefixes that policies name
BUILTIN_SOURCE = "builtin"  # 0.0.0.0/0 and ::/0 are the world
SOURCES = (HOST_SOURCE, LOCAL_SOURCE, NODES_SOURCE, KVSTORE_SOURCE, CIDR_SOURCE, BUILTIN_SOURCE)

# So many entries are written before anybody else may run: three milliseconds.  In a thread it would take
# longer: half of it is Python's, and the two would wait for each other.
WRITTEN_AT_ONCE = 1024
# Prefixes deleted before anybody else may run: a few milliseconds.
PRUNED_AT_ONCE = 1024
LOOKED_AT_ONCE = 16_384  # the same of entries that are only compared

NOWHERE = "0.0.0.0"  # a tunnel endpoint that is none


class Record(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Who a prefix is, and what etcd says beside it."""

    identity: int
    host_ip: str = ""
    key: int = 0
    metadata: str = ""
    space: str = ""  # the address space of the key that it was read from


IpTable = Table[str, Record]


def new_table(*, ipv6: bool = False) -> IpTable:
    """Return the table with what is always in it."""
    table: IpTable = Table("ipcache", SOURCES)
    builtin = table.source(BUILTIN_SOURCE)
    for everywhere in ("0.0.0.0/0", "::/0") if ipv6 else ("0.0.0.0/0",):
        builtin.upsert(everywhere, Record(WORLD))
    builtin.mark_in_sync()
    return table


def set_host_addresses(table: IpTable, addresses: Iterable[str]) -> None:
    """Make the host's source hold exactly these addresses; they are this host, now."""
    source = table.source(HOST_SOURCE)
    source.relist({host_prefix(address): Record(HOST) for address in addresses}, grace=0)
    source.mark_in_sync()


class PolicyBarrier(Protocol):
    """Lets a write wait until the policy maps know every identity that is about to be used."""

    async def wait_idle(self) -> None: ...


class IpcacheMapTarget:
    """Operations over cilium_ipcache.  Policy maps first: an entry never names what no map knows yet."""

    def __init__(
        self,
        ipcache: IpcacheMap,
        before: PolicyBarrier,
        hosts: Container[str] = (),
        *,
        is_ours: bool = False,
    ) -> None:
        self._map = ipcache
        self._before = before
        self._hosts = hosts
        self._is_ours = is_ours  # made by this process, and written by nobody but this target

    async def update(self, items: Sequence[tuple[str, Record]]) -> Mapping[str, Exception]:
        await self._before.wait_idle()
        # Encapsulate to registered nodes only: of a record in etcd the host may be anybody's word.
        hosts = self._hosts
        entries = [
            (prefix, (each.identity, host if (host := each.host_ip) in hosts else NOWHERE, each.key))
            for prefix, each in items
        ]
        return dict(self._map.upsert(entries))

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        try:
            self._map.delete(keys)
        except HoldfastError as error:
            return dict.fromkeys(keys, error)
        return {}

    async def prune(self, table: IpTable) -> int:
        """Remove what is in the map and in no source's list.

        The map is read in a thread, a chunk at a time.  The table belongs to the loop, so it is looked at
        there, and again right before the deletion: what came into it since the map was read stays.
        """
        if self._is_ours:
            self._is_ours = False  # by the next time somebody may have found it
            return 0
        chunks, stale = self._map.key_chunks(), list[str]()
        while (found := await asyncio.to_thread(next, chunks, None)) is not None:
            stale += [prefix for prefix in found if prefix not in table]
        removed = 0
        for start in range(0, len(stale), PRUNED_AT_ONCE):
            unwanted = [prefix for prefix in stale[start : start + PRUNED_AT_ONCE] if prefix not in table]
            removed += self._map.delete(unwanted)
            await asyncio.sleep(0)
        return removed


def reconciler(
    table: IpTable, ipcache: IpcacheMap, before: PolicyBarrier, hosts: Container[str] = ()
) -> Reconciler[str, Record]:
    """Return the map's reconciler; `hosts` are those that packets are encapsulated to, as of each write."""
    target = IpcacheMapTarget(ipcache, before, hosts, is_ours=ipcache.handle.is_new)
    return Reconciler("ipcache", table, target, batch=WRITTEN_AT_ONCE)


async def used(table: IpTable, numbers: Collection[int]) -> set[int]:
    """Return those of these identities that an address has, by any source; the loop gets its turn."""
    found: set[int] = set()
    for source in table.sources:
        records = list(source.entries().values())
        for at in range(0, len(records), LOOKED_AT_ONCE):
            some = records[at : at + LOOKED_AT_ONCE]
            found.update(record.identity for record in some if record.identity in numbers)
            await asyncio.sleep(0)
    return found


async def behind(table: IpTable, hosts: Container[str]) -> list[str]:
    """Return the prefixes that records say lie behind these hosts; the loop gets its turn meanwhile."""
    found: list[str] = []
    for source in table.sources:
        entries = list(source.entries().items())
        for at in range(0, len(entries), LOOKED_AT_ONCE):
            some = entries[at : at + LOOKED_AT_ONCE]
            found += [prefix for prefix, record in some if record.host_ip in hosts]
            await asyncio.sleep(0)
    return found
