# SPDX-License-Identifier: Apache-2.0
"""Rules of ICMP types, from a policy to packets: a type is one family's, and opens or shuts nothing else."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import closing
from typing import NamedTuple

import pytest

from tests.support.frames import checksum, icmp_message
from tests.support.host import wait_for
from tests.support.places import PacketTap, Place
from tests.support.rules import Rule, document, element, rule, selects
from tests.support.site import Site, both_families
from tests.support.traffic import family_of

NAMES = {4: "IPv4", 6: "IPv6"}
OTHER = {4: 6, 6: 4}
PROTOCOLS = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}
ECHO = {4: 8, 6: 128}
ASKING = {4: 13, 6: 139}  # another question: for a timestamp, for node information
NO_RULE, DENY_RULE = "Policy denied", "Policy denied by denylist"


class Flow(NamedTuple):
    """Messages from one place to another, as a subject of policy has them in one direction."""

    site: Site
    direction: str
    subject: Place
    sender: Place
    receiver: Place

    def rule(self, *types: tuple[int, int], deny: bool = False) -> Rule:
        """A rule for the subject and everybody: of these (family, type)."""
        return rule(self.subject, self.direction, icmps(*types), deny=deny)

    def passes(self, kind: int, reason: str = NO_RULE) -> bool:
        """Send a message of a type; tell whether it arrived, once it has or was dropped for that reason."""
        token = os.urandom(16)
        before = self.site.dropped(reason, self.direction)
        with closing(PacketTap(self.receiver)) as tap:
            seen: list[bytes] = []

            def settled() -> bool:
                dropped = self.site.dropped(reason, self.direction) > before
                seen.extend(packet for packet in tap.packets() if token in packet)
                return dropped or bool(seen)

            send(self.sender, self.receiver.address, kind, token)
            wait_for(settled, f"fate of a message {kind}")
            return bool(seen)


def icmps(*types: tuple[int, int]) -> Rule:
    """What an element says of types of ICMP, each with its family."""
    return {"icmps": [{"fields": [{"family": NAMES[family], "type": kind} for family, kind in types]}]}


def send(sender: Place, address: str, kind: int, data: bytes) -> None:
    message = icmp_message(kind, ident=os.getpid() & 0xFFFF, data=data)
    if sender.family == 4:  # the kernel does it for IPv6
        message = message[:2] + struct.pack(">H", checksum(message)) + message[4:]
    with sender.netns.socket(socket.SOCK_RAW, family_of(address), PROTOCOLS[sender.family]) as raw:
        raw.sendto(message, (address, 0))


@pytest.fixture(params=["ingress", "egress"])
def flow(site: Site, request: pytest.FixtureRequest) -> Flow:
    """From client to server; the one of them that has the policy is its subject."""
    subject = site.server if request.param == "ingress" else site.client
    return Flow(site, request.param, subject, site.client, site.server)


def pings(site: Site, family: int) -> bool:
    """Tell whether client reaches server with an echo request of a family, and is answered."""
    there = site.by(family)
    return there.client.pings(there.server.address)


@both_families
@pytest.mark.parametrize(("named", "other"), [(ECHO, ASKING), (ASKING, ECHO)], ids=["echo", "asking"])
def test_only_the_named_type_passes(
    site: Site, flow: Flow, named: dict[int, int], other: dict[int, int]
) -> None:
    family = site.family
    with site.policy(flow.rule((family, named[family]))):
        assert flow.passes(named[family])
        assert not flow.passes(other[family])
        assert pings(site, family) is (named is ECHO)
        assert site.client.asks("TCP", site.server.address) is None
        assert site.client.asks("UDP", site.server.address) is None


@both_families
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_named_type_of_a_machine_outside(site: Site, direction: str) -> None:
    """The world asks server, and server the world: only about what the rule names."""
    sender, receiver = (site.world, site.server) if direction == "ingress" else (site.server, site.world)
    flow = Flow(site, direction, site.server, sender, receiver)
    world = element(direction, entities=["world"], of=icmps((site.family, ASKING[site.family])))
    with site.policy(rule(site.server, direction, world)):
        assert flow.passes(ASKING[site.family])
        assert not flow.passes(ECHO[site.family])
        assert not sender.pings(receiver.address)


@both_families
def test_rule_of_a_family_opens_nothing_of_the_other(site: Site, flow: Flow) -> None:
    """All types that are sent here are allowed, to the other family."""
    family, other = site.family, OTHER[site.family]
    types = {ECHO[family], ASKING[family], ECHO[other]}
    with site.policy(flow.rule(*((other, kind) for kind in types))):
        assert not flow.passes(ECHO[family])
        assert not flow.passes(ASKING[family])
        assert not pings(site, family)
        assert pings(site, other)


@both_families
def test_denied_type_of_a_family_is_denied_of_no_other(site: Site, flow: Flow) -> None:
    family, other = site.family, OTHER[site.family]
    everything = rule(flow.subject, flow.direction, element(flow.direction, endpoints=[{}]))
    with site.policy(everything, flow.rule((family, ECHO[family]), (family, ECHO[other]), deny=True)):
        assert not flow.passes(ECHO[family], DENY_RULE)
        assert flow.passes(ASKING[family], DENY_RULE)
        assert not pings(site, family)
        assert pings(site, other)


@both_families
def test_families_have_rules_side_by_side(site: Site, flow: Flow) -> None:
    """One element with types of both, from a peer by its labels: to another peer it is nothing."""
    peer = site.client if flow.direction == "ingress" else site.server
    types = icmps((4, ECHO[4]), (6, ASKING[6]))
    clause = element(flow.direction, endpoints=[selects(peer)], of=types)
    with site.policy(rule(flow.subject, flow.direction, clause)):
        allowed, refused = (ECHO, ASKING) if site.family == 4 else (ASKING, ECHO)
        assert flow.passes(allowed[site.family])
        assert not flow.passes(refused[site.family])
        sender, receiver = (
            (site.other, site.server) if flow.direction == "ingress" else (site.client, site.other)
        )
        assert not flow._replace(sender=sender, receiver=receiver).passes(allowed[site.family])


@pytest.mark.parametrize("kind", [8, "8"], ids=["number", "text"])
def test_type_without_a_family_is_of_ipv4(site: Site, kind: int | str) -> None:
    fields = [{"type": kind}, {"type": ECHO[6]}]
    with site.policy(rule(site.server, "ingress", {"icmps": [{"fields": fields}]})):
        assert pings(site, 4)
        assert not pings(site, 6)


def test_type_by_name_is_refused_and_what_is_in_force_stays(site: Site) -> None:
    """Types are numbers here: a name changes nothing, and the refusal says where it stands."""
    named = rule(site.server, "ingress", {"icmps": [{"fields": [{"family": "IPv6", "type": "EchoRequest"}]}]})
    with site.policy(rule(site.server, "ingress", icmps((4, ECHO[4]))), name="icmp"):
        done = site.host.cli(
            "policy", "apply", "--local", "-f", "-", stdin=document("icmp", named), check=False
        )
        assert done.returncode != 0
        assert all(word in done.stderr for word in ("fields[0].type", "EchoRequest")), done.stderr
        assert pings(site, 4)
        assert not pings(site, 6)
