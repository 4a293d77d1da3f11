# SPDX-License-Identifier: Apache-2.0
"""Machines without an agent: what somebody writes into etcd about them is enforced with real packets.

vm (10.77.0.5, 10.77.0.6, 10.78.0.9, fd78::5) ── a router on the hub ── eth0 [host: agent] ── server, client
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from datapath.addresses import host_prefix
from tests.support.host import run, wait_for
from tests.support.places import PORTS, Neighbour, Place, passes
from tests.support.rules import element, rule
from tests.support.site import Site, both_families
from tests.support.traffic import TCP, UDP, serving
from tests.support.vectors import Entry, etcd_dump

PROTOCOLS = ("TCP", "UDP", "ICMP")
DIRECTIONS = ("ingress", "egress")

VECTORS = "with-external-vm.txt"
NUMBER = 4242
SELECTOR = {"matchLabels": {"container:app": "legacyvm"}}
# Three ways in which the vectors write an address: in full, short by hand, and a prefix around it.
ADDRESSES = {"10.77.0.5": "10.77.0.5", "10.77.0.6": "10.77.0.6", "10.78.0.9": "10.78.0.0/24"}
FULL = "10.77.0.5"
REGISTERED = {4: FULL, 6: "fd78::5"}


@pytest.fixture(scope="module")
def machines(site: Site) -> Iterator[dict[str, Place]]:
    """Places with the vectors' addresses, and one of IPv6, behind a route of the host."""
    addresses = {*ADDRESSES, *REGISTERED.values()}
    neighbour = Neighbour(site.hub)
    with contextlib.ExitStack() as stack:
        stack.callback(neighbour.stop)
        netns = neighbour.place("vm").netns
        for address in addresses:
            run(["ip", "-n", neighbour.netns, "address", "add", host_prefix(address), "dev", "lo"])
            via = neighbour.place("vm").of(6 if ":" in address else 4).address
            route = [host_prefix(address), "via", via]
            run(["ip", "-n", site.host.netns, "route", "add", *route])
            stack.callback(run, ["ip", "-n", site.host.netns, "route", "del", *route], check=False)
            for port, kind in itertools.product(PORTS, (TCP, UDP)):
                stack.enter_context(serving(netns, port, kind, address))
        yield {address: Place("vm", address, netns) for address in addresses}


@pytest.fixture
def sender(site: Site, machines: dict[str, Place]) -> Callable[[str], Place]:
    """Return the place of an address after making it the source of what the machine sends."""

    def choose(address: str) -> Place:
        place = machines[address]
        by = site.by(place.family)
        place.netns.run("ip", "route", "replace", by.pool, "via", by.card, "src", address)
        return place

    return choose


def entries_of(address: str) -> list[Entry]:
    """Return the three entries that make a machine: labels, user and address."""
    wanted = (f"/id/{NUMBER}", ";/192.0.2.10", f"/default/{ADDRESSES[address]}")
    return [entry for entry in etcd_dump(VECTORS) if entry.key.endswith(wanted)]


@contextlib.contextmanager
def injected(site: Site, address: str) -> Iterator[None]:
    """Have a machine's entries in etcd, byte for byte as recorded, for the length of the block."""
    entries = entries_of(address)
    assert len(entries) == 3
    try:
        for entry in entries:
            site.host.etcdctl("put", entry.key, entry.value)
        wait_for(lambda: identity_of(site, ADDRESSES[address]) == NUMBER, f"identity of {address}")
        yield
    finally:
        for entry in entries:
            site.host.etcdctl("del", entry.key)


def identity_of(site: Site, prefix: str) -> int:
    """Return the identity that the kernel's map has for exactly this prefix, 0 without one."""
    wanted = prefix if "/" in prefix else host_prefix(prefix)
    found: dict[str, dict[str, Any]] = site.json("bpf", "ipcache", "list")
    return int(found[wanted]["identity"]) if wanted in found else 0


def allowing(site: Site, direction: str) -> contextlib.AbstractContextManager[None]:
    return site.policy(rule(site.server, direction, element(direction, endpoints=[SELECTOR])))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("address", ADDRESSES)
def test_machine_of_the_vectors_is_let_in_while_its_entries_are_there(
    site: Site, sender: Callable[[str], Place], address: str, direction: str
) -> None:
    """Without its entries it is the world, which the policy does not name."""
    vm = sender(address)
    with allowing(site, direction):
        assert not passes(site.server, vm, direction, "TCP")
        with injected(site, address):
            for protocol in PROTOCOLS:
                assert passes(site.server, vm, direction, protocol), protocol
            assert not passes(site.server, site.other, direction, "TCP")
            assert not passes(site.server, site.world, direction, "TCP")
        wait_for(lambda: identity_of(site, ADDRESSES[address]) == 0, f"end of {address}")
        for protocol in PROTOCOLS:
            assert not passes(site.server, vm, direction, protocol), protocol


def test_machine_is_denied_by_its_identity(site: Site, sender: Callable[[str], Place]) -> None:
    vm = sender(FULL)
    everybody = rule(site.server, "ingress", element("ingress", entities=["all"]))
    denied = rule(site.server, "ingress", element("ingress", endpoints=[SELECTOR]), deny=True)
    with site.policy(everybody, denied):
        assert passes(site.server, vm, "ingress", "TCP")
        with injected(site, FULL):
            for protocol in PROTOCOLS:
                assert not passes(site.server, vm, "ingress", protocol), protocol
            assert passes(site.server, site.world, "ingress", "TCP")


def test_relabelled_machine_is_somebody_else(site: Site, sender: Callable[[str], Place]) -> None:
    vm = sender(FULL)
    with allowing(site, "ingress"), injected(site, FULL):
        assert passes(site.server, vm, "ingress", "TCP")
        site.host.etcdctl("put", f"cilium/state/identities/v1/id/{NUMBER}", "container:app=other;")
        wait_for(lambda: not passes(site.server, vm, "ingress", "TCP"), "denied machine")


# --- the command line


@both_families
def test_registered_machine_is_let_in_until_it_is_unregistered(
    site: Site, sender: Callable[[str], Place]
) -> None:
    """As an operator of this host's etcd types it."""
    address = REGISTERED[site.family]
    machine = sender(address)
    labels = ["-l", "app=legacyvm", "-l", "site=dc1"]
    with allowing(site, "ingress"):
        said = json.loads(site.cli("vm", "register", "legacy-1", "--ip", address, *labels, "-o", "json"))
        try:
            wait_for(lambda: identity_of(site, address) == said["identity"], "identity of the machine")
            for protocol in PROTOCOLS:
                assert passes(site.server, machine, "ingress", protocol), protocol
            assert [each["name"] for each in site.json("vm", "list")] == ["legacy-1"]
            assert {"legacy-1", address} <= set(site.cli("vm", "list").split())
            assert written(site, address, said["identity"]) == expected(address, said["identity"])
        finally:
            site.cli("vm", "unregister", "legacy-1")
        wait_for(lambda: identity_of(site, address) == 0, "end of the machine")
        assert not passes(site.server, machine, "ingress", "TCP")
    assert site.json("vm", "list") == []
    assert address not in "".join(site.host.keys("cilium/state/"))


def written(site: Site, address: str, number: int) -> dict[str, str]:
    """Return what etcd holds of the machine under cilium/."""
    found = site.host.keys("cilium/state/")
    return {key: value for key, value in found.items() if address in key or key.endswith(f"/id/{number}")}


def expected(address: str, number: int) -> dict[str, str]:
    """Return the vectors' three entries with our number; the machine is its own user and on no node."""
    names = {f"/id/{NUMBER}": f"/id/{number}", str(NUMBER): str(number), FULL: address}
    key_names = names | {"192.0.2.10": address}
    return {
        replaced(entry.key, key_names): replaced(entry.value, names | {"192.0.2.10": ""})
        for entry in entries_of(FULL)
    }


def replaced(text: str, names: Mapping[str, str]) -> str:
    for recorded, ours in names.items():
        text = text.replace(recorded, ours)
    return text
