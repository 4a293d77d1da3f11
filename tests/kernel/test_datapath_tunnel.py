# SPDX-License-Identifier: Apache-2.0
"""Between two hosts on the real kernel: who speaks is known from the packet, by the tunnel and directly."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from datapath.errors import DeviceError, RouteError
from datapath.netlink import Netlink
from datapath.noderoutes import NodeRoute, NodeRoutes
from datapath.tunnel import DEVICE, PORT, Shape, Tunnel
from tests.support import frames
from tests.support.netns import Netns, inside_new_netns
from tests.support.require import require_root, require_tools
from tests.support.traffic import TCP, UDP, seen_by_server, serving
from tests.support.twohosts import (
    FAMILIES,
    REMOTE_NODE,
    Side,
    address,
    identity,
    link,
    router,
    two_hosts,
    wire_address,
)

INGRESS, EGRESS = 0, 1
LISTEN = 8000
DENIED, FORGED, UNSUPPORTED, STALE = (133, 1), (132, 1), (139, 1), (151, 1)


@pytest.fixture(params=["tunnel", "direct"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sides(mode: str) -> Iterator[tuple[Side, Side]]:
    require_root()
    require_tools("ip", "nsenter", "sysctl", "ping")
    with two_hosts(tunnel=mode == "tunnel", enforced=True) as made:
        for side in made:
            side.allow(EGRESS)
        yield made


def pings(source: Netns, target: str) -> bool:
    command = source.command(["ping", "-n", "-c", "1", "-W", "1", target])
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_only_the_named_identity_gets_in(
    sides: tuple[Side, Side], family: int, protocol: socket.SocketKind
) -> None:
    one, two = sides
    with serving(two.endpoint, LISTEN, protocol):
        assert seen_by_server(one.endpoint, address(2, family), LISTEN, protocol) is None
        assert two.dropped()[DENIED] > 0
        two.allow(INGRESS, identity(1))
        assert seen_by_server(one.endpoint, address(2, family), LISTEN, protocol) == address(1, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_host_itself_is_a_remote_node(sides: tuple[Side, Side], family: int) -> None:
    one, two = sides
    two.allow(INGRESS, identity(1))
    assert not pings(one.host, address(2, family))
    two.allow(INGRESS, REMOTE_NODE)
    assert pings(one.host, address(2, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_endpoint_reaches_the_other_hosts_own_addresses(sides: tuple[Side, Side], family: int) -> None:
    assert pings(sides[0].endpoint, router(2, family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["tunnel"], indirect=True)
def test_the_identity_is_the_packets_and_not_the_maps(sides: tuple[Side, Side], family: int) -> None:
    """Host 2 has never heard of the sender's address, or believes it to be somebody else's."""
    one, two = sides
    two.allow(INGRESS, identity(1))
    prefix = f"{address(1, family)}/{32 if family == 4 else 128}"
    with serving(two.endpoint, LISTEN):
        entry = two.ipcache.get(prefix)
        assert entry is not None
        two.ipcache.upsert([(prefix, entry._replace(identity=777))])
        assert seen_by_server(one.endpoint, address(2, family), LISTEN, TCP) == address(1, family)


class Injector:
    """Somebody on the wire who sends VXLAN packets of his own making to a host."""

    def __init__(self, netns: Netns, target: str) -> None:
        self._socket = netns.socket(socket.SOCK_DGRAM)
        self._target = (target, PORT)

    def send(self, number: int, frame: bytes) -> None:
        header = struct.pack(">BxxxI", 0x08, number << 8)
        self._socket.sendto(header + bytes(6) + b"\x02" + bytes(5) + frame[12:], self._target)

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("mode", ["tunnel"], indirect=True)
def test_what_is_wrong_in_the_tunnel_is_dropped_for_what_is_wrong_with_it(
    sides: tuple[Side, Side],
) -> None:
    one, two = sides
    two.allow(INGRESS)
    injector = Injector(one.host, wire_address(2))
    try:
        for family in FAMILIES:
            cases = {
                FORGED: frames.udp(address(2, family), address(2, family), 1, LISTEN),
                STALE: frames.udp(address(1, family), address(9, family), 1, LISTEN),
            }
            for reason, frame in cases.items():
                before = two.dropped().get(reason, 0)
                injector.send(identity(1), frame)
                eventually(two, reason, before)
        before = two.dropped().get(UNSUPPORTED, 0)
        injector.send(identity(1), frames.arp_request("10.50.2.2"))
        eventually(two, UNSUPPORTED, before)
    finally:
        injector.close()


@pytest.mark.parametrize("mode", ["tunnel"], indirect=True)
def test_a_stranger_who_claims_to_be_the_host_is_a_remote_node(sides: tuple[Side, Side]) -> None:
    one, two = sides
    two.allow(INGRESS, 1)  # the host's own identity, and nobody else
    injector = Injector(one.host, wire_address(2))
    try:
        before = two.dropped().get(DENIED, 0)
        injector.send(1, frames.udp(router(1), address(2), 1, LISTEN))
        eventually(two, DENIED, before)
    finally:
        injector.close()


def eventually(side: Side, reason: tuple[int, int], before: int) -> None:
    for _ in range(200):
        if side.dropped().get(reason, 0) == before + 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"{reason} is not counted: {side.dropped()}")


# --- the device


async def made(netlink: Netlink, shape: Shape | None = None, index: int = 0) -> Tunnel:
    tunnel = Tunnel(netlink, shape or Shape())
    tunnel.index = index
    await tunnel.ensure()
    return tunnel


def on_host(work: Callable[[Netns, Netlink], Awaitable[None]]) -> None:
    """Run a coroutine function with a netlink socket in a namespace of its own."""
    require_root()
    with inside_new_netns() as netns:

        async def main() -> None:
            async with Netlink() as netlink:
                await work(netns, netlink)

        asyncio.run(main())


def test_the_device_comes_back_under_its_index() -> None:
    """Endpoints' programs know it by that."""

    async def work(netns: Netns, netlink: Netlink) -> None:
        tunnel = await made(netlink)
        index = tunnel.index
        assert not await tunnel.ensure()
        netns.run("ip", "link", "del", DEVICE)
        netns.run("ip", "link", "add", "other", "type", "bridge")
        assert await tunnel.ensure()
        assert (tunnel.index, link(netns, DEVICE)[0]) == (index, index)

    on_host(work)


def test_a_former_life_s_device_is_kept_or_made_anew() -> None:
    async def work(netns: Netns, netlink: Netlink) -> None:
        first = await made(netlink)
        assert (await made(netlink)).index == first.index
        moved = await made(netlink, Shape(port=4789, mtu=1400))
        assert "dstport 4789" in netns.run("ip", "-d", "link", "show", DEVICE)
        assert "mtu 1400" in netns.run("ip", "link", "show", DEVICE)
        assert await moved.remove()
        assert not await moved.remove()

    on_host(work)


def test_somebody_elses_device_of_that_name_is_left_alone() -> None:
    async def work(netns: Netns, netlink: Netlink) -> None:
        netns.run("ip", "link", "add", DEVICE, "type", "bridge")
        with pytest.raises(DeviceError, match="is a bridge of somebody else"):
            await made(netlink)
        assert not await Tunnel(netlink, Shape()).remove()

    on_host(work)


def test_a_port_that_is_taken_is_named() -> None:
    async def work(netns: Netns, netlink: Netlink) -> None:
        netns.run("ip", "link", "add", "theirs", "type", "vxlan", "external", "dstport", str(PORT))
        with pytest.raises(DeviceError, match=f"UDP port {PORT}") as refused:
            await made(netlink)
        assert "tunnel-port" in refused.value.hint

    on_host(work)


# --- routes


def test_routes_are_replaced_pruned_and_nobody_elses() -> None:
    async def work(netns: Netns, netlink: Netlink) -> None:
        tunnel, routes = await made(netlink), NodeRoutes(netlink)
        netns.run("ip", "route", "add", "10.77.0.0/24", "dev", DEVICE)
        for host in ("10.9.0.2", "10.9.0.3"):
            await routes.upsert_tunnelled(NodeRoute("10.50.2.0/24", host), tunnel.index)
        await routes.upsert_tunnelled(NodeRoute("fd00:50:2::/64", "10.9.0.3"), tunnel.index)
        shown = netns.run("ip", "route", "show", "10.50.2.0/24")
        assert "dst 10.9.0.3" in shown
        assert shown.count("10.50.2.0/24") == 1
        assert await routes.ours() == {"10.50.2.0/24", "fd00:50:2::/64"}
        assert await routes.prune(["10.50.2.0/24"]) == 1
        assert await routes.delete("10.50.2.0/24")
        assert not await routes.delete("10.50.2.0/24")
        assert "10.77.0.0/24" in netns.run("ip", "route")

    on_host(work)


def test_many_routes_are_written_at_once_and_what_is_refused_is_named() -> None:
    """More than go into one message to the kernel; one of them would leave by an address that nobody has."""
    wanted = [NodeRoute(f"10.60.{number}.0/24", f"10.9.0.{number}") for number in range(1, 200)]
    wanted.append(NodeRoute("10.61.0.0/24", "10.9.0.7", "192.0.2.1"))
    wanted += [NodeRoute(f"fd00:60:{number}::/64", "10.9.0.8") for number in range(1, 20)]

    async def work(netns: Netns, netlink: Netlink) -> None:
        tunnel, routes = await made(netlink), NodeRoutes(netlink)
        refused = await routes.upsert_all_tunnelled(wanted, tunnel.index)
        assert list(refused) == ["10.61.0.0/24"]
        assert "10.9.0.7" in str(refused["10.61.0.0/24"])
        assert await routes.ours() == {each.prefix for each in wanted} - set(refused)
        shown = netns.run("ip", "route", "show", "dev", DEVICE)
        for each in wanted[:199]:
            assert f"{each.prefix}  encap ip id 1 src 0.0.0.0 dst {each.host} " in shown
        again = [NodeRoute(each.prefix, "10.9.0.250") for each in wanted[:199]]
        assert await routes.upsert_all_tunnelled(again, tunnel.index) == {}
        shown = netns.run("ip", "route", "show", "dev", DEVICE)
        assert shown.count("dst 10.9.0.250 ") == shown.count("proto") == len(again)
        assert await routes.prune(each.prefix for each in wanted[:9]) == 190 + 19

    on_host(work)


def test_a_device_that_is_gone_is_said_for_each_route() -> None:
    async def work(netns: Netns, netlink: Netlink) -> None:
        routes = NodeRoutes(netlink)
        wanted = [NodeRoute(prefix, "10.9.0.2") for prefix in ("10.50.2.0/24", "fd00:50:2::/64")]
        refused = await routes.upsert_all_tunnelled(wanted, 4242)
        assert list(refused) == [each.prefix for each in wanted]
        with pytest.raises(RouteError, match=r"pool 10\.50\.2\.0/24 of host 10\.9\.0\.2: No such device"):
            await routes.upsert_tunnelled(wanted[0], 4242)

    on_host(work)


def test_a_host_behind_a_router_is_no_neighbour() -> None:
    async def work(netns: Netns, netlink: Netlink) -> None:
        netns.run("ip", "link", "add", "wire", "type", "bridge")
        netns.run("ip", "link", "set", "wire", "up")
        netns.run("ip", "addr", "add", "10.9.0.1/24", "dev", "wire")
        netns.run("ip", "route", "add", "10.8.0.0/16", "via", "10.9.0.254")
        routes = NodeRoutes(netlink)
        await routes.upsert_direct(NodeRoute("10.50.2.0/24", "10.9.0.2"))
        with pytest.raises(
            RouteError, match=r"host 10\.8\.0\.2: it is behind router 10\.9\.0\.254"
        ) as refused:
            await routes.upsert_direct(NodeRoute("10.50.3.0/24", "10.8.0.2"))
        assert "vxlan" in refused.value.hint
        assert await routes.ours() == {"10.50.2.0/24"}

    on_host(work)
