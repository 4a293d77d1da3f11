# SPDX-License-Identifier: Apache-2.0
"""Ten thousand rules: from the command line through etcd into the kernel, while the agent goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.host import wait_for
from tests.support.places import PORTS, Place
from tests.support.rules import element, on, rule, selects
from tests.support.site import Site

RULES = 10_000
# Reading takes seconds on a quiet machine.
SECONDS = 300


def strangers(first: int, count: int, subject: Place) -> list[Any]:
    """Rules that let in workloads that do not exist."""
    return [
        rule(
            subject,
            "ingress",
            element("ingress", endpoints=[{"matchLabels": {"app": f"stranger-{number}"}}], of=on("TCP", 80)),
        )
        for number in range(first, first + count)
    ]


def policy(name: str, rules: list[Any]) -> dict[str, Any]:
    return {"kind": "CiliumClusterwideNetworkPolicy", "metadata": {"name": name}, "specs": rules}


@pytest.fixture
def many(site: Site, tmp_path: Path) -> Iterator[Path]:
    """A directory of two policies of 5 000 rules, of which the last one is about somebody who exists."""
    half = RULES // 2 - 1
    client = element("ingress", endpoints=[selects(site.client)], of=on("TCP"))
    other = element("ingress", endpoints=[selects(site.other)], of=on("UDP"))
    for number, known in enumerate((client, other), start=1):
        rules = [*strangers(number * half, half, site.server), rule(site.server, "ingress", known)]
        (tmp_path / f"many-{number}.json").write_text(json.dumps(policy(f"many-{number}", rules), indent=2))
    yield tmp_path
    site.host.etcdctl("del", "--prefix", "holdfast/policies/v1/many-")
    wait_for(lambda: not in_force(site), "end of the policies", seconds=SECONDS, pause=0.5)


def in_force(site: Site) -> set[str]:
    """Return which of the policies the agent has; it answers, whatever it is doing."""
    assert site.status()["holdfast"]["state"] == "Ok"
    return {each["name"] for each in site.host.api("/v1/policy")["policies"]} & {"many-1", "many-2"}


def test_ten_thousand_rules_go_from_the_command_line_into_the_map(site: Site, many: Path) -> None:
    assert "valid" in site.cli("policy", "validate", "-f", str(many))
    applied = site.json("policy", "apply", "-f", str(many))
    assert [each["name"] for each in applied] == ["many-1", "many-2"]
    wait_for(lambda: in_force(site) == {"many-1", "many-2"}, "policies in force", seconds=SECONDS, pause=0.5)
    revision = site.host.api("/v1/policy")["revision"]
    site.cli("policy", "wait", str(revision))
    assert site.client.asks("TCP", site.server.address) == site.client.address
    assert site.other.asks("UDP", site.server.address) == site.other.address
    assert site.client.asks("UDP", site.server.address) is None
    assert site.other.asks("TCP", site.server.address) is None
    (entries,) = site.json("bpf", "policy", "get", str(site.endpoint_id(site.server))).values()
    ingress = {
        (each["identity"], each["dport"], each["protocol"]) for each in entries if not each["direction"]
    }
    assert ingress == {(site.identity(site.client), PORTS[0], 6), (site.identity(site.other), PORTS[0], 17)}


def test_a_large_policy_goes_to_this_host_alone_and_is_changed(site: Site, tmp_path: Path) -> None:
    """By the agent's API, whose answer comes when the change is in the map."""
    path = tmp_path / "large.json"

    def apply(peer: Place) -> None:
        named = rule(site.server, "ingress", element("ingress", endpoints=[selects(peer)], of=on("TCP")))
        large = policy("large", [named])
        large["metadata"]["annotations"] = {"note": '"' * 700_000}  # as it is stored, two bytes each
        path.write_text(json.dumps(large, indent=2))
        site.cli("policy", "apply", "--local", "-f", str(path))

    try:
        apply(site.client)
        assert site.client.asks("TCP", site.server.address) == site.client.address
        assert site.other.asks("TCP", site.server.address) is None
        apply(site.other)
        assert site.client.asks("TCP", site.server.address) is None
        assert site.other.asks("TCP", site.server.address) == site.other.address
    finally:
        site.cli("policy", "delete", "--local", "large")
