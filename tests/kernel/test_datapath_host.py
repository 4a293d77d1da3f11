# SPDX-License-Identifier: Apache-2.0
"""Programs, routes and rules together on one small host, with real connections over every way there is.

The rules of netfilter and the programs' conntrack see different halves of some flows; here it shows
whether both agree: who is seen by a server, and what policy says about it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from socket import SocketKind

import pytest

from datapath.firewall import PublishedPort
from tests.support.bpflab import HOST, WORLD
from tests.support.enforced import EVERYBODY, EnforcedHost, enforced_host, identity
from tests.support.hostnet import HOST_ON_WIRE, POOL, ROUTER, container_address
from tests.support.hostnet import WORLD as WORLD_ADDRESS
from tests.support.require import require_root, require_tools
from tests.support.traffic import TCP, UDP, ask, connected, seen_by_server, serving

FIVE, SIX = container_address(5), container_address(6)
BOTH = pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])


@pytest.fixture
async def host() -> AsyncIterator[EnforcedHost]:
    require_root()
    require_tools("ip", "nsenter", "nft", "iptables", "iptables-save", "iptables-restore")
    ports = (PublishedPort(number, "", 8080, 8080, FIVE, 80, 80) for number in (6, 17))
    async with enforced_host(*ports) as made:
        yield made


@BOTH
async def test_between_containers(host: EnforcedHost, kind: SocketKind) -> None:
    five, six = await host.container(5), await host.container(6)
    with serving(five, 80, kind):
        assert seen_by_server(six, FIVE, 80, kind) is None
        assert host.denied()
        host.allow(5, identity(6), 80, 6 if kind == TCP else 17)
        assert seen_by_server(six, FIVE, 80, kind) == SIX
    with serving(five, 81, kind):
        assert seen_by_server(six, FIVE, 81, kind) is None


@BOTH
async def test_container_to_the_world_is_masqueraded(host: EnforcedHost, kind: SocketKind) -> None:
    five = await host.container(5)
    with serving(host.net.world, 80, kind):
        assert seen_by_server(five, WORLD_ADDRESS, 80, kind) == HOST_ON_WIRE


@BOTH
async def test_world_to_a_container_by_its_own_address(host: EnforcedHost, kind: SocketKind) -> None:
    """The way in passes the stack by, the way out does not: its packets must not be masqueraded."""
    five = await host.container(5)
    host.net.world.run("ip", "route", "add", POOL, "via", HOST_ON_WIRE)
    with serving(five, 80, kind):
        assert seen_by_server(host.net.world, FIVE, 80, kind) is None
        host.allow(5, WORLD)
        assert seen_by_server(host.net.world, FIVE, 80, kind) == WORLD_ADDRESS


@BOTH
async def test_world_to_a_published_port(host: EnforcedHost, kind: SocketKind) -> None:
    five = await host.container(5)
    with serving(five, 80, kind):
        assert seen_by_server(host.net.world, HOST_ON_WIRE, 8080, kind) is None
        assert host.denied()
        host.allow(5, WORLD, 80)
        assert seen_by_server(host.net.world, HOST_ON_WIRE, 8080, kind) is None  # port without protocol
        host.allow(5, WORLD, 80, 6 if kind == TCP else 17)
        assert seen_by_server(host.net.world, HOST_ON_WIRE, 8080, kind) == WORLD_ADDRESS


@BOTH
async def test_host_to_a_container_and_to_a_published_port(host: EnforcedHost, kind: SocketKind) -> None:
    five = await host.container(5)
    ways = ((FIVE, 80, ROUTER), ("127.0.0.1", 8080, ROUTER), (HOST_ON_WIRE, 8080, HOST_ON_WIRE))
    with serving(five, 80, kind):
        for address, port, _ in ways:
            assert seen_by_server(host.net.host, address, port, kind) is None
        host.allow(5, HOST)
        for address, port, seen in ways:
            assert seen_by_server(host.net.host, address, port, kind) == seen


@BOTH
async def test_container_to_the_host(host: EnforcedHost, kind: SocketKind) -> None:
    five = await host.container(5)
    for address in (HOST_ON_WIRE, ROUTER):  # a UDP server on no address would answer from the router's
        with serving(host.net.host, 7000, kind, address):
            assert seen_by_server(five, address, 7000, kind) == FIVE


@BOTH
async def test_container_to_another_by_a_published_port(host: EnforcedHost, kind: SocketKind) -> None:
    """The neighbour keeps its identity although the packet goes through the host's address."""
    five, six = await host.container(5), await host.container(6)
    with serving(five, 80, kind):
        host.allow(5, HOST)
        assert seen_by_server(six, HOST_ON_WIRE, 8080, kind) is None
        host.allow(5, identity(6))
        assert seen_by_server(six, HOST_ON_WIRE, 8080, kind) == SIX
        assert seen_by_server(six, FIVE, 80, kind) == SIX  # directly as well, at the same time


@BOTH
async def test_container_to_itself_by_a_published_port(host: EnforcedHost, kind: SocketKind) -> None:
    five = await host.container(5)
    with serving(five, 80, kind):
        assert seen_by_server(five, HOST_ON_WIRE, 8080, kind) is None
        host.allow(5, HOST)
        assert seen_by_server(five, HOST_ON_WIRE, 8080, kind) == ROUTER


async def test_a_policy_taken_back_ends_a_connection(host: EnforcedHost) -> None:
    five = await host.container(5)
    host.allow(5, EVERYBODY)
    with serving(five, 80), connected(host.net.world, HOST_ON_WIRE, 8080) as client:
        assert ask(client, "one") == WORLD_ADDRESS
        host.policies[5].delete([(EVERYBODY, 0, 0, 0)])
        with pytest.raises(TimeoutError):
            ask(client, "two")


async def test_connections_live_while_rules_are_rewritten(host: EnforcedHost) -> None:
    five = await host.container(5)
    host.allow(5, EVERYBODY)
    with serving(five, 80), connected(host.net.world, HOST_ON_WIRE, 8080) as client:
        assert ask(client, "one") == WORLD_ADDRESS
        await host.publish()
        assert ask(client, "two") == WORLD_ADDRESS
        await host.forward.remove()
        await host.forward.ensure()
        assert ask(client, "three") == WORLD_ADDRESS


async def test_ping_both_ways(host: EnforcedHost) -> None:
    require_tools("ping")
    five, six = await host.container(5), await host.container(6)
    host.allow(5, identity(6), 8, 1)
    assert "1 received" in six.run("ping", "-c1", "-W1", FIVE)
    assert "1 received" in five.run("ping", "-c1", "-W1", WORLD_ADDRESS)
    with pytest.raises(AssertionError):
        five.run("ping", "-c1", "-W1", SIX)


async def test_datagrams_larger_than_the_mtu(host: EnforcedHost) -> None:
    """Fragments: only the first has ports, and the host's stack may put them together on the way."""
    five, six = await host.container(5), await host.container(6)
    host.net.world.run("ip", "route", "add", POOL, "via", HOST_ON_WIRE)
    for remote in (identity(6), WORLD):
        host.allow(5, remote, 80, 17)
    ways = ((six, FIVE, 80), (host.net.world, FIVE, 80), (host.net.world, HOST_ON_WIRE, 8080))
    with serving(five, 80, UDP), serving(host.net.world, 81, UDP):
        for sender, address, port in (*ways, (five, WORLD_ADDRESS, 81)):
            with connected(sender, address, port, UDP) as client:
                assert ask(client, "x" * 3000)
