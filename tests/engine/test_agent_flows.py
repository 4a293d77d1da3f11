# SPDX-License-Identifier: Apache-2.0
"""Who may talk to whom: real packets between real containers, the host and the world, under policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.places import PORTS, Place
from tests.support.site import Site

FIRST, SECOND = PORTS
PROTOCOLS = ("TCP", "UDP", "ICMP")
DIRECTIONS = ("ingress", "egress")

Rule = Mapping[str, Any]


def selects(place: Place) -> Rule:
    return {"matchLabels": {"app": place.name}}


def element(direction: str, **parts: Any) -> Rule:
    """One element of a section; `peers` stands for fromX or toX, by the direction."""
    prefix = "from" if direction == "ingress" else "to"
    return {
        f"{prefix}{name[0].upper()}{name[1:]}" if name in PEERS else name: value
        for name, value in parts.items()
    }


PEERS = ("endpoints", "entities", "CIDR", "CIDRSet")


def on(protocol: str, port: int = FIRST) -> Rule:
    """What an element says of a protocol: a port of TCP or UDP, ICMP's echo request."""
    if protocol == "ICMP":
        return {"icmps": [{"fields": [{"family": "IPv4", "type": 8}]}]}
    return {"toPorts": [{"ports": [{"port": str(port), "protocol": protocol}]}]}


def rule(subject: Place, direction: str, *elements: Rule, deny: bool = False) -> Rule:
    return {"endpointSelector": selects(subject), f"{direction}{'Deny' if deny else ''}": list(elements)}


# --- one side may, the other may not


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_only_the_named_side_passes(site: Site, protocol: str, direction: str) -> None:
    """Ingress: client may reach server, other may not.  Egress: server may reach client, not other."""
    named = element(direction, endpoints=[selects(site.client)], **on(protocol))
    with site.policy(rule(site.server, direction, named)):
        before = site.dropped("Policy denied", direction)
        if direction == "ingress":
            assert site.client.asks(protocol, site.server.address) is not None
            assert site.other.asks(protocol, site.server.address) is None
        else:
            assert site.server.asks(protocol, site.client.address) is not None
            assert site.server.asks(protocol, site.other.address) is None
        assert site.dropped("Policy denied", direction) > before


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_passes_without_a_policy(site: Site, protocol: str) -> None:
    assert site.other.asks(protocol, site.server.address) is not None
    assert site.server.asks(protocol, site.world.address) is not None


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rule_of_a_port_covers_that_port_and_protocol(site: Site, protocol: str, direction: str) -> None:
    other_protocol = "UDP" if protocol == "TCP" else "TCP"
    subject = site.server if direction == "ingress" else site.client
    with site.policy(rule(subject, direction, on(protocol, FIRST))):
        assert site.client.asks(protocol, site.server.address, FIRST) == site.client.address
        assert site.client.asks(protocol, site.server.address, SECOND) is None
        assert site.client.asks(other_protocol, site.server.address, FIRST) is None
        assert not site.client.pings(site.server.address)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_deny_wins_over_allow(site: Site, protocol: str, direction: str) -> None:
    subject, peer = (site.server, site.client) if direction == "ingress" else (site.client, site.server)
    everybody = element(direction, endpoints=[{}])
    denied = element(direction, endpoints=[selects(peer)], **on(protocol))
    with site.policy(rule(subject, direction, everybody), rule(subject, direction, denied, deny=True)):
        before = site.dropped("Policy denied by denylist", direction)
        assert site.client.asks(protocol, site.server.address) is None
        assert site.dropped("Policy denied by denylist", direction) > before
        if protocol != "ICMP":
            assert site.client.asks(protocol, site.server.address, SECOND) is not None
