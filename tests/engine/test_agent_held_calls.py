# SPDX-License-Identifier: Apache-2.0
"""A start that is held inside one driver call: what is done to the container meanwhile lands in the middle of
its set-up, and an agent that is killed there is followed by one that goes on with what it finds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.support.agent import AgentHost
from tests.support.engine import WORKLOAD_IMAGE
from tests.support.host import Hub, wait_for
from tests.support.netns import Netns
from tests.support.places import PORTS, Place
from tests.support.relay import Point, Relay
from tests.support.require import require_tools
from tests.support.site import Site
from tests.support.traces import traces

NAME = "held"
# `run`: all calls of a start come before the interface is moved into the container.
RUN = [
    *(Point("CreateEndpoint", answered) for answered in (False, True)),
    *(Point("Join", answered) for answered in (False, True)),
    *(Point("ProgramExternalConnectivity", answered) for answered in (False, True)),
    *(Point("EndpointOperInfo", answered) for answered in (False, True)),
]
# `network connect`: it is moved between Join and EndpointOperInfo.
CONNECT = [each for each in RUN if each.method != "ProgramExternalConnectivity"]
END = [Point(method, answered) for method in ("Leave", "DeleteEndpoint") for answered in (False, True)]

Started = Future[CompletedProcess[str]]


class Held:
    """A site whose engine reaches its agent by a relay."""

    def __init__(self, site: Site, relay: Relay) -> None:
        self.site, self.relay, self.host = site, relay, site.host
        self.docker = site.host.engine.docker

    def next_life(self) -> None:
        """Kill the agent and start another one."""
        self.host.kill_agent()
        start_agent(self.host, self.relay)

    def background(self, pool: ThreadPoolExecutor, *arguments: str) -> Started:
        return pool.submit(self.docker, *arguments, check=False)

    def waits_for_engine(self, *words: str) -> None:
        """Return when the engine's log has a line with `words`: it has got a request."""
        wait_for(
            lambda: any(all(word in line for word in words) for line in self.log()), f"{words} in its log"
        )

    def log(self) -> list[str]:
        daemon = self.host.engine._daemon
        assert daemon is not None
        return daemon.output().splitlines()

    def endpoint(self) -> Any:
        return self.host.endpoint_of(NAME)["status"]

    def passes(self) -> bool:
        """True when the container and another one reach each other."""
        address = self.endpoint()["networking"]["addressing"][0]["ipv4"]
        inside = self.site.netns_of(NAME)
        with contextlib.ExitStack() as stack:
            stack.callback(inside.close)
            place = Place(NAME, address, inside).serve(stack)
            there = place.asks("TCP", self.site.server.address) == address
            return there and self.site.client.asks("TCP", address, PORTS[1]) == self.site.client.address


def start_agent(host: AgentHost, relay: Relay) -> None:
    inside = str(relay.agent.relative_to(host.private("/")))
    host.start_agent(docker_plugin_socket=f"/{inside}")


@pytest.fixture(scope="module")
def made(hub: Hub) -> Iterator[Held]:
    require_tools("etcd", "etcdctl", "curl", "nft", "iptables", "ping")
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(AgentHost("hfh", options=["--debug"]))
        host.address = hub.join(host)
        plugins = host.private("/run/docker") / "plugins"
        plugins.mkdir(exist_ok=True)
        agent = host.private("/run/docker") / "agent" / "holdfast.sock"
        relay = stack.enter_context(Relay(plugins / "holdfast.sock", agent))
        host.start_etcd()
        start_agent(host, relay)
        yield Held(Site(host, hub, stack), relay)


@pytest.fixture
def held(made: Held) -> Iterator[Held]:
    """Afterwards there is nothing on the host that was not before, and the name can be used again."""
    before = traces(made.host)
    yield made
    made.docker("rm", "-f", NAME, check=False)
    wait_for(lambda: traces(made.host) == before, f"end of all traces; before: {before}")
    made.docker("run", "--rm", "--name", NAME, "--network", "holdfast", WORKLOAD_IMAGE, "true")
    wait_for(lambda: traces(made.host) == before, f"end of all traces; before: {before}")
    assert made.site.status()["holdfast"]["state"] == "Ok"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.mark.parametrize("end", [("kill",), ("rm", "-f")], ids=["kill", "rm"])
@pytest.mark.parametrize("point", RUN, ids=str)
def test_container_killed_inside_its_set_up_leaves_nothing(
    held: Held, pool: ThreadPoolExecutor, point: Point, end: tuple[str, ...]
) -> None:
    created = held.docker("create", "--name", NAME, "--network", "holdfast", WORKLOAD_IMAGE, "sleep", "60")
    path = f"containers/{NAME}" if end == ("kill",) else f"containers/{NAME}?force=1"
    with held.relay.holding(point) as hold:
        starting = held.background(pool, "start", NAME)
        hold.wait()
        ending = held.background(pool, *end, NAME)
        held.waits_for_engine("Calling", path if end[0] == "rm" else f"{path}/kill")
        assert not starting.done(), "the end must land inside the start"
    assert created.returncode == 0
    starting.result()
    ending.result()


@pytest.mark.parametrize("point", RUN, ids=str)
def test_agent_killed_inside_the_start_of_a_container(
    held: Held, pool: ThreadPoolExecutor, point: Point
) -> None:
    held.docker("create", "--name", NAME, "--network", "holdfast", WORKLOAD_IMAGE, "sleep", "60")
    with held.relay.holding(point) as hold:
        starting = held.background(pool, "start", NAME)
        hold.wait()
        held.next_life()
        assert not starting.done()
    assert starting.result().returncode == 0, starting.result().stderr
    wait_for(lambda: bool(held.endpoint()["state"] == "ready"), "ready endpoint")
    assert held.passes()


@pytest.mark.parametrize("point", CONNECT, ids=str)
def test_agent_killed_inside_a_connection_to_the_network(
    held: Held, pool: ThreadPoolExecutor, point: Point
) -> None:
    """At EndpointOperInfo the interface is in the container already: it must be the same afterwards."""
    held.docker("run", "-d", "--name", NAME, WORKLOAD_IMAGE, "sleep", "60")
    with contextlib.closing(held.site.netns_of(NAME)) as inside:
        with held.relay.holding(point) as hold:
            connecting = held.background(pool, "network", "connect", "holdfast", NAME)
            hold.wait()
            before = interfaces(inside)
            assert ("eth1" in before) == (point.method == "EndpointOperInfo")
            held.next_life()
            assert not connecting.done()
        assert connecting.result().returncode == 0, connecting.result().stderr
        after = interfaces(inside)
    assert {name: after.get(name) for name in before} == before
    assert "eth1" in after
    wait_for(lambda: bool(held.endpoint()["state"] == "ready"), "ready endpoint")


@pytest.mark.parametrize("point", END, ids=str)
def test_agent_killed_inside_the_end_of_a_container(
    held: Held, pool: ThreadPoolExecutor, point: Point
) -> None:
    held.docker("run", "-d", "--name", NAME, "--network", "holdfast", WORKLOAD_IMAGE, "sleep", "60")
    assert held.passes()
    with held.relay.holding(point) as hold:
        ending = held.background(pool, "rm", "-f", NAME)
        hold.wait()
        held.next_life()
        assert not ending.done()
    assert ending.result().returncode == 0, ending.result().stderr


def interfaces(inside: Netns) -> dict[str, int]:
    """Return the interfaces in a namespace with their indices; the engine would not say it meanwhile."""
    return {each["ifname"]: each["ifindex"] for each in json.loads(inside.run("ip", "-j", "link"))}
