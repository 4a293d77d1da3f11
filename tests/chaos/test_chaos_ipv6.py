# SPDX-License-Identifier: Apache-2.0
"""IPv6 over lives of the agent: a stream outlives it, and the option is switched off and on again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import live
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub, wait_for
from tests.support.places import PORTS
from tests.support.rules import document, element, rule, selects
from tests.support.site import Site, new_site

__all__ = ["engine_parts", "hub"]


@pytest.fixture(scope="module")
def site(hub: Hub) -> Iterator[Site]:
    """The site by IPv6, where client may reach server and other may not."""
    with new_site(hub) as whole:
        named = element("ingress", endpoints=[selects(whole.client)])
        (whole.host.policies / "server.yaml").write_text(
            document("server", rule(whole.server, "ingress", named))
        )
        wait_for(lambda: not reaches(whole, "other"), "policy in force")
        yield whole.by(6)


def reaches(site: Site, name: str) -> bool:
    """Whether client or other reaches server, by the family of the view."""
    sender = {"client": site.client, "other": site.other}[name]
    return sender.asks("TCP", site.server.address) == sender.address


def addresses(site: Site) -> dict[str, str]:
    """Return the IPv6 address of each container, empty without one."""
    return {
        each["status"]["external-identifiers"]["container-name"]: each["status"]["networking"]["addressing"][
            0
        ].get("ipv6", "")
        for each in site.host.api("/v1/endpoint")
    }


def test_stream_outlives_a_killed_agent(site: Site) -> None:
    before = addresses(site)
    assert before["client"] == site.client.address
    with live.Stream("client to server", site.client.netns, site.server.address, PORTS[0]) as stream:
        stream.goes_on()
        site.host.kill_agent()
        stream.goes_on(20)
        assert not reaches(site, "other")
        assert reaches(site, "client")
        site.host.start_agent(enable_ipv6="true")
        stream.goes_on(20)
    assert not reaches(site, "other")
    assert addresses(site) == before


def test_switched_off_and_on_again(site: Site) -> None:
    """Off, packets of IPv6 end at the container; on, containers have addresses of it when they start anew."""
    host, four = site.host, site.by(4)
    host.stop_agent()
    host.start_agent()
    wait_for(lambda: not reaches(site, "client"), "end of IPv6")
    assert site.world.asks("TCP", site.server.address) is None
    assert reaches(four, "client")
    assert not reaches(four, "other")
    assert set(addresses(site).values()) == {""}
    with four.container("meanwhile", labels={"app": "client"}) as meanwhile:
        host.stop_agent()
        host.start_agent(enable_ipv6="true")
        assert meanwhile.asks("TCP", four.server.address) == meanwhile.address
        assert addresses(site)["meanwhile"] == ""
        assert reaches(four, "client")
        assert not reaches(four, "other")
        with site.container("anew") as first, site.container("too") as second:
            assert first.asks("TCP", second.address) == first.address
