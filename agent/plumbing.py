# SPDX-License-Identifier: Apache-2.0
"""The target of the endpoints' reconciler: interface, programs, endpoint map, route.

An endpoint that is connected has, in this order: a policy map (empty at first: everything is denied), a
veth pair, its programs on the host side, its place in the endpoint map and a host route.  A new identity
is one word that the running programs read.  Everything is idempotent: a restarted
agent runs through the same code and finds most of it in place.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from loguru import logger

from agent.endpoint import Endpoint
from core import metrics
from core.errors import HoldfastError
from core.table import Table
from datapath.addresses import host_prefix
from datapath.allowall import laid_over
from datapath.devices import Device, Devices, host_name
from datapath.errors import DatapathError, DeviceError, SyscallError
from datapath.maps import LxcMap, PolicyMap, PolicyWriting, RawPolicyEntry, RawPolicyKey
from datapath.mapspec import MapCatalogue, policy_map_name
from datapath.policy_order import RawPolicyMap
from datapath.records import ENDPOINT_IS_HOST, LxcEntry
from datapath.routes import EndpointRoute, Routes
from policy.model import PolicyEntry, PolicyKey

# Several changes of one start come within milliseconds; a refresh comes after half an hour and looks again.
TRUSTED_S = 60.0


class Programs(Protocol):
    """Loads and attaches an endpoint's programs (agent.programs)."""

    async def load(self, endpoint: Endpoint, ifindex: int, policy_map: PolicyMap) -> None: ...

    def set_identity(self, endpoint_id: int, identity: int) -> None: ...

    async def attached(self, endpoint: Endpoint, ifindex: int) -> bool: ...

    def unload(self, endpoint_id: int) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where this host keeps things: `root` holds the pinned maps."""

    root: Path
    mtu: int
    pools: tuple[str, ...]
    # By family: the host's address when it speaks to endpoints, best first; those of IPv6 come and go.
    sources: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Placed:
    """What was put into the kernel for an endpoint, and until when (monotonic s) nobody looks again."""

    ifindex: int
    identity: int
    addresses: tuple[str, ...]
    mac: str
    trusted_until: float

    def stands(self, endpoint: Endpoint) -> bool:
        same = (self.addresses, self.mac) == (tuple(endpoint.addresses.values()), endpoint.mac)
        return same and time.monotonic() < self.trusted_until


def _nothing_ordered(endpoint_id: int) -> RawPolicyMap:
    return {}


class PolicyMapStore:
    """The open policy maps of this host's endpoints, by endpoint id (PolicyTarget of agent.policy_maps).

    `ordered` says which entries an operator has ordered for an endpoint (`agent.allow_all`): whatever is
    written, they stay.
    """

    def __init__(
        self, catalogue: MapCatalogue, root: Path, ordered: Callable[[int], RawPolicyMap] = _nothing_ordered
    ) -> None:
        self._catalogue = catalogue
        self._root = root
        self._ordered = ordered
        self._open: dict[int, PolicyMap] = {}
        # Maps that went with their interface: a late change of policy must not make them anew.
        self._removed: set[int] = set()

    def make(self, endpoint_id: int, *, empty: bool) -> PolicyMap:
        """Return the map for an interface; `empty` for a new one, which must not inherit what it allows."""
        self._removed.discard(endpoint_id)
        policy_map = self.get(endpoint_id)
        if empty:
            policy_map.sync(self._ordered(endpoint_id).items())
        return policy_map

    def get(self, endpoint_id: int) -> PolicyMap:
        """Return the endpoint's map, opened or created and pinned.  Raises DatapathError."""
        found = self._open.get(endpoint_id)
        if found is None:
            found = self._open[endpoint_id] = PolicyMap.of(endpoint_id, self._catalogue, self._root)
        return found

    def applying(
        self, endpoint_id: int, upserts: Mapping[PolicyKey, PolicyEntry], deletes: set[PolicyKey]
    ) -> Iterator[None]:
        """Change the map; see `agent.policy_maps.PolicyTarget`."""
        if endpoint_id not in self._removed:
            changed: Iterable[tuple[RawPolicyKey, RawPolicyEntry]] = upserts.items()
            gone: Iterable[RawPolicyKey] = deletes
            if added := self._ordered(endpoint_id):
                over, gone = laid_over(changed, gone, added)
                changed = over.items()
            yield from self._written(endpoint_id, self.get(endpoint_id).applying(changed, gone))

    def replacing(self, endpoint_id: int, wanted: Mapping[PolicyKey, PolicyEntry]) -> Iterator[None]:
        """Make the map hold exactly `wanted`; see `agent.policy_maps.PolicyTarget`."""
        if endpoint_id not in self._removed:
            whole: Iterable[tuple[RawPolicyKey, RawPolicyEntry]] = wanted.items()
            if added := self._ordered(endpoint_id):
                whole = laid_over(whole, added.keys() - wanted.keys(), added)[0].items()
            yield from self._written(endpoint_id, self.get(endpoint_id).syncing(whole))

    def _written(self, endpoint_id: int, writing: PolicyWriting) -> Iterator[None]:
        """Make a change and raise what was refused; nothing more once the map is removed."""
        try:
            while True:
                next(writing)
                yield
                if endpoint_id in self._removed:
                    return
        except StopIteration as ended:
            _raise_first(ended.value.failed)

    def remove(self, endpoint_id: int) -> None:
        """Close and unpin a map; its programs must be gone."""
        self._removed.add(endpoint_id)
        found = self._open.pop(endpoint_id, None)
        if found is not None:
            found.close()
        PolicyMap.remove(endpoint_id, self._root)

    def held(self, endpoint_id: int) -> Mapping[RawPolicyKey, RawPolicyEntry]:
        """Return what a pinned map holds of a policy, nothing without one.  Raises DatapathError."""
        try:
            with PolicyMap.reader(policy_map_name(endpoint_id), self._root).handle as handle:
                return {key: entry for key, entry in PolicyMap(handle).items() if not entry[2]}
        except SyscallError as error:
            if error.errno == errno.ENOENT:
                return {}
            raise

    def pinned(self) -> set[int]:
        """Return the endpoint ids of every policy map under the root."""
        names = (path.name.rpartition("_")[2] for path in self._root.glob("cilium_policy_*"))
        return {int(name) for name in names if name.isdigit()}


class EndpointTarget:
    """Operations over the endpoints; only the reconciler's task calls it."""

    def __init__(
        self,
        place: Place,
        devices: Devices,
        routes: Routes,
        lxc: LxcMap,
        policy_maps: PolicyMapStore,
        programs: Programs,
    ) -> None:
        self._place = place
        self._devices = devices
        self._routes = routes
        self._lxc = lxc
        self._policy_maps = policy_maps
        self._programs = programs
        self._placed: dict[int, Placed] = {}

    async def update(self, items: Sequence[tuple[int, Endpoint]]) -> Mapping[int, Exception]:
        failed: dict[int, Exception] = {}
        for endpoint_id, endpoint in items:
            try:
                if endpoint.connected:
                    await self._connect(endpoint)
                else:
                    await self._disconnect(endpoint_id, endpoint.addresses.values(), endpoint.interface)
            except (HoldfastError, OSError) as error:
                failed[endpoint_id] = error
        return failed

    async def delete(self, keys: Sequence[int]) -> Mapping[int, Exception]:
        failed: dict[int, Exception] = {}
        for endpoint_id in keys:
            placed = self._placed.get(endpoint_id)
            try:
                await self._disconnect(endpoint_id, placed.addresses if placed else (), "")
            except (HoldfastError, OSError) as error:
                failed[endpoint_id] = error
        return failed

    async def prune(self, table: Table[int, Endpoint]) -> int:
        """Remove interfaces, routes, map entries and maps of endpoints that nobody has."""
        endpoints = [endpoint for _, endpoint in table.items() if endpoint.connected]
        ids = {endpoint.id for endpoint in endpoints}
        addresses = {address for endpoint in endpoints for address in endpoint.addresses.values()}
        removed = len(await self._devices.collect_leaks(ids))
        removed += len(await self._routes.prune({*map(host_prefix, addresses), *self._place.pools}))
        stale = [
            address
            for address, entry in self._lxc.items()
            if address not in addresses and not entry.flags & ENDPOINT_IS_HOST
        ]
        removed += self._lxc.delete(stale) if stale else 0
        for endpoint_id in self._policy_maps.pinned() - ids:
            self._programs.unload(endpoint_id)
            self._policy_maps.remove(endpoint_id)
            removed += 1
        return removed

    async def _connect(self, endpoint: Endpoint) -> None:
        """Put an endpoint in place; what was put or looked at a moment ago only gets its identity."""
        placed = self._placed.get(endpoint.id)
        if placed is not None and placed.stands(endpoint):
            self._identify(endpoint, placed)
            return
        new = placed is None and not endpoint.handed_over
        policy_map = self._policy_maps.make(endpoint.id, empty=new)
        device = await self._device(endpoint)
        await self._load(endpoint, device, policy_map)
        entry = LxcEntry(device.index, endpoint.id, 0, endpoint.mac, endpoint.node_mac)
        addresses = endpoint.addresses
        _raise_first(self._lxc.upsert((address, entry) for address in addresses.values()))
        for family, address in addresses.items():
            route = EndpointRoute(address, device.index, endpoint.mac)
            await self._routes.upsert_by(route, self._place.sources[family])
        self._placed[endpoint.id] = Placed(
            device.index,
            endpoint.enforced_identity,
            tuple(addresses.values()),
            endpoint.mac,
            time.monotonic() + TRUSTED_S,
        )

    def _identify(self, endpoint: Endpoint, placed: Placed) -> None:
        if placed.identity != endpoint.enforced_identity:
            self._programs.set_identity(endpoint.id, endpoint.enforced_identity)
            self._placed[endpoint.id] = replace(placed, identity=endpoint.enforced_identity)

    async def _device(self, endpoint: Endpoint) -> Device:
        """Return the host side of the pair; a lost pair can only be made again before it was handed over.

        Once it was joined the other side may be in the container: what a former life of the agent has made
        for this endpoint is kept, or the container would lose its interface.
        """
        device = await self._devices.find(endpoint.interface)
        if device is not None and self._is_kept(endpoint, device):
            return device
        if endpoint.handed_over:
            raise DeviceError(
                f"interface {endpoint.interface} of endpoint {endpoint.id} is gone",
                hint=f"restart {endpoint.container_name or 'the workload'}",
            )
        pair = await self._devices.create_veth(
            endpoint.id, mtu=self._place.mtu, mac=endpoint.mac, host_mac=endpoint.node_mac
        )
        return pair.host

    def _is_kept(self, endpoint: Endpoint, device: Device) -> bool:
        if endpoint.handed_over or endpoint.id in self._placed:
            return True
        return endpoint.joined and device.is_made_for(endpoint.id, endpoint.node_mac)

    async def _load(self, endpoint: Endpoint, device: Device, policy_map: PolicyMap) -> None:
        placed = self._placed.get(endpoint.id)
        if placed is not None and placed.ifindex == device.index:
            self._identify(endpoint, placed)
            if await self._programs.attached(endpoint, device.index):
                return
        try:
            with metrics.ENDPOINT_REGENERATION_SECONDS.labels("bpfLoadProg", "success").time():
                await self._programs.load(endpoint, device.index, policy_map)
        except DatapathError:
            metrics.ENDPOINT_REGENERATIONS.labels("fail").inc()
            raise
        metrics.ENDPOINT_REGENERATIONS.labels("success").inc()

    async def _disconnect(self, endpoint_id: int, addresses: Iterable[str], interface: str) -> None:
        """Take everything away; what is not there is fine."""
        for address in addresses:
            self._lxc.delete([address])
            await self._routes.delete(address)
        self._programs.unload(endpoint_id)
        if not await self._devices.delete(interface or host_name(endpoint_id)):
            logger.debug("endpoint {}: no interface to delete", endpoint_id)
        self._policy_maps.remove(endpoint_id)
        self._placed.pop(endpoint_id, None)


def _raise_first(failed: Mapping[Any, DatapathError]) -> None:
    for error in failed.values():
        raise error
