# SPDX-License-Identifier: Apache-2.0
"""Three hosts with an agent each: what each shows of the others, and what it shows when one is cut off.

The first has etcd.  Probes come every second or two, so that a period is over soon.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.agent import AgentHost
from tests.support.fleet import GONE_S
from tests.support.host import REPO, Hub, hub_ipv6, run, wait_for
from tests.support.require import require_tools

NAMES = ("a", "b", "c")
PORT = 4240


@pytest.fixture(scope="module")
def hosts(hub: Hub) -> Iterator[tuple[AgentHost, AgentHost, AgentHost]]:
    require_tools("etcd", "etcdctl", "curl", "ping")
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(AgentHost("hfn")) for _ in NAMES]
        for each in made:
            each.address = hub.join(each)
            each.etcd_address = made[0].address
        made[0].start_etcd(shared=True)
        for each, name in zip(made, NAMES, strict=True):
            start(each, name)
        a, b, c = made
        yield a, b, c


def start(host: AgentHost, name: str, **options: str) -> None:
    """Start the agent of a host; it has a pool of its own."""
    host.start_agent(
        node_name=name,
        ipv4_range=f"10.{50 + NAMES.index(name)}.0.0/16",
        enable_ipv6="true",
        cluster_health_interval="1s",
        **options,
    )


def states(host: AgentHost) -> dict[str, str]:
    return {each["name"].partition("/")[2]: each["state"] for each in host.api("/v1/health")["nodes"]}


def sees(host: AgentHost, **wanted: str) -> None:
    """Wait until a host shows these nodes in these states, and no others."""
    what = f"{wanted} in the eyes of {host.address}: {states(host)}"
    wait_for(lambda: states(host) == wanted, what, seconds=GONE_S)


ALL = dict.fromkeys(NAMES, "reachable")


def paths(host: AgentHost, name: str) -> Sequence[Any]:
    """Return what a host shows of the addresses of a node."""
    (node,) = (each["host"] for each in host.api("/v1/health")["nodes"] if each["name"] == f"default/{name}")
    return [node["primary-address"], *node["secondary-addresses"]]


@contextlib.contextmanager
def link_cut(hub: Hub, host: AgentHost) -> Iterator[None]:
    """Have the port of the hub down that a host is at; it has the number of the host's address."""
    port = f"p{host.address.rpartition('.')[2]}"
    run(["ip", "-n", hub.name, "link", "set", port, "down"])
    try:
        yield
    finally:
        run(["ip", "-n", hub.name, "link", "set", port, "up"])


Hosts = tuple[AgentHost, AgentHost, AgentHost]


def test_each_host_sees_all_by_both_families(hosts: Hosts) -> None:
    for host in hosts:
        sees(host, **ALL)
    for name, peer in zip(NAMES, hosts, strict=True):
        found = paths(hosts[0], name)
        assert [each["ip"] for each in found] == [peer.address, hub_ipv6(peer.address)]
        for each in found:
            for probe in ("tcp", "http", "icmp"):
                assert (each[probe]["status"], each[probe]["latency"] > 0) == ("", True), (name, probe)


def test_the_command_shows_it_as_ciliums_does(hosts: Hosts) -> None:
    a, b, _ = hosts
    sees(a, **ALL)
    shown = a.cli("health").stdout
    assert re.search(r"^Probe time:   20\S+Z$", shown, re.MULTILINE)
    assert "  default/a (localhost): " in shown
    primary = shown.partition("  default/b: ")[2].partition("  default/c: ")[0]
    assert f"    Host connectivity to {b.address}:\n" in primary
    for label in ("ICMP to stack:", "TCP to agent:", "HTTP to agent:"):
        assert re.search(rf"^      {label} +OK, RTT=[\d.]+(µs|ms)$", primary, re.MULTILINE), primary
    assert hub_ipv6(b.address) not in shown
    assert f"Secondary connectivity to {hub_ipv6(b.address)}:" in a.cli("health", "--verbose").stdout
    succinct = a.cli("health", "--succinct", "--probe").stdout.splitlines()
    assert succinct[0].startswith("Cluster health:   3/3 reachable")
    assert [line.split()[0] for line in succinct[2:]] == ["default/a", "default/b", "default/c"]
    assert json.loads(a.cli("health", "-o", "json").stdout)["local"] == {"name": "default/a"}
    assert re.search(
        r"^Cluster health: +3/3 reachable \(\d+s ago, each every 1s\)$", a.cli("status").stdout, re.MULTILINE
    )


def metric(host: AgentHost, name: str) -> dict[str, float]:
    """Return the series of a metric: labels as text → value."""
    text = run(["curl", "-s", "--unix-socket", str(host.socket), "http://holdfast/metrics"]).stdout
    found = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def test_a_host_that_is_cut_off_is_shown_and_comes_back(hosts: Hosts, hub: Hub) -> None:
    a, b, c = hosts
    sees(a, **ALL)
    with link_cut(hub, b):
        sees(a, a="reachable", b="unreachable", c="reachable")
        sees(c, a="reachable", b="unreachable", c="reachable")
        sees(b, a="unreachable", b="reachable", c="unreachable")
        shown = a.cli("health", check=False)
        assert shown.returncode == 1
        status = a.cli("status")
        assert re.search(r"^Cluster health: +2/3 reachable ", status.stdout, re.MULTILINE)
        # Not of the first probe: that was under way when the link was cut.
        named = re.compile(rf"^  default/b {b.address}: TCP: ", re.MULTILINE)
        wait_for(lambda: named.search(a.cli("status").stdout) is not None, "the reason")
        assert metric(a, "cilium_unreachable_nodes") == {"": 1.0}
        (series,) = (
            each for each in metric(a, "cilium_node_connectivity_status").items() if 'name="b"' in each[0]
        )
        assert series[1] == 0.0
    for host in hosts:
        sees(host, **ALL)
    assert metric(a, "cilium_unreachable_nodes") == {"": 0.0}
    assert set(metric(a, "cilium_node_connectivity_status").values()) == {1.0}
    assert len(metric(a, "cilium_node_connectivity_latency_seconds")) == len(NAMES) * 2 * 2


def test_of_a_host_whose_agent_is_down_the_stack_answers(hosts: Hosts) -> None:
    a, _, c = hosts
    sees(a, **ALL)
    c.stop_agent()
    sees(a, a="reachable", b="reachable", c="unreachable")
    wait_for(
        lambda: all(each["http"]["status"] == "Connection refused" for each in paths(a, "c")), "refusals"
    )
    assert [each["icmp"]["status"] for each in paths(a, "c")] == ["", ""]
    start(c, "c")
    sees(a, **ALL)


def test_a_port_that_is_taken_is_a_warning_and_traffic_and_agent_go_on(hosts: Hosts) -> None:
    a, _, c = hosts
    c.stop_agent()
    other = c.popen("python3", "-m", "http.server", str(PORT), "--bind", c.address)
    wait_for(lambda: f":{PORT}" in c.exec("ss", "-tln").stdout, "another server on the port")
    start(c, "c")
    found = c.api("/v1/healthz")
    assert (found["holdfast"]["state"], found["cluster-health"]["state"]) == ("Ok", "Warning")
    assert f"{c.address} port {PORT}: Address already in use" in found["cluster-health"]["msg"]
    assert f"{c.address} port {PORT}: Address already in use" in c.cli("status").stdout
    # Not the first alone: each is as old as its last probe, and the other server was there before the agent.
    answers = ["HTTP status 404", ""]
    wait_for(
        lambda: [each["http"]["status"] for each in paths(a, "c")] == answers, "the other server's answer"
    )
    other.stop()
    sees(a, **ALL)
    assert c.api("/v1/healthz")["cluster-health"]["state"] == "Ok"


# What answers probes on a host whose clock is ahead: NODE ADDRESS… SECONDS.
AHEAD = """
import asyncio, sys, time
from agent.health_server import HealthServer

own, *addresses, seconds = sys.argv[1:]
asyncio.run(HealthServer(own, addresses, 4240, clock=lambda: time.time() + float(seconds)).run())
"""


@contextlib.contextmanager
def clock_ahead(host: AgentHost, name: str, seconds: int) -> Iterator[None]:
    """Have a host answer as if its clock were ahead; its agent is away meanwhile."""
    host.stop_agent()
    words = (f"default/{name}", host.address, hub_ipv6(host.address), str(seconds))
    answering = host.popen(sys.executable, "-c", AHEAD, *words, environment={"PYTHONPATH": str(REPO)})
    try:
        yield
    finally:
        answering.stop()
        start(host, name)


def test_a_clock_that_is_wrong_is_named_and_by_its_own_host_too(hosts: Hosts) -> None:
    """With one clock ahead it is that one; with both others ahead it is this host that is behind."""
    a, b, c = hosts
    sees(a, **ALL)
    with clock_ahead(c, "c", 75):
        named = re.compile(r"^  default/c: its clock is 1m1[456]s ahead of most$", re.MULTILINE)
        wait_for(lambda: all(named.search(host.cli("status").stdout) for host in (a, b)), "its name")
        with clock_ahead(b, "b", 75):
            words = r"^  this host: its clock is 1m1[456]s behind most, and differs from 2 of 2 "
            own = re.compile(words, re.MULTILINE)
            wait_for(lambda: own.search(a.cli("status").stdout) is not None, "its own clock")
            assert "default/c: its clock" not in a.cli("status").stdout
            assert metric(a, "holdfast_clock_ahead_seconds")[""] == pytest.approx(-75, abs=3)
    sees(a, **ALL)
    wait_for(lambda: "its clock is" not in a.cli("status").stdout, "clocks that agree")
    assert metric(a, "holdfast_wrong_clocks") == {"": 0.0}


def test_a_node_that_has_left_is_forgotten_and_switched_off_is_said(hosts: Hosts) -> None:
    a, _, c = hosts
    c.stop_agent()
    a.etcdctl("del", "cilium/state/nodes/v1/default/c")
    sees(a, a="reachable", b="reachable")
    start(c, "c", cluster_health_port="0")
    assert "Probe disabled (cluster-health-port is 0)" in c.cli("status").stdout
    off = c.cli("health", check=False)
    assert (off.returncode, "cluster-health-port is 0" in off.stderr) == (4, True)
    sees(a, a="reachable", b="reachable", c="unreachable")
    c.stop_agent()
    start(c, "c")
    sees(a, **ALL)
