# SPDX-License-Identifier: Apache-2.0
"""Three etcd members under two hosts with traffic: one is killed, then a second, then both come back.

    host 1      client, stranger, and what starts meanwhile
    host 2      server
    m1 m2 m3    etcd

Traffic and enforcement never change.  Containers that need an identity wait for it and do not fail.  One set
of machines for the whole module, because each step stands on the one before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.engine import WORKLOAD_IMAGE
from tests.support.engine_fixtures import engine_parts
from tests.support.fleet import Fleet, FleetHost, new_fleet
from tests.support.host import wait_for
from tests.support.members import NAMES, EtcdMembers
from tests.support.stream import POLICY, Flows

__all__ = ["engine_parts"]

# Nobody has had these labels before: `app` is what policy asks for, `env` makes the identity a new one.
LATE = {"friend": {"app": "client", "env": "late"}, "foe": {"app": "stranger", "env": "late"}}


class Scene:
    """The hosts, the members, and the traffic between the hosts."""

    def __init__(self, fleet: Fleet, members: EtcdMembers) -> None:
        self.one, self.two = fleet.hosts
        self.members = members
        for host in fleet.hosts:
            (host.policies / "server.yaml").write_text(POLICY)
        fleet.start(tunnel="vxlan", kvstore_opt=f"etcd.config={members.config}")
        self.flows = Flows(self.one, elsewhere={"server": self.two})
        self.known = {host.name: self.ipcache(host) for host in fleet.hosts}

    def ipcache(self, host: FleetHost) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(host.cli("bpf", "ipcache", "list", "-o", "json").stdout)
        return found

    def check(self) -> None:
        """Traffic went on, what is denied did not pass, and both kernels know all that they knew."""
        self.flows.wait_progress(200)
        self.flows.check()
        for host in (self.one, self.two):
            there = self.ipcache(host)
            lost = {each: was for each, was in self.known[host.name].items() if there.get(each) != was}
            assert not lost, (host.name, lost)

    def reaches(self, container: str) -> bool:
        """True when a container gets an answer of the server on the other host."""
        ping = ("ping", "-n", "-c1", "-W1", self.flows.server_ip)
        return bool(self.one.inside(container, *ping, check=False).returncode == 0)

    def identity(self, container: str) -> int:
        return int(self.one.endpoint_of(container)["status"]["identity"]["id"])

    def state(self, container: str) -> str:
        return str(self.one.endpoint_of(container)["status"]["state"])

    def prefix(self, container: str) -> str:
        (addresses,) = self.one.endpoint_of(container)["status"]["networking"]["addressing"]
        return f"{addresses['ipv4']}/32"

    def waits(self) -> str:
        """Return the lines of `holdfast status` that say what is waited for."""
        lines: list[str] = self.one.cli("status", check=False).stdout.splitlines()
        return "\n".join(line for line in lines if "waiting" in line.lower() or "KVStore" in line)


@pytest.fixture(scope="module")
def scene(engine_parts: None) -> Iterator[Scene]:
    with new_fleet(2, etcd=False) as fleet, EtcdMembers(fleet.hub) as members:
        yield Scene(fleet, members)


def test_the_leader_is_killed(scene: Scene) -> None:
    """Two are enough: new labels get their number, and the other host hears of the new address."""
    scene.check()
    scene.members.kill(scene.members.leader())
    address = scene.one.container("early", "sleep", "infinity", labels={"app": "client", "env": "early"})
    wait_for(lambda: scene.identity("early") > 255, "identity of the new container", seconds=90)
    wait_for(lambda: f"{address}/32" in scene.ipcache(scene.two), "its address on the other host", seconds=90)
    wait_for(lambda: scene.reaches("early"), "way to the server")
    wait_for(scene.one.healthy, "healthy agent", seconds=90)
    scene.check()


@pytest.mark.rare
def test_a_second_one_is_killed_and_both_come_back(scene: Scene) -> None:
    """Without a quorum there are no new numbers: who has none waits, denied, and has it afterwards."""
    scene.members.kill(scene.members.running[0])
    wait_for(lambda: "Failure" in scene.waits(), "trouble with etcd in status", seconds=60)
    with ThreadPoolExecutor(len(LATE)) as starting:
        starts = [starting.submit(start, scene, name, labels) for name, labels in LATE.items()]
        wait_for(lambda: "identity of" in scene.waits(), "word of them in status")
    for each in starts:
        assert each.result() == 0
    scene.one.container("known", "sleep", "infinity", labels={"app": "client", "env": "early"})
    assert scene.reaches("known"), "labels that have a number need no etcd"
    for name in LATE:
        assert scene.state(name) == "waiting-for-identity"
        assert not scene.reaches(name), "nobody knows yet who it is"
    scene.check()
    for name in set(NAMES) - set(scene.members.running):
        scene.members.start(name)
    scene.members.wait_serving()
    wait_for(lambda: {scene.state(name) for name in LATE} == {"ready"}, "two that are ready", seconds=60)
    assert all(scene.identity(name) > 255 for name in LATE)
    # Host 2 enforces: it has to hear of the number, and its patience grows to half a minute.
    wait_for(lambda: scene.reaches("friend"), "way to the server", seconds=60)
    assert not scene.reaches("foe")
    for host in (scene.one, scene.two):
        wait_for(host.healthy, "healthy agent", seconds=60)
    assert not scene.reaches("foe")
    scene.check()
    late = {scene.prefix(name) for name in ("known", *LATE)}
    wait_for(lambda: late <= scene.ipcache(scene.two).keys(), "their addresses on the other host")


def start(scene: Scene, name: str, labels: dict[str, str]) -> int:
    """Create a container, start it, and return the status of `docker start`."""
    docker = scene.one.engine.docker
    words = [part for label in labels.items() for part in ("-l", "=".join(label))]
    create = ("create", "--init", "--name", name, "--network", "holdfast", *words)
    docker(*create, WORKLOAD_IMAGE, "sleep", "infinity")
    return docker("start", name, check=False).returncode
