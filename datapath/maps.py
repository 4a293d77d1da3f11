# SPDX-License-Identifier: Apache-2.0
"""Typed maps: the data path's tables in records, one class per map.

Responsible for: records to bytes and back, and saying which records could not be written.  Which maps
there are and how they are opened is `datapath.mapspec`; its names are offered here as well.
Called by: the agent's reconcilers, the command line's `bpf …` verbs, `datapath.ctgc`.

Every method does system calls (0.1–10 ms); from the event loop call large ones in a thread.
"""

from __future__ import annotations

import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, Self, TypeVar

from core.errors import shorten
from datapath import layouts
from datapath.addresses import (
    pack_address,
    pack_ip,
    pack_mac,
    split_prefix,
    unpack_address,
    unpack_ip,
    unpack_mac,
)
from datapath.errors import DatapathError
from datapath.handle import MapHandle
from datapath.mapspec import GLOBALS, MapCatalogue, MapSpec, policy_map_name, unpin
from datapath.mapspec import open_or_create as open_or_create
from datapath.mapspec import open_pinned as open_pinned
from datapath.records import (
    CtEntry,
    CtKey,
    IpcacheEntry,
    LxcEntry,
    MetricsKey,
    MetricsValue,
    PolicyCounters,
    PolicyEntry,
    PolicyKey,
)

K = TypeVar("K")
V = TypeVar("V")

RawPolicyKey = tuple[int, int, int, int]  # PolicyKey, or any tuple of the same shape
RawPolicyEntry = tuple[bool, int]
_LPM_STATIC_BITS = 32  # of ipcache_key before the address: always compared
_UNPACKABLE = (ValueError, OSError, struct.error, OverflowError)


class TypedMap(ABC, Generic[K, V]):
    """A map of records; owns `handle`."""

    def __init__(self, handle: MapHandle) -> None:
        self.handle = handle

    @classmethod
    def open(cls, spec: MapSpec, root: Path = GLOBALS) -> Self:
        """Open the map pinned under `root` or create and pin it.  Raises LayoutMismatch, SyscallError."""
        return cls(open_or_create(spec, root))

    @classmethod
    def reader(cls, name: str, root: Path = GLOBALS) -> Self:
        """Open a pinned map for reading, whatever its size.  Raises SyscallError when there is none."""
        return cls(open_pinned(name, root))

    @property
    def name(self) -> str:
        return self.handle.name

    @property
    def fd(self) -> int:
        return self.handle.fd

    def close(self) -> None:
        self.handle.close()

    def upsert(self, items: Iterable[tuple[K, V]]) -> dict[K, DatapathError]:
        """Write all records in batches; return those that failed, with why (empty: all are in)."""
        keys: list[K] = []
        entries: list[tuple[bytes, bytes]] = []
        failed: dict[K, DatapathError] = {}
        for key, value in items:
            try:
                entries.append((self._pack_key(key), self._pack_value(value)))
            except _UNPACKABLE as error:
                failed[key] = self._unpackable(key, value, error)
            else:
                keys.append(key)
        for position, refused in self.handle.update_many(entries).items():
            failed[keys[position]] = refused
        return failed

    def delete(self, keys: Iterable[K]) -> int:
        """Delete records; return how many were there.  Raises DatapathError."""
        packed = []
        for key in keys:
            try:
                packed.append(self._pack_key(key))
            except _UNPACKABLE as error:
                raise self._unpackable(key, None, error) from error
        return self.handle.delete_many(packed)

    def get(self, key: K) -> V | None:
        """Return one record, or None.  Raises MapError."""
        value = self.handle.lookup(self._pack_key(key))
        return None if value is None else self._unpack_value(value)

    def items(self) -> Iterator[tuple[K, V]]:
        """Yield every record."""
        for key, value in self.handle.items():
            yield self._unpack_key(key), self._unpack_value(value)

    def keys(self) -> Iterator[K]:
        """Yield every key."""
        return (self._unpack_key(key) for key, _ in self.handle.items())

    def pressure(self) -> float:
        """Return how full the map is, 0 to 1; reads the whole map."""
        return self.handle.count() / self.handle.info.max_entries

    def _unpackable(self, key: K, value: V | None, error: Exception) -> DatapathError:
        return DatapathError(f"map {self.name}: {shorten(key)} = {shorten(value)} is no entry: {error}")

    @abstractmethod
    def _pack_key(self, key: K) -> bytes: ...

    @abstractmethod
    def _unpack_key(self, data: bytes) -> K: ...

    @abstractmethod
    def _pack_value(self, value: V) -> bytes: ...

    @abstractmethod
    def _unpack_value(self, data: bytes) -> V: ...


class _ByAddress(TypedMap[str, V]):
    """Maps whose key is one address (endpoint_key)."""

    def _pack_key(self, key: str) -> bytes:
        family, data = pack_address(key)
        return layouts.ENDPOINT_KEY.pack(data, family, 0, 0)

    def _unpack_key(self, data: bytes) -> str:
        address, family, _, _ = layouts.ENDPOINT_KEY.unpack(data)
        return unpack_address(family, address)


class LxcMap(_ByAddress[LxcEntry]):
    """cilium_lxc: the host's endpoints, and its own addresses, by address."""

    def _pack_value(self, value: LxcEntry) -> bytes:
        mac, node_mac = pack_mac(value.mac), pack_mac(value.node_mac)
        return layouts.ENDPOINT_INFO.pack(
            value.ifindex, 0, value.endpoint_id, value.flags, 0, mac, node_mac, bytes(16)
        )

    def _unpack_value(self, data: bytes) -> LxcEntry:
        ifindex, _, endpoint_id, flags, _, mac, node_mac, _ = layouts.ENDPOINT_INFO.unpack(data)
        return LxcEntry(ifindex, endpoint_id, flags, unpack_mac(mac), unpack_mac(node_mac))


class TunnelMap(_ByAddress[str]):
    """cilium_tunnel_map: first address of a host's pool → that host's address."""

    def _pack_value(self, value: str) -> bytes:
        return self._pack_key(value)

    def _unpack_value(self, data: bytes) -> str:
        return self._unpack_key(data)


class IpcacheMap(TypedMap[str, IpcacheEntry]):
    """cilium_ipcache: prefix ("10.0.0.0/24"; a single address is its /32 or /128) → identity.

    Bits of the address beyond the length are stored as given: normalise prefixes where they come in.
    """

    def _pack_key(self, key: str) -> bytes:
        family, data, bits = split_prefix(key)
        return layouts.IPCACHE_KEY.pack(bits + _LPM_STATIC_BITS, 0, 0, family, data)

    def _unpack_key(self, data: bytes) -> str:
        length, _, _, family, address = layouts.IPCACHE_KEY.unpack(data)
        return f"{unpack_address(family, address)}/{length - _LPM_STATIC_BITS}"

    def _pack_value(self, value: IpcacheEntry) -> bytes:
        identity, tunnel_endpoint, key = value
        return layouts.REMOTE_ENDPOINT_INFO.pack(identity, pack_ip(tunnel_endpoint), key, b"\0\0\0")

    def _unpack_value(self, data: bytes) -> IpcacheEntry:
        identity, tunnel_endpoint, key, _ = layouts.REMOTE_ENDPOINT_INFO.unpack(data)
        return IpcacheEntry(identity, unpack_ip(tunnel_endpoint), key)


class PolicyChange(NamedTuple):
    """What a write to a policy map did: `failed` holds what the kernel refused."""

    written: int
    deleted: int
    failed: dict[RawPolicyKey, DatapathError]


class PolicyMap(TypedMap[RawPolicyKey, RawPolicyEntry]):
    """cilium_policy_…: what one endpoint may receive and send.  Writing an entry zeroes its counters."""

    @classmethod
    def of(cls, endpoint_id: int, catalogue: MapCatalogue, root: Path = GLOBALS) -> Self:
        """Open or create an endpoint's map.  Raises LayoutMismatch, SyscallError."""
        return cls.open(catalogue.policy(endpoint_id), root)

    @staticmethod
    def remove(endpoint_id: int, root: Path = GLOBALS) -> bool:
        """Unpin an endpoint's map; return whether it was pinned."""
        return unpin(policy_map_name(endpoint_id), root)

    def apply(
        self, upserts: Iterable[tuple[RawPolicyKey, RawPolicyEntry]], deletes: Iterable[RawPolicyKey]
    ) -> PolicyChange:
        """Write, then delete: an allowed flow finds an entry at every moment.

        Only what found the map full is written once more after the deletions.
        """
        wanted = dict(upserts)
        failed = self.upsert(wanted.items())
        deleted = self.delete(deletes)
        if failed and deleted:
            failed = self.upsert((key, wanted[key]) for key in list(failed))
        return PolicyChange(len(wanted) - len(failed), deleted, failed)

    def sync(self, desired: Iterable[tuple[RawPolicyKey, RawPolicyEntry]]) -> PolicyChange:
        """Make the map equal to `desired`, touching (and zeroing the counters of) only what differs."""
        wanted = dict(desired)
        present = dict(self.items())
        upserts = [(key, entry) for key, entry in wanted.items() if present.get(key) != entry]
        return self.apply(upserts, [key for key in present if key not in wanted])

    def dump(self) -> Iterator[PolicyCounters]:
        """Yield every entry with its counters."""
        for key, value in self.handle.items():
            *_, packets, count = layouts.POLICY_ENTRY.unpack(value)
            yield PolicyCounters(self._unpack_key(key), self._unpack_value(value), packets, count)

    def _pack_key(self, key: RawPolicyKey) -> bytes:
        identity, dport, protocol, direction = key
        return layouts.POLICY_KEY.pack(identity, dport.to_bytes(2), protocol, direction & 1)

    def _unpack_key(self, data: bytes) -> PolicyKey:
        identity, dport, protocol, direction = layouts.POLICY_KEY.unpack(data)
        return PolicyKey(identity, int.from_bytes(dport), protocol, direction & 1)

    def _pack_value(self, value: RawPolicyEntry) -> bytes:
        deny, proxy_port = value
        return layouts.POLICY_ENTRY.pack(proxy_port.to_bytes(2), int(deny), 0, 0, 0, 0, 0)

    def _unpack_value(self, data: bytes) -> PolicyEntry:
        proxy_port, verdict, *_ = layouts.POLICY_ENTRY.unpack(data)
        return PolicyEntry(bool(verdict & 1), int.from_bytes(proxy_port))


class CtMap(TypedMap[CtKey, CtEntry]):
    """cilium_ct4_global and its like: conntrack of TCP, or of everything else.

    The tuple holds the addresses of the first packet swapped and its ports as they were.
    """

    def _pack_key(self, key: CtKey) -> bytes:
        layout = layouts.CT6_TUPLE if ":" in key.source else layouts.CT4_TUPLE
        return layout.pack(
            pack_ip(key.source),
            pack_ip(key.destination),
            key.destination_port.to_bytes(2),
            key.source_port.to_bytes(2),
            key.protocol,
            key.flags,
        )

    def _unpack_key(self, data: bytes) -> CtKey:
        layout = layouts.CT4_TUPLE if len(data) == layouts.CT4_TUPLE.size else layouts.CT6_TUPLE
        daddr, saddr, dport, sport, protocol, flags = layout.unpack(data)
        ports = int.from_bytes(sport), int.from_bytes(dport)
        return CtKey(unpack_ip(daddr), unpack_ip(saddr), *ports, protocol, flags)

    def _pack_value(self, value: CtEntry) -> bytes:
        return layouts.CT_ENTRY.pack(*value[:6], value.rev_nat_index.to_bytes(2), *value[7:])

    def _unpack_value(self, data: bytes) -> CtEntry:
        values = layouts.CT_ENTRY.unpack(data)
        return CtEntry._make((*values[:6], int.from_bytes(values[6]), *values[7:]))


class MetricsMap(TypedMap[MetricsKey, MetricsValue]):
    """cilium_metrics: packets by reason and direction; values are summed over CPUs, writing is for tests."""

    def _pack_key(self, key: MetricsKey) -> bytes:
        return layouts.METRICS_KEY.pack(key.reason, key.direction, 0, 0, 0)

    def _unpack_key(self, data: bytes) -> MetricsKey:
        reason, direction, *_ = layouts.METRICS_KEY.unpack(data)
        return MetricsKey(reason, direction & 3)

    def _pack_value(self, value: MetricsValue) -> bytes:
        first = layouts.METRICS_VALUE.pack(*value)
        return first.ljust(self.handle.value_size, b"\0")

    def _unpack_value(self, data: bytes) -> MetricsValue:
        parts = list(layouts.METRICS_VALUE.codec.iter_unpack(data))
        return MetricsValue(sum(part[0] for part in parts), sum(part[1] for part in parts))


class MonitorFlag(TypedMap[int, int]):
    """holdfast_monitor: one word; programs emit events only while it is not zero."""

    def set(self, flags: int) -> None:
        """Switch events on (non-zero) or off.  Raises MapError."""
        self.handle.update(self._pack_key(0), self._pack_value(flags))

    def _pack_key(self, key: int) -> bytes:
        return key.to_bytes(4, sys.byteorder)

    def _unpack_key(self, data: bytes) -> int:
        return int.from_bytes(data, sys.byteorder)

    def _pack_value(self, value: int) -> bytes:
        return self._pack_key(value)

    def _unpack_value(self, data: bytes) -> int:
        return self._unpack_key(data)


class EventsLost(TypedMap[int, int]):
    """holdfast_events_lost: events that found the ring full, over all CPUs."""

    def total(self) -> int:
        """Return how many were lost since the map was made.  Raises MapError."""
        return self.get(0) or 0

    def _pack_key(self, key: int) -> bytes:
        return key.to_bytes(4, sys.byteorder)

    def _unpack_key(self, data: bytes) -> int:
        return int.from_bytes(data, sys.byteorder)

    def _pack_value(self, value: int) -> bytes:
        return value.to_bytes(8, sys.byteorder).ljust(self.handle.value_size, b"\0")

    def _unpack_value(self, data: bytes) -> int:
        return sum(int.from_bytes(data[at : at + 8], sys.byteorder) for at in range(0, len(data), 8))
