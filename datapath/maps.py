# SPDX-License-Identifier: Apache-2.0
"""Typed maps: the data path's tables in records, one class per map.

Responsible for: records to bytes and back, and saying which records could not be written.  Which maps
there are and how they are opened is `datapath.mapspec`; its names are offered here as well.
Called by: the agent's reconcilers, the command line's `bpf …` verbs, `datapath.ctgc`.

Every method does system calls (0.1–10 ms); from the event loop call large ones in a thread.
"""

from __future__ import annotations

import errno
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from socket import AF_INET, inet_pton
from typing import Generic, NamedTuple, Self, TypeVar, cast

from core.errors import shorten
from datapath import layouts
from datapath.addresses import (
    FAMILY4,
    pack_address,
    pack_ip,
    pack_mac,
    split_prefix,
    unpack_address,
    unpack_ip,
    unpack_mac,
)
from datapath.errors import DatapathError, map_error
from datapath.grace import let_programs_end
from datapath.handle import MapHandle
from datapath.mapspec import GLOBALS, MapCatalogue, MapSpec, policy_map_name, unpin
from datapath.mapspec import open_or_create as open_or_create
from datapath.mapspec import open_pinned as open_pinned
from datapath.policy_order import RawPolicyEntry as RawPolicyEntry
from datapath.policy_order import RawPolicyKey as RawPolicyKey
from datapath.policy_order import RawPolicyMap, Write, in_order, replacing
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
    RawIpcacheEntry,
)

K = TypeVar("K")
V = TypeVar("V")

_LPM_STATIC_BITS = 32  # of ipcache_key before the address: always compared
# What stands before and behind the four bytes of a single IPv4 address in an ipcache_key.
_SINGLE4 = layouts.IPCACHE_KEY.pack(32 + _LPM_STATIC_BITS, 0, 0, FAMILY4, bytes(16))[:-16]
_PADDING4 = bytes(12)
_pack_remote = layouts.REMOTE_ENDPOINT_INFO.codec.pack
_pack_host = lru_cache(maxsize=1 << 14)(pack_ip)  # a fleet has more addresses than hosts
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
        wanted, failed = list(items), dict[K, DatapathError]()
        try:
            keys, values = self._pack(wanted)
        except _UNPACKABLE:
            wanted, failed = self._packable(wanted)
            keys, values = self._pack(wanted)
        for position, refused in self.handle.update_many(keys, values).items():
            failed[wanted[position][0]] = refused
        return failed

    def _pack(self, items: Sequence[tuple[K, V]]) -> tuple[list[bytes], list[bytes]]:
        """Return keys and values as the kernel has them."""
        return [self._pack_key(key) for key, _ in items], [self._pack_value(value) for _, value in items]

    def _packable(self, items: Sequence[tuple[K, V]]) -> tuple[list[tuple[K, V]], dict[K, DatapathError]]:
        """Return those records that can be packed, and why the others can not."""
        good, failed = list[tuple[K, V]](), dict[K, DatapathError]()
        for key, value in items:
            try:
                self._pack([(key, value)])
            except _UNPACKABLE as error:
                failed[key] = self._unpackable(key, value, error)
            else:
                good.append((key, value))
        return good, failed

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
        return chain.from_iterable(self.item_chunks())

    def item_chunks(self) -> Iterator[list[tuple[K, V]]]:
        """Yield every record, some thousand at a time: each step is one system call."""
        for keys, values, _ in self.handle.chunks():
            size = self.handle.value_size
            each = (values[at : at + size] for at in range(0, len(values), size))
            yield list(zip(self._unpack_keys(keys), map(self._unpack_value, each), strict=True))

    def keys(self) -> Iterator[K]:
        """Yield every key."""
        return chain.from_iterable(self.key_chunks())

    def key_chunks(self) -> Iterator[list[K]]:
        """Yield every key, some thousand at a time: each step is one system call.

        Delete nothing before the end: the kernel goes on from the last key of a chunk.
        """
        return (self._unpack_keys(keys) for keys, _, _ in self.handle.chunks())

    def pressure(self) -> float:
        """Return how full the map is, 0 to 1; reads the whole map."""
        return self.handle.count() / self.handle.info.max_entries

    def _unpackable(self, key: K, value: V | None, error: Exception) -> DatapathError:
        return DatapathError(f"map {self.name}: {shorten(key)} = {shorten(value)} is no entry: {error}")

    def _unpack_keys(self, data: bytes) -> list[K]:
        size = self.handle.info.key_size
        return [self._unpack_key(data[at : at + size]) for at in range(0, len(data), size)]

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


class PathMtuMap(_ByAddress[int]):
    """holdfast_path_mtu: another host's address → the longest packet, from its IP header on, that arrives."""

    def _pack_value(self, value: int) -> bytes:
        return value.to_bytes(4, sys.byteorder)

    def _unpack_value(self, data: bytes) -> int:
        return int.from_bytes(data, sys.byteorder)


class IpcacheMap(TypedMap[str, IpcacheEntry]):
    """cilium_ipcache: prefix ("10.0.0.0/24"; a single address is its /32 or /128) → identity.

    Bits of the address beyond the length are stored as given: normalise prefixes where they come in.
    """

    def upsert(self, items: Iterable[tuple[str, RawIpcacheEntry]]) -> dict[str, DatapathError]:
        """Write records, or plain tuples of their shape; see TypedMap."""
        return super().upsert(cast("Iterable[tuple[str, IpcacheEntry]]", items))

    def _pack(self, items: Sequence[tuple[str, RawIpcacheEntry]]) -> tuple[list[bytes], list[bytes]]:
        # Single IPv4 addresses, which nearly all of a hundred thousand are, without a call for each part.
        keys = [
            _SINGLE4 + inet_pton(AF_INET, key[:-3]) + _PADDING4
            if key.endswith("/32") and ":" not in key
            else self._pack_key(key)
            for key, _ in items
        ]
        values = [
            _pack_remote(identity, _pack_host(tunnel_endpoint), encryption_key, b"\0\0\0")
            for _, (identity, tunnel_endpoint, encryption_key) in items
        ]
        return keys, values

    def _pack_key(self, key: str) -> bytes:
        family, data, bits = split_prefix(key)
        return layouts.IPCACHE_KEY.pack(bits + _LPM_STATIC_BITS, 0, 0, family, data)

    def _unpack_key(self, data: bytes) -> str:
        (prefix,) = self._unpack_keys(data)
        return prefix

    def _unpack_keys(self, data: bytes) -> list[str]:
        return [
            f"{unpack_address(family, address)}/{length - _LPM_STATIC_BITS}"
            for length, _, _, family, address in layouts.IPCACHE_KEY.codec.iter_unpack(data)
        ]

    def _pack_value(self, value: IpcacheEntry) -> bytes:
        identity, tunnel_endpoint, key = value
        return _pack_remote(identity, _pack_host(tunnel_endpoint), key, b"\0\0\0")

    def _unpack_value(self, data: bytes) -> IpcacheEntry:
        identity, tunnel_endpoint, key, _ = layouts.REMOTE_ENDPOINT_INFO.unpack(data)
        return IpcacheEntry(identity, unpack_ip(tunnel_endpoint), key)


class PolicyChange(NamedTuple):
    """What a write to a policy map did: `failed` holds what the kernel refused, which ended the change."""

    written: int
    deleted: int
    failed: dict[RawPolicyKey, DatapathError]


# A change under way: it pauses wherever programs that run have to end before it goes on.
PolicyWriting = Generator[None, None, PolicyChange]


class PolicyMap(TypedMap[RawPolicyKey, RawPolicyEntry]):
    """cilium_policy_…: what one endpoint may receive and send.  Writing an entry zeroes its counters.

    A change is made in the order of `datapath.policy_order`, which says why.  `applying` and `syncing` pause
    where it has to wait; `apply` and `sync` wait.  It ends at the first rank of which an entry was refused,
    between the old policy and the new one; what does not fit into the map at all is refused before anything
    is written.  Only one object may write to an endpoint's map.
    """

    def __init__(self, handle: MapHandle) -> None:
        super().__init__(handle)
        self._changes = 0
        # The map holds no more entries than that; None: nobody has counted.
        self._most: int | None = None

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
        """Write and delete entries; blocks while programs have to end."""
        return _at_once(self.applying(upserts, deletes))

    def sync(self, desired: Iterable[tuple[RawPolicyKey, RawPolicyEntry]]) -> PolicyChange:
        """Make the map equal to `desired`; blocks while programs have to end."""
        return _at_once(self.syncing(desired))

    def applying(
        self, upserts: Iterable[tuple[RawPolicyKey, RawPolicyEntry]], deletes: Iterable[RawPolicyKey]
    ) -> PolicyWriting:
        """Write and delete entries; no key may be in both."""
        new, gone = dict(upserts), set(deletes)
        if self._has_room(len(new)):
            return (yield from self._write(in_order(new.items(), gone)))
        present = dict(self.items())
        kept = {key: entry for key, entry in present.items() if key not in gone}
        return (yield from self._change(present, kept | new))

    def syncing(self, desired: Iterable[tuple[RawPolicyKey, RawPolicyEntry]]) -> PolicyWriting:
        """Make the map equal to `desired`, touching (and zeroing the counters of) only what differs."""
        return (yield from self._change(dict(self.items()), dict(desired)))

    def _change(self, present: RawPolicyMap, wanted: RawPolicyMap) -> PolicyWriting:
        self._most = len(present)
        size = self.handle.info.max_entries
        if len(wanted) > size:
            full = map_error(self.name, "update", errno.E2BIG)
            return PolicyChange(0, 0, dict.fromkeys(wanted.keys() - present.keys(), full))
        return (yield from self._write(replacing(present, wanted, size)))

    def _write(self, writes: Iterable[Write]) -> PolicyWriting:
        self._changes = turn = self._changes + 1
        written = deleted = 0
        for each in writes:
            if each.waits:
                yield
                if turn != self._changes:
                    raise DatapathError(f"map {self.name}: another change came in between")
            failed = self.upsert(each.upserts)
            written += len(each.upserts) - len(failed)
            if failed:
                return PolicyChange(written, deleted, failed)
            deleted += self.delete(each.deletes)
        return PolicyChange(written, deleted, {})

    def _has_room(self, more: int) -> bool:
        """True if that many entries more fit for certain; counts only when what is known does not tell."""
        size = self.handle.info.max_entries
        if more and (self._most is None or self._most + more > size):
            self._most = self.handle.count()
        return not more or (self._most or 0) + more <= size

    def upsert(
        self, items: Iterable[tuple[RawPolicyKey, RawPolicyEntry]]
    ) -> dict[RawPolicyKey, DatapathError]:
        """Write records without regard to what packets meet meanwhile; see TypedMap."""
        entries = list(items)
        if self._most is not None:
            self._most += len(entries)
        return super().upsert(entries)

    def delete(self, keys: Iterable[RawPolicyKey]) -> int:
        """Delete records without regard to what packets meet meanwhile; see TypedMap."""
        deleted = super().delete(keys)
        if self._most is not None:
            self._most -= deleted
        return deleted

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
        deny, proxy_port, until = value
        low, high = until & 0xFFFF, until >> 16
        return layouts.POLICY_ENTRY.pack(proxy_port.to_bytes(2), int(deny), 0, low, high, 0, 0)

    def _unpack_value(self, data: bytes) -> PolicyEntry:
        proxy_port, verdict, _, low, high, *_ = layouts.POLICY_ENTRY.unpack(data)
        return PolicyEntry(bool(verdict & 1), int.from_bytes(proxy_port), low | high << 16)


def _at_once(writing: PolicyWriting) -> PolicyChange:
    while True:
        try:
            next(writing)
        except StopIteration as ended:
            change: PolicyChange = ended.value
            return change
        let_programs_end()


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
