# SPDX-License-Identifier: Apache-2.0
"""An engine without live-restore starts its containers before the agent is there, or ends them without it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.agent import AgentHost
from tests.support.engine import WORKLOAD_IMAGE
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub, wait_for
from tests.support.refusing import calls_of_the_engine_fail

__all__ = ["engine_parts", "hub"]

pytestmark = pytest.mark.rare


@pytest.fixture
def host(hub: Hub) -> Iterator[AgentHost]:
    with AgentHost() as made:
        made.address = hub.join(made)
        made.start_etcd()
        made.start_agent()
        made.network()
        yield made


def run(host: AgentHost, name: str, *options: str) -> None:
    command = ("run", "-d", *options, "--name", name, "--network", "holdfast", "--label", f"app={name}")
    host.engine.docker(*command, WORKLOAD_IMAGE, "sleep", "infinity")


def state(host: AgentHost, name: str) -> dict[str, Any]:
    found: Any = host.engine.inspect(name)["State"]
    return dict(found)


def interfaces(host: AgentHost) -> set[str]:
    """Return the names of the host's sides of endpoints."""
    links = json.loads(host.exec("ip", "-j", "link", "show").stdout)
    return {each["ifname"] for each in links if each["ifname"].startswith("lxc")}


def engine_comes_back_alone(host: AgentHost) -> None:
    """Kill the engine under its containers and start it; the driver's calls fail meanwhile."""
    host.engine.kill()
    with calls_of_the_engine_fail(host):
        # It ends what it finds alive first, and answers nobody meanwhile.
        with contextlib.suppress(subprocess.TimeoutExpired):
            host.engine.start()
        wait_for(lambda: bool(state(host, "kept")["Error"]), "a container left exited", seconds=60)


def test_containers_that_the_engine_could_not_start(host: AgentHost) -> None:
    """Those that it keeps running are started by the agent; nothing is left of their former lives."""
    run(host, "kept", "--restart", "always", "--publish", "8900:9000")  # its former life has the port too
    run(host, "once")
    identity = host.endpoint_of("kept")["status"]["identity"]["id"]
    host.kill_agent()
    engine_comes_back_alone(host)
    assert "legacy plugin: Plugin.Activate: nobody is here" in state(host, "kept")["Error"]
    assert state(host, "kept")["Status"] == "exited"
    host.launch_agent()
    wait_for(lambda: state(host, "kept")["Running"], "the container, started again", seconds=60)
    wait_for(lambda: host.endpoint_of("kept")["status"]["identity"]["id"] == identity, "its identity")
    assert not state(host, "once")["Running"], "whoever started it decides"
    assert host.agent is not None
    assert "container kept was left exited when this driver was late" in host.agent.output()
    wait_for(lambda: len(host.api("/v1/endpoint")) == 1, "former endpoints collected", seconds=120)
    wait_for(lambda: len(interfaces(host)) == 1, "former interfaces gone")
    wait_for(host.healthy, "healthy agent", seconds=60)


def test_interfaces_of_containers_that_end_while_the_agent_is_away(host: AgentHost) -> None:
    run(host, "stays")
    run(host, "goes")
    both = interfaces(host)
    assert len(both) == 2
    host.kill_agent()
    with calls_of_the_engine_fail(host):
        host.engine.docker("kill", "goes")
    host.start_agent()
    stays = host.endpoint_of("stays")["status"]["networking"]["interface-name"]
    wait_for(lambda: len(host.api("/v1/endpoint")) == 1, "former endpoint collected", seconds=120)
    wait_for(lambda: interfaces(host) == {stays}, "former interface gone")
