# SPDX-License-Identifier: Apache-2.0
"""An operator opens a host in an emergency: with everything dead, over agents' lives, and to its end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from datapath.allowall import BOTH_WAYS
from datapath.mapspec import MapCatalogue
from tests.support.agent import AgentHost
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub, wait_for
from tests.support.stopped import stopped_command
from tests.support.stream import POLICY

__all__ = ["engine_parts", "hub"]

WHY = ("--reason", "incident 4711", "--by", "alice")


class Scene:
    """A server that lets clients in, and a stranger who is none."""

    def __init__(self, host: AgentHost) -> None:
        self.host = host
        self.server_ip = host.container("server", "sleep", "infinity", labels={"app": "server"})
        host.container("stranger", "sleep", "infinity", labels={"app": "stranger"})
        self.apply(POLICY)

    def apply(self, policy: str) -> None:
        """Have the host's policy file hold this, and wait until it does for the agent too."""
        before = self.host.api("/v1/policy")["revision"]
        (self.host.policies / "server.yaml").write_text(policy)
        wait_for(lambda: self.host.api("/v1/policy")["revision"] > before, "policy in force")

    def stranger_gets_in(self, server: str = "") -> bool:
        ping = ("ping", "-c1", "-W1", server or self.server_ip)
        return bool(self.host.inside("stranger", *ping, check=False).returncode == 0)

    def opened(self, *words: str) -> str:
        return str(self.host.cli("allow-all", "--state-dir", str(self.host.state), *words, *WHY).stdout)

    def ended(self) -> None:
        self.host.cli("allow-all", "--state-dir", str(self.host.state), "--end")

    def shows(self, words: str) -> bool:
        return words in self.host.cli("status", check=False).stdout

    def said(self, words: str) -> bool:
        """True once the agent of now has logged it."""
        assert self.host.agent is not None
        return words in self.host.agent.output()


@pytest.fixture(scope="module")
def scene(hub: Hub) -> Iterator[Scene]:
    with AgentHost() as host:
        host.address = hub.join(host)
        host.start_etcd()
        host.start_agent()
        host.network()
        yield Scene(host)


@pytest.fixture(autouse=True)
def closed_before_and_after(scene: Scene) -> Iterator[None]:
    wait_for(lambda: not scene.stranger_gets_in(), "a server that is closed to strangers")
    try:
        yield
    finally:
        scene.ended()


@contextlib.contextmanager
def nobody_else_alive(scene: Scene) -> Iterator[None]:
    """Agent and etcd are dead; afterwards etcd is there, and an agent that has reached it."""
    scene.host.kill_agent()
    scene.host.stop_etcd()
    try:
        yield
    finally:
        scene.host.start_etcd()
        if scene.host.agent is None or not scene.host.agent.running:
            scene.host.launch_agent()
    wait_for(scene.host.healthy, "healthy agent", seconds=90)


def test_agent_and_etcd_are_dead(scene: Scene) -> None:
    """It is open at once, stays so when an agent comes back, which says so everywhere, and is taken back."""
    with nobody_else_alive(scene):
        assert "1 endpoint" in scene.opened("--endpoint", "container-name:server")
        assert scene.stranger_gets_in()
        scene.host.launch_agent()
        wait_for(lambda: scene.said("ALL IS ALLOWED to and from endpoint"), "word of the order")
        wait_for(lambda: scene.host.api("/v1/endpoint", check=False), "endpoints restored")
        assert scene.stranger_gets_in()
    assert scene.stranger_gets_in()
    shown = scene.host.cli("status", check=False).stdout
    assert "ALL IS ALLOWED to and from endpoint" in shown
    assert "by alice: incident 4711" in shown
    assert "ALL IS ALLOWED" in scene.host.cli("status", "--brief", check=False).stdout
    rows = [line for line in scene.host.cli("endpoint", "list").stdout.splitlines() if "ALLOW-ALL" in line]
    assert len(rows) == 1
    assert "app=server" in rows[0]
    counted = scene.host.cli("metrics", "list", "-p", "allow_all_orders").stdout
    assert counted.split()[-2:] == ["holdfast_allow_all_orders", "1.0"]
    scene.ended()
    wait_for(lambda: not scene.stranger_gets_in(), "a closed server")
    wait_for(lambda: scene.said("no longer in force: all allowed to and from endpoint"), "word of the end")
    assert "ALL IS ALLOWED" not in scene.host.cli("status").stdout


@pytest.mark.rare
def test_it_ends_on_time_although_the_agent_came_back(scene: Scene) -> None:
    scene.host.kill_agent()
    scene.opened("--host", "--for", "12s")
    assert scene.stranger_gets_in()
    scene.host.start_agent()
    wait_for(lambda: scene.said("ALL IS ALLOWED on this host"), "word of the order")
    wait_for(lambda: not scene.stranger_gets_in(), "end of the order")
    wait_for(lambda: scene.said("no longer in force: all allowed on this host"), "word of the end")
    number = str(scene.host.endpoint_of("server")["id"])
    held = json.loads(scene.host.cli("bpf", "policy", "get", number, "-o", "json").stdout)
    ((_, entries),) = held.items()
    assert not [each for each in entries if each["until"]], "the agent has taken the entries out"
    assert not scene.stranger_gets_in()


def test_policy_changes_and_containers_start_meanwhile(scene: Scene) -> None:
    """What is opened stays open whatever policy says, and what starts later is open as well."""
    scene.opened("--host", "--for", "1h")
    scene.apply(POLICY.replace("app: client", "app: nobody"))
    assert scene.stranger_gets_in()
    late = scene.host.container("late", "sleep", "infinity", labels={"app": "server"})
    try:
        assert scene.stranger_gets_in(late)
        scene.host.kill_agent()
        scene.host.start_agent()
        assert scene.stranger_gets_in()
        assert scene.stranger_gets_in(late)
        scene.ended()
        assert not scene.stranger_gets_in()
        assert not scene.stranger_gets_in(late)
    finally:
        scene.host.engine.docker("rm", "-f", "late")
        scene.apply(POLICY)


def test_an_order_that_ended_beside_a_stopped_command_does_not_come_back(scene: Scene) -> None:
    """Neither at once nor with an agent that starts and compares every map."""
    scene.opened("--host", "--for", "1h")
    wait_for(lambda: scene.shows("ALL IS ALLOWED to and from every endpoint"), "word of the order")
    with stopped_command(scene.host.state):
        scene.ended()
    assert not scene.stranger_gets_in()
    scene.host.kill_agent()
    scene.host.start_agent()
    assert not scene.stranger_gets_in()
    assert not scene.shows("ALL IS ALLOWED")


def test_a_policy_that_fills_its_map_leaves_room_for_an_order(scene: Scene) -> None:
    """What does not fit into that is refused, and what is in force stays."""
    number = str(scene.host.endpoint_of("server")["id"])

    def held() -> int:
        ((_, entries),) = json.loads(
            scene.host.cli("bpf", "policy", "get", number, "-o", "json").stdout
        ).items()
        return len(entries)

    room = MapCatalogue().policy_max - len(BOTH_WAYS)
    before = held()
    try:
        scene.apply(POLICY + filler(room - before))
        wait_for(lambda: held() == room, "policy map as full as a policy may make it")
        scene.opened("--endpoint", number)
        assert scene.stranger_gets_in()
        scene.ended()
        scene.apply(POLICY + filler(room - before + 1))
        wait_for(
            lambda: f"needs {room + 1} map entries" in scene.host.cli("status", check=False).stdout,
            "word of it",
        )
        assert held() == room
        scene.opened("--endpoint", number)
        assert scene.stranger_gets_in()
    finally:
        scene.ended()
        scene.apply(POLICY)
    wait_for(lambda: held() == before, "policy map as it was")


def filler(ports: int) -> str:
    """Return a rule that costs so many entries."""
    ranges = [(first, min(first + 63, 10_000 + ports - 1)) for first in range(10_000, 10_000 + ports, 64)]
    listed = ", ".join(f"{{port: '{first}', endPort: {last}, protocol: TCP}}" for first, last in ranges)
    return f"""
- endpointSelector: {{matchLabels: {{app: server}}}}
  ingress:
  - fromCIDR: [192.0.2.0/24]
    toPorts: [{{ports: [{listed}]}}]
"""


def test_a_damaged_file_is_named_and_takes_nothing_back(scene: Scene) -> None:
    scene.opened("--host", "--for", "1h")
    wait_for(lambda: scene.shows("ALL IS ALLOWED to and from every endpoint"), "word of the order")
    (scene.host.state / "allow-all.json").write_text("{")
    wait_for(lambda: scene.shows("allow-all.json: Input data was truncated; what was ordered stays"), "word")
    assert list(scene.host.state.glob("allow-all.json.damaged-*"))
    assert scene.stranger_gets_in()
    scene.ended()
    wait_for(lambda: not scene.stranger_gets_in(), "a closed server")
    wait_for(lambda: not scene.shows("truncated"), "orders that can be read")
    assert not scene.shows("ALL IS ALLOWED")
