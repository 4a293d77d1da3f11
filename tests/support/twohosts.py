# SPDX-License-Identifier: Apache-2.0
"""Two hosts in namespaces, joined by a wire, each with one endpoint: the way between hosts without an agent.

    endpoint 1  10.50.1.2, fd00:50:1::2 ── lxc ── host 1  10.9.0.1 ──── wire ──── host 2 ── lxc ── endpoint 2

`enforced` has programs on everything and policy at both ends; without, the kernel alone forwards the same
path: by the same VXLAN device where there is a tunnel, by the same routes where there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_address
from typing import TypeVar

from datapath.attach import Attacher, Hook, attach_endpoint
from datapath.constants import DatapathOptions, EndpointConstants, netdev_constants
from datapath.loader import ENDPOINT_OBJECTS, NETDEV_OBJECTS, OVERLAY_OBJECTS, POLICY_MAP
from datapath.maps import IpcacheMap, LxcMap, MetricsMap, PathMtuMap, PolicyMap
from datapath.mapspec import create
from datapath.namespace import inside
from datapath.netlink import Netlink
from datapath.noderoutes import NodeRoute, NodeRoutes
from datapath.records import ENDPOINT_IS_HOST, IpcacheEntry, LxcEntry, PolicyEntry, PolicyKey
from datapath.ring import EventRing
from datapath.tunnel import DEVICE, OVERHEAD, Shape, Tunnel
from tests.support.bpflab import CATALOGUE, HOST, template
from tests.support.netns import Netns, new_netns

T = TypeVar("T")
FAMILIES = (4, 6)
MTU = 1500
REMOTE_NODE = 6
_NO_MAC = "00:00:00:00:00:00"


def wire_address(number: int, family: int = 4) -> str:
    return f"10.9.0.{number}" if family == 4 else f"fd09::{number}"


def pool(number: int, family: int = 4) -> str:
    return f"10.50.{number}.0/24" if family == 4 else f"fd00:50:{number}::/64"


def router(number: int, family: int = 4) -> str:
    return f"10.50.{number}.1" if family == 4 else f"fd00:50:{number}::1"


def address(number: int, family: int = 4) -> str:
    return f"10.50.{number}.2" if family == 4 else f"fd00:50:{number}::2"


def identity(number: int) -> int:
    return 300 + number


def alone(text: str) -> str:
    return f"{text}/{128 if ':' in text else 32}"


def visit(netns: Netns, work: Callable[[Netlink], Awaitable[T]]) -> T:
    """Run `work` with a netlink socket inside a namespace."""
    return asyncio.run(inside(netns.fd, work))


class Side:
    """One host and its endpoint."""

    def __init__(self, number: int, stack: contextlib.ExitStack, *, tunnel: bool) -> None:
        self.number, self.tunnel = number, tunnel
        self.other = 3 - number
        self.host, self.endpoint = stack.enter_context(new_netns()), stack.enter_context(new_netns())
        self._stack = stack
        self.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for netns in (self.host, self.endpoint):
            netns.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        self.inner_mtu = MTU - OVERHEAD if tunnel else MTU
        self.host.run(
            *("ip", "link", "add", "lxc", "mtu", str(self.inner_mtu), "type", "veth"),
            *("peer", "name", "eth0", "mtu", str(self.inner_mtu), "netns", str(self.endpoint.path)),
        )
        self.host.run("ip", "link", "set", "lxc", "up")
        self.endpoint.run("ip", "link", "set", "eth0", "up")
        self.ifindex, self.host_mac = link(self.host, "lxc")
        self.mac = link(self.endpoint, "eth0")[1]
        for family in FAMILIES:
            self._address(family)

    def _address(self, family: int) -> None:
        own, gateway = address(self.number, family), "169.254.1.1" if family == 4 else "fe80::1"
        known = ("lladdr", self.host_mac, "dev", "eth0", "nud", "permanent")
        self.endpoint.run("ip", "addr", "add", alone(own), "dev", "eth0")
        self.endpoint.run("ip", "neigh", "replace", gateway, *known)
        self.endpoint.run("ip", "route", "add", "default", "via", gateway, "dev", "eth0", "onlink")
        self.host.run("ip", "route", "add", own, "dev", "lxc")
        peer = ("lladdr", self.mac, "dev", "lxc", "nud", "permanent")
        self.host.run("ip", "neigh", "replace", own, *peer)
        self.host.run("ip", "addr", "add", alone(router(self.number, family)), "dev", "lo")

    def lead_to_the_other(self) -> None:
        """Write the routes of the host's own packets, and without programs everybody's."""
        index = visit(self.host, self._tunnel) if self.tunnel else 0
        visit(self.host, lambda netlink: self._lead(NodeRoutes(netlink), index))
        self.tunnel_index = index

    @staticmethod
    async def _tunnel(netlink: Netlink) -> int:
        made = Tunnel(netlink, Shape(mtu=MTU - OVERHEAD))
        await made.ensure()
        return made.index

    async def _lead(self, routes: NodeRoutes, index: int) -> None:
        for family in FAMILIES:
            there = wire_address(self.other, 4 if self.tunnel else family)
            route = NodeRoute(pool(self.other, family), there, router(self.number, family))
            if index:
                await routes.upsert_tunnelled(route, index)
            else:
                await routes.upsert_direct(route)

    def lead_without_programs(self, other: Side) -> None:
        """Have the kernel alone deliver what comes by the tunnel: frames for the other's own device."""
        mac = link(other.host, DEVICE)[1]
        for family in FAMILIES:
            by = router(self.other, family)
            self.host.run("ip", "neigh", "replace", by, "lladdr", mac, "dev", DEVICE, "nud", "permanent")
            self.host.run(
                *("ip", "route", "replace", pool(self.other, family)),
                *("encap", "ip", "id", "1", "dst", wire_address(self.other)),
                *("via", by, "dev", DEVICE, "onlink"),
            )

    def enforce(self) -> None:
        """Load programs on everything; nothing may pass until `allow` says so."""
        handles = {spec.name: create(spec) for spec in CATALOGUE.shared()}
        policy = create(CATALOGUE.policy(self.number))
        for handle in (*handles.values(), policy):
            self._stack.callback(handle.close)
        self.lxc, self.ipcache = LxcMap(handles["cilium_lxc"]), IpcacheMap(handles["cilium_ipcache"])
        self.metrics, self.policy = MetricsMap(handles["cilium_metrics"]), PolicyMap(policy)
        self.path_mtus = PathMtuMap(handles["holdfast_path_mtu"])
        ring = self._stack.enter_context(EventRing.create(1 << 16))
        fds = {name: handle.fd for name, handle in handles.items()} | ring.descriptors
        self._tell_maps()
        visit(self.host, lambda netlink: self._attach(Attacher(netlink), fds, policy.fd))

    def _tell_maps(self) -> None:
        behind = wire_address(self.other) if self.tunnel else "0.0.0.0"
        for family in FAMILIES:
            entry = LxcEntry(self.ifindex, self.number, 0, self.mac, self.host_mac)
            own = [wire_address(self.number, family), router(self.number, family)]
            self.lxc.upsert([(address(self.number, family), entry)])
            self.lxc.upsert((each, LxcEntry(0, 0, ENDPOINT_IS_HOST, _NO_MAC, _NO_MAC)) for each in own)
            self.ipcache.upsert(
                [
                    *((alone(each), IpcacheEntry(HOST)) for each in own),
                    (alone(address(self.number, family)), IpcacheEntry(identity(self.number))),
                    (alone(address(self.other, family)), IpcacheEntry(identity(self.other), behind)),
                    (alone(router(self.other, family)), IpcacheEntry(REMOTE_NODE, behind)),
                    (alone(wire_address(self.other, family)), IpcacheEntry(REMOTE_NODE)),
                    (pool(self.other, family), IpcacheEntry(2, behind)),
                ]
            )

    async def _attach(self, attacher: Attacher, fds: dict[str, int], policy: int) -> None:
        options = DatapathOptions(tunnel_ifindex=self.tunnel_index)
        with contextlib.ExitStack() as stack:
            loaded = {}
            for family in FAMILIES:
                constants = EndpointConstants(
                    self.number,
                    identity(self.number),
                    self.ifindex,
                    ip_address(address(self.number, family)),
                    self.host_mac,
                    options=options,
                )
                programs = template(ENDPOINT_OBJECTS[family]).load(constants, fds | {POLICY_MAP: policy})
                loaded[family] = stack.enter_context(programs)
            calls = {4: fds["cilium_call_policy"], 6: fds["holdfast_call_policy6"]}
            await attach_endpoint(attacher, self.ifindex, self.number, loaded, calls)
        places = [("wire", NETDEV_OBJECTS, "from_netdev")]
        places += [(DEVICE, OVERLAY_OBJECTS, "from_overlay")] if self.tunnel else []
        for device, objects, name in places:
            for family, object_name in objects.items():
                with template(object_name).load(netdev_constants(options), fds) as programs:
                    index = link(self.host, device)[0]
                    await attacher.attach(index, Hook.INGRESS, programs[name], name, family=family)

    def allow(self, direction: int, remote: int = 0, port: int = 0, protocol: int = 0) -> None:
        """Write one policy entry; without more than a direction it allows everything."""
        self.policy.upsert([(PolicyKey(remote, port, protocol, direction), PolicyEntry(False, 0))])

    def dropped(self) -> dict[tuple[int, int], int]:
        """All drops so far: (reason, direction) → packets."""
        return {(k.reason, k.direction): v.packets for k, v in self.metrics.items() if k.reason}


def link(netns: Netns, name: str) -> tuple[int, str]:
    """Return a device's number and MAC address."""
    (found,) = json.loads(netns.run("ip", "-j", "link", "show", name))
    return int(found["ifindex"]), str(found["address"])


@contextlib.contextmanager
def two_hosts(*, tunnel: bool, enforced: bool) -> Iterator[tuple[Side, Side]]:
    """Yield both hosts; everything ends with the block."""
    with contextlib.ExitStack() as stack:
        one, two = Side(1, stack, tunnel=tunnel), Side(2, stack, tunnel=tunnel)
        peer = ("peer", "name", "wire", "netns", str(two.host.path))
        one.host.run("ip", "link", "add", "wire", "type", "veth", *peer)
        for side in (one, two):
            for family in FAMILIES:
                prefix = f"{wire_address(side.number, family)}/{24 if family == 4 else 64}"
                side.host.run("ip", "addr", "add", prefix, "dev", "wire")
            side.host.run("ip", "link", "set", "wire", "up")
        for side in (one, two):
            side.lead_to_the_other()
        if tunnel and not enforced:
            one.lead_without_programs(two)
            two.lead_without_programs(one)
        for side in (one, two) if enforced else ():
            side.enforce()
        yield one, two
