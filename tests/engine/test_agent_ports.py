# SPDX-License-Identifier: Apache-2.0
"""Published ports: who reaches them from where, as whom, and which can not be published."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from identity.numbers import HOST, WORLD
from tests.support.host import wait_for
from tests.support.places import PORTS, Place
from tests.support.rules import Rule, element, rule, selects
from tests.support.site import Monitor, Site, both_families
from tests.support.traffic import UDP, ask, connected, serving

FIRST, SECOND = PORTS

LOOPBACK = "127.0.0.1"

# Ports of the host and what they lead to; `bound` ones have an address of the host of their own.
EVERYWHERE, OF_LOOPBACK, OF_CARD, OF_RANGE, DATAGRAM = 8080, 8081, 8082, 9000, 5300
PUBLISHED = {"TCP": EVERYWHERE, "UDP": DATAGRAM}


@pytest.fixture(scope="module")
def shop(site: Site) -> Iterator[Place]:
    """A container that publishes ports in every way there is."""
    published = (
        f"{EVERYWHERE}:{FIRST}",
        f"{LOOPBACK}:{OF_LOOPBACK}:{FIRST}",
        f"{site.on_host.literal}:{OF_CARD}:{FIRST}",
        f"{OF_RANGE}-{OF_RANGE + 1}:{FIRST}-{SECOND}",
        f"{DATAGRAM}:{FIRST}/udp",
    )
    options = [part for port in published for part in ("--publish", port)]
    with site.container("shop", labels={"app": "shop"}, options=options) as made:
        yield made


@pytest.fixture(scope="module")
def monitor(whole_site: Site) -> Iterator[Monitor]:
    """One `holdfast monitor` for all tests here: each looks for its own addresses and ports."""
    with whole_site.monitor("-t", "drop") as listening:
        yield listening


def places(site: Site, shop: Place) -> dict[str, tuple[Place, str, str | None]]:
    """Return name → (who asks, the host's address that it uses, whom the container sees if anybody).

    Of the host's loopback, and of itself by a published port, it sees the host's address among endpoints.
    """
    card, router = site.card, site.router
    by_loopback = router if site.family == 4 else None  # the kernel takes nothing for ::1 but from lo
    return {
        "world": (site.world, card, site.world.address),
        "host by its address": (site.on_host, card, card),
        "host by its loopback": (site.on_host, site.loopback, by_loopback),
        "container": (site.client, card, site.client.address),
        "hairpin": (shop, card, router),
    }


WHO = ("world", "host by its address", "host by its loopback", "container", "hairpin")


@both_families
@pytest.mark.parametrize("who", WHO)
def test_published_ports_are_reached_from_everywhere(site: Site, shop: Place, who: str) -> None:
    place, address, seen = places(site, shop)[who]
    assert place.asks("TCP", address, EVERYWHERE) == seen
    assert place.asks("UDP", address, DATAGRAM) == seen
    assert [place.asks("TCP", address, OF_RANGE + offset) for offset in (0, 1)] == [seen, seen]
    assert place.asks("TCP", address, OF_RANGE + 2) is None
    by_loopback = address == site.loopback
    assert place.asks("TCP", address, OF_LOOPBACK) == (seen if by_loopback else None)
    assert place.asks("TCP", address, OF_CARD) == (None if by_loopback else seen)


@both_families
def test_published_ports_are_shown(site: Site, shop: Place) -> None:
    """The engine shows none for a network driver, not even those that the driver chose."""
    card = site.on_host.literal
    assert published_by(site, shop) == {
        f"0.0.0.0:{EVERYWHERE}->{FIRST}/tcp",
        f"{LOOPBACK}:{OF_LOOPBACK}->{FIRST}/tcp",
        f"{card}:{OF_CARD}->{FIRST}/tcp",
        *(f"0.0.0.0:{OF_RANGE + each}->{FIRST + each}/tcp" for each in (0, 1)),
        f"0.0.0.0:{DATAGRAM}->{FIRST}/udp",
    }


def test_port_that_was_chosen_for_the_container_is_told_and_works(site: Site) -> None:
    with site.container("chosen", options=["--publish", str(FIRST)]) as chosen:
        (shown,) = published_by(site, chosen)
        port = int(shown.partition("->")[0].rpartition(":")[2])
        assert site.world.asks("TCP", site.card, port) == site.world.address


def published_by(site: Site, place: Place) -> set[str]:
    return set(site.host.endpoint_of(place.name)["status"]["networking"]["published-ports"])


@both_families
def test_client_that_never_pauses_follows_the_port_to_the_next_container(site: Site) -> None:
    """One UDP socket of the world, two containers that publish the port one after the other."""
    with connected(site.world.netns, site.card, 5301, UDP) as client:
        for name in ("earlier", "later"):
            with site.container(name, options=["--publish", f"5301:{FIRST}/udp"]):
                assert ask(client) == site.world.address


def test_ports_follow_a_restarted_container(site: Site) -> None:
    with site.container("again", options=["--publish", f"8091:{FIRST}"], serve=False):
        site.host.engine.docker("restart", "-t", "1", "again")
        inside = site.netns_of("again")
        with contextlib.closing(inside), serving(inside, FIRST):
            assert site.world.asks("TCP", site.card, 8091) == site.world.address


# --- policy sees the real client


@both_families
@pytest.mark.parametrize(
    ("admitted", "peers"),
    [
        ({"world"}, {"entities": ["world"]}),
        ({"host by its address", "host by its loopback", "hairpin"}, {"entities": ["host"]}),
        ({"container"}, {"endpoints": [{"matchLabels": {"app": "client"}}]}),
    ],
    ids=["world", "host", "container"],
)
def test_policy_judges_the_real_client(site: Site, shop: Place, admitted: set[str], peers: Rule) -> None:
    flows = places(site, shop)
    wanted = {
        (name, protocol): seen if name in admitted else None
        for name, (_, _, seen) in flows.items()
        for protocol in PUBLISHED
    }

    def answer(flow: tuple[str, str]) -> str | None:
        place, address, _ = flows[flow[0]]
        return place.asks(flow[1], address, PUBLISHED[flow[1]])

    with site.policy(rule(shop, "ingress", element("ingress", **peers))), ThreadPoolExecutor(10) as pool:
        assert dict(zip(wanted, pool.map(answer, wanted), strict=True)) == wanted


@both_families
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_denial_through_a_port_is_counted_and_told(
    site: Site, shop: Place, monitor: Monitor, protocol: str
) -> None:
    """As of the client and the container: neither the host nor its port is in it."""
    with site.policy(rule(shop, "ingress", {})):
        before, seen = site.dropped("Policy denied", "ingress"), len(monitor.lines())
        assert site.world.asks(protocol, site.card, PUBLISHED[protocol]) is None
        assert site.dropped("Policy denied", "ingress") > before
        identities = f"identity {WORLD}->{site.identity(shop)}"
        flow = (f"{site.world.literal}:", f"-> {shop.literal}:{FIRST} {protocol.lower()}")
        monitor.waits_for("xx drop (Policy denied)", identities, *flow, after=seen)


@both_families
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_port_is_the_hosts_for_the_egress_of_who_asks(
    site: Site, shop: Place, monitor: Monitor, protocol: str
) -> None:
    card, port = site.card, PUBLISHED[protocol]
    with site.policy(rule(site.client, "egress", element("egress", entities=["host"]))):
        assert site.client.asks(protocol, card, port) == site.client.address
        assert site.client.asks(protocol, shop.address) is None
    with site.policy(rule(site.client, "egress", element("egress", endpoints=[selects(shop)]))):
        before, seen = site.dropped("Policy denied", "egress"), len(monitor.lines())
        assert site.client.asks(protocol, shop.address) == site.client.address
        assert site.client.asks(protocol, card, port) is None
        assert site.dropped("Policy denied", "egress") > before
        identities = f"identity {site.identity(site.client)}->{HOST}"
        flow = (f"{site.client.literal}:", f"-> {site.on_host.literal}:{port} {protocol.lower()}")
        monitor.waits_for("xx drop (Policy denied)", identities, *flow, after=seen)


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_container_that_may_send_nothing_answers_through_its_port(
    site: Site, shop: Place, protocol: str
) -> None:
    """What it asks itself is denied, also where it would come back to it."""
    card, port = site.card, PUBLISHED[protocol]
    with site.policy(rule(shop, "egress", {})):
        assert site.world.asks(protocol, card, port) == site.world.address
        assert site.client.asks(protocol, card, port) == site.client.address
        assert shop.asks(protocol, card, port) is None
        assert shop.asks(protocol, site.world.address) is None


@both_families
def test_virtual_machine_is_judged_by_its_labels(site: Site, shop: Place) -> None:
    """`far` is the world until it is registered as a VM, and again after it is not."""
    legacy = element("ingress", endpoints=[{"matchLabels": {"app": "legacy"}}])
    address = site.card
    with site.policy(rule(shop, "ingress", legacy)):
        assert site.far.asks("TCP", address, EVERYWHERE) is None
        site.cli("vm", "register", "legacy-1", "--ip", site.far.address, "-l", "app=legacy")
        wait_for(lambda: site.far.asks("TCP", address, EVERYWHERE) == site.far.address, "VM let in")
        assert site.far.asks("TCP", shop.address) == site.far.address
        assert site.world.asks("TCP", address, EVERYWHERE) is None
        site.cli("vm", "unregister", "legacy-1")
        wait_for(lambda: site.far.asks("TCP", address, EVERYWHERE) is None, "VM kept out")


# --- what can not be published


@both_families
def test_port_of_a_host_service_is_refused_and_the_service_goes_on(site: Site) -> None:
    refuses(site, f"{FIRST}:80", f"host port {FIRST}/tcp is in use")
    assert site.world.asks("TCP", site.card, FIRST) == site.world.address


def test_port_of_another_container_is_refused(site: Site, shop: Place) -> None:
    refuses(site, f"{EVERYWHERE}:80", f"host port {EVERYWHERE}/tcp is in use")
    assert site.world.asks("TCP", site.card, EVERYWHERE) == site.world.address


def test_address_that_is_not_the_hosts_is_refused(site: Site) -> None:
    refuses(site, "192.0.2.1:8099:80", "192.0.2.1 is not an address of this host")


def test_ipv6_loopback_is_refused_at_once(site: Site, shop: Place) -> None:
    """A browser that tries `localhost` goes on to 127.0.0.1 then, instead of waiting."""
    refuses(site, f"[::1]:8099:{FIRST}", "can not be published on ::1")
    with pytest.raises(ConnectionRefusedError), connected(site.on_host.netns, "::1", EVERYWHERE):
        pass


def refuses(site: Site, publish: str, reason: str) -> None:
    """Starting a container that publishes so fails with this reason, and leaves nothing."""
    before = len(site.json("endpoint", "list"))
    try:
        with (
            pytest.raises(AssertionError, match=reason),
            site.container("refused", options=["--publish", publish]),
        ):
            pass
    finally:
        site.host.engine.docker("rm", "-f", "refused", check=False)
    assert len(site.json("endpoint", "list")) == before


def test_port_is_free_again_after_its_container(site: Site) -> None:
    for name in ("first", "second"):
        with site.container(name, options=["--publish", f"8090:{FIRST}"]):
            assert site.world.asks("TCP", site.card, 8090) == site.world.address
        assert site.world.asks("TCP", site.card, 8090) is None
