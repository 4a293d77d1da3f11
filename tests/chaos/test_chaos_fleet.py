# SPDX-License-Identifier: Apache-2.0
"""Two hosts under traffic: agents die, etcd goes, a host changes name or address, leaves and comes back.

    host 1    client, stranger; etcd of both
    host 2    server

Nothing that is allowed breaks where nothing must, and in the end nobody holds anything stale.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from tests.support.engine_fixtures import engine_parts
from tests.support.fleet import GONE_S, Fleet, FleetHost, new_fleet
from tests.support.host import run, wait_for
from tests.support.stream import POLICY, Flows

__all__ = ["engine_parts"]

LEASE_S = 30
NEW_ADDRESS = "10.77.0.20"
MODES = {
    "tunnel": {"tunnel": "vxlan"},
    "direct": {"tunnel": "disabled", "auto_direct_node_routes": "true"},
}
CHOSEN = ["tunnel", pytest.param("direct", marks=pytest.mark.rare)]


class Pair:
    """The hosts, the options of their agents, and the traffic between them."""

    def __init__(self, fleet: Fleet, mode: str) -> None:
        self.fleet, self.mode = fleet, mode
        self.one, self.two = fleet.hosts
        self.options = MODES[mode] | {"kvstore_lease_ttl": f"{LEASE_S}s"}
        for host in fleet.hosts:
            (host.policies / "server.yaml").write_text(POLICY)
        fleet.start(**self.options)
        self.flows = Flows(self.one, elsewhere={"server": self.two})

    def start(self, host: FleetHost, **options: str) -> None:
        host.start_agent(**(self.options | options))

    def restart(self, host: FleetHost, **options: str) -> None:
        host.stop_agent()
        self.start(host, **options)

    def traces(self, text: str) -> list[str]:
        """Return every line of host 1's tables that has `text` in it: an address, a name, or "10.50.2."."""
        wanted = re.compile(rf"(?<![\w.]){re.escape(text)}" + ("" if text.endswith(".") else r"(?![\w])"))
        tables = [
            self.one.cli("node", "list").stdout,
            self.one.cli("ip", "list", "-n", "-v").stdout,
            self.one.cli("bpf", "ipcache", "list").stdout,
            self.one.cli("bpf", "tunnel", "list").stdout,
            self.one.exec("ip", "route").stdout,
            self.one.exec("ip", "-6", "route").stdout,
        ]
        return [line for table in tables for line in table.splitlines() if wanted.search(line)]


@pytest.fixture(scope="module", params=CHOSEN)
def pair(request: pytest.FixtureRequest, engine_parts: None) -> Iterator[Pair]:
    with new_fleet(2) as fleet:
        yield Pair(fleet, request.param)


@pytest.mark.parametrize("which", [0, 1], ids=["sender", "receiver"])
def test_an_agent_dies_and_starts_again_while_etcd_is_away(pair: Pair, which: int) -> None:
    """It knows from the kernel's own maps where everybody is."""
    host = pair.fleet.hosts[which]
    before = pair.traces(pair.two.address)
    pair.flows.check()
    pair.one.stop_etcd()
    host.kill_agent()
    pair.flows.wait_progress(200)
    host.launch_agent(**pair.options)
    wait_for(lambda: host.api("/v1/endpoint", check=False) is not None, "answer of the agent", seconds=60)
    wait_for(
        lambda: all(each["status"]["state"] == "ready" for each in host.api("/v1/endpoint")), "ready again"
    )
    pair.flows.wait_progress(200)
    pair.flows.check()
    routes = [line for line in pair.traces(pair.two.address) if "proto" in line]
    assert routes == [line for line in before if "proto" in line]
    pair.one.start_etcd(shared=True)
    wait_for(host.healthy, "healthy agent", seconds=90)
    wait_for(lambda: pair.traces(pair.two.address) == before, "the same tables again")
    pair.flows.check()


def test_a_host_with_another_name_leaves_nothing_of_the_old_one(pair: Pair) -> None:
    old = pair.two.name
    pair.flows.check()
    pair.restart(pair.two, node_name="renamed")
    wait_for(
        lambda: bool(pair.traces("renamed")) and not pair.traces(old),
        "only the new name",
        seconds=LEASE_S + GONE_S,
    )
    assert pair.one.keys("cilium/state/nodes/v1/default/").keys() >= {
        "cilium/state/nodes/v1/default/renamed",
        f"cilium/state/nodes/v1/default/{pair.one.name}",
    }
    claims = pair.one.keys("holdfast/pools/v1/default/")
    assert claims[f"holdfast/pools/v1/default/{pair.two.pool}"].endswith('"Node":"renamed"}')
    pair.flows.wait_progress(200)
    pair.flows.check()
    pair.restart(pair.two, node_name=old)
    wait_for(
        lambda: bool(pair.traces(old)) and not pair.traces("renamed"),
        "the old name again",
        seconds=LEASE_S + GONE_S,
    )
    pair.flows.check()


@pytest.mark.rare
def test_a_host_that_left_for_longer_than_its_lease(pair: Pair) -> None:
    before = len(pair.traces(pair.two.address))
    pair.two.kill_agent()
    wait_for(lambda: not pair.traces(pair.two.address), "nothing of host 2", seconds=LEASE_S + GONE_S)
    assert not pair.traces(pair.two.pool.removesuffix("0/24")), "neither its pool nor its workloads"
    claims = pair.one.keys("holdfast/pools/v1/default/")
    assert f"holdfast/pools/v1/default/{pair.two.pool}" in claims, "its pool is still its own"
    pair.start(pair.two)
    wait_for(lambda: len(pair.traces(pair.two.address)) == before, "host 2 as it was")
    pair.flows.wait_progress(200)
    pair.flows.check_unbroken()
    pair.flows.check_denied()


def readdress(host: FleetHost, old: str, new: str) -> None:
    """Take an address from a host and give it another, as DHCP may."""
    for line in (
        f"addr del {old}/24 dev eth0",
        f"addr add {new}/24 dev eth0",
        "route replace default via 10.77.0.254",
    ):
        run(["ip", "-n", host.netns, *line.split()])


@pytest.mark.rare
def test_a_host_with_another_address_leaves_nothing_of_the_old_one(pair: Pair) -> None:
    old = pair.two.address
    before = len(pair.traces(old))
    pair.two.stop_agent()
    readdress(pair.two, old, NEW_ADDRESS)
    pair.two.launch_agent(**pair.options)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: "in use at" in pair.two.cli("status", check=False).stdout, "its wait", seconds=20)
    wait_for(pair.two.healthy, "registered under the new address", seconds=120)
    wait_for(
        lambda: len(pair.traces(NEW_ADDRESS)) == before,
        "all of it under the new address",
        seconds=LEASE_S + GONE_S,
    )
    assert not pair.traces(old)
    pair.flows.wait_progress(200)
    pair.flows.check_unbroken()
    pair.flows.check_denied()


@pytest.mark.rare
def test_an_agent_whose_host_gets_another_address_begins_anew_by_itself(pair: Pair) -> None:
    """It is the same process; the old address is given back, to the one that had it first."""
    assert pair.two.agent is not None
    pid, before = pair.two.agent.pid, len(pair.traces(NEW_ADDRESS))
    readdress(pair.two, NEW_ADDRESS, pair.two.address)
    wait_for(lambda: len(pair.traces(pair.two.address)) == before, "all of it under the new one", seconds=120)
    wait_for(pair.two.healthy, "healthy agent", seconds=60)
    assert not pair.traces(NEW_ADDRESS)
    assert pair.two.agent.running
    assert pair.two.agent.pid == pid
    pair.flows.wait_progress(200)
    pair.flows.check_unbroken()
    pair.flows.check_denied()
