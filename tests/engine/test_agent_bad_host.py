# SPDX-License-Identifier: Apache-2.0
"""A host in bad order: a pinned map of another layout, a second agent, a pool that is full.

One host of its own with the smallest pool there may be; its tests run in their order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from prestart import handover
from tests.support.agent import AgentHost
from tests.support.engine import WORKLOAD_IMAGE
from tests.support.host import REPO, Hub, wait_for
from tests.support.stream import POLICY, Flows

SMALL = "10.50.0.0/29"
CAPACITY = 5  # eight addresses less network, router and broadcast
PINS = "/sys/fs/bpf/tc/globals"
PIN = f"{PINS}/cilium_ipcache"


@pytest.fixture(scope="module")
def small(hub: Hub) -> Iterator[AgentHost]:
    with AgentHost("hfp") as host:
        host.address = hub.join(host)
        host.start_etcd()
        (host.policies / "server.yaml").write_text(POLICY)
        host.start_agent(ipv4_range=SMALL)
        host.network()
        wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 1, "policy in force")
        yield host


@pytest.fixture(scope="module")
def flows(small: AgentHost) -> Flows:
    """A live stream that is allowed and datagrams that are denied, between three containers."""
    return Flows(small)


def test_full_pool_is_named_and_takes_the_next_one_when_there_is_room(small: AgentHost, flows: Flows) -> None:
    used = small.api("/v1/healthz")["ipam"]["used"]
    for number in range(CAPACITY - used):
        small.container(f"filler{number}", "sleep", "infinity")
    command = ("run", "-d", "--network", "holdfast", "--name", "late", WORKLOAD_IMAGE, "sleep", "60")
    refused = small.engine.docker(*command, check=False)
    assert refused.returncode != 0
    assert SMALL in refused.stderr
    assert "ipv4-range" in refused.stderr
    small.engine.docker("rm", "-f", "late")
    freed = small.endpoint_of("filler0")["status"]["networking"]["addressing"][0]["ipv4"]
    small.engine.docker("rm", "-f", "filler0")
    assert small.container("late", "sleep", "infinity") == freed
    small.engine.docker("rm", "-f", "late", *(f"filler{number}" for number in range(1, CAPACITY - used)))
    flows.wait_progress()
    flows.check_unbroken()


def test_second_agent_does_nothing_while_the_first_lives(small: AgentHost, flows: Flows) -> None:
    """It says who is in its way, and ends when it is asked to."""
    before = small.api("/v1/endpoint")
    plugin = small.private("/run/docker") / "plugins" / "holdfast.sock"
    inode = plugin.stat().st_ino
    arguments = [part for name, value in small.options().items() for part in (f"--{name}", value)]
    second = small.popen(sys.executable, "-m", "agent", *arguments, environment={"PYTHONPATH": str(REPO)})
    wait_for(lambda: f"another agent serves {small.socket}" in second.output(), "reason")
    assert small.api("/v1/endpoint") == before
    assert plugin.stat().st_ino == inode
    flows.wait_progress()
    assert second.stop() == 0
    assert small.healthy()


def test_pinned_map_of_another_layout_is_refused_and_nothing_stops(small: AgentHost, flows: Flows) -> None:
    """The agent says every difference and waits; what runs is enforced; without the pin it goes on."""
    before = [(each["id"], each["status"]["identity"]) for each in small.api("/v1/endpoint")]
    small.stop_agent()
    small.exec("mv", PIN, f"{PINS}/aside")
    small.exec(*f"bpftool map create {PIN} type hash key 4 value 8 entries 10 name wrong".split())
    agent = small.launch_agent(ipv4_range=SMALL)
    wait_for(lambda: "layout" in trouble(small) or "differ" in trouble(small), "trouble in status")
    for words in (
        PIN,
        "type is hash",
        "key size is 4",
        "value size is 8",
        "max entries is 10",
        "flags is 0x0",
    ):
        assert words in trouble(small)
    assert "cilium_ipcache" in small.cli("status", check=False).stdout
    flows.wait_progress()
    small.exec("rm", PIN)
    wait_for(small.healthy, "healthy agent", seconds=60)
    assert agent.running
    small.exec("rm", f"{PINS}/aside")
    assert [(each["id"], each["status"]["identity"]) for each in small.api("/v1/endpoint")] == before
    flows.wait_progress()
    flows.check_unbroken()
    flows.check_denied()


def test_full_etcd_is_named_and_nothing_stops(small: AgentHost, flows: Flows) -> None:
    """etcd takes no write: status says so, and what was lost meanwhile is written when there is room."""
    record = f"cilium/state/nodes/v1/default/{small.name}"
    small.stop_etcd()
    small.start_etcd(quota=16 << 20)
    wait_for(small.healthy, "healthy agent", seconds=60)
    assert record in small.keys(record)
    for number in range(20):
        small.etcdctl("put", f"junk/{number}", stdin="x" * 1_200_000, check=False)
    assert "NOSPACE" in small.etcdctl("alarm", "list")
    small.etcdctl("del", record)
    wait_for(lambda: "space exceeded" in kvstore(small, "Failure"), "trouble in status", seconds=60)
    assert record in kvstore(small, "Failure")
    assert "space exceeded" in small.cli("status", check=False).stdout
    flows.wait_progress()
    revision = json.loads(small.etcdctl("get", "junk/0", "-w", "json"))["header"]["revision"]
    small.etcdctl("del", "--prefix", "junk/")
    small.etcdctl("compact", str(revision))
    small.etcdctl("defrag")
    small.etcdctl("alarm", "disarm")
    wait_for(lambda: record in small.keys(record), "record again", seconds=90)
    wait_for(small.healthy, "healthy agent", seconds=60)
    flows.check_unbroken()
    flows.check_denied()


def test_state_directory_that_can_not_be_written_is_named_and_nothing_stops(
    small: AgentHost, flows: Flows
) -> None:
    """A start with a disk that has gone read-only; what can not be written down is not begun."""
    before = [(each["id"], each["status"]["identity"]) for each in small.api("/v1/endpoint")]
    state = str(small.state)
    small.stop_agent()
    small.exec("mount", "--bind", state, state)
    small.exec("mount", "-o", "remount,bind,ro", state)
    try:
        small.start_agent(ipv4_range=SMALL)
        found = small.api("/v1/healthz")["checkpoint"]
        assert found["state"] == "Warning"
        assert f"{state}/views.db can not be" in found["msg"]
        assert "views.db can not be" in small.cli("status", check=False).stdout
        assert [(each["id"], each["status"]["identity"]) for each in small.api("/v1/endpoint")] == before
        command = ("run", "-d", "--network", "holdfast", "--name", "late", WORKLOAD_IMAGE, "sleep", "60")
        refused = small.engine.docker(*command, check=False)
        assert refused.returncode != 0
        assert "Read-only file system" in refused.stderr
        small.engine.docker("rm", "-f", "late")
        flows.wait_progress()
        flows.check_denied()
    finally:
        small.exec("umount", state)
    small.container("late", "sleep", "infinity")
    small.engine.docker("rm", "-f", "late")
    wait_for(lambda: small.api("/v1/healthz")["checkpoint"]["state"] == "Ok", "checkpoint", seconds=60)
    flows.wait_progress()
    flows.check_unbroken()


def test_damaged_files_of_the_last_life_stand_in_status(small: AgentHost, flows: Flows) -> None:
    small.stop_agent()
    (small.state / "node.json").write_bytes(b"{")
    (small.state / "views.db").write_bytes(b"")
    small.handed_over = {handover.CONNECT: "0", handover.TROUBLE: "prestart.json is empty"}
    try:
        small.start_agent(ipv4_range=SMALL)
    finally:
        small.handed_over = {}
    found = small.api("/v1/healthz")["checkpoint"]
    assert found["state"] == "Warning"
    for words in ("node.json is damaged", "views.db was damaged (it is empty)", "prestart.json is empty"):
        assert words in found["msg"]
    assert {path.name.partition(".damaged-")[0] for path in small.state.glob("*.damaged-*")} == {
        "node.json",
        "views.db",
    }
    flows.wait_progress()
    flows.check_unbroken()
    flows.check_denied()


def kvstore(host: AgentHost, state: str) -> str:
    """Return what status says of etcd in this state; nothing in another, or while it does not answer."""
    status = host.api("/v1/healthz", check=False)
    return str(status["kvstore"]["msg"]) if status and status["kvstore"]["state"] == state else ""


def trouble(host: AgentHost) -> str:
    """Return what status says is wrong with the agent; nothing while it does not answer."""
    status = host.api("/v1/healthz", check=False)
    return str(status["holdfast"]["msg"]) if status and status["holdfast"]["state"] == "Failure" else ""
