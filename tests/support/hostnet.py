# SPDX-License-Identifier: Apache-2.0
"""A small host for tests of devices, routes and rules, without any BPF: the test stands in its namespace.

world 198.51.100.2 ──── wire 198.51.100.1 [host, router 10.50.0.1 on lo] lxc… ──── containers 10.50.0.x
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from datapath.devices import GATEWAY, Devices, temporary_name
from datapath.netlink import Netlink
from datapath.routes import EndpointRoute, Routes
from datapath.sysctl import Sysctls, host_settings
from tests.support.netns import Netns, inside_new_netns, new_netns

ROUTER = "10.50.0.1"
POOL = "10.50.0.0/24"
HOST_ON_WIRE = "198.51.100.1"
WORLD = "198.51.100.2"
MTU = 1450


@dataclass
class HostNet:
    """The host's namespace, the world behind its wire, and what makes containers."""

    host: Netns
    world: Netns
    devices: Devices
    routes: Routes
    stack: contextlib.ExitStack

    async def container(self, endpoint_id: int, *, gateway: bool = True) -> Netns:
        """Make a container with address 10.50.0.<endpoint id>, as the agent would.

        `gateway`: tell it the gateway's MAC, because without programs nobody answers ARP for it.
        """
        address = container_address(endpoint_id)
        mac = f"0a:58:0a:32:00:{endpoint_id:02x}"
        pair = await self.devices.create_veth(endpoint_id, mtu=MTU, mac=mac)
        inside = self.stack.enter_context(new_netns())
        await self.devices.move_inside(temporary_name(endpoint_id), inside.path, "eth0", address)
        if gateway:
            neighbour = ("ip", "neigh", "replace", GATEWAY, "lladdr", pair.host.mac)
            inside.run(*neighbour, "dev", "eth0", "nud", "permanent")
        await self.routes.upsert(EndpointRoute(address, pair.host.index, mac, ROUTER))
        return inside


def container_address(endpoint_id: int) -> str:
    return f"10.50.0.{endpoint_id}"


@contextlib.asynccontextmanager
async def host_net() -> AsyncIterator[HostNet]:
    """Yield a host; everything in it ends with the block."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(inside_new_netns())
        world = stack.enter_context(new_netns())
        host.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "eth0")
        host.run("ip", "link", "set", "eth0", "netns", str(world.path))
        for netns, device, address in ((host, "wire", HOST_ON_WIRE), (world, "eth0", WORLD)):
            netns.run("ip", "address", "add", f"{address}/24", "dev", device)
            netns.run("ip", "link", "set", device, "up")
        sysctls = Sysctls()
        sysctls.write_all(host_settings())
        async with Netlink() as netlink:
            devices = Devices(netlink, sysctls)
            await devices.add_router(ROUTER)
            yield HostNet(host, world, devices, Routes(netlink), stack)
