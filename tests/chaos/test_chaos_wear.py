# SPDX-License-Identifier: Apache-2.0
"""Containers come and go: nothing of them stays behind, in the agent or in the kernel; idle, it is silent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.support import snapshot
from tests.support.agent import AgentHost
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub, wait_for

__all__ = ["engine_parts", "hub"]

WARM, ROUNDS = 3, 12
SPARE = 2  # connections to the engine that are kept for a moment
SILENCE_S = 8.0  # every part has looked at the host once


@pytest.fixture(scope="module")
def host(hub: Hub) -> Iterator[AgentHost]:
    with AgentHost("hfw") as new:
        new.address = hub.join(new)
        new.start_etcd()
        new.start_agent()
        new.network()
        yield new


def start_and_remove(host: AgentHost, number: int) -> None:
    """One container's life, with a label and a published port of its own."""
    publish = ("--publish", f"{9000 + number}:80")
    host.container(f"short{number}", "sleep", "infinity", labels={"app": f"short{number}"}, options=publish)
    host.engine.docker("rm", "-f", f"short{number}")


def descriptors(host: AgentHost) -> int:
    assert host.agent is not None
    return len(os.listdir(f"/proc/{host.agent.pid}/fd"))


def test_nothing_is_left_of_containers(host: AgentHost) -> None:
    for number in range(WARM):
        start_and_remove(host, number)
    wait_for(lambda: host.api("/v1/endpoint") == [], "no endpoints")
    open_before, before = descriptors(host), snapshot.taken(host)
    for number in range(ROUNDS):
        start_and_remove(host, number)
    wait_for(lambda: host.api("/v1/endpoint") == [], "no endpoints")
    wait_for(lambda: descriptors(host) <= open_before + SPARE, f"no more than {open_before} descriptors")
    wait_for(lambda: snapshot.differences(before, snapshot.taken(host)) == [], "the host as it was")


def test_idle_agent_is_silent(host: AgentHost) -> None:
    assert host.agent is not None
    written = host.agent.output()
    time.sleep(SILENCE_S)
    said = host.agent.output().removeprefix(written).splitlines()
    # A look at the connections every few minutes is said at the lowest level.
    assert [line for line in said if "level=DEBUG subsys=agent.conntrack" not in line] == []
