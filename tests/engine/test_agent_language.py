# SPDX-License-Identifier: Apache-2.0
"""Ports by name and requirements, from a container's labels to its packets."""

from __future__ import annotations

import pytest

from tests.support.places import PORTS
from tests.support.rules import element, on, rule, selects
from tests.support.site import Site

FIRST, SECOND = PORTS
LABELS = {"app": "named", "holdfast.port.web": str(FIRST), "holdfast.port.dns": f"{SECOND}/UDP"}


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_port_by_name(site: Site, direction: str) -> None:
    """The name is the server's: the rule is its own in ingress, and its client's in egress."""
    with site.container("named", labels=LABELS) as named:
        subject, peer = (named, site.client) if direction == "ingress" else (site.client, named)
        web = element(direction, endpoints=[selects(peer)], of=on("TCP", "web"))
        dns = element(direction, endpoints=[selects(peer)], of=on("UDP", "dns"))
        with site.policy(rule(subject, direction, web), rule(subject, direction, dns)):
            assert site.client.asks("TCP", named.address, FIRST) == site.client.address
            assert site.client.asks("UDP", named.address, SECOND) == site.client.address
            assert site.client.asks("TCP", named.address, SECOND) is None
            assert site.client.asks("UDP", named.address, FIRST) is None


def test_name_of_a_container_that_starts_later(site: Site) -> None:
    """Two servers with other numbers for one name, started while the client's policy is in force."""
    web = element("egress", endpoints=[{}], of=on("TCP", "web"))
    with site.policy(rule(site.client, "egress", web)):
        assert site.client.asks("TCP", site.server.address, FIRST) is None
        with (
            site.container("first", labels={"app": "first", "holdfast.port.web": str(FIRST)}) as first,
            site.container("second", labels={"app": "second", "holdfast.port.web": str(SECOND)}) as second,
        ):
            assert site.client.asks("TCP", first.address, FIRST) is not None
            assert site.client.asks("TCP", second.address, SECOND) is not None
            assert site.client.asks("TCP", first.address, SECOND) is None
            assert site.client.asks("TCP", second.address, FIRST) is None


def test_requirement_of_another_rule(site: Site) -> None:
    everybody = element("ingress", endpoints=[{}])
    with site.policy(rule(site.server, "ingress", everybody)):
        assert site.other.asks("TCP", site.server.address) is not None
        required = {"fromRequires": [selects(site.client)]}
        with site.policy(rule(site.server, "ingress", required), name="required"):
            assert site.client.asks("TCP", site.server.address) is not None
            assert site.other.asks("TCP", site.server.address) is None
        assert site.other.asks("TCP", site.server.address) is not None


def test_container_with_a_label_that_names_no_port_stays_closed(site: Site) -> None:
    with site.container("bad", labels={"app": "bad", "holdfast.port.web": "eighty"}) as bad:
        assert bad.asks("TCP", site.server.address) is None
        assert site.client.asks("TCP", bad.address) is None
