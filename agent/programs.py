# SPDX-License-Identifier: Apache-2.0
"""This host's maps and programs: opened once at the start, loaded for each endpoint, attached to devices.

Loading (5 ms of the verifier's work) runs in a thread; attaching is a netlink request on the loop.  What
is attached stays when the agent ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol, TypeVar

from agent.endpoint import Endpoint
from core.options import Config
from datapath.attach import NAME_PREFIX, Attacher, Hook, attach_endpoint, remove_policy
from datapath.bpffs import ensure_bpffs, raise_memlock
from datapath.constants import Aggregation, DatapathOptions, EndpointConstants, netdev_constants
from datapath.handle import MapHandle
from datapath.loader import ENDPOINT_OBJECT, NETDEV_OBJECT, POLICY_MAP, IdentityCell, Template
from datapath.maps import CtMap, EventsLost, IpcacheMap, LxcMap, MetricsMap, MonitorFlag, PolicyMap, TunnelMap
from datapath.mapspec import MapCatalogue, open_or_create
from datapath.netlink import Netlink
from datapath.ring import EventRing

GLOBALS_BELOW = Path("tc/globals")
NETDEV_PROGRAM = "from_netdev"
NETDEV_FILTER = NAME_PREFIX + NETDEV_PROGRAM


class _Closable(Protocol):
    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=_Closable)


@dataclass(frozen=True)
class HostMaps:
    """The maps that a host has once."""

    lxc: LxcMap
    ipcache: IpcacheMap
    ct_tcp: CtMap
    ct_any: CtMap
    metrics: MetricsMap
    tunnel: TunnelMap
    monitor: MonitorFlag
    call_policy: MapHandle
    fragments: MapHandle
    lost: EventsLost
    ring: EventRing

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
                ct_tcp=held(CtMap.open(catalogue.ct(tcp=True), root)),
                ct_any=held(CtMap.open(catalogue.ct(tcp=False), root)),
                metrics=held(MetricsMap.open(catalogue.metrics, root)),
                tunnel=held(TunnelMap.open(catalogue.tunnel, root)),
                monitor=held(MonitorFlag.open(catalogue.monitor, root)),
                call_policy=held(open_or_create(catalogue.call_policy, root)),
                fragments=held(open_or_create(catalogue.fragments4, root)),
                lost=held(EventsLost.open(catalogue.events_lost, root)),
                ring=EventRing.create(),
            )
            # An attempt that fails is repeated for as long as it takes: it must leave nothing open.
            stack.pop_all()
            return maps

    def by_name(self) -> dict[str, int]:
        """Return descriptors by the names that the objects use."""
        handles = (self.lxc, self.ipcache, self.ct_tcp, self.ct_any, self.metrics, self.monitor, self.lost)
        plain = (self.call_policy, self.fragments)
        found = {each.name: each.fd for each in handles} | {each.name: each.fd for each in plain}
        return found | self.ring.descriptors


class HostPrograms:
    """Loads and attaches (agent.plumbing.Programs, agent.keeper.NetdevPrograms)."""

    def __init__(
        self,
        catalogue: MapCatalogue,
        root: Path,
        maps: HostMaps,
        templates: tuple[Template, Template],
        options: DatapathOptions,
        netlink: Netlink,
    ) -> None:
        self.catalogue = catalogue
        self.root = root
        self.maps = maps
        self._options = options
        self._attacher = Attacher(netlink)
        self._endpoint, self._netdev = templates
        self._on_devices: dict[int, str] = {}
        self._cells: dict[int, IdentityCell] = {}

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
        )
        objects = object_dir(config)
        templates = Template.read(objects / ENDPOINT_OBJECT), Template.read(objects / NETDEV_OBJECT)
        maps = HostMaps.open(catalogue, root)
        return cls(catalogue, root, maps, templates, options_of(config), Netlink())

    # --- agent.plumbing.Programs

    async def load(self, endpoint: Endpoint, ifindex: int, policy_map: PolicyMap) -> None:
        """Load an endpoint's programs and put them in the place of the former ones, without a gap."""
        constants = EndpointConstants(
            endpoint_id=endpoint.id,
            identity=endpoint.enforced_identity,
            ifindex=ifindex,
            ipv4=IPv4Address(endpoint.ipv4),
            host_mac=endpoint.node_mac,
            options=self._options,
        )
        maps = self.maps.by_name() | {POLICY_MAP: policy_map.fd}
        with await asyncio.to_thread(self._endpoint.load, constants, maps) as programs:
            await attach_endpoint(self._attacher, ifindex, endpoint.id, programs, self.maps.call_policy.fd)
            self._forget_cell(endpoint.id)
            self._cells[endpoint.id] = programs.take_identity()

    def set_identity(self, endpoint_id: int, identity: int) -> None:
        """Give an endpoint's running programs another identity.  Raises MapError; KeyError if not loaded."""
        self._cells[endpoint_id].set(identity)

    async def attached(self, ifindex: int) -> bool:
        """True when both of our filters are on a device."""
        return {each.hook for each in await self._attacher.filters(ifindex) if each.ours} == set(Hook)

    def unload(self, endpoint_id: int) -> None:
        """Make an endpoint unreachable for tail calls; its filters go with its device."""
        self._forget_cell(endpoint_id)
        remove_policy(self.maps.call_policy.fd, endpoint_id)

    def _forget_cell(self, endpoint_id: int) -> None:
        cell = self._cells.pop(endpoint_id, None)
        if cell is not None:
            cell.close()

    # --- agent.keeper.NetdevPrograms

    async def attach_netdev(self, name: str, index: int) -> bool:
        """Attach from_netdev to a device of the host; return whether anything was done."""
        filters = await self._attacher.filters(index)
        if self._on_devices.get(index) == name and any(each.ours for each in filters):
            return False
        with await asyncio.to_thread(
            self._netdev.load, netdev_constants(self._options), self.maps.by_name()
        ) as programs:
            await self._attacher.attach(index, Hook.INGRESS, programs[NETDEV_PROGRAM], NETDEV_PROGRAM)
        self._on_devices[index] = name
        return True

    async def has_netdev(self, index: int) -> bool:
        """True when from_netdev is on a device, whoever attached it; an endpoint's device has others."""
        return NETDEV_FILTER in {each.name for each in await self._attacher.filters(index) if each.ours}

    async def release_netdev(self, index: int) -> None:
        """Take our program off a device of the host."""
        await self._attacher.release(index)
        self._on_devices.pop(index, None)


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
