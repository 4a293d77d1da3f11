# SPDX-License-Identifier: Apache-2.0
"""The small host of `hostnet` with everything on it: programs on veths and wire, maps, nft and iptables.

Maps are unpinned and end with the test.  Identity of container 10.50.0.<n> is 300 + n.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

from datapath.attach import Attacher, Hook, attach_endpoint
from datapath.constants import DatapathOptions, EndpointConstants, netdev_constants
from datapath.devices import host_name
from datapath.firewall import Firewall, FirewallState, PublishedPort
from datapath.forward import ForwardChain
from datapath.loader import ENDPOINT_OBJECTS, NETDEV_OBJECTS, POLICY_MAP
from datapath.maps import IpcacheMap, LxcMap, MetricsMap, PolicyMap
from datapath.mapspec import create
from datapath.netlink import Netlink
from datapath.records import (
    ENDPOINT_IS_HOST,
    IpcacheEntry,
    LxcEntry,
    MetricsKey,
    PolicyEntry,
    PolicyKey,
)
from datapath.ring import EventRing
from tests.support.bpflab import CATALOGUE, HOST, INGRESS, WORLD, template
from tests.support.hostnet import HOST_ON_WIRE, POOL, ROUTER, HostNet, container_address, host_net
from tests.support.netns import Netns

_NO_MAC = "00:00:00:00:00:00"
EVERYBODY = 0
DENIED = 133


def identity(endpoint_id: int) -> int:
    return 300 + endpoint_id


class EnforcedHost:
    """A host whose containers have programs; nothing may pass until `allow` says so."""

    def __init__(self, net: HostNet, attacher: Attacher, stack: contextlib.ExitStack) -> None:
        self.net = net
        self.firewall, self.forward = Firewall(), ForwardChain()
        self._attacher = attacher
        self._stack = stack
        handles = {spec.name: create(spec) for spec in CATALOGUE.shared()}
        for handle in handles.values():
            stack.callback(handle.close)
        self.lxc = LxcMap(handles["cilium_lxc"])
        self.ipcache = IpcacheMap(handles["cilium_ipcache"])
        self.metrics = MetricsMap(handles["cilium_metrics"])
        self.policies: dict[int, PolicyMap] = {}
        self._call_policy = handles["cilium_call_policy"].fd
        ring = stack.enter_context(EventRing.create(1 << 16))
        self._fds = {name: handle.fd for name, handle in handles.items()} | ring.descriptors
        self._endpoint, self._netdev = template(ENDPOINT_OBJECTS[4]), template(NETDEV_OBJECTS[4])

    async def start(self, *ports: PublishedPort) -> None:
        """Write the host's own entries and rules, with FORWARD DROP around them, and attach to the wire."""
        for address in (ROUTER, HOST_ON_WIRE):
            self.lxc.upsert([(address, LxcEntry(0, 0, ENDPOINT_IS_HOST, _NO_MAC, _NO_MAC))])
            self.ipcache.upsert([(address, IpcacheEntry(HOST))])
        self.ipcache.upsert([("0.0.0.0/0", IpcacheEntry(WORLD))])
        self.net.host.run("iptables", "-P", "FORWARD", "DROP")
        await self.forward.ensure()
        await self.publish(*ports)
        await self.net.routes.add_unreachable(POOL)
        wire = await self.net.devices.get("wire")
        with self._netdev.load(netdev_constants(DatapathOptions()), self._fds) as programs:
            await self._attacher.attach(wire.index, Hook.INGRESS, programs["from_netdev"], "from_netdev")

    async def publish(self, *ports: PublishedPort) -> None:
        await self.firewall.apply(FirewallState(ROUTER, frozenset({POOL}), frozenset(), frozenset(ports)))

    async def container(self, endpoint_id: int) -> Netns:
        """Make a container with programs; it may send to everybody and receive from nobody."""
        inside = await self.net.container(endpoint_id, gateway=False)
        device = await self.net.devices.get(host_name(endpoint_id))
        address = container_address(endpoint_id)
        handle = create(CATALOGUE.policy(endpoint_id))
        self._stack.callback(handle.close)
        self.policies[endpoint_id] = PolicyMap(handle)
        self.policies[endpoint_id].upsert([(PolicyKey(EVERYBODY, 0, 0, 1), PolicyEntry(False, 0))])
        self.ipcache.upsert([(address, IpcacheEntry(identity(endpoint_id)))])
        mac = inside.run("cat", "/sys/class/net/eth0/address").strip()
        constants = EndpointConstants(
            endpoint_id, identity(endpoint_id), device.index, IPv4Address(address), device.mac
        )
        with self._endpoint.load(constants, self._fds | {POLICY_MAP: handle.fd}) as programs:
            await attach_endpoint(
                self._attacher, device.index, endpoint_id, {4: programs}, {4: self._call_policy}
            )
        self.lxc.upsert([(address, LxcEntry(device.index, endpoint_id, 0, mac, device.mac))])
        return inside

    def allow(self, endpoint_id: int, remote: int, port: int = 0, protocol: int = 0) -> None:
        """Let `remote` (an identity) in."""
        self.policies[endpoint_id].upsert(
            [(PolicyKey(remote, port, protocol, INGRESS), PolicyEntry(False, 0))]
        )

    def denied(self) -> int:
        """Packets that ingress policy dropped so far."""
        found = self.metrics.get(MetricsKey(DENIED, 1))
        return found.packets if found else 0


@contextlib.asynccontextmanager
async def enforced_host(*ports: PublishedPort) -> AsyncIterator[EnforcedHost]:
    """Yield a host with `ports` published; everything in it ends with the block."""
    with contextlib.ExitStack() as stack:
        async with host_net() as net, Netlink() as netlink:
            host = EnforcedHost(net, Attacher(netlink), stack)
            await host.start(*ports)
            yield host
