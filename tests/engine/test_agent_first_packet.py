# SPDX-License-Identifier: Apache-2.0
"""From `docker run` on, policy is in force: a client that sends from its first instruction.

The client is the first process of its container and sends to everybody at once: numbered UDP packets and
TCP SYNs.  Each start has labels that nobody had before, so its identity is new to the cluster, to the
ip→identity table and to every policy map.  `PacketTap` counts what reaches a peer below its own stack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_pton

import pytest

from tests.support.engine import WORKLOAD_IMAGE
from tests.support.host import unique_name
from tests.support.places import PORTS, PacketTap, Place
from tests.support.rules import Rule, element, rule
from tests.support.site import Site, both_families

STARTS = 2  # of each kind and family
UDP, TCP, ICMPV6 = 17, 6, 58
RST = 0x04  # of TCP
DISCOVERY = range(133, 138)  # router and neighbour solicitations and advertisements, redirects
FIRST_WORDS = b"packet 0"
SYN = 0x02
SPEAKER = {"matchLabels": {"app": "speaker"}}

# Nothing is imported but the socket itself: the first packet leaves as early as an interpreter can.
CLIENT = f"""
import _socket, sys
addresses = sys.argv[1:]
family = _socket.AF_INET6 if ':' in addresses[0] else _socket.AF_INET
datagrams = _socket.socket(family, _socket.SOCK_DGRAM, 0)
streams = []
for number in range(300):
    for address in addresses:
        try:
            datagrams.sendto(b'packet %d' % number, (address, {PORTS[0]}))
        except OSError:
            pass
        if number < 20:
            stream = _socket.socket(family, _socket.SOCK_STREAM, 0)
            stream.setblocking(False)
            stream.connect_ex((address, {PORTS[0]}))
            streams.append(stream)
"""
ASKS_ONCE = f"""
import _socket, sys
family = _socket.AF_INET6 if ':' in sys.argv[1] else _socket.AF_INET
stream = _socket.socket(family, _socket.SOCK_STREAM, 0)
stream.connect((sys.argv[1], {PORTS[0]}))
stream.send(b'x')
print(stream.recv(100).decode())
"""


@contextlib.contextmanager
def tapped(*places: Place) -> Iterator[list[PacketTap]]:
    with contextlib.ExitStack() as stack:
        taps = [PacketTap(place) for place in places]
        for tap in taps:
            stack.callback(tap.close)
        yield taps


def speak(site: Site, script: str, *addresses: str) -> str:
    """Run a client with labels of its own to its end; return the first word that it printed."""
    unheard_of = unique_name("speaker")
    labels = ("-l", "app=speaker", "-l", f"env={unheard_of}")
    command = ("python3", "-S", "-E", "-c", script, *addresses)
    done = site.host.engine.docker("run", "--rm", "--network", "holdfast", *labels, WORKLOAD_IMAGE, *command)
    return done.stdout.partition(" ")[0]


def of_speaker(site: Site, packets: list[bytes]) -> list[bytes]:
    """Leave out what the containers of other tests may still say to each other, and what nobody asked for."""
    others = {packed(place.address) for place in (site.client, site.other, site.server, site.far)}
    return [
        packet
        for packet in packets
        if source(packet) not in others and not is_discovery(packet) and not is_reset(packet)
    ]


def packed(address: str) -> bytes:
    return inet_pton(AF_INET6 if ":" in address else AF_INET, address)


def source(packet: bytes) -> bytes:
    return packet[8:24] if is_ipv6(packet) else packet[12:16]


def protocol(packet: bytes) -> int:
    return packet[6 if is_ipv6(packet) else 9]


def payload(packet: bytes) -> bytes:
    """Return what is behind the IP header; nobody here sends options."""
    return packet[40 if is_ipv6(packet) else 20 :]


def is_ipv6(packet: bytes) -> bool:
    return packet[0] >> 4 == 6


def is_discovery(packet: bytes) -> bool:
    """True for the neighbours' questions and answers, which are for a link alone."""
    return protocol(packet) == ICMPV6 and payload(packet)[0] in DISCOVERY


def is_reset(packet: bytes) -> bool:
    """True for TCP's answer to what is for nobody: the host's, when a server goes on answering the speaker
    of the test before, which has ended.  A speaker sends none."""
    return protocol(packet) == TCP and bool(payload(packet)[13] & RST)


def protocols(packets: list[bytes]) -> set[int]:
    """ICMP is left out: a speaker that has ended refuses the answers."""
    return set(map(protocol, packets)) & {UDP, TCP}


@both_families
@pytest.mark.parametrize("start", range(STARTS))
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_not_one_denied_packet_passes(site: Site, direction: str, start: int) -> None:
    """`server` (and, for egress, `world`) is denied, `other` is not: that one proves that it was sent."""
    with site.policy(*closing(site, direction)), tapped(site.server, site.world, site.other) as taps:
        speak(site, CLIENT, site.server.address, site.world.address, site.other.address)
        at_server, at_world, at_other = (of_speaker(site, tap.packets()) for tap in taps)
        assert protocols(at_other) == {UDP, TCP}
        assert at_server == []
        if direction == "egress":
            assert at_world == []
        else:
            assert protocols(at_world) == {UDP, TCP}


def closing(site: Site, direction: str) -> list[Rule]:
    """Rules by which a speaker reaches `other` but not `server`."""
    if direction == "ingress":
        return [
            rule(site.server, "ingress", element("ingress", endpoints=[{"matchLabels": {"app": "client"}}]))
        ]
    to_other = element("egress", endpoints=[{"matchLabels": {"app": "other"}}])
    return [{"endpointSelector": SPEAKER, "egress": [to_other]}]


@both_families
@pytest.mark.parametrize("start", range(STARTS))
def test_first_packet_of_the_allowed_arrives(site: Site, start: int) -> None:
    """Both sides are enforced and name the other: nothing is lost while a new identity spreads."""
    rules = [
        rule(site.server, "ingress", element("ingress", endpoints=[SPEAKER])),
        {
            "endpointSelector": SPEAKER,
            "egress": [element("egress", endpoints=[{"matchLabels": {"app": "server"}}])],
        },
    ]
    with site.policy(*rules), tapped(site.server) as (tap,):
        seen = speak(site, ASKS_ONCE, site.server.address)
        syns = [each for each in tap.packets() if protocol(each) == TCP and payload(each)[13] == SYN]
        assert packets_from(seen, syns) == 1
        speak(site, CLIENT, site.server.address)
        assert any(packet.endswith(FIRST_WORDS) for packet in tap.packets())


def packets_from(address: str, packets: list[bytes]) -> int:
    """Return how many of these come from an address: one SYN means that connect worked the first time."""
    return sum(source(packet) == packed(address) for packet in packets)
