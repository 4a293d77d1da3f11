# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a denied packet, of policies and of containers, with the agent's own commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine import WORKLOAD_IMAGE
from tests.support.host import wait_for
from tests.support.places import PORTS
from tests.support.rules import document, element, on, rule, selects
from tests.support.site import Monitor, Site, both_families

FIRST, SECOND = PORTS
PROTOCOLS = ("TCP", "UDP", "ICMP")
PACKET = {
    4: {"TCP": "tcp SYN", "UDP": "udp", "ICMP": "icmp EchoRequest"},
    6: {"TCP": "tcp SYN", "UDP": "udp", "ICMP": "icmpv6 EchoRequest"},
}

# how a packet is denied → the reason that metrics and monitor give
REASONS = {"no rule": "Policy denied", "deny rule": "Policy denied by denylist"}


@pytest.fixture(scope="module")
def monitor(whole_site: Site) -> Iterator[Monitor]:
    """One `holdfast monitor` for all tests here: each looks for its own addresses and ports."""
    with whole_site.monitor() as listening:
        yield listening


# --- a denied packet


@both_families
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("direction", ["ingress", "egress"])
@pytest.mark.parametrize("how", list(REASONS))
def test_denied_packet_is_counted_and_told(
    site: Site, monitor: Monitor, how: str, direction: str, protocol: str
) -> None:
    """`other` asks `server`; for ingress server refuses, for egress other itself does."""
    subject, peer = (site.server, site.other) if direction == "ingress" else (site.other, site.server)
    clause = element(direction, endpoints=[selects(peer)], of=on(protocol))
    rules = (
        [rule(subject, direction, clause, deny=True)]
        if how == "deny rule"
        else [rule(subject, direction, {})]
    )
    with site.policy(*rules):
        before, seen = site.dropped(REASONS[how], direction), len(monitor.lines())
        assert site.other.asks(protocol, site.server.address) is None
        assert site.dropped(REASONS[how], direction) > before
        identities = f"identity {site.identity(site.other)}->{site.identity(site.server)}"
        told = (f"xx drop ({REASONS[how]})", identities, site.other.address)
        monitor.waits_for(*told, PACKET[site.family][protocol], after=seen)
        verdict = monitor.waits_for(f"local EP ID {site.endpoint_id(subject)}", "action deny", after=seen)
        assert f"ingress {str(direction == 'ingress').lower()}" in verdict


# --- what the commands say of policy and connections


def test_policy_map_shows_rules_with_counters(site: Site) -> None:
    named = element("ingress", endpoints=[selects(site.client)], of=on("TCP"))
    with site.policy(rule(site.server, "ingress", named)):
        number = site.endpoint_id(site.server)
        assert site.client.asks("TCP", site.server.address) is not None
        (entries,) = site.json("bpf", "policy", "get", str(number)).values()
        ingress = [each for each in entries if each["direction"] == 0]
        assert [(each["identity"], each["dport"], each["protocol"], each["deny"]) for each in ingress] == [
            (site.identity(site.client), FIRST, 6, False)
        ]
        assert ingress[0]["packets"] > 3
        assert f"{FIRST}/TCP" in site.cli("bpf", "policy", "get", str(number))


@both_families
def test_connections_are_listed_from_both_ends(site: Site) -> None:
    assert site.client.asks("TCP", site.server.address, SECOND) is not None
    flow = f"-> {site.server.literal}:{SECOND}"
    lines = [line for line in site.cli("bpf", "ct", "list").splitlines() if flow in line]
    ours = [line for line in lines if f"{site.client.literal}:" in line]
    assert {line.split()[1] for line in ours} == {"IN", "OUT"}
    assert all(f"SourceSecurityID={site.identity(site.client)}" in line for line in ours)


def test_trace_says_what_packets_met(site: Site) -> None:
    named = element("ingress", endpoints=[selects(site.client)], of=on("TCP"))
    to_server = ("-d", "container:app=server", "--dport", f"{FIRST}/TCP")
    with site.policy(rule(site.server, "ingress", named)):
        for place, verdict, status in ((site.client, "ALLOWED", 0), (site.other, "DENIED", 1)):
            assert (place.asks("TCP", site.server.address) is None) == (verdict == "DENIED")
            done = site.host.cli(
                "policy", "trace", "-s", f"container:app={place.name}", *to_server, check=False
            )
            assert f"Final verdict: {verdict}" in done.stdout
            assert done.returncode == status


def test_endpoints_are_listed_with_what_is_enforced(site: Site) -> None:
    with site.policy(rule(site.server, "ingress", {})):
        by_name = {
            each["status"]["external-identifiers"]["container-name"]: each["status"]
            for each in site.json("endpoint", "list")
        }
        assert by_name["server"]["policy"]["policy-enabled"] == "ingress"
        assert by_name["client"]["policy"]["policy-enabled"] == "none"
        for place in (site.client, site.other, site.server):
            status = by_name[place.name]
            assert status["state"] == "ready"
            assert status["networking"]["addressing"][0]["ipv4"] == place.address
            assert f"container:app={place.name}" in status["identity"]["labels"]
        (one,) = site.json("endpoint", "get", str(site.endpoint_id(site.server)))
        assert one["status"]["identity"] == by_name["server"]["identity"]


# --- where policies come from


def test_policy_of_a_file_in_the_watched_directory(site: Site) -> None:
    file = site.host.policies / "by-hand.yaml"
    try:
        file.write_text(document("by-hand", rule(site.server, "ingress", {})))
        wait_for(lambda: not reaches(site), "the file in force")
    finally:
        file.unlink()
    wait_for(lambda: reaches(site), "the file out of force")


@pytest.mark.parametrize("where", [(), ("--local",)], ids=["etcd", "local"])
def test_policy_of_the_command_line(site: Site, tmp_path: Path, where: tuple[str, ...]) -> None:
    file = tmp_path / "shut.yaml"
    file.write_text(document("shut", rule(site.server, "ingress", {})))
    site.cli("policy", "apply", "-f", str(file), "--wait", *where)
    try:
        assert not reaches(site)
        assert "shut" in site.cli("policy", "get")
        if not where:
            assert "holdfast/policies/v1/shut" in site.host.keys("holdfast/policies/")
    finally:
        site.cli("policy", "delete", "shut", *where)
    wait_for(lambda: reaches(site), "the policy out of force")


def test_refused_policy_leaves_the_last_good_one(site: Site) -> None:
    file = site.host.policies / "good-then-bad.yaml"
    try:
        file.write_text(document("good", rule(site.server, "ingress", {})))
        wait_for(lambda: not reaches(site), "the good file in force")
        file.write_text(document("good", {"endpointSelector": {}, "ingres": []}))
        wait_for(lambda: "ingres" in site.cli("status"), "refusal in status")
        assert not reaches(site)
    finally:
        file.unlink()
    wait_for(lambda: reaches(site) and "ingres" not in site.cli("status"), "the file out of force")


def reaches(site: Site) -> bool:
    return site.client.asks("TCP", site.server.address) is not None


# --- what is not managed


def test_containers_elsewhere_are_said_to_be_unmanaged(site: Site) -> None:
    docker = site.host.engine.docker
    wanted = {"on-bridge": "bridge", "on-host": "host"}
    try:
        for name, network in wanted.items():
            docker("run", "-d", "--name", name, "--network", network, WORKLOAD_IMAGE, "sleep", "infinity")
        wait_for(lambda: set(unmanaged(site)) == set(wanted), "both in status")
        assert "docker's network bridge" in unmanaged(site)["on-bridge"]
        assert "host's network" in unmanaged(site)["on-host"]
        text = site.cli("status")
        assert "2 containers: policy does not reach them" in text
        assert all(name in text for name in wanted)
    finally:
        docker("rm", "-f", *wanted, check=False)
    wait_for(lambda: not unmanaged(site), "none in status")


def unmanaged(site: Site) -> dict[str, str]:
    return {each["name"]: each["reason"] for each in site.status()["unmanaged"]}


def test_container_with_one_leg_elsewhere_is_said_to_be_so(site: Site) -> None:
    """What it sends by docker's bridge meets no policy: the operator must know."""
    docker = site.host.engine.docker
    with site.container("two-legs") as place:
        docker("network", "connect", "bridge", place.name)
        wait_for(lambda: "another network of docker's" in unmanaged(site).get(place.name, ""), "it in status")
        docker("network", "disconnect", "bridge", place.name)
        wait_for(lambda: not unmanaged(site), "none in status")


def test_second_network_is_refused_by_name(site: Site) -> None:
    docker = site.host.engine.docker
    site.host.network("second")
    try:
        done = docker("network", "connect", "second", "client", check=False)
        assert "container client is on a network of Holdfast already" in done.stderr
        assert site.client.asks("TCP", site.server.address) == site.client.address
    finally:
        docker("network", "rm", "second")


def test_malformed_label_is_named_and_the_container_stays_shut(site: Site) -> None:
    """docker lets a label hold `;`, by which it could pass for another label."""
    with site.container("evil", labels={"app": "a;k8s:role=admin"}) as evil:
        endpoint = site.host.api(f"/v1/endpoint/ipv4:{evil.address}")
        assert endpoint["status"]["state"] == "waiting-for-identity"
        messages = [line["message"] for line in endpoint["status"]["log"]]
        assert any("label container:app is a;k8s:role=admin" in message for message in messages), messages
        assert evil.asks("TCP", site.server.address) is None
        assert site.client.asks("TCP", evil.address) is None
    assert site.client.asks("TCP", site.server.address) is not None


# --- what the agent does


def test_what_the_agent_does_is_told(site: Site) -> None:
    with site.monitor("-t", "agent") as monitor:
        number = site.endpoint_id(site.server)
        with site.policy(rule(site.server, "ingress", {})):
            monitor.waits_for(">> Policy updated: {", '"name":"test"', '"rule_count":1')
            monitor.waits_for(">> Endpoint regenerated: {", f'"id":{number},', '"container-name":"server"')
        monitor.waits_for(">> Policy deleted: {", '"name":"test"')
        with site.container("brief") as brief:
            begun = monitor.waits_for(">> Endpoint created: {", brief.address)
            identity = f'"identity":{site.identity(brief)}'
            monitor.waits_for(
                ">> Endpoint identity changed: {", identity, "container:holdfast.network=holdfast"
            )
        monitor.waits_for(">> Endpoint deleted: {", json.loads(begun.partition(": ")[2])["addresses"][0])
        assert all(line.startswith(">> ") for line in monitor.lines())
