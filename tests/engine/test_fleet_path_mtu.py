# SPDX-License-Identifier: Apache-2.0
"""Two hosts on a network that loses, in silence, what is longer than 1400 bytes: it is found out and told.

host 1    client ──────── bulk ──────▶ server    host 2
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.agent import ETCD_PORT
from tests.support.bulk import Bulk
from tests.support.fleet import Fleet, FleetHost, new_fleet
from tests.support.host import hub_ipv6, wait_for
from tests.support.netns import Netns
from tests.support.places import Place, opened

FULL, CARRIED, OVERHEAD = 1500, 1400, 50
FAMILIES = (4, 6)
MODES = {
    "tunnel": {"tunnel": "vxlan"},
    "direct": {"tunnel": "disabled", "auto_direct_node_routes": "true"},
}
# Longer than the kernel waits before it sends a lost packet for the fifth time.
SILENCE_S = 3.0


class Scene:
    """The hosts, what runs on them, and the network between."""

    def __init__(self, fleet: Fleet, mode: str, stack: contextlib.ExitStack) -> None:
        self.one, self.two = fleet.hosts
        self.mode = mode
        self.client = stack.enter_context(self.one.workload("client"))
        self.server = stack.enter_context(self.two.workload("server"))
        self.insides = {host.name: opened(Path(f"/run/netns/{host.netns}")) for host in fleet.hosts}
        self.switch = opened(Path(f"/run/netns/{fleet.hub.name}"))
        for inside in (*self.insides.values(), self.switch):
            stack.callback(inside.close)
        for inside in self.insides.values():
            inside.cut_on_the_wire("eth0")
        wait_for(lambda: self.one.knows(self.server) and self.two.knows(self.client), "both known")

    def bulk(self, family: int, source: Netns | None = None) -> Bulk:
        return Bulk(source or self.client.netns, self.server.netns, self.server.of(family).address)

    def of(self, host: FleetHost) -> Place:
        return host.place(self.insides[host.name])

    def is_found_out(self) -> bool:
        """True when each host knows what arrives at both addresses of the other."""
        others = ((self.one, self.two), (self.two, self.one))
        return all(
            narrow(host) == dict.fromkeys((other.address, hub_ipv6(other.address)), CARRIED)
            for host, other in others
        )

    def inside_mtu(self) -> int:
        """Return what endpoints may send while the network carries less."""
        return CARRIED - OVERHEAD if self.mode == "tunnel" else CARRIED

    def route_mtu(self, address: str) -> int:
        """Return what host 1's own route to an address says."""
        (route,) = json.loads(self.insides[self.one.name].run("ip", "-j", "route", "get", address))
        metrics = route.get("metrics") or [{}]
        return int(metrics[0].get("mtu", 0))


def narrow(host: FleetHost) -> dict[str, int]:
    """Return address → bytes of what a host says that less arrives at."""
    found: Any = host.api("/v1/healthz")["cluster-health"]
    return {each["ip"]: each["mtu"] for each in found["narrow-paths"]}


@pytest.fixture(scope="module", params=MODES)
def scene(request: pytest.FixtureRequest, engine_parts: None) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(new_fleet(2))
        fleet.start(cluster_health_interval="1s", **MODES[request.param])
        yield Scene(fleet, request.param, stack)


@pytest.fixture
def narrowed(scene: Scene) -> Iterator[Scene]:
    for port in ("p1", "p2"):
        scene.switch.narrow(port, CARRIED, but=f"tcp sport {ETCD_PORT}")  # as by a network of its own
    try:
        yield scene
    finally:
        scene.switch.widen()
        wait_for(lambda: not narrow(scene.one) and not narrow(scene.two), "full length again", seconds=60)


def test_a_bulk_transfer_goes_on_once_the_network_is_found_out(narrowed: Scene) -> None:
    with contextlib.closing(narrowed.bulk(4)) as begun:
        assert not begun.arrives(SILENCE_S), "the network is to lose long packets"
        wait_for(narrowed.is_found_out, "word of both hosts", seconds=90)
        assert begun.arrives(60), "TCP tries again at growing intervals"
    for family in FAMILIES:
        with contextlib.closing(narrowed.bulk(family)) as later:
            assert later.arrives(SILENCE_S), family
        with contextlib.closing(narrowed.bulk(family, narrowed.of(narrowed.one).netns)) as from_host:
            assert from_host.arrives(SILENCE_S), f"from the host itself by IPv{family}"
    said = narrowed.one.cli("status", check=False).stdout
    assert f"{narrowed.two.name} {narrowed.two.address}: only packets of up to {CARRIED} bytes" in said
    assert f"up to {CARRIED} bytes arrive, of {FULL}" in narrowed.one.cli("health", check=False).stdout
    listed = narrowed.one.cli("metrics", "list", check=False).stdout
    assert re.search(r"^holdfast_narrow_paths +2(\.0)?$", listed, re.MULTILINE), "an address of each family"


def test_it_is_known_from_the_start_of_the_next_life_and_of_a_host_that_is_gone(narrowed: Scene) -> None:
    one, two = narrowed.one, narrowed.two
    wait_for(narrowed.is_found_out, "word of both hosts", seconds=90)
    wait_for(lambda: narrowed.route_mtu(narrowed.server.address) == narrowed.inside_mtu(), "route")
    two.kill_agent()
    one.stop_agent()
    one.start_agent(cluster_health_interval="1s", **MODES[narrowed.mode])
    wait_for(lambda: one.api("/v1/healthz")["cluster-health"]["unreachable"] == 1, "a node that is gone")
    assert narrow(one).get(two.address) == CARRIED
    assert narrowed.route_mtu(narrowed.server.address) == narrowed.inside_mtu()
    with contextlib.closing(narrowed.bulk(4, narrowed.of(one).netns)) as from_host:
        assert from_host.arrives(SILENCE_S)
    two.start_agent(cluster_health_interval="1s", **MODES[narrowed.mode])


def test_a_network_that_heals_carries_full_length_again(scene: Scene) -> None:
    wait_for(lambda: scene.route_mtu(scene.server.address) == 0, "route of full length")
    pinned = scene.one.cli("map", "get", "holdfast_path_mtu", check=False).stdout
    assert scene.two.address not in pinned
