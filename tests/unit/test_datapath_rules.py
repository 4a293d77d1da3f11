# SPDX-License-Identifier: Apache-2.0
"""Firewall state to script and back from listings, without a kernel."""

from __future__ import annotations

import dataclasses

import pytest

from datapath.errors import FirewallError
from datapath.firewall import IPV6, FirewallState, PublishedPort, plan
from datapath.forward import CHAIN, install_script, parse_filter, remove_script
from datapath.nftlist import parse_listing

STATE = FirewallState("10.50.0.1", frozenset({"10.50.0.0/24"}))
PORT = PublishedPort(6, "", 8080, 8080, "10.50.0.5", 80, 80)


def with_ports(*ports: PublishedPort) -> FirewallState:
    return dataclasses.replace(STATE, ports=frozenset(ports))


def test_script_replaces_the_whole_table() -> None:
    script = plan(with_ports(PORT)).script()
    assert script.startswith("table ip holdfast {}\ndelete table ip holdfast\ntable ip holdfast {\n")
    assert "tcp . 8080 : 10.50.0.5 . 80" in script
    assert "masquerade" in script


def test_masquerading_can_be_off() -> None:
    assert "masquerade" not in plan(dataclasses.replace(STATE, masquerade=False)).script()


def test_ipv6_is_the_same_plan() -> None:
    script = plan(FirewallState("fd00::1", frozenset({"fd00::/64"})), IPV6).script()
    assert script.startswith("table ip6 holdfast {}")
    assert "ip6 daddr ::1/128 drop" in script
    assert "ip daddr" not in script


def test_overlapping_prefixes_are_merged() -> None:
    state = dataclasses.replace(STATE, direct=frozenset({"10.50.0.0/16", "192.0.2.7/32"}))
    assert plan(state).elements["direct"] == {"10.50.0.0/16": "", "192.0.2.7": ""}


@pytest.mark.parametrize(
    ("port", "words"),
    [
        (dataclasses.replace(PORT, protocol=1), "protocol is not one of"),
        (dataclasses.replace(PORT, host_port=0), "ports must be"),
        (dataclasses.replace(PORT, host_port_end=8079), "ports must be"),
        (dataclasses.replace(PORT, host_port_end=8081), "differ in length"),
        (
            dataclasses.replace(PORT, container_port=65535, container_port_end=65536, host_port_end=8081),
            "length",
        ),
        (
            dataclasses.replace(PORT, container_address="fd00::5"),
            "'fd00::5' is not an IPv4 address|fd00::5 is not",
        ),
        (dataclasses.replace(PORT, host_address="; flush ruleset"), "is not an IPv4 address"),
    ],
)
def test_a_port_that_can_not_be_published_is_named(port: PublishedPort, words: str) -> None:
    with pytest.raises(FirewallError, match=words) as refused:
        plan(with_ports(port))
    assert "published port" in str(refused.value)


def test_a_port_published_twice_names_both_targets() -> None:
    other = dataclasses.replace(PORT, container_address="10.50.0.6")
    with pytest.raises(FirewallError, match=r"tcp \. 8080 is published twice: .*\.5 .*\.6 "):
        plan(with_ports(PORT, other))


@pytest.mark.parametrize("pool", ["10.50.0.1/24", "nonsense", "fd00::/64"])
def test_a_pool_that_is_no_prefix_is_named(pool: str) -> None:
    with pytest.raises(FirewallError, match="prefix for the firewall"):
        plan(dataclasses.replace(STATE, pools=frozenset({pool})))


def test_unreadable_listing_is_an_error() -> None:
    for text in ("", "[]", '{"nftables": [{"rule": {}}]}', "null"):
        with pytest.raises(FirewallError, match="listing can not be read"):
            parse_listing(text)


DOCKER = f"""*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
:{CHAIN} - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j {CHAIN}
-A FORWARD -j {CHAIN}
-A {CHAIN} -i lxc0+ -m comment --comment "holdfast: from endpoints" -j ACCEPT
-A {CHAIN} -s 192.0.2.1/32 -j ACCEPT
COMMIT
"""


def test_what_docker_left_is_repaired_in_one_script() -> None:
    found = parse_filter(DOCKER)
    assert found.exists
    assert found.jumps == 2
    assert len(found.missing()) == 2
    script = install_script(found)
    assert script.count(f"-D FORWARD -j {CHAIN}") == 2
    assert script.index("-D FORWARD") < script.index(f"-I FORWARD 1 -j {CHAIN}")
    assert remove_script(found).count("-D FORWARD") == 2


def test_foreign_rules_in_our_chain_are_noticed() -> None:
    whole = parse_filter(
        DOCKER.replace(
            f"-A {CHAIN} -s",
            f'-A {CHAIN} -o lxc0+ -m comment --comment "holdfast: to endpoints" -j ACCEPT\n-A {CHAIN} -s',
        )
    )
    assert f"foreign rules in {CHAIN}" in whole.missing()
