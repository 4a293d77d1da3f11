# SPDX-License-Identifier: Apache-2.0
"""Three hosts: who may talk to whom is the same on one host and between two, by the tunnel and directly.

    host 1    server, near-friend, near-foe; etcd
    host 2    far-friend
    host 3    far-foe

All are set up from the project's images by `make certs`, `make member` and `make join`; between the two modes
their options change, and the agents are made anew.  Policy knows friends from foes by label alone; every host
learns the others' workloads from etcd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tests.support.composed import ComposedFleet, composed_fleet
from tests.support.host import run, wait_for
from tests.support.node import Node
from tests.support.places import PORTS, Neighbour, Place, opened, passing
from tests.support.rules import element, on, rule

PROTOCOLS = ("TCP", "UDP", "ICMP")
FAMILIES = (4, 6)
EVERY_MODE = {"enable_ipv6": "true", "cluster_pool_ipv4_cidr": "10.50.0.0/16"}
MODES = {
    "tunnel": {"tunnel": "vxlan", "auto_direct_node_routes": "false"},
    "direct": {"tunnel": "disabled", "auto_direct_node_routes": "true"},
}


class Scene:
    """The hosts with their workloads."""

    def __init__(self, fleet: ComposedFleet, mode: str, stack: contextlib.ExitStack) -> None:
        self.fleet, self.mode, self._stack = fleet, mode, stack
        self.one, self.two, self.three = fleet.hosts
        self.server = self._run(self.one, "server")
        self.near_friend = self._run(self.one, "near-friend", app="friend")
        self.near_foe = self._run(self.one, "near-foe", app="foe")
        self.far_friend = self._run(self.two, "far-friend", app="friend")
        self.far_foe = self._run(self.three, "far-foe", app="foe")
        self.clients = (self.near_friend, self.near_foe, self.far_friend, self.far_foe)
        for host in fleet.hosts:
            for place in (self.server, *self.clients):
                self._known(host, place)

    def _run(self, host: Node, name: str, *, app: str = "") -> Place:
        return self._stack.enter_context(host.workload(name, app=app))

    @staticmethod
    def _known(host: Node, place: Place) -> None:
        wait_for(lambda: host.knows(place), f"{place.name} known to {host.name}")

    @staticmethod
    def pool_of(host: Node) -> IPv4Network:
        """Return what the host has claimed of the cluster's range."""
        return IPv4Network(host.api("/v1/healthz")["ipam"]["pool"])

    def outside(self, host: Node) -> Place:
        """Return a host itself as a place."""
        inside = opened(Path(f"/run/netns/{host.netns}"))
        self._stack.callback(inside.close)
        return host.place(inside)


@pytest.fixture(scope="module")
def fleet(engine_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposedFleet]:
    with composed_fleet(3, tmp_path_factory.mktemp("fleet")) as made:
        yield made


@pytest.fixture(scope="module", params=MODES)
def scene(request: pytest.FixtureRequest, fleet: ComposedFleet) -> Iterator[Scene]:
    fleet.start(request.param, **EVERY_MODE, **MODES[request.param])
    with contextlib.ExitStack() as stack:
        yield Scene(fleet, request.param, stack)
        for host in fleet.hosts:
            assert "Traceback" not in host.log(), host.log()[-4000:]


FRIENDS = {"matchLabels": {"app": "friend"}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_friends_pass_and_foes_do_not_wherever_they_are(scene: Scene, direction: str, family: int) -> None:
    subject = scene.server.of(family)
    peers = [each.of(family) for each in scene.clients]
    everything = {(peer.name, protocol) for peer in peers for protocol in PROTOCOLS}
    assert passing(subject, peers, direction, PROTOCOLS) == everything, "without a policy all pass"
    before = scene.one.dropped("Policy denied", direction)
    with scene.one.policy(rule(subject, direction, element(direction, endpoints=[FRIENDS]))):
        friends = {each for each in everything if "friend" in each[0]}
        assert passing(subject, peers, direction, PROTOCOLS) == friends
    assert scene.one.dropped("Policy denied", direction) > before


@pytest.mark.parametrize("family", FAMILIES)
def test_receivers_see_the_senders_own_address(scene: Scene, family: int) -> None:
    """Nothing is masqueraded between workloads."""
    server, client = scene.server.of(family), scene.far_friend.of(family)
    for protocol in ("TCP", "UDP"):
        assert client.asks(protocol, server.address) == client.address
        assert server.asks(protocol, client.address) == server.address


@pytest.mark.parametrize("family", FAMILIES)
def test_another_hosts_own_traffic_is_remote_node(scene: Scene, family: int) -> None:
    """Its host is `host`, the other one is `remote-node`, and neither is the world."""
    server = scene.server.of(family)
    here, there = scene.outside(scene.one).of(family), scene.outside(scene.two).of(family)
    for entity, allowed, denied in (("remote-node", there, here), ("host", here, there)):
        with scene.one.policy(rule(server, "ingress", element("ingress", entities=[entity]))):
            assert allowed.asks("TCP", server.address) is not None, entity
            assert denied.asks("TCP", server.address) is None, entity


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_from_the_first_packet(scene: Scene, family: int) -> None:
    """Host 1 learns nothing while its agent is stopped: what it knows of a new sender is what a packet says.

    Over the tunnel that is its identity.  Directly it is the world until its entry has come, and never
    somebody else.
    """
    server = scene.server.of(family)
    as_friend, as_world = PORTS
    elements = (
        element("ingress", endpoints=[FRIENDS], of=on("TCP", as_friend)),
        element("ingress", entities=["world"], of=on("TCP", as_world)),
    )

    def taken_for(place: Place) -> set[int]:
        return {port for port in PORTS if place.of(family).asks("TCP", server.address, port) is not None}

    with scene.one.policy(rule(server, "ingress", *elements)), contextlib.ExitStack() as stack:
        with scene.one.agent_stopped():
            friend = stack.enter_context(scene.two.workload("new-friend", app="friend"))
            foe = stack.enter_context(scene.three.workload("new-foe", app="foe"))
            if scene.mode == "tunnel":
                assert (taken_for(friend), taken_for(foe)) == ({as_friend}, set())
            else:
                assert (taken_for(friend), taken_for(foe)) == ({as_world}, {as_world})
        wait_for(lambda: all(map(scene.one.knows, (friend, foe))), "the new ones known")
        assert (taken_for(friend), taken_for(foe)) == ({as_friend}, set())


def test_published_port_from_afar(scene: Scene) -> None:
    """Another host, its workloads and the world reach a published port; who they are is told apart."""
    scene.one.container("shop", "sleep", "infinity", labels={"app": "shop"}, options=("-p", "8090:8000"))
    try:
        with contextlib.ExitStack() as stack:
            inside = stack.enter_context(contextlib.closing(scene.one.netns_of("shop")))
            Place("shop", "0.0.0.0", inside, "::").serve(stack)
            world = Neighbour(scene.fleet.hub)
            stack.callback(world.stop)
            outside = world.place("world")
            there = scene.outside(scene.two)
            address = scene.one.address
            for place in (outside, there, scene.far_friend):
                assert place.asks("TCP", address, 8090) is not None, place.name
            shop = {"endpointSelector": {"matchLabels": {"app": "shop"}}}
            for entity, allowed, denied in (("world", outside, there), ("remote-node", there, outside)):
                with scene.one.policy(shop | {"ingress": [element("ingress", entities=[entity])]}):
                    assert allowed.asks("TCP", address, 8090) is not None, entity
                    assert denied.asks("TCP", address, 8090) is None, entity
    finally:
        scene.one.engine.docker("rm", "-f", "shop", check=False)


def test_large_packets_arrive_whole(scene: Scene) -> None:
    """Echoes of every size up to beyond what one packet carries."""
    for family in FAMILIES:
        client, server = scene.far_friend.of(family), scene.server.of(family)
        for size in (1300, 1400, 1450, 1500, 4000):
            ping = client.netns.command(["ping", "-n", "-c", "1", "-W", "1", "-s", str(size), server.address])
            run(ping)


def test_what_is_for_nobody_is_dropped_and_named(scene: Scene) -> None:
    """An address of host 1's pool that no endpoint has."""
    free = scene.pool_of(scene.one)[250]
    assert not scene.far_friend.pings(str(free))
    if scene.mode == "tunnel":
        assert scene.one.dropped("Stale or unroutable IP", "ingress") > 0


def test_tables_say_where_everybody_is(scene: Scene) -> None:
    tunnel = scene.one.cli("bpf", "tunnel", "list").stdout
    entries = {
        line.split()[0]: line for line in scene.one.cli("bpf", "ipcache", "list").stdout.splitlines() if line
    }
    far = entries[f"{scene.far_friend.address}/32"]
    assert (f"tunnelendpoint={scene.two.address}" in far) == (scene.mode == "tunnel")
    assert (f"{scene.pool_of(scene.two).network_address}:0" in tunnel) == (scene.mode == "tunnel")
    nodes = scene.one.cli("node", "list").stdout
    assert all(host.address in nodes for host in scene.fleet.hosts)
