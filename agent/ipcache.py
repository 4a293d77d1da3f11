# SPDX-License-Identifier: Apache-2.0
"""The table ip → identity, and its way into cilium_ipcache.

Where several sources speak of one prefix, the first of `SOURCES` wins: an address of this host is the
host, whatever etcd says; an own endpoint is what this agent says; a record in etcd beats a prefix that a
policy named (Cilium: a host entry beats a CIDR of the same /32).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from core.errors import HoldfastError
from core.reconciler import Reconciler
from core.table import Table
from datapath.addresses import host_prefix
from datapath.maps import IpcacheMap
from datapath.records import IpcacheEntry
from identity.numbers import HOST, WORLD

# Highest precedence first.
HOST_SOURCE = "host"  # addresses of this host
LOCAL_SOURCE = "local"  # endpoints of this host
NODES_SOURCE = "nodes"  # addresses of other nodes
KVSTORE_SOURCE = "kvstore"  # ip/v1 records of everybody
CIDR_SOURCE = "cidr"  # prefixes that policies name
BUILTIN_SOURCE = "builtin"  # 0.0.0.0/0 and ::/0 are the world
SOURCES = (HOST_SOURCE, LOCAL_SOURCE, NODES_SOURCE, KVSTORE_SOURCE, CIDR_SOURCE, BUILTIN_SOURCE)

# Prefixes looked at, and deleted, before anybody else may run: a few milliseconds.
PRUNED_AT_ONCE = 1024


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

    def __init__(self, ipcache: IpcacheMap, before: PolicyBarrier) -> None:
        self._map = ipcache
        self._before = before

    async def update(self, items: Sequence[tuple[str, Record]]) -> Mapping[str, Exception]:
        await self._before.wait_idle()
        return dict(self._map.upsert((prefix, _entry(record)) for prefix, record in items))

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        try:
            self._map.delete(keys)
        except HoldfastError as error:
            return dict.fromkeys(keys, error)
        return {}

    async def prune(self, table: IpTable) -> int:
        """Remove what is in the map and in no source's list.

        The map is read in a thread.  The table belongs to the loop, so it is looked at there, a slice at a
        time and right before the deletion: what came into it since the map was read stays.
        """
        found = await asyncio.to_thread(list, self._map.keys())
        removed = 0
        while found:
            stale = [prefix for prefix in found[-PRUNED_AT_ONCE:] if prefix not in table]
            del found[-PRUNED_AT_ONCE:]  # and not all at the end: to free 300 000 takes its time too
            removed += self._map.delete(stale) if stale else 0
            await asyncio.sleep(0)
        return removed


def reconciler(table: IpTable, ipcache: IpcacheMap, before: PolicyBarrier) -> Reconciler[str, Record]:
    return Reconciler("ipcache", table, IpcacheMapTarget(ipcache, before))


def _entry(record: Record) -> IpcacheEntry:
    # Encapsulation comes with registered nodes; until then nothing is tunnelled.
    return IpcacheEntry(record.identity, "0.0.0.0", record.key)
