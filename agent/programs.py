# SPDX-License-Identifier: Apache-2.0
"""This host's maps and programs: opened once at the start, loaded for each endpoint, attached to devices.

Loading (5 ms of the verifier's work) runs in a thread; attaching is a netlink request on the loop.  What
is attached stays when the agent ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from loguru import logger

from agent.endpoint import Endpoint
from agent.host import has_ipv6
from core.options import Config
from datapath.attach import NAME_PREFIX, PLACES, Attacher, Hook, attach_endpoint, remove_policy
from datapath.bpffs import ensure_bpffs, raise_memlock
from datapath.constants import Aggregation, DatapathOptions, EndpointConstants, netdev_constants
from datapath.handle import MapHandle
from datapath.loader import (
    ENDPOINT_OBJECTS,
    NETDEV_OBJECTS,
    OVERLAY_OBJECTS,
    POLICY_MAP,
    IdentityCell,
    Programs,
    Template,
)
from datapath.maps import (
    CtMap,
    EventsLost,
    IpcacheMap,
    LxcMap,
    MetricsMap,
    MonitorFlag,
    PathMtuMap,
    PolicyMap,
    TunnelMap,
    TypedMap,
)
from datapath.mapspec import MapCatalogue, open_or_create
from datapath.netlink import Netlink
from datapath.ring import EventRing

GLOBALS_BELOW = Path("tc/globals")
NETDEV_PROGRAM, OVERLAY_PROGRAM = "from_netdev", "from_overlay"
NETDEV_FILTER = NAME_PREFIX + NETDEV_PROGRAM


class _Closable(Protocol):
    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=_Closable)


class FamilyMaps(NamedTuple):
    """The maps that each address family has for itself."""

    ct_tcp: CtMap
    ct_any: CtMap
    call_policy: MapHandle
    fragments: MapHandle


@dataclass(frozen=True)
class HostMaps:
    """The maps that a host has once."""

    lxc: LxcMap
    ipcache: IpcacheMap
    metrics: MetricsMap
    tunnel: TunnelMap
    path_mtu: PathMtuMap
    monitor: MonitorFlag
    lost: EventsLost
    ring: EventRing
    families: Mapping[int, FamilyMaps]

    @classmethod
    def open(cls, catalogue: MapCatalogue, root: Path) -> HostMaps:
        """Open or create every map.  Raises LayoutMismatch with all differences of the first that differs."""
        with contextlib.ExitStack() as stack:

            def held(opened: Opened) -> Opened:
                stack.callback(opened.close)
                return opened

            maps = cls(
                lxc=held(LxcMap.open(catalogue.lxc, root)),
                ipcache=held(IpcacheMap.open(catalogue.ipcache, root)),
                metrics=held(MetricsMap.open(catalogue.metrics, root)),
                tunnel=held(TunnelMap.open(catalogue.tunnel, root)),
                path_mtu=held(PathMtuMap.open(catalogue.path_mtu, root)),
                monitor=held(MonitorFlag.open(catalogue.monitor, root)),
                lost=held(EventsLost.open(catalogue.events_lost, root)),
                ring=EventRing.create(),
                families={
                    family: FamilyMaps(
                        ct_tcp=held(CtMap.open(catalogue.ct(tcp=True, family=family), root)),
                        ct_any=held(CtMap.open(catalogue.ct(tcp=False, family=family), root)),
                        call_policy=held(open_or_create(catalogue.call_policy(family=family), root)),
                        fragments=held(open_or_create(catalogue.fragments(family=family), root)),
                    )
                    for family in catalogue.families
                },
            )
            # An attempt that fails is repeated for as long as it takes: it must leave nothing open.
            stack.pop_all()
            return maps

    def close(self) -> None:
        """Close every descriptor; what is pinned stays."""
        for each in (*self._shared, self.tunnel):
            each.close()
        self.ring.close()
        for maps in self.families.values():
            for own in maps:
                own.close()

    def by_name(self) -> dict[str, int]:
        """Return descriptors by the names that the objects use."""
        found = {each.name: each.fd for each in self._shared}
        for maps in self.families.values():
            found |= {each.name: each.fd for each in maps}
        return found | self.ring.descriptors

    @property
    def _shared(self) -> tuple[TypedMap[Any, Any], ...]:
        """Return the maps of both families that programs use."""
        return (self.lxc, self.ipcache, self.metrics, self.path_mtu, self.monitor, self.lost)

    @property
    def conntrack(self) -> tuple[CtMap, ...]:
        """Return every conntrack map."""
        return tuple(ct for each in self.families.values() for ct in (each.ct_tcp, each.ct_any))


class Templates(NamedTuple):
    """The objects of one address family."""

    endpoint: Template
    netdev: Template
    overlay: Template

    @classmethod
    def read(cls, objects: Path, family: int) -> Templates:
        """Read those of a family.  Raises LoadError."""
        names = (ENDPOINT_OBJECTS[family], NETDEV_OBJECTS[family], OVERLAY_OBJECTS[family])
        return cls(*(Template.read(objects / name) for name in names))


class HostPrograms:
    """Loads and attaches (agent.plumbing.Programs, agent.keeper.NetdevPrograms)."""

    def __init__(
        self,
        catalogue: MapCatalogue,
        root: Path,
        maps: HostMaps,
        templates: Mapping[int, Templates],
        options: DatapathOptions,
        netlink: Netlink,
    ) -> None:
        self.catalogue = catalogue
        self.root = root
        self.maps = maps
        self._options = options
        self._attacher = Attacher(netlink)
        self._templates = templates
        self._on_devices: dict[int, str] = {}
        # One for each family that an endpoint has programs for.
        self._cells: dict[int, list[IdentityCell]] = {}

    @classmethod
    def open(cls, config: Config) -> HostPrograms:
        """Mount bpffs if need be, open the maps, read the objects.  Raises DatapathError."""
        raise_memlock()
        bpffs = Path(config["bpf-root"])
        ensure_bpffs(bpffs)
        root = bpffs / GLOBALS_BELOW
        catalogue = MapCatalogue(
            ct_tcp_max=config["bpf-ct-global-tcp-max"],
            ct_any_max=config["bpf-ct-global-any-max"],
            policy_max=config["bpf-policy-map-max"],
            fragments_max=config["bpf-fragments-map-max"],
            enable_ipv6=speaks_ipv6(config),
        )
        objects = object_dir(config)
        templates = {family: Templates.read(objects, family) for family in catalogue.families}
        maps = HostMaps.open(catalogue, root)
        return cls(catalogue, root, maps, templates, options_of(config), Netlink())

    def use_tunnel(self, ifindex: int) -> None:
        """Have programs that are loaded from now on send to other hosts by this device."""
        self._options = replace(self._options, tunnel_ifindex=ifindex)

    # --- agent.plumbing.Programs

    async def load(self, endpoint: Endpoint, ifindex: int, policy_map: PolicyMap) -> None:
        """Load an endpoint's programs and put them in the place of the former ones, without a gap."""
        maps = self.maps.by_name() | {POLICY_MAP: policy_map.fd}
        call_policy = {family: each.call_policy.fd for family, each in self.maps.families.items()}
        with contextlib.ExitStack() as stack:
            programs = {}
            for family, address in endpoint.addresses.items():
                constants = EndpointConstants(
                    endpoint_id=endpoint.id,
                    identity=endpoint.enforced_identity,
                    ifindex=ifindex,
                    address=ip_address(address),
                    host_mac=endpoint.node_mac,
                    options=self._options,
                )
                loaded = await asyncio.to_thread(self._templates[family].endpoint.load, constants, maps)
                programs[family] = stack.enter_context(loaded)
            await attach_endpoint(self._attacher, ifindex, endpoint.id, programs, call_policy)
            self._take_cells(endpoint.id, programs.values())

    def set_identity(self, endpoint_id: int, identity: int) -> None:
        """Give an endpoint's running programs another identity.  Raises MapError; KeyError if not loaded."""
        for cell in self._cells[endpoint_id]:
            cell.set(identity)

    async def attached(self, endpoint: Endpoint, ifindex: int) -> bool:
        """True when a filter of ours is on both hooks of a device for each of the endpoint's addresses."""
        found = {(each.hook, each.place) for each in await self._attacher.filters(ifindex) if each.ours}
        return found == {(hook, PLACES[family]) for hook in Hook for family in endpoint.addresses}

    def unload(self, endpoint_id: int) -> None:
        """Make an endpoint unreachable for tail calls; its filters go with its device."""
        self._forget_cells(endpoint_id)
        for each in self.maps.families.values():
            remove_policy(each.call_policy.fd, endpoint_id)

    def _take_cells(self, endpoint_id: int, programs: Iterable[Programs]) -> None:
        self._forget_cells(endpoint_id)
        self._cells[endpoint_id] = [each.take_identity() for each in programs]

    def _forget_cells(self, endpoint_id: int) -> None:
        for cell in self._cells.pop(endpoint_id, ()):
            cell.close()

    # --- agent.keeper.NetdevPrograms

    async def attach_netdev(self, name: str, index: int) -> bool:
        """Attach from_netdev to a device of the host; return whether anything was done."""
        objects = {family: each.netdev for family, each in self._templates.items()}
        return await self._attach(name, index, objects, NETDEV_PROGRAM)

    async def attach_overlay(self, name: str, index: int) -> bool:
        """Attach from_overlay to the device between hosts; return whether anything was done."""
        objects = {family: each.overlay for family, each in self._templates.items()}
        return await self._attach(name, index, objects, OVERLAY_PROGRAM)

    async def _attach(self, name: str, index: int, objects: Mapping[int, Template], program: str) -> bool:
        places = {each.place for each in await self._attacher.filters(index) if each.ours}
        if self._on_devices.get(index) == name and places == {PLACES[family] for family in objects}:
            return False
        constants, maps = netdev_constants(self._options), self.maps.by_name()
        for family, template in objects.items():
            with await asyncio.to_thread(template.load, constants, maps) as programs:
                await self._attacher.attach(index, Hook.INGRESS, programs[program], program, family=family)
        await self._attacher.keep_only(index, objects)
        self._on_devices[index] = name
        return True

    async def has_netdev(self, index: int) -> bool:
        """True when from_netdev is on a device, whoever attached it; an endpoint's device has others."""
        return NETDEV_FILTER in {each.name for each in await self._attacher.filters(index) if each.ours}

    async def release_netdev(self, index: int) -> None:
        """Take our program off a device of the host."""
        await self._attacher.release(index)
        self._on_devices.pop(index, None)


def speaks_ipv6(config: Config) -> bool:
    """Whether endpoints get IPv6: wanted, and to be had on this host."""
    if config["enable-ipv6"] and not has_ipv6():
        logger.warning("enable-ipv6 is true, but this host's kernel has no IPv6: endpoints have IPv4 only")
        return False
    return bool(config["enable-ipv6"])


def object_dir(config: Config) -> Path:
    """Return where the compiled objects are: configured, installed, or in the checkout."""
    if config["bpf-object-dir"] is not None:
        return Path(config["bpf-object-dir"])
    installed = Path("/usr/lib/holdfast/bpf")
    checkout = Path(__file__).resolve().parent.parent / "bpf" / "build"
    return installed if installed.is_dir() else checkout


def options_of(config: Config) -> DatapathOptions:
    """Return what all programs have in common."""
    return DatapathOptions(
        aggregation=Aggregation[config["monitor-aggregation"].upper()],
        payload_length=config["trace-payloadlen"],
        report_interval=int(config["monitor-aggregation-interval"]),
        timeout_tcp=int(config["bpf-ct-timeout-regular-tcp"]),
        timeout_any=int(config["bpf-ct-timeout-regular-any"]),
        timeout_tcp_syn=int(config["bpf-ct-timeout-regular-tcp-syn"]),
        timeout_tcp_fin=int(config["bpf-ct-timeout-regular-tcp-fin"]),
    )
