# SPDX-License-Identifier: Apache-2.0
"""Devices, addresses, settings and routes of endpoints, in a namespace of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from datapath.attach import Attacher
from datapath.devices import Devices, host_name, temporary_name
from datapath.errors import DeviceError, RouteError
from datapath.netlink import Netlink
from datapath.routes import EndpointRoute, Routes
from datapath.sysctl import Sysctls
from tests.support.hostnet import MTU, POOL, ROUTER, HostNet, container_address, host_net
from tests.support.netns import inside_new_netns, new_netns
from tests.support.require import require_root, require_tools
from tests.support.traffic import seen_by_server, serving


@pytest.fixture
async def net() -> AsyncIterator[HostNet]:
    require_root()
    require_tools("ip", "nsenter")
    async with host_net() as made:
        yield made


async def test_pair_has_names_macs_mtu_and_settings(net: HostNet) -> None:
    pair = await net.devices.create_veth(
        0x1001, mtu=MTU, mac="0a:58:00:00:00:01", host_mac="0a:59:00:00:00:01"
    )
    assert (pair.host.name, pair.container.name) == ("lxc01001", "hf01001")
    assert (pair.host.mac, pair.container.mac) == ("0a:59:00:00:00:01", "0a:58:00:00:00:01")
    assert (pair.host.mtu, pair.container.mtu) == (MTU, MTU)
    assert pair.host.up
    assert pair.host.peer == pair.container.index
    settings = Sysctls()
    assert settings.read("net/ipv4/conf/lxc01001/route_localnet") == "1"
    assert settings.read("net/ipv4/conf/lxc01001/rp_filter") == "0"
    assert await net.devices.find_index(pair.host.index) == pair.host


async def test_pair_is_made_again_over_a_leftover(net: HostNet) -> None:
    first = await net.devices.create_veth(7, mtu=MTU, mac="0a:58:00:00:00:01")
    second = await net.devices.create_veth(7, mtu=MTU, mac="0a:58:00:00:00:02")
    assert second.host.index != first.host.index
    assert await net.devices.find_index(first.host.index) is None


async def test_foreign_device_of_our_name_is_left_alone(net: HostNet) -> None:
    net.host.run("ip", "link", "add", "lxc00007", "type", "veth", "peer", "name", "other")
    with pytest.raises(DeviceError, match="lxc00007 exists and is not Holdfast's"):
        await net.devices.create_veth(7, mtu=MTU, mac="0a:58:00:00:00:01")
    assert await net.devices.collect_leaks([]) == []
    assert await net.devices.find("lxc00007")


async def test_pair_of_an_agent_that_died_while_it_made_it_is_replaced(net: HostNet) -> None:
    """It has no alias yet; the name of its other side says whose it is."""
    net.host.run("ip", "link", "add", "lxc00007", "type", "veth", "peer", "name", "hf00007")
    half = await net.devices.get("lxc00007")
    pair = await net.devices.create_veth(7, mtu=MTU, mac="0a:58:00:00:00:01")
    assert pair.host.index != half.index
    assert set(await net.devices.ours()) == {"lxc00007"}


async def test_failed_creation_leaves_nothing(net: HostNet, tmp_path: Path) -> None:
    async with Netlink() as netlink:
        devices = Devices(netlink, Sysctls(tmp_path))
        with pytest.raises(DeviceError, match="sysctl net/ipv4/conf/lxc00009/forwarding"):
            await devices.create_veth(9, mtu=MTU, mac="0a:58:00:00:00:01")
        assert await devices.ours() == {}


async def test_read_only_settings_do_not_keep_an_endpoint_from_working(net: HostNet, tmp_path: Path) -> None:
    device = tmp_path / "net/ipv4/conf/lxc00009"
    device.mkdir(parents=True)
    (device / "forwarding").write_text("1\n")
    async with Netlink() as netlink:
        devices = Devices(netlink, Sysctls(tmp_path))
        assert (await devices.create_veth(9, mtu=MTU, mac="0a:58:00:00:00:01")).host.up
        assert set(await devices.ours()) == {"lxc00009"}


async def test_leaks_are_collected_and_kept_endpoints_stay(net: HostNet) -> None:
    for endpoint_id in (1, 2, 3):
        await net.devices.create_veth(endpoint_id, mtu=MTU, mac=f"0a:58:00:00:00:0{endpoint_id}")
    assert sorted(await net.devices.collect_leaks([2])) == [host_name(1), host_name(3)]
    assert set(await net.devices.ours()) == {host_name(2)}
    assert await net.devices.find(temporary_name(1)) is None
    assert await net.devices.delete(host_name(2))
    assert not await net.devices.delete(host_name(2))


async def test_unknown_device_and_namespace_are_named(net: HostNet) -> None:
    with pytest.raises(DeviceError, match="find device nope"):
        await net.devices.get("nope")
    await net.devices.create_veth(1, mtu=MTU, mac="0a:58:00:00:00:01")
    with pytest.raises(DeviceError, match="/nowhere can not be opened"):
        await net.devices.move_inside("hf00001", Path("/nowhere"), "eth0", "10.50.0.9")


async def test_mtu_and_addresses_change(net: HostNet) -> None:
    await net.devices.create_veth(1, mtu=MTU, mac="0a:58:00:00:00:01")
    await net.devices.set_mtu("lxc00001", 1400)
    assert (await net.devices.get("lxc00001")).mtu == 1400
    await net.devices.add_router(ROUTER)  # again: fine
    assert await net.devices.routers() == {ROUTER}
    assert await net.devices.remove_address(ROUTER)
    assert not await net.devices.remove_address(ROUTER)
    assert await net.devices.routers() == set()


async def test_container_and_host_reach_each_other(net: HostNet) -> None:
    inside = await net.container(5)
    with serving(inside, 80):
        assert seen_by_server(net.host, container_address(5), 80) == ROUTER
    with serving(net.host, 8000):
        assert seen_by_server(inside, ROUTER, 8000) == container_address(5)


async def test_routes_are_listed_and_pruned(net: HostNet) -> None:
    await net.container(5)
    await net.container(6)
    await net.routes.add_unreachable(POOL)
    await net.routes.add_unreachable(POOL)
    net.host.run("ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2")  # not ours
    ours = await net.routes.ours()
    assert set(ours) == {"10.50.0.5/32", "10.50.0.6/32", POOL}
    assert ours[POOL] == 0
    assert await net.routes.prune([POOL, "10.50.0.5/32"]) == ["10.50.0.6/32"]
    assert await net.routes.delete(POOL)
    assert not await net.routes.delete(POOL)
    assert await net.routes.delete("10.50.0.5")
    assert "203.0.113.0/24" in net.host.run("ip", "route")


async def test_address_without_an_endpoint_is_refused(net: HostNet) -> None:
    inside = await net.container(5)
    await net.routes.add_unreachable(POOL)
    assert seen_by_server(inside, "10.50.0.77", 80) is None
    assert "unreachable" in net.host.run("ip", "route", "show", "type", "unreachable")


async def test_route_to_a_missing_device_names_it(net: HostNet) -> None:
    with pytest.raises(RouteError, match=r"route to 10\.50\.0\.9 by device 4242"):
        await net.routes.upsert(EndpointRoute("10.50.0.9", 4242, "0a:58:00:00:00:01"))


def test_read_only_sysctls_say_what_to_bind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some").write_text("0\n")

    def refuse(*_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system")

    settings = Sysctls(tmp_path)
    assert not settings.write("some", "0")
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(DeviceError, match=r"sysctl some can not be set to 1: Read-only file system \(.*bind"):
        settings.write("some", "1")


async def test_netlink_belongs_to_the_namespace_it_was_opened_in() -> None:
    require_root()
    with inside_new_netns(), new_netns():
        async with Netlink() as netlink:
            assert [device.name for device in await Devices(netlink).all()] == ["lo"]
            assert await Routes(netlink).ours() == {}


async def test_several_tasks_list_on_one_socket(net: HostNet) -> None:
    """The kernel refuses a second dump while one is under way; of many devices it takes several reads."""
    ids = range(1, 31)
    for endpoint_id in ids:
        await net.devices.create_veth(endpoint_id, mtu=MTU, mac=f"0a:58:00:00:00:{endpoint_id:02x}")
    names = {host_name(each) for each in ids} | {temporary_name(each) for each in ids}
    async with Netlink() as netlink:
        devices, routes, attacher = Devices(netlink), Routes(netlink), Attacher(netlink)
        for _ in range(5):
            first, second, on_lo, found, filters = await asyncio.gather(
                devices.all(), devices.all(), devices.routers(), routes.ours(), attacher.filters(1)
            )
            assert names < {each.name for each in first}
            assert first == second
            assert (on_lo, found, filters) == ({ROUTER}, {}, [])
