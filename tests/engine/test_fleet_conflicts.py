# SPDX-License-Identifier: Apache-2.0
"""A second host with another's name or pool is refused, with that one's name; what is mended counts."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support.engine import WORKLOAD_IMAGE
from tests.support.fleet import GONE_S, Fleet, FleetHost, new_fleet
from tests.support.host import wait_for


@pytest.fixture(scope="module")
def fleet(engine_parts: None) -> Iterator[Fleet]:
    """Host 1 runs; host 2 is started by each test."""
    with new_fleet(2) as made:
        made.hosts[0].start_agent()
        made.hosts[0].network()
        yield made


@pytest.fixture
def second(fleet: Fleet) -> Iterator[FleetHost]:
    """Host 2, whose agent is stopped and forgotten afterwards."""
    host = fleet.hosts[1]
    yield host
    host.stop_agent()
    host.cli("cleanup", "--all", "-f", "--state-dir", str(host.state), check=False)
    fleet.hosts[0].etcdctl("del", f"cilium/state/nodes/v1/default/{host.name}")
    for line in json.loads(pools(fleet)):
        if line["node"] == host.name:
            operator(fleet, "node", "release", host.name)


def operator(fleet: Fleet, *words: str, check: bool = True) -> str:
    """Run a command of the operator's on host 1."""
    one = fleet.hosts[0]
    config = one.directory / "operator.config"
    config.write_text("endpoints: [http://127.0.0.1:2379]\n")
    done = one.cli(*words, "--etcd-config", str(config), check=check)
    return str(done.stdout + done.stderr)


def pools(fleet: Fleet) -> str:
    return operator(fleet, "node", "pools", "-o", "json")


def refused(host: FleetHost, **options: str) -> str:
    """Start the agent and return why it is not registered."""
    host.launch_agent(**options)
    wait_for(lambda: "not registered" in host.cli("status", check=False).stdout, "refusal", seconds=60)
    text: str = host.cli("status", check=False).stdout
    return text


def test_a_name_that_is_taken(fleet: Fleet, second: FleetHost) -> None:
    first = fleet.hosts[0]
    text = refused(second, node_name=first.name)
    assert f"the name {first.name} belongs to the node at {first.address}" in text
    assert first.pool in text
    second.network()
    done = second.engine.docker("run", "--rm", "--network", "holdfast", WORKLOAD_IMAGE, "true", check=False)
    assert f"not registered: the name {first.name} belongs to" in done.stderr
    second.engine.docker("network", "rm", "holdfast", check=False)
    key = f"cilium/state/nodes/v1/default/{first.name}"
    record = json.loads(first.keys("cilium/state/nodes/v1/default/")[key])
    assert record["IPAddresses"][0]["IP"] == first.address, "the first one's record stays its own"


@pytest.mark.parametrize(("pool", "words"), [("10.50.1.0/24", "belongs to"), ("10.50.0.0/20", "overlaps")])
def test_a_pool_that_is_anothers(fleet: Fleet, second: FleetHost, pool: str, words: str) -> None:
    first = fleet.hosts[0]
    text = refused(second, ipv4_range=pool)
    assert f"pool {pool} {words}" in text
    assert f"node {first.name}" in text
    assert [each["node"] for each in json.loads(pools(fleet))] == [first.name]


def test_what_the_operator_mends_counts_without_a_restart(fleet: Fleet, second: FleetHost) -> None:
    """Its pool is another's that is gone, until that one's is released."""
    operator(fleet, "node", "add", "gone", "--pool", second.pool)
    assert "node gone" in refused(second)
    assert "gone: released 10.50.2.0/24" in operator(fleet, "node", "release", "gone")
    wait_for(second.healthy, "registered", seconds=90)
    second.network()
    with second.workload("late") as late:
        assert late.address.startswith("10.50.2.")
    second.engine.docker("network", "rm", "holdfast")


def test_pools_of_the_clusters_range_are_claimed_and_found_again(fleet: Fleet, second: FleetHost) -> None:
    options = {"ipv4_range": "auto", "cluster_pool_ipv4_cidr": "10.60.0.0/16"}
    second.start_agent(**options)
    claimed = {each["pool"] for each in json.loads(pools(fleet)) if each["node"] == second.name}
    (pool,) = claimed
    assert pool.startswith("10.60.")
    assert pool in second.cli("node", "list").stdout
    second.stop_agent()
    for path in second.state.rglob("*.json"):
        path.unlink()
    second.start_agent(**options)
    assert pool in second.cli("node", "list").stdout, "a host that was installed again finds its pool"
    assert "registered: its pool can not be released" in operator(
        fleet, "node", "release", second.name, check=False
    )


def test_a_node_of_another_cluster_is_ignored_and_counted(fleet: Fleet) -> None:
    first = fleet.hosts[0]
    record = {
        "Name": "far",
        "Cluster": "other",
        "IPAddresses": [{"Type": "InternalIP", "IP": "192.0.2.77"}],
        "IPv4AllocCIDR": {"IP": "10.99.0.0", "Mask": "//8AAA=="},
    }
    first.etcdctl("put", "cilium/state/nodes/v1/other/far", json.dumps(record))
    wait_for(lambda: "nodes/v1/other/far" in first.cli("status", "--verbose").stdout, "it is named")
    assert "192.0.2.77" not in first.cli("ip", "list").stdout
    assert "10.99.0.0" not in first.cli("bpf", "tunnel", "list").stdout
    first.etcdctl("del", "cilium/state/nodes/v1/other/far")
    wait_for(
        lambda: "nodes/v1/other/far" not in first.cli("status", "--verbose").stdout,
        "and forgotten",
        seconds=GONE_S,
    )
