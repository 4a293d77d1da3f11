# SPDX-License-Identifier: Apache-2.0
"""`holdfast health` and its line of `status`, as real processes against a small agent on a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from agent.api import models, models_health
from cli.commands.health import rtt
from cli.commands.status import cluster_health
from tests.support.agent_view import FakeAgent, Serving, make_health, serving
from tests.support.cli import run

REFUSED = "Connection refused"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Serving]:
    with serving(FakeAgent(), tmp_path / "h.sock") as served:
        yield served


def test_health_has_ciliums_lines(agent: Serving) -> None:
    shown = run("health", socket=agent.path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == (
        "Probe time:   2026-01-01T00:00:00Z\n"
        "Nodes:\n"
        "  default/vm (localhost): 1m15s ago\n"
        "    Host connectivity to 10.99.0.2:\n"
        "      ICMP to stack:  not granted\n"
        "      TCP to agent:   OK, RTT=350.5µs\n"
        "      HTTP to agent:  OK, RTT=350.5µs\n"
        "  default/b: 1m15s ago\n"
        "    Host connectivity to 10.99.0.3:\n"
        "      ICMP to stack:  not granted\n"
        "      TCP to agent:   OK, RTT=350.5µs\n"
        "      HTTP to agent:  OK, RTT=350.5µs\n"
    )


def test_a_further_address_is_shown_when_it_has_failed_or_all_are_wanted(agent: Serving) -> None:
    agent.view.found = make_health({"default/vm": {"10.99.0.2": "", "fd77::2": ""}})
    assert "fd77::2" not in run("health", socket=agent.path).stdout
    assert (
        "      Secondary connectivity to fd77::2:\n" in run("health", "--verbose", socket=agent.path).stdout
    )
    agent.view.found = make_health({"default/vm": {"10.99.0.2": "", "fd77::2": f"{REFUSED}\x1b[31m"}})
    shown = run("health", socket=agent.path)
    assert shown.returncode == 1
    assert "        HTTP to agent:  Connection refused\\x1b[31m\n" in shown.stdout


def test_succinct_is_a_line_a_node(agent: Serving) -> None:
    nodes = {
        "default/vm": {"10.99.0.2": "", "fd77::2": ""},
        "default/b": {"10.99.0.3": REFUSED},
        "default/c": {},
    }
    agent.view.found = make_health(nodes)
    shown = run("health", "--succinct", socket=agent.path)
    assert shown.returncode == 1
    lines = shown.stdout.splitlines()
    assert lines[0] == "Cluster health:   1/3 reachable   (2026-01-01T00:00:00Z)"
    assert [line.split() for line in lines[1:]] == [
        ["Name", "IP", "Node", "Probed"],
        ["default/vm", "(localhost)", "10.99.0.2,fd77::2", "reachable", "1m15s", "ago"],
        ["default/b", "10.99.0.3", "unreachable", "1m15s", "ago"],
        ["default/c", "unknown", "not", "probed", "yet"],
    ]
    assert run("health", "--succinct", "--verbose", socket=agent.path).stdout.startswith("Probe time:")


def test_a_probe_on_demand_and_json(agent: Serving) -> None:
    before = json.loads(run("health", "-o", "json", socket=agent.path).stdout)
    assert before["timestamp"] == "2026-01-01T00:00:00Z"
    assert before["nodes"][0]["host"]["primary-address"]["http"] == {"latency": 350_500, "status": ""}
    probed = json.loads(run("health", "--probe", "-o", "json", socket=agent.path).stdout)
    assert probed["timestamp"] == "2026-01-02T00:00:00Z"


def test_status_has_a_line_and_unreachable_nodes_are_no_failure_of_this_agent(agent: Serving) -> None:
    assert (
        "Cluster health:         2/2 reachable (12s ago, each every 1m5s)\n"
        in run("status", socket=agent.path).stdout
    )
    agent.view.cluster_health = models.ClusterHealth(
        state="Warning",
        msg="others' probes can not be answered at 10.99.0.2 port 4240: Address already in use",
        nodes=20,
        reachable=8,
        unreachable=11,
        interval=180.0,
        age=3.0,
        unreachable_nodes=[models.UnreachableNode(name="default/b", ip="10.99.0.3", error=f"TCP: {REFUSED}")],
    )
    shown = run("status", socket=agent.path)
    assert shown.returncode == 0
    assert shown.stdout.partition("Cluster health:")[2].splitlines()[:4] == [
        "         8/20 reachable, 1 unknown (3s ago, each every 3m0s)",
        "  Warning: others' probes can not be answered at 10.99.0.2 port 4240: Address already in use",
        "  default/b 10.99.0.3: TCP: Connection refused",
        "  … (holdfast health shows all)",
    ]


def test_a_way_that_carries_less_is_shown_with_its_node_and_what_it_carries(agent: Serving) -> None:
    path = models.NarrowPath(name="default/b", ip="10.99.0.3", mtu=1400, device_mtu=1500)
    shown = structs.replace(agent.view.cluster_health, narrow=11, narrow_paths=[path])
    agent.view.cluster_health = shown
    lines = run("status", socket=agent.path).stdout.partition("Cluster health:")[2].splitlines()
    assert lines[1:3] == [
        "  default/b 10.99.0.3: only packets of up to 1400 bytes arrive, this host sends 1500: lowered",
        "  … 11 like this (holdfast health shows all)",
    ]
    agent.view.found = with_mtu(agent.view.found, 1400)
    assert (
        "      Packets:        up to 1400 bytes arrive, of 1500\n" in run("health", socket=agent.path).stdout
    )
    (line,) = run("health", "--succinct", socket=agent.path).stdout.splitlines()[-1:]
    assert line.split()[:5] == ["default/b", "10.99.0.3", "reachable,", "MTU", "1400"]


def test_a_clock_that_is_wrong_is_shown_with_whose_it_is(agent: Serving) -> None:
    wrong = models.WrongClock(name="default/b", ahead=75.4)
    clock = models.Clock(differing=1, others=3, wrong=1, wrong_nodes=[wrong])
    agent.view.cluster_health = structs.replace(agent.view.cluster_health, clock=clock)
    agent.view.found = with_clock(agent.view.found, clock)
    assert "  default/b: its clock is 1m15s ahead of most\n" in run("status", socket=agent.path).stdout
    assert "    Clock: 1m15s ahead of this host's\n" in run("health", socket=agent.path).stdout
    (line,) = run("health", "--succinct", socket=agent.path).stdout.splitlines()[-1:]
    assert line.split()[:5] == ["default/b", "10.99.0.3", "reachable,", "clock", "+75.4s"]


def test_a_host_whose_own_clock_is_wrong_says_so(agent: Serving) -> None:
    clock = models.Clock(ahead=-30.2, differing=3, others=3)
    agent.view.cluster_health = structs.replace(agent.view.cluster_health, clock=clock)
    agent.view.found = structs.replace(agent.view.found, clock=clock)
    said = "30s behind most, and differs from 3 of 3 other nodes\n"
    assert f"  this host: its clock is {said}" in run("status", socket=agent.path).stdout
    assert f"Clock:        {said}" in run("health", socket=agent.path).stdout


def with_clock(found: models_health.HealthStatus, clock: models.Clock) -> models_health.HealthStatus:
    """Return the same with a last node whose clock is wrong."""
    first, last = found.nodes
    wrong = structs.replace(last, clock_ahead=75.4, clock_wrong=True)
    return structs.replace(found, nodes=[first, wrong], clock=clock)


def with_mtu(found: models_health.HealthStatus, mtu: int) -> models_health.HealthStatus:
    """Return the same with a last node that only so much arrives at."""
    first, last = found.nodes
    assert last.host.primary_address is not None
    path = structs.replace(last.host.primary_address, mtu=mtu)
    narrow = structs.replace(last, host=structs.replace(last.host, primary_address=path))
    return structs.replace(found, nodes=[first, narrow], device_mtu=1500)


def test_status_of_an_agent_without_probes() -> None:
    off = models.ClusterHealth(state="Disabled", msg="cluster-health-port is 0")
    (shown,) = cluster_health(structs.asdict(off))
    assert shown == "Cluster health:         Probe disabled (cluster-health-port is 0)"
    assert list(cluster_health(None)) == []


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0ns"),
        (999, "999ns"),
        (35_500, "35.5µs"),
        (350_512, "350.512µs"),
        (1_204_000, "1.204ms"),
        (2 * 10**9, "2s"),
    ],
)
def test_times_have_the_unit_that_fits(nanoseconds: int, text: str) -> None:
    assert rtt(nanoseconds) == text
