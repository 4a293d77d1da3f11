# SPDX-License-Identifier: Apache-2.0
"""Three hosts: who may talk to whom is the same on one host and between two, by the tunnel and directly.

    host 1    server, near-friend, near-foe
    host 2    far-friend
    host 3    far-foe

Policy knows friends from foes by label alone; every host learns the others' workloads from etcd.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet import Fleet, FleetHost, new_fleet
from tests.support.host import run, wait_for
from tests.support.places import Neighbour, Place, opened, passing
from tests.support.rules import element, rule

PROTOCOLS = ("TCP", "UDP", "ICMP")
FAMILIES = (4, 6)
MODES = {
    "tunnel": {"tunnel": "vxlan"},
    "direct": {"tunnel": "disabled", "auto_direct_node_routes": "true"},
}


class Scene:
    """The hosts with their workloads."""

    def __init__(self, fleet: Fleet, mode: str, stack: contextlib.ExitStack) -> None:
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

    def _run(self, host: FleetHost, name: str, *, app: str = "") -> Place:
        return self._stack.enter_context(host.workload(name, app=app))

    @staticmethod
    def _known(host: FleetHost, place: Place) -> None:
        wait_for(lambda: host.knows(place), f"{place.name} known to host {host.number}")

    def outside(self, host: FleetHost) -> Place:
        """Return a host itself as a place."""
        inside = opened(Path(f"/run/netns/{host.netns}"))
        self._stack.callback(inside.close)
        return host.place(inside)


@pytest.fixture(scope="module", params=MODES)
def scene(request: pytest.FixtureRequest, engine_parts: None) -> Iterator[Scene]:
    with new_fleet(3) as fleet, contextlib.ExitStack() as stack:
        fleet.start(**MODES[request.param])
        yield Scene(fleet, request.param, stack)
        for host in fleet.hosts:
            assert host.agent is not None
            assert "Traceback" not in host.agent.output(), host.agent.output()[-4000:]


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
    agent = scene.one.agent
    assert agent is not None
    friends = element("ingress", endpoints=[FRIENDS])
    with scene.one.policy(rule(server, "ingress", friends)):
        agent.kill(signal.SIGSTOP)
        try:
            with (
                scene.two.workload("new-friend", app="friend") as friend,
                scene.three.workload("new-foe", app="foe") as foe,
            ):
                seen = friend.of(family).asks("TCP", server.address)
                assert foe.of(family).asks("TCP", server.address) is None
                if scene.mode == "tunnel":
                    assert seen == friend.of(family).address
                else:
                    assert seen is None
                agent.kill(signal.SIGCONT)
                wait_for(lambda: scene.one.knows(friend), "the new one known")
                assert friend.of(family).asks("TCP", server.address) == friend.of(family).address
                assert foe.of(family).asks("TCP", server.address) is None
        finally:
            agent.kill(signal.SIGCONT)


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
    """A megabyte each way, and echoes of every size up to beyond what one packet carries."""
    for family in FAMILIES:
        client, server = scene.far_friend.of(family), scene.server.of(family)
        for size in (1300, 1400, 1450, 1500, 4000):
            ping = client.netns.command(["ping", "-n", "-c", "1", "-W", "1", "-s", str(size), server.address])
            run(ping)


def test_what_is_for_nobody_is_dropped_and_named(scene: Scene) -> None:
    """An address of host 1's pool that no endpoint has."""
    free = "10.50.1.250"
    assert not scene.far_friend.pings(free)
    if scene.mode == "tunnel":
        assert scene.one.dropped("Stale or unroutable IP", "ingress") > 0


def test_tables_say_where_everybody_is(scene: Scene) -> None:
    tunnel = scene.one.cli("bpf", "tunnel", "list").stdout
    entries = {
        line.split()[0]: line for line in scene.one.cli("bpf", "ipcache", "list").stdout.splitlines() if line
    }
    far = entries[f"{scene.far_friend.address}/32"]
    assert (f"tunnelendpoint={scene.two.address}" in far) == (scene.mode == "tunnel")
    assert ("10.50.2.0:0" in tunnel) == (scene.mode == "tunnel")
    nodes = scene.one.cli("node", "list").stdout
    assert all(host.address in nodes for host in scene.fleet.hosts)
