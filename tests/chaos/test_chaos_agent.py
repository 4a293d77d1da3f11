# SPDX-License-Identifier: Apache-2.0
"""The agent and the engine die under live traffic: nothing that is allowed breaks, nothing denied passes."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from prestart import handover
from prestart.handover import boot_time
from tests.support.agent import ETCD_PORT, AgentHost
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub, wait_for
from tests.support.saved import Saved
from tests.support.stream import POLICY, Flows, Machine

__all__ = ["engine_parts", "hub"]

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def host(hub: Hub) -> Iterator[AgentHost]:
    """A host whose engine keeps containers over its own restart (live-restore), with traffic under policy."""
    with AgentHost(options=("--live-restore",)) as new:
        new.address = hub.join(new)
        new.start_etcd()
        (new.policies / "server.yaml").write_text(POLICY)
        new.start_agent()
        new.network()
        wait_for(lambda: len(new.api("/v1/policy")["policies"]) == 1, "policy in force")
        yield new


@pytest.fixture(scope="module")
def machine(host: AgentHost, hub: Hub) -> Iterator[Machine]:
    """A VM behind the host's card."""
    with contextlib.closing(Machine(hub, host)) as made:
        yield made


@pytest.fixture(scope="module")
def flows(host: AgentHost, machine: Machine) -> Flows:
    """Streams between containers, to the VM and through a published port; others that are denied."""
    return Flows(host, machine)


def numbers(host: AgentHost) -> list[tuple[int, int, str, str]]:
    """Return (endpoint, identity, address, container) of every endpoint."""
    found: list[Any] = host.api("/v1/endpoint")
    return [
        (
            each["id"],
            each["status"]["identity"]["id"],
            each["status"]["networking"]["addressing"][0]["ipv4"],
            each["status"]["external-identifiers"]["container-name"],
        )
        for each in found
    ]


def test_kill_of_the_agent(host: AgentHost, flows: Flows) -> None:
    before = numbers(host)
    flows.check()
    host.kill_agent()
    flows.wait_progress(200)
    flows.check()
    host.start_agent()
    assert numbers(host) == before
    wait_for(lambda: all(each["status"]["state"] == "ready" for each in host.api("/v1/endpoint")), "ready")
    flows.wait_progress(200)
    flows.check()


def test_a_container_started_after_the_restart_gets_its_own_number_and_policy(
    host: AgentHost, flows: Flows
) -> None:
    before = {number for number, *_ in numbers(host)}
    address = host.container("late", "sleep", "infinity", labels={"app": "client"})
    endpoint = host.endpoint_of("late")
    assert endpoint["id"] not in before
    assert address not in {each for _, _, each, _ in numbers(host) if each != address}
    assert host.inside("late", "ping", "-c1", "-W2", flows.server_ip, check=False).returncode == 0
    host.engine.docker("rm", "-f", "late")
    wait_for(lambda: endpoint["id"] not in {number for number, *_ in numbers(host)}, "endpoint removed")
    flows.check()


def test_a_second_network_is_refused_by_the_next_agent_too(host: AgentHost, flows: Flows) -> None:
    host.network("second")
    host.kill_agent()
    host.start_agent()
    done = host.engine.docker("network", "connect", "second", "client", check=False)
    assert "container client is on a network of Holdfast already" in done.stderr
    host.engine.docker("network", "rm", "second")
    flows.check()


def test_restart_of_the_engine(host: AgentHost, flows: Flows) -> None:
    before = numbers(host)
    host.engine.restart()
    wait_for(host.healthy, "healthy agent")
    flows.wait_progress(200)
    flows.check()
    assert numbers(host) == before
    host.container("after", "sleep", "infinity", labels={"app": "client"})
    assert host.inside("after", "ping", "-c1", "-W2", flows.server_ip, check=False).returncode == 0
    host.engine.docker("rm", "-f", "after")


def test_kill_of_the_engine(host: AgentHost, flows: Flows) -> None:
    before = numbers(host)
    host.engine.kill()
    flows_before = flows
    host.engine.start()
    wait_for(host.healthy, "healthy agent")
    flows_before.wait_progress(200)
    flows_before.check()
    assert numbers(host) == before


def test_agent_and_engine_both_gone_at_once(host: AgentHost, flows: Flows) -> None:
    before = numbers(host)
    host.kill_agent()
    host.engine.restart()
    flows.wait_progress(100)
    host.start_agent()
    assert numbers(host) == before
    flows.wait_progress(100)
    flows.check()


def test_etcd_gone_and_back(host: AgentHost, flows: Flows) -> None:
    """Nothing is deleted while etcd is away; what was written meanwhile arrives afterwards."""
    before = numbers(host)
    host.stop_etcd()
    wait_for(lambda: host.api("/v1/healthz")["kvstore"]["state"] != "Ok", "trouble with etcd in status")
    flows.wait_progress(100)
    assert numbers(host) == before
    host.start_etcd()
    wait_for(host.healthy, "healthy agent", seconds=90)  # etcd is asked every half minute by then
    flows.wait_progress(100)
    flows.check()
    assert {f"cilium/state/ip/v1/default/{address}" for _, _, address, _ in before} <= set(
        host.keys("cilium/state/ip/")
    )


def test_an_entry_that_could_not_be_deleted_goes_in_the_next_life(host: AgentHost, flows: Flows) -> None:
    """A container ends while etcd is away, then the agent is killed: nobody remembers to delete its keys."""
    address = host.container("short-lived", "sleep", "infinity", labels={"app": "short"})
    entry = f"cilium/state/ip/v1/default/{address}"
    kept = {f"cilium/state/ip/v1/default/{address}" for _, _, address, _ in numbers(host)}
    kept.discard(entry)
    wait_for(lambda: entry in host.keys("cilium/state/ip/"), "entry of the container")

    def users() -> list[str]:
        return [key for key in host.keys("cilium/state/identities/v1/value/") if "app=short;" in key]

    assert users()
    wait_for(
        lambda: json.loads((host.state / "node.json").read_text()).get("lease"), "lease in the checkpoint"
    )
    host.stop_etcd()
    host.engine.docker("rm", "-f", "short-lived")
    wait_for(lambda: "short-lived" not in [name for _, _, _, name in numbers(host)], "endpoint gone")
    host.kill_agent()
    host.start_etcd()
    assert entry in host.keys("cilium/state/ip/")
    host.start_agent()
    wait_for(lambda: entry not in host.keys("cilium/state/ip/"), "entry deleted", seconds=60)
    wait_for(lambda: not users(), "its identity has no user any more", seconds=60)
    assert kept <= set(host.keys("cilium/state/ip/"))
    flows.check()


def test_a_restart_while_etcd_is_away(host: AgentHost, flows: Flows) -> None:
    """The agent has no checkpoint and knows no policy, the maps still do: what it shows is theirs."""
    before = host.endpoint_of("server")
    assert before["status"]["policy"]["policy-enabled"] == "ingress"
    assert before["status"]["identity"]["reference-count"] == 1
    networking = before["status"]["networking"]
    link = host.exec("ip", "-o", "link", "show", networking["interface-name"]).stdout
    assert link.startswith(f"{networking['interface-index']}: ")
    host.kill_agent()
    host.stop_etcd()
    (host.policies / "server.yaml").unlink()
    Saved(host.state).path.unlink()
    try:
        host.launch_agent()
        wait_for(lambda: host.api("/v1/endpoint", check=False), "endpoints restored")
        after = host.endpoint_of("server")
        assert after["status"]["policy"]["policy-enabled"] == "ingress"
        assert after["status"]["policy"]["map-entries"] == before["status"]["policy"]["map-entries"]
        assert after["status"]["networking"] == networking
        flows.wait_progress(100)
    finally:
        (host.policies / "server.yaml").write_text(POLICY)
        wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 1, "policy in force")
        host.start_etcd()
    wait_for(host.healthy, "healthy agent", seconds=90)  # etcd is asked every half minute by then
    flows.check()


def test_containers_that_start_without_etcd_are_under_the_policy_of_the_checkpoint(
    host: AgentHost, flows: Flows
) -> None:
    """Agent and etcd both went: labels and policies of the last life are what a new container gets."""
    host.etcdctl("put", "holdfast/policies/v1/server-rules", stdin=POLICY)
    saved = Saved(host.state)
    wait_for(
        lambda: saved.knows("policies", "holdfast/policies/v1/server-rules"), "checkpoint with the policy"
    )
    (host.policies / "server.yaml").unlink()
    wait_for(lambda: [each["name"] for each in host.api("/v1/policy")["policies"]] == ["server-rules"], "one")
    host.kill_agent()
    host.stop_etcd()
    started: list[str] = []
    try:
        host.launch_agent()
        wait_for(lambda: host.api("/v1/endpoint", check=False), "endpoints restored")
        for name in ("client", "stranger", "server"):
            started.append(f"late-{name}")
            host.container(f"late-{name}", "sleep", "infinity", labels={"app": name})
            known = host.endpoint_of(name)["status"]["identity"]["id"]
            assert host.endpoint_of(f"late-{name}")["status"]["identity"]["id"] == known
        for server in (flows.server_ip, address_of(host, "late-server")):
            ping = ("ping", "-c1", "-W2", server)
            wait_for(lambda: host.inside("late-client", *ping, check=False).returncode == 0, "answer")  # noqa: B023
            assert host.inside("late-stranger", *ping, check=False).returncode == 1
        flows.wait_progress(100)
        flows.check()
    finally:
        (host.policies / "server.yaml").write_text(POLICY)
        host.engine.docker("rm", "-f", *started)
        host.start_etcd()
    wait_for(host.healthy, "healthy agent", seconds=90)  # etcd is asked every half minute by then
    wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 2, "policy in force")
    host.etcdctl("del", "holdfast/policies/v1/server-rules")
    wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 1, "one policy in force")
    flows.wait_progress(100)
    flows.check()


def test_a_slot_that_is_an_hour_away_keeps_no_container_waiting(host: AgentHost, flows: Flows) -> None:
    """etcd is there and must not be asked; an order ends that, and what happened meanwhile is learned."""
    host.etcdctl("put", "holdfast/policies/v1/server-rules", stdin=POLICY)
    saved, key = Saved(host.state), "holdfast/policies/v1/server-rules"
    wait_for(lambda: saved.knows("policies", key), "checkpoint with the policy")
    host.kill_agent()
    host.etcdctl("del", key)
    instant = str(boot_time() + HOUR_S)
    host.handed_over = {handover.CONNECT: str(time.time() + HOUR_S), handover.CONNECT_BOOT: instant}
    try:
        host.launch_agent()
        wait_for(lambda: host.api("/v1/endpoint", check=False), "endpoints restored")
        host.container("early", "sleep", "infinity", labels={"app": "client"})
        ping = ("ping", "-c1", "-W2", flows.server_ip)
        wait_for(lambda: host.inside("early", *ping, check=False).returncode == 0, "answer")
        connections = host.exec("ss", "-Htnp", "state", "established", "dport", "=", f":{ETCD_PORT}").stdout
        assert "python" not in connections, "etcd was asked"
        assert {each["name"] for each in host.api("/v1/policy")["policies"]} == {"server", "server-rules"}
        shown = host.cli("status", check=False).stdout
        assert shown.count("its start slot, before it talks to etcd") == 1
        assert "not asked before this host's slot" in shown
        assert "before this host's slot" in host.cli("start-now", "--by", "alice").stdout
        wait_for(host.healthy, "healthy agent", seconds=60)
        assert host.agent is not None
        assert "by order of alice" in host.agent.output()
        wait_for(
            lambda: [each["name"] for each in host.api("/v1/policy")["policies"]] == ["server"], "deletion"
        )
        assert "nothing was waited for" in host.cli("start-now").stdout
    finally:
        host.handed_over = {}
        host.cli("start-now", check=False)
        host.engine.docker("rm", "-f", "early", check=False)
    flows.wait_progress(100)
    flows.check()


def address_of(host: AgentHost, container: str) -> str:
    (addresses,) = host.endpoint_of(container)["status"]["networking"]["addressing"]
    return str(addresses["ipv4"])


def test_machine_deleted_while_the_agent_is_away(host: AgentHost, machine: Machine, flows: Flows) -> None:
    """The watch goes on where the checkpoint stands: what was deleted is deleted, and not just missing."""
    machine.register("short-lived", "10.99.0.7")
    wait_for(lambda: Saved(host.state).knows("addresses", "10.99.0.7/32"), "machine in the checkpoint")
    start_hook = host.state / "cluster.json"
    wait_for(lambda: json.loads(start_hook.read_text())["revision"] > 0, "word that watches will resume")
    host.kill_agent()
    assert machine.is_known("10.99.0.7")
    machine.vm("unregister", "short-lived")
    host.start_agent()
    wait_for(lambda: not machine.is_known("10.99.0.7"), "end of the machine")
    assert machine.is_known(machine.address)
    assert missing(host) == {}
    flows.wait_progress()
    flows.check()


def missing(host: AgentHost) -> dict[str, int]:
    """Return how many records of each table are kept although etcd lacks them."""
    return {each["name"]: each["missing"] for each in host.api("/v1/healthz")["tables"] if each["missing"]}


def test_etcd_wiped_while_the_agent_is_away(host: AgentHost, flows: Flows) -> None:
    """A store without policies is no permission: what was known stays in force for its grace."""
    before = numbers(host)
    host.etcdctl("put", "holdfast/policies/v1/server-rules", stdin=POLICY)
    wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 2, "policy of etcd in force")
    (host.policies / "server.yaml").unlink()
    wait_for(lambda: [each["name"] for each in host.api("/v1/policy")["policies"]] == ["server-rules"], "one")
    wait_for(
        lambda: Saved(host.state).knows("policies", "holdfast/policies/v1/server-rules"),
        "policy in the checkpoint",
    )
    host.kill_agent()
    host.stop_etcd()
    shutil.rmtree(host.directory / "etcd-data")
    host.start_etcd()
    host.start_agent()
    assert numbers(host) == before
    missing = {each["name"]: each["missing"] for each in host.api("/v1/healthz")["tables"]}
    assert missing["policy-documents"] == 1, missing
    flows.wait_progress(200)
    flows.check()


def test_policy_deleted_while_the_agent_is_away(host: AgentHost, flows: Flows) -> None:
    """The watch goes on where it stood: a deletion that happened meanwhile counts at once."""
    host.etcdctl("put", "holdfast/policies/v1/server-rules", stdin=POLICY)
    host.etcdctl("put", "holdfast/policies/v1/short-lived", stdin=POLICY)
    wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 2, "two policies")
    wait_for(
        lambda: Saved(host.state).knows("policies", "holdfast/policies/v1/short-lived"),
        "policy in the checkpoint",
    )
    host.kill_agent()
    host.etcdctl("del", "holdfast/policies/v1/short-lived")
    host.start_agent()
    # Sooner than the grace of what a list lacks, which is ten minutes.
    wait_for(lambda: [each["name"] for each in host.api("/v1/policy")["policies"]] == ["server-rules"], "one")
    flows.wait_progress(100)
    flows.check()
