# SPDX-License-Identifier: Apache-2.0
"""The firewall's rules with real packets through veth pairs: no programs here, so nft and iptables decide."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from datapath.errors import FirewallError
from datapath.firewall import IPV6, MARK_NO_MASQUERADE, Firewall, FirewallState, PublishedPort
from datapath.forward import CHAIN, ForwardChain
from datapath.hostflows import HostFlows
from datapath.rulewatch import RuleWatch
from tests.support.hostnet import HOST_ON_WIRE, POOL, ROUTER, WORLD, HostNet, container_address, host_net
from tests.support.netns import Netns
from tests.support.require import require_root, require_tools
from tests.support.traffic import REFUSED_AFTER_S, UDP, ask, connected, seen_by_server, serving

FIVE, SIX = container_address(5), container_address(6)


@pytest.fixture
async def net() -> AsyncIterator[HostNet]:
    require_root()
    require_tools("ip", "nsenter", "nft", "iptables", "iptables-save", "iptables-restore")
    async with host_net() as made:
        yield made


def published(host_port: int, *, address: str = "", protocol: int = 6, count: int = 1) -> PublishedPort:
    """Port `host_port` (or `count` from there) of the host, as port 80 and following of container 5."""
    return PublishedPort(protocol, address, host_port, host_port + count - 1, FIVE, 80, 80 + count - 1)


def state(*ports: PublishedPort, direct: frozenset[str] = frozenset()) -> FirewallState:
    return FirewallState(ROUTER, frozenset({POOL}), direct, frozenset(ports))


def drop_forward(host: Netns) -> None:
    host.run("iptables", "-P", "FORWARD", "DROP")


# --- FORWARD DROP


@pytest.mark.parametrize("before", [True, False])
async def test_flows_pass_a_host_that_drops_what_it_forwards(net: HostNet, before: bool) -> None:
    inside = await net.container(5)
    await Firewall().apply(state(published(8080)))
    chain = ForwardChain()
    if before:
        drop_forward(net.host)
        with serving(net.world, 80):
            assert seen_by_server(inside, WORLD, 80) is None
    assert await chain.ensure()
    if not before:
        drop_forward(net.host)
    with serving(net.world, 80), serving(inside, 80):
        assert seen_by_server(inside, WORLD, 80) == HOST_ON_WIRE
        assert seen_by_server(net.world, HOST_ON_WIRE, 8080) == WORLD
    assert await chain.verify() == []


async def test_forward_chain_goes_without_a_trace(net: HostNet) -> None:
    net.host.run("iptables", "-A", "FORWARD", "-s", "192.0.2.1", "-j", "DROP")
    before = net.host.run("iptables", "-S")
    chain = ForwardChain()
    assert await chain.ensure()
    assert await chain.ensure() == []
    assert await chain.remove()
    assert not await chain.remove()
    assert net.host.run("iptables", "-S") == before


async def test_jump_comes_back_to_the_top(net: HostNet) -> None:
    """What a restart of docker or ufw does: rules before ours, or everything flushed."""
    chain = ForwardChain()
    await chain.ensure()
    net.host.run("iptables", "-N", "DOCKER-USER")
    net.host.run("iptables", "-I", "FORWARD", "-j", "DOCKER-USER")
    net.host.run("iptables", "-A", "FORWARD", "-j", CHAIN)
    assert await chain.ensure() == [f"{CHAIN} is not the one first rule of FORWARD"]
    assert net.host.run("iptables", "-S", "FORWARD").splitlines()[1:] == [
        f"-A FORWARD -j {CHAIN}",
        "-A FORWARD -j DOCKER-USER",
    ]
    net.host.run("iptables", "-F")
    assert len(await chain.ensure()) == 3
    assert await chain.verify() == []


async def test_changes_by_others_are_noticed_once(net: HostNet) -> None:
    async with RuleWatch() as watch:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.changed(), 0.3)
        for number in range(5):
            net.host.run("iptables", "-A", "FORWARD", "-s", f"192.0.2.{number}", "-j", "DROP")
        await asyncio.wait_for(watch.changed(), 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.changed(), 0.3)


# --- masquerading


async def test_world_sees_the_host_and_direct_prefixes_see_the_container(net: HostNet) -> None:
    inside = await net.container(5)
    net.world.run("ip", "route", "add", POOL, "via", HOST_ON_WIRE)
    firewall = Firewall()
    with serving(net.world, 80), serving(net.world, 81, UDP):
        await firewall.apply(state())
        assert seen_by_server(inside, WORLD, 80) == HOST_ON_WIRE
        assert seen_by_server(inside, WORLD, 81, UDP) == HOST_ON_WIRE
        await firewall.apply(state(direct=frozenset({"198.51.100.0/24"})))
        assert seen_by_server(inside, WORLD, 80) == FIVE


async def test_marked_packets_are_not_masqueraded(net: HostNet) -> None:
    inside = await net.container(5)
    net.world.run("ip", "route", "add", POOL, "via", HOST_ON_WIRE)
    await Firewall().apply(state())
    net.host.run(
        "iptables", "-t", "mangle", "-A", "FORWARD", "-j", "MARK", "--or-mark", str(MARK_NO_MASQUERADE)
    )
    with serving(net.world, 80):
        assert seen_by_server(inside, WORLD, 80) == FIVE


async def test_containers_are_not_masqueraded_to_each_other(net: HostNet) -> None:
    inside, other = await net.container(5), await net.container(6)
    await Firewall().apply(state())
    with serving(inside, 80):
        assert seen_by_server(other, FIVE, 80) == SIX


# --- published ports


async def test_published_port_from_everywhere(net: HostNet) -> None:
    inside, other = await net.container(5), await net.container(6)
    await Firewall().apply(state(published(8080)))
    with serving(inside, 80):
        assert seen_by_server(net.world, HOST_ON_WIRE, 8080) == WORLD
        assert seen_by_server(net.host, "127.0.0.1", 8080) == ROUTER
        assert seen_by_server(net.host, HOST_ON_WIRE, 8080) == HOST_ON_WIRE
        assert seen_by_server(other, HOST_ON_WIRE, 8080) == SIX
        assert seen_by_server(other, ROUTER, 8080) == SIX
        assert seen_by_server(inside, HOST_ON_WIRE, 8080) == ROUTER  # hairpin to itself


async def test_published_udp_port(net: HostNet) -> None:
    inside = await net.container(5)
    await Firewall().apply(state(published(8080, protocol=17)))
    with serving(inside, 80, UDP):
        assert seen_by_server(net.world, HOST_ON_WIRE, 8080, UDP) == WORLD
        assert seen_by_server(net.host, "127.0.0.1", 8080, UDP) == ROUTER
        assert seen_by_server(inside, HOST_ON_WIRE, 8080, UDP) == ROUTER


async def test_published_range(net: HostNet) -> None:
    inside = await net.container(5)
    await Firewall().apply(state(published(9000, count=10)))
    with serving(inside, 80), serving(inside, 89):
        assert seen_by_server(net.world, HOST_ON_WIRE, 9000) == WORLD
        assert seen_by_server(net.world, HOST_ON_WIRE, 9009) == WORLD
        assert seen_by_server(net.world, HOST_ON_WIRE, 9010) is None


async def test_port_bound_to_one_address(net: HostNet) -> None:
    inside = await net.container(5)
    await Firewall().apply(state(published(8081, address=HOST_ON_WIRE), published(8082, address="127.0.0.1")))
    with serving(inside, 80):
        assert seen_by_server(net.world, HOST_ON_WIRE, 8081) == WORLD
        assert seen_by_server(net.host, "127.0.0.1", 8081) is None
        assert seen_by_server(net.host, "127.0.0.1", 8082) == ROUTER
        assert seen_by_server(net.world, HOST_ON_WIRE, 8082) is None


def send_loopback_over(device: str, gateway: str, netns: Netns) -> None:
    """Make `netns` send what it has for 127.0.0.1 over the wire, as an attacker would."""
    netns.run("ip", "route", "del", "local", "127.0.0.1", "table", "local")
    netns.run("ip", "route", "del", "local", "127.0.0.0/8", "table", "local")
    netns.run("ip", "route", "add", "127.0.0.1", "via", gateway, "dev", device, "onlink")


async def test_wire_does_not_reach_a_port_published_on_loopback(net: HostNet) -> None:
    inside = await net.container(5)
    send_loopback_over("eth0", HOST_ON_WIRE, net.world)
    await Firewall().apply(state(published(8080, address="127.0.0.1"), published(8081)))
    with serving(inside, 80):
        assert seen_by_server(net.world, "127.0.0.1", 8080) is None
        assert seen_by_server(net.world, "127.0.0.1", 8081) is None


def reaches(sender: Netns, receiver: socket.socket) -> bool:
    """Say whether a datagram for the receiver's address comes through; no answer is needed."""
    receiver.settimeout(REFUSED_AFTER_S)
    with sender.socket(UDP) as client:
        client.sendto(b"x", receiver.getsockname())
    try:
        return receiver.recv(16) == b"x"
    except TimeoutError:
        return False


async def test_containers_do_not_reach_the_hosts_loopback(net: HostNet) -> None:
    inside = await net.container(5)
    send_loopback_over("eth0", "169.254.1.1", inside)
    with net.host.socket(UDP) as receiver:
        receiver.bind(("127.0.0.1", 9000))
        assert reaches(inside, receiver)  # route_localnet alone lets it in
        await Firewall().apply(state(published(8080)))
        assert not reaches(inside, receiver)
        assert reaches(net.host, receiver)


async def test_connections_outlive_a_rewrite(net: HostNet) -> None:
    inside = await net.container(5)
    firewall = Firewall()
    await firewall.apply(state(published(8080)))
    with serving(inside, 80), connected(net.world, HOST_ON_WIRE, 8080) as client:
        assert ask(client, "one") == WORLD
        await firewall.apply(state(published(8080), published(8081)))
        assert ask(client, "two") == WORLD
        await firewall.apply(state())
        assert ask(client, "three") == WORLD
        assert seen_by_server(net.world, HOST_ON_WIRE, 8080) is None


# --- verify, ensure, remove


async def test_everything_amiss_is_named_and_repaired(net: HostNet) -> None:
    firewall, wanted = Firewall(), state(published(8080, count=3), published(53, protocol=17, address=ROUTER))
    assert "chain guard" in await firewall.verify(wanted)
    assert await firewall.ensure(wanted)
    assert await firewall.ensure(wanted) == []
    net.host.run("nft", "delete element ip holdfast published { tcp . 8081 }")
    net.host.run("nft", "add element ip holdfast published { tcp . 22 : 10.50.0.9 . 22 }")
    net.host.run("nft", "flush chain ip holdfast guard")
    assert await firewall.verify(wanted) == [
        "rule endpoints do not reach the host's loopback in guard",
        "rule endpoints do not claim a loopback address in guard",
        "tcp . 8081 in published",
        "nothing for tcp . 22 in published",
    ]
    assert len(await firewall.ensure(wanted)) == 4
    net.host.run("nft", "flush ruleset")
    assert await firewall.ensure(wanted)
    assert await firewall.verify(wanted) == []


async def test_remove_leaves_nothing_and_foreign_tables_alone(net: HostNet) -> None:
    net.host.run("nft", "add table ip other")
    firewall = Firewall()
    await firewall.apply(state(published(8080)))
    await firewall.remove()
    await firewall.remove()
    assert net.host.run("nft", "list", "ruleset").split() == ["table", "ip", "other", "{", "}"]


async def test_refused_script_leaves_the_old_table(net: HostNet) -> None:
    firewall = Firewall()
    await firewall.apply(state(published(8080)))
    with pytest.raises(FirewallError, match="published twice"):
        await firewall.apply(state(published(8080), PublishedPort(6, "", 8080, 8080, SIX, 80, 80)))
    assert await firewall.verify(state(published(8080))) == []


async def test_ipv6_is_the_same_table_in_another_family(net: HostNet) -> None:
    port = PublishedPort(6, "", 8080, 8081, "fd00::5", 80, 81)
    wanted = FirewallState("fd00::1", frozenset({"fd00::/64"}), frozenset({"fd01::7/128"}), frozenset({port}))
    firewall, chain = Firewall(IPV6), ForwardChain("ip6tables")
    assert await firewall.ensure(wanted)
    assert await firewall.verify(wanted) == []
    assert await chain.ensure()
    assert await chain.verify() == []
    assert net.host.run("iptables", "-S").count(CHAIN) == 0
    await firewall.remove()
    await chain.remove()
    assert "holdfast" not in net.host.run("nft", "list", "ruleset")


async def test_a_thousand_published_ports(net: HostNet) -> None:
    inside = await net.container(5)
    firewall, wanted = Firewall(), state(published(20000, count=1000))
    await firewall.apply(wanted)
    assert await firewall.verify(wanted) == []
    with serving(inside, 1079):
        assert seen_by_server(net.world, HOST_ON_WIRE, 20999) == WORLD


# --- flows of the host's own conntrack


async def test_udp_flow_follows_a_port_that_moves_to_another_container(net: HostNet) -> None:
    five, six = await net.container(5), await net.container(6)
    firewall, old = Firewall(), published(8080, protocol=17)
    new = PublishedPort(17, "", 8080, 8080, SIX, 80, 80)
    await firewall.apply(state(old))
    with serving(five, 80, UDP), connected(net.world, HOST_ON_WIRE, 8080, UDP) as client:
        ask(client, "five")
        async with HostFlows() as flows:
            assert await flows.forget_diverted([old]) == 0
            await firewall.apply(state(new))
            ask(client, "still five")
            assert await flows.forget_diverted([new]) == 1
        with pytest.raises(OSError, match=r"timed out|refused"):
            ask(client, "nobody serves there yet")
        with serving(six, 80, UDP):
            assert ask(client, "six") == WORLD


async def test_udp_flow_from_before_a_port_was_published(net: HostNet) -> None:
    five = await net.container(5)
    await Firewall().apply(state())
    wanted = published(8080, protocol=17, count=3)
    with connected(net.world, HOST_ON_WIRE, 8081, UDP) as client, serving(five, 81, UDP):
        with serving(net.host, 8081, UDP):
            ask(client, "the host itself")
        await Firewall().apply(state(wanted))
        async with HostFlows() as flows:
            assert await flows.forget_diverted([wanted]) == 1
        assert ask(client, "the container") == WORLD


async def test_flows_of_an_address_that_goes_are_forgotten(net: HostNet) -> None:
    five, six = await net.container(5), await net.container(6)
    await Firewall().apply(state(published(8080)))
    with serving(five, 80), serving(net.world, 81), serving(net.world, 82, UDP):
        assert seen_by_server(net.world, HOST_ON_WIRE, 8080) == WORLD
        assert seen_by_server(five, WORLD, 81) == HOST_ON_WIRE
        assert seen_by_server(six, WORLD, 82, UDP) == HOST_ON_WIRE
        async with HostFlows() as flows:
            assert await flows.forget_address(FIVE) == 2
            assert await flows.forget_address(FIVE) == 0
            assert await flows.forget_address(SIX) == 1


# --- beside docker

# What docker 20.10 writes for its own bridge and one published port.
DOCKER_RULES = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8088 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""


def flush_for_docker(host: Netns, tmp_path: Path) -> None:
    """Leave nothing but docker's rules in the tables of iptables."""
    (tmp_path / "rules").write_text(DOCKER_RULES)
    host.run("iptables-restore", str(tmp_path / "rules"))


def start_docker(host: Netns, tmp_path: Path) -> None:
    """Put docker's rules where docker puts them: before those that are there."""
    (tmp_path / "rules").write_text(DOCKER_RULES.replace("-A FORWARD -j", "-I FORWARD -j"))
    host.run("iptables-restore", "--noflush", str(tmp_path / "rules"))


async def check_flows(net: HostNet, inside: Netns) -> None:
    with serving(net.world, 80), serving(inside, 80):
        assert seen_by_server(inside, WORLD, 80) == HOST_ON_WIRE
        assert seen_by_server(net.world, HOST_ON_WIRE, 8080) == WORLD
        assert seen_by_server(net.host, "127.0.0.1", 8080) == ROUTER


@pytest.mark.parametrize("docker_first", [True, False])
async def test_flows_pass_beside_docker_in_either_order(
    net: HostNet, tmp_path: Path, docker_first: bool
) -> None:
    inside = await net.container(5)
    firewall, chain = Firewall(), ForwardChain()
    if docker_first:
        start_docker(net.host, tmp_path)
    await firewall.apply(state(published(8080)))
    await chain.ensure()
    if not docker_first:
        start_docker(net.host, tmp_path)
        await check_flows(net, inside)  # its rules are before ours now, and let our packets by
        assert await chain.ensure()
    await check_flows(net, inside)
    flush_for_docker(net.host, tmp_path)
    assert await chain.ensure()
    assert await firewall.verify(state(published(8080))) == []
    await check_flows(net, inside)
