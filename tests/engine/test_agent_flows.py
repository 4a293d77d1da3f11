# SPDX-License-Identifier: Apache-2.0
"""Who may talk to whom: real packets between real containers, the host and the world, under policies."""

from __future__ import annotations

import pytest

from tests.support.places import PORTS, Place, passing
from tests.support.rules import element, on, rule, selects
from tests.support.site import Site, both_families
from tests.support.traffic import ask, connected

pytestmark = both_families

FIRST, SECOND = PORTS
PROTOCOLS = ("TCP", "UDP", "ICMP")
DIRECTIONS = ("ingress", "egress")


# --- one side may, the other may not


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_only_the_named_side_passes(site: Site, protocol: str, direction: str) -> None:
    """Ingress: client may reach server, other may not.  Egress: server may reach client, not other."""
    named = element(direction, endpoints=[selects(site.client)], of=on(protocol))
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
    denied = element(direction, endpoints=[selects(peer)], of=on(protocol))
    with site.policy(rule(subject, direction, everybody), rule(subject, direction, denied, deny=True)):
        before = site.dropped("Policy denied by denylist", direction)
        assert site.client.asks(protocol, site.server.address) is None
        assert site.dropped("Policy denied by denylist", direction) > before
        if protocol != "ICMP":
            assert site.client.asks(protocol, site.server.address, SECOND) is not None


# --- the host and the world


def test_host_is_an_entity_of_its_own(site: Site) -> None:
    """An enforced container hears its host only by a rule, and the world is not meant by it."""
    address = site.server.address
    for entity, allowed in (("host", site.on_host), ("world", site.world)):
        refused = site.world if allowed is site.on_host else site.on_host
        with site.policy(rule(site.server, "ingress", element("ingress", entities=[entity]))):
            assert allowed.asks("TCP", address) == allowed.address
            assert allowed.pings(address)
            assert refused.asks("TCP", address) is None
            assert site.client.asks("TCP", address) is None


def test_container_reaches_its_host_and_the_world_by_entity(site: Site) -> None:
    for entity, allowed, refused in (
        ("host", site.on_host, site.world),
        ("world", site.world, site.on_host),
    ):
        with site.policy(rule(site.client, "egress", element("egress", entities=[entity]))):
            peers = (allowed, refused)
            assert passing(site.client, peers, "egress", PROTOCOLS) == by_all_protocols(allowed)


def test_world_sees_the_host_and_the_host_sees_the_container(site: Site) -> None:
    assert site.client.asks("TCP", site.world.address) == site.card
    assert site.client.asks("TCP", site.card) == site.client.address


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_prefix_covers_its_addresses_only(site: Site, direction: str) -> None:
    """`far` is inside the allowed prefix but excepted; `world` is inside and is not."""
    peers = [{"cidr": site.hub_prefix, "except": [site.far.prefix]}]
    with site.policy(rule(site.client, direction, element(direction, cidr_set=peers))):
        others = (site.world, site.far, site.server)
        assert passing(site.client, others, direction, PROTOCOLS) == by_all_protocols(site.world)


def by_all_protocols(place: Place) -> set[tuple[str, str]]:
    return {(place.name, protocol) for protocol in PROTOCOLS}


def test_denied_prefix_inside_an_allowed_one(site: Site) -> None:
    allowed = element("egress", cidr=[site.hub_prefix])
    denied = element("egress", cidr=[site.world.prefix], of=on("TCP"))
    with site.policy(rule(site.client, "egress", allowed), rule(site.client, "egress", denied, deny=True)):
        assert site.client.asks("TCP", site.world.address) is None
        assert site.client.asks("TCP", site.world.address, SECOND) is not None
        assert site.client.asks("TCP", site.far.address) is not None


# --- what a change of policy does


def test_answers_pass_where_the_flow_was_allowed(site: Site) -> None:
    """A container that may send nothing answers whom it may hear."""
    with site.policy(rule(site.server, "egress", {})):
        for direction, passed in (("egress", by_all_protocols(site.server)), ("ingress", set())):
            assert passing(site.client, [site.server], direction, PROTOCOLS) == passed


def test_policy_taken_back_ends_an_open_connection(site: Site) -> None:
    named = element("ingress", endpoints=[selects(site.client)], of=on("TCP"))
    with connected(site.client.netns, site.server.address, FIRST) as connection:
        with site.policy(rule(site.server, "ingress", named)):
            assert ask(connection) == site.client.address
        with site.policy(rule(site.server, "ingress", {})), pytest.raises(TimeoutError):
            ask(connection)
        connection.settimeout(20)
        assert connection.recv(100), "the policy is gone: what was sent is sent again and answered"
