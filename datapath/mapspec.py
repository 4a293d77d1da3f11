# SPDX-License-Identifier: Apache-2.0
"""Which maps there are: name, type, shapes, size and flags of each, and how a pinned one is opened.

Responsible for: the catalogue (Cilium 1.11's names and defaults) and the refusal of a pinned map that
differs.  Called by: `datapath.maps` and, for the descriptors that programs are loaded with, the loader.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from datapath import syscall
from datapath.btf import BtfBuilder, Shape
from datapath.errors import LayoutMismatch, SyscallError
from datapath.handle import MapHandle
from datapath.layouts import (
    CT4_TUPLE,
    CT6_TUPLE,
    CT_ENTRY,
    ENDPOINT_INFO,
    ENDPOINT_KEY,
    FRAG4_KEY,
    FRAG4_PORTS,
    FRAG6_KEY,
    FRAG6_PORTS,
    IPCACHE_KEY,
    METRICS_KEY,
    METRICS_VALUE,
    POLICY_ENTRY,
    POLICY_KEY,
    REMOTE_ENDPOINT_INFO,
    U32,
    U64,
)
from datapath.uapi import NAME_LENGTH, NO_PREALLOC, MapType

GLOBALS = Path("/sys/fs/bpf/tc/globals")  # where Cilium and iproute2 pin

_WITHOUT_BTF = frozenset({MapType.PROG_ARRAY, MapType.PERF_EVENT_ARRAY, MapType.RINGBUF})


@dataclass(frozen=True)
class MapSpec:
    """What a map must be; sizes in bytes come from the shapes."""

    name: str
    type: MapType
    key: Shape
    value: Shape
    max_entries: int
    flags: int = 0

    def differences(self, info: syscall.MapInfo) -> tuple[str, ...]:
        """Return how a map that exists differs, one sentence each; empty when it fits."""
        wanted = (self.type, self.key.size, self.value.size, self.max_entries, self.flags)
        found = (info.type, info.key_size, info.value_size, info.max_entries, info.flags)
        names = ("type", "key size", "value size", "max entries", "flags")
        return tuple(
            f"{name} is {_shown(name, have)}, expected {_shown(name, want)}"
            for name, have, want in zip(names, found, wanted, strict=True)
            if have != want
        )


def _shown(name: str, value: int) -> str:
    if name == "type":
        with contextlib.suppress(ValueError):
            return MapType(value).name.lower()
    return hex(value) if name == "flags" else str(value)


@dataclass(frozen=True)
class MapCatalogue:
    """Every map of a host; the sizes are options of the agent, the defaults are Cilium 1.11's.

    `preallocate` False saves memory per map (for 500 endpoints' policy maps: 0.7 GB) at some latency.
    """

    ct_tcp_max: int = 524_288
    ct_any_max: int = 262_144
    policy_max: int = 16_384
    fragments_max: int = 8_192
    preallocate: bool = True
    enable_ipv6: bool = False

    @property
    def _hash_flags(self) -> int:
        return 0 if self.preallocate else NO_PREALLOC

    @property
    def lxc(self) -> MapSpec:
        return MapSpec("cilium_lxc", MapType.HASH, ENDPOINT_KEY, ENDPOINT_INFO, 65_535, self._hash_flags)

    @property
    def ipcache(self) -> MapSpec:
        return MapSpec(
            "cilium_ipcache", MapType.LPM_TRIE, IPCACHE_KEY, REMOTE_ENDPOINT_INFO, 512_000, NO_PREALLOC
        )

    def call_policy(self, *, family: int = 4) -> MapSpec:
        """Ingress policy programs by endpoint id; Cilium's serve both families, ours one each."""
        name = "cilium_call_policy" if family == 4 else "holdfast_call_policy6"
        return MapSpec(name, MapType.PROG_ARRAY, U32, U32, 65_535)

    @property
    def metrics(self) -> MapSpec:
        return MapSpec(
            "cilium_metrics", MapType.PERCPU_HASH, METRICS_KEY, METRICS_VALUE, 1_024, self._hash_flags
        )

    @property
    def tunnel(self) -> MapSpec:
        return MapSpec(
            "cilium_tunnel_map", MapType.HASH, ENDPOINT_KEY, ENDPOINT_KEY, 65_536, self._hash_flags
        )

    def fragments(self, *, family: int = 4) -> MapSpec:
        """The ports of fragmented datagrams; Cilium 1.11 has none for IPv6, where it drops them."""
        key, ports = (FRAG4_KEY, FRAG4_PORTS) if family == 4 else (FRAG6_KEY, FRAG6_PORTS)
        name = f"cilium_ipv{family}_frag_datagrams"
        return MapSpec(name, MapType.LRU_HASH, key, ports, self.fragments_max)

    @property
    def path_mtu(self) -> MapSpec:
        """Not Cilium's: hosts that less arrives at than this host's devices send; most have no entry."""
        return MapSpec("holdfast_path_mtu", MapType.HASH, ENDPOINT_KEY, U32, 65_536, NO_PREALLOC)

    @property
    def monitor(self) -> MapSpec:
        """Not Cilium's: one word that says whether programs emit events at all."""
        return MapSpec("holdfast_monitor", MapType.ARRAY, U32, U32, 1)

    @property
    def events_lost(self) -> MapSpec:
        """Not Cilium's: how many events found the ring full, per CPU."""
        return MapSpec("holdfast_events_lost", MapType.PERCPU_ARRAY, U32, U64, 1)

    def policy(self, endpoint_id: int) -> MapSpec:
        return MapSpec(
            policy_map_name(endpoint_id),
            MapType.HASH,
            POLICY_KEY,
            POLICY_ENTRY,
            self.policy_max,
            self._hash_flags,
        )

    def ct(self, *, tcp: bool, family: int = 4) -> MapSpec:
        """The global conntrack map of TCP or of everything else, for one address family (4 or 6)."""
        size = self.ct_tcp_max if tcp else self.ct_any_max
        tuples = CT4_TUPLE if family == 4 else CT6_TUPLE
        name = f"cilium_ct{'' if tcp else '_any'}{family}_global"
        return MapSpec(name, MapType.LRU_HASH, tuples, CT_ENTRY, size)

    def shared(self) -> tuple[MapSpec, ...]:
        """Return the maps that a host has once; policy maps come with their endpoint."""
        maps = [
            self.lxc,
            self.ipcache,
            self.metrics,
            self.tunnel,
            self.path_mtu,
            self.monitor,
            self.events_lost,
        ]
        for family in self.families:
            maps += [self.ct(tcp=True, family=family), self.ct(tcp=False, family=family)]
            maps += [self.fragments(family=family), self.call_policy(family=family)]
        return tuple(maps)

    @property
    def families(self) -> tuple[int, ...]:
        """Return the address families that this host has: 4, and 6 with `enable_ipv6`."""
        return (4, 6) if self.enable_ipv6 else (4,)


def policy_map_name(endpoint_id: int) -> str:
    return f"cilium_policy_{endpoint_id:05d}"


def events_ring(size: int) -> MapSpec:
    """The ring of events, unpinned: `size` bytes, a power of two and a multiple of the page size."""
    return MapSpec("cilium_events", MapType.RINGBUF, _NOTHING, _NOTHING, size)


_NOTHING = replace(U32, name="void", size=0, align=0)


def create(spec: MapSpec) -> MapHandle:
    """Create a map that is pinned nowhere.  Raises MapError."""
    with _types_of(spec) as btf:
        fd = syscall.map_create(
            spec.name, spec.type, spec.key.size, spec.value.size, spec.max_entries, spec.flags, btf=btf
        )
    return MapHandle(spec.name, fd, is_new=True)


def open_pinned(name: str, root: Path = GLOBALS) -> MapHandle:
    """Open a pinned map as it is, for readers.  Raises SyscallError (ENOENT: there is none)."""
    return MapHandle(name, syscall.obj_get(root / name))


def open_or_create(spec: MapSpec, root: Path = GLOBALS) -> MapHandle:
    """Open the map pinned under `root`, or create and pin it.

    Raises LayoutMismatch when a pinned map differs from `spec` (it is left alone), SyscallError when
    the kernel refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        return _open_checked(spec, root / spec.name)
    handle = create(spec)
    try:
        syscall.obj_pin(handle.fd, root / spec.name)
    except SyscallError as error:
        handle.close()
        if error.errno == errno.EEXIST:  # somebody else was faster
            return _open_checked(spec, root / spec.name)
        raise
    return handle


def unpin(name: str, root: Path = GLOBALS) -> bool:
    """Remove the pin of a map; return whether there was one.  The map goes with its last user."""
    try:
        os.unlink(root / name)
    except FileNotFoundError:
        return False
    return True


def _open_checked(spec: MapSpec, path: Path) -> MapHandle:
    try:
        handle = MapHandle(spec.name, syscall.obj_get(path))
    except SyscallError as error:
        if error.errno == errno.ENOENT:
            raise FileNotFoundError(path) from error
        raise
    differences = spec.differences(handle.info)
    if differences:
        handle.close()
        raise LayoutMismatch(str(path), differences)
    return handle


@contextlib.contextmanager
def _types_of(spec: MapSpec) -> Iterator[tuple[int, int, int]]:
    """Yield descriptor, key type and value type of the map's BTF; zeros where there can be none."""
    if spec.type in _WITHOUT_BTF:
        yield (0, 0, 0)
        return
    builder = BtfBuilder()
    key, value = builder.add(spec.key), builder.add(spec.value)
    try:
        fd = syscall.btf_load(builder.blob())
    except SyscallError:  # a kernel without BTF: the map works, dumps show bytes
        yield (0, 0, 0)
        return
    try:
        yield (fd, key, value)
    finally:
        os.close(fd)


__all__ = [
    "GLOBALS",
    "NAME_LENGTH",
    "MapCatalogue",
    "MapSpec",
    "create",
    "events_ring",
    "open_or_create",
    "open_pinned",
    "policy_map_name",
    "unpin",
]
