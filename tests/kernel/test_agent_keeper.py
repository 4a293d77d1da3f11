# SPDX-License-Identifier: Apache-2.0
"""The keeper of the host's state on real devices: what a former life or a former pool left is taken away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from loguru import logger

from agent import ipcache
from agent.host import look
from agent.keeper import Keeper
from agent.overlay import Overlay
from agent.programs import HostMaps, HostPrograms, Templates
from datapath.attach import Attacher, Hook
from datapath.constants import DatapathOptions, netdev_constants
from datapath.devices import host_name
from datapath.loader import NETDEV_OBJECTS
from datapath.netlink import Netlink
from datapath.tunnel import Shape, Tunnel
from tests.support.bpf import own_bpffs
from tests.support.bpflab import CATALOGUE, OBJECTS, template
from tests.support.hostnet import HOST_ON_WIRE, MTU, POOL, ROUTER, HostNet, host_net
from tests.support.require import require_root, require_tools

WIRE, NIC = "wire", "nic2"
NETDEV = "holdfast:from_netdev"
NETDEVS = [NETDEV] * len(CATALOGUE.families)  # one filter a family


class Host:
    """The small host with maps and programs; each `life` is an agent that starts on it."""

    def __init__(self, net: HostNet, netlink: Netlink, root: Path, stack: contextlib.ExitStack) -> None:
        self.net = net
        self.run = net.host.run
        self.attacher = Attacher(netlink)
        self._netlink, self._root, self._stack = netlink, root, stack

    def programs(self) -> HostPrograms:
        maps = HostMaps.open(CATALOGUE, self._root)
        self._stack.callback(maps.close)
        templates = {family: Templates.read(OBJECTS, family) for family in CATALOGUE.families}
        return HostPrograms(CATALOGUE, self._root, maps, templates, DatapathOptions(), self._netlink)

    async def life(self, *devices: str, pool: str = POOL, router: str = ROUTER) -> Keeper:
        """Return the keeper of an agent that has just started; without `devices` it finds them itself."""
        programs = self.programs()
        return Keeper(
            await asyncio.to_thread(look, IPv4Address(HOST_ON_WIRE), devices),
            ipcache.new_table(),
            self.net.devices,
            self.net.routes,
            programs.maps.lxc,
            programs,
            Overlay(Tunnel(self._netlink, Shape()), programs, enabled=False),
            configured_devices=devices,
            pools=(pool,),
            routers=(router,),
        )

    def add_nic(self) -> None:
        self.run("ip", "link", "add", NIC, "type", "veth", "peer", "name", "cable")
        for each in (NIC, "cable"):
            self.run("ip", "link", "set", each, "up")
        self.run("ip", "address", "add", "192.0.2.1/24", "dev", NIC)

    async def filters(self, device: str) -> list[str]:
        index = (await self.net.devices.get(device)).index
        return [each.name for each in await self.attacher.filters(index)]

    def on_lo(self) -> set[str]:
        lines = self.run("ip", "-o", "-4", "address", "show", "dev", "lo").splitlines()
        return {line.split()[3] for line in lines} - {"127.0.0.1/8"}


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    require_root()
    require_tools("ip", "nsenter")
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(own_bpffs(tmp_path))
        async with host_net() as net, Netlink() as netlink:
            yield Host(net, netlink, root, stack)


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


async def test_a_device_that_faces_nobody_any_more(host: Host, said: list[str]) -> None:
    host.add_nic()
    keeper = await host.life()
    await keeper.once()
    assert await host.filters(WIRE) == await host.filters(NIC) == NETDEVS
    assert set(keeper.devices) == {WIRE, NIC}
    host.run("ip", "address", "flush", "dev", NIC)
    said.clear()
    for _ in range(2):
        await keeper.once()
        assert await host.filters(NIC) == []
    assert "clsact" not in host.run("tc", "qdisc", "show", "dev", NIC)
    assert said == [f"program from_netdev taken off {NIC}: it faces no other machine now"]
    assert await host.filters(WIRE) == NETDEVS
    host.run("ip", "address", "add", "192.0.2.1/24", "dev", NIC)
    await keeper.once()
    assert await host.filters(NIC) == NETDEVS


async def test_a_device_of_a_former_life(host: Host) -> None:
    """Another configuration: only what is our own `from_netdev` goes, endpoints keep their programs."""
    host.add_nic()
    await (await host.life()).once()
    endpoint = (await host.net.devices.create_veth(5, mtu=MTU, mac="0a:58:00:00:00:05")).host
    programs = host.programs()
    with template(NETDEV_OBJECTS[4]).load(
        netdev_constants(DatapathOptions()), programs.maps.by_name()
    ) as loaded:
        for hook in Hook:
            await host.attacher.attach(endpoint.index, hook, loaded["from_netdev"], "from_endpoint")
    await (await host.life(WIRE)).once()
    assert await host.filters(NIC) == []
    assert await host.filters(WIRE) == NETDEVS
    assert await host.filters(host_name(5)) == ["holdfast:from_endpoint"] * 2


async def test_a_device_that_is_down_keeps_its_program(host: Host) -> None:
    host.add_nic()
    keeper = await host.life()
    await keeper.once()
    host.run("ip", "link", "set", NIC, "down")
    await keeper.once()
    assert set(keeper.devices) == {WIRE}
    assert await host.filters(NIC) == NETDEVS
    host.run("ip", "address", "flush", "dev", NIC)
    host.run("ip", "link", "set", NIC, "up")
    await keeper.once()
    assert await host.filters(NIC) == []


async def test_a_device_that_is_gone(host: Host) -> None:
    host.add_nic()
    keeper = await host.life()
    await keeper.once()
    host.run("ip", "link", "delete", NIC)
    for _ in range(2):
        await keeper.once()
    assert set(keeper.devices) == {WIRE}


async def test_the_address_of_a_former_pool(host: Host, said: list[str]) -> None:
    theirs = "10.70.0.1"
    host.run("ip", "address", "add", f"{theirs}/32", "dev", "lo")
    for pool, router in ((POOL, ROUTER), ("10.70.0.0/24", theirs), ("10.60.0.0/24", "10.60.0.1")):
        keeper = await host.life(pool=pool, router=router)
        await keeper.once()
        await keeper.once()
        assert host.on_lo() == {f"{router}/32", f"{theirs}/32"}
        assert IPv4Address(router) in keeper.view.addresses
    assert [line for line in said if "former pool" in line] == [
        f"address {ROUTER} of a former pool taken off lo"
    ]
