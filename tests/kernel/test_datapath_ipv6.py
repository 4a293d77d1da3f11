# SPDX-License-Identifier: Apache-2.0
"""What only IPv6 has: neighbour discovery, extension headers, the fragment header, addresses by scope."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address

import pytest

from datapath.mapspec import MapCatalogue
from datapath.records import CtKey
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, VM_IDENTITY, WORLD, Lab, lab, lab_with_neighbours
from tests.support.families import NET6
from tests.support.frames import (
    AUTH,
    DESTINATION,
    FRAGMENT,
    HOP_BY_HOP,
    SYN,
    Extension,
    authentication,
    fragment_header,
    padding,
    routing,
)

A, B, VM, NODE, OUTSIDE, ROUTER = NET6.a, NET6.b, NET6.vm, NET6.node, NET6.outside, NET6.router
GATEWAY = "fe80::1"
OPTIONS = padding()


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab_with_neighbours() as made:
        yield made


def extended(*extensions: Extension, source: str = A, to: str = VM, data: bytes = b"") -> bytes:
    """A UDP datagram from port 4000 to 53 behind extension headers."""
    return frames.udp(source, to, 4000, 53, data, extensions=extensions)


def part(*extensions: Extension, data: bytes = bytes(16)) -> bytes:
    """A UDP datagram's part that does not begin it, behind extension headers."""
    return frames.ethernet(frames.ipv6(A, VM, frames.UDP, data, extensions=extensions), frames.ETH_IPV6)


# --- neighbour discovery


@pytest.mark.parametrize("asked_at", ["ff02::1:ff00:1", GATEWAY], ids=["everybody", "the gateway alone"])
@pytest.mark.parametrize("sender", [A, "fe80::abcd:1234"])
def test_the_gateway_advertises_itself(host: Lab, sender: str, asked_at: str) -> None:
    """Without any policy; the fields are those of RFC 4861, 4.4 and 7.2.4."""
    outcome = host.send(1, frames.solicitation(GATEWAY, sender=sender, to=asked_at))
    assert outcome.verdict == ACT_REDIRECT
    eth, ip, message = outcome.packet[:14], outcome.packet[14:54], outcome.packet[54:]
    assert eth.hex(":") == "02:00:00:00:00:01:02:00:00:00:00:a1:86:dd"
    assert (ip[0] >> 4, int.from_bytes(ip[4:6], "big"), ip[6], ip[7]) == (6, 32, frames.ICMPV6, 255)
    assert (IPv6Address(ip[8:24]), IPv6Address(ip[24:40])) == (IPv6Address(GATEWAY), IPv6Address(sender))
    assert (message[0], message[1], message[4:8].hex()) == (frames.ADVERTISEMENT, 0, "e0000000")
    assert IPv6Address(message[8:24]) == IPv6Address(GATEWAY)
    assert message[24:].hex(":") == "02:01:02:00:00:00:00:a1"  # the target's link-layer address
    assert frames.checksum6(GATEWAY, sender, frames.ICMPV6, message) == 0
    assert host.dropped() == {}


def test_the_checksum_is_right_for_any_sender(host: Lab) -> None:
    """Some sums carry once when they are folded, some twice."""
    for last in range(0, 0x10000, 97):
        sender = f"fe80:ffff:ffff:ffff:ffff:ffff:ffff:{last:x}"
        message = host.send(1, frames.solicitation(GATEWAY, sender=sender)).packet[54:]
        assert frames.checksum6(GATEWAY, sender, frames.ICMPV6, message) == 0, sender


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(frames.solicitation("fe80::2"), id="another neighbour"),
        pytest.param(frames.solicitation(B), id="an endpoint"),
        pytest.param(frames.solicitation(GATEWAY, kind=frames.ADVERTISEMENT), id="advertisement"),
        pytest.param(frames.solicitation(GATEWAY, kind=133), id="router solicitation"),
        pytest.param(frames.solicitation(GATEWAY, kind=143), id="multicast listeners"),
        pytest.param(frames.solicitation(GATEWAY, ttl=254), id="forwarded"),
        pytest.param(frames.solicitation(GATEWAY, code=1), id="code"),
        pytest.param(frames.solicitation(GATEWAY, options=b""), id="nobody to answer"),
        pytest.param(frames.solicitation(GATEWAY, options=b"\x02\1" + bytes(6)), id="another option"),
        pytest.param(frames.solicitation(GATEWAY, options=b"\x01\2" + bytes(14)), id="longer option"),
        pytest.param(frames.solicitation(GATEWAY, extensions=[padding(HOP_BY_HOP)]), id="options"),
        pytest.param(frames.solicitation(GATEWAY, sender="::", options=b""), id="duplicate detection"),
        pytest.param(frames.solicitation(A, sender="fe80::9"), id="own address from another"),
        pytest.param(frames.solicitation(GATEWAY)[:85], id="cut"),
    ],
)
def test_nothing_else_is_answered(host: Lab, frame: bytes) -> None:
    """Nor counted: systems say it by themselves, and nobody else is on the link."""
    host.allow_all(1)
    outcome = host.send(1, frame)
    assert (outcome.verdict, outcome.packet) == (ACT_SHOT, frame)
    assert host.dropped() == {}


def test_a_link_speaks_with_no_other_headers(host: Lab) -> None:
    host.allow_all(1)
    for extensions in ([padding(HOP_BY_HOP, 1)], [padding(DESTINATION)], [padding(HOP_BY_HOP)] * 2):
        frame = frames.solicitation(GATEWAY, extensions=extensions)
        assert host.send(1, frame).verdict == ACT_SHOT
    assert host.dropped() == {(151, 2): 3}


@pytest.mark.parametrize("kind", [frames.SOLICITATION, frames.ADVERTISEMENT, 134, 137])
def test_only_the_gateways_own_words_reach_an_endpoint(host: Lab, kind: int) -> None:
    host.allow_all(1)
    for sender, verdict in ((GATEWAY, ACT_OK), ("fe80::2", ACT_SHOT), (NODE, ACT_SHOT), (B, ACT_SHOT)):
        frame = frames.solicitation(A, sender=sender, to=A, kind=kind)
        assert host.deliver(1, frame).verdict == verdict, sender
    assert host.connections() == {}


# --- addresses


@pytest.mark.parametrize(
    "destination",
    ["ff02::1", "ff05::2", "ff0e::1", "fe80::2", "febf::1", "::1", "::", "::ffff:10.0.0.2", "::10.0.0.2"],
)
def test_what_means_nothing_beyond_its_device_is_dropped(host: Lab, destination: str) -> None:
    host.allow_all(1)
    assert host.send(1, frames.tcp(A, destination, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(151, 2): 1}


@pytest.mark.parametrize("destination", ["64:ff9b::192.0.2.7", "fc00::1", "fec0::1", "2001:db8::1", "100::1"])
def test_what_may_be_routed_passes(host: Lab, destination: str) -> None:
    """Of those, the first is how hosts without IPv4 reach it (NAT64, RFC 6052)."""
    host.allow(1, EGRESS, WORLD)
    assert host.send(1, frames.tcp(A, destination, 4000, 80)).verdict == ACT_OK


def test_every_bit_of_an_own_address_counts(host: Lab) -> None:
    host.allow_all(1)
    for bit in range(128):
        other = str(IPv6Address(int(IPv6Address(A)) ^ 1 << bit))
        assert host.send(1, frames.tcp(other, VM, 4000, 80)).verdict == ACT_SHOT, other
    assert host.dropped() == {(132, 2): 128}


# --- extension headers

ONE_EACH = {
    "hop-by-hop": padding(HOP_BY_HOP),
    "destination": padding(DESTINATION),
    "long options": padding(DESTINATION, 9),
    "authentication": authentication(),
    "odd authentication": authentication(5),
    "shortest authentication": authentication(0),
    "atomic fragment": fragment_header(),
}


@pytest.mark.parametrize("each", ONE_EACH.values(), ids=ONE_EACH.keys())
def test_up_to_four_headers_are_passed(host: Lab, each: Extension) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 53, frames.UDP)
    for others in range(4):
        chain = [each, *[OPTIONS] * others]
        for turned in (chain, chain[::-1]):
            assert host.send(1, extended(*turned)).verdict == ACT_OK, turned
    assert set(host.connections()) == {CtKey(A, VM, 4000, 53, frames.UDP, 0)}


def test_every_protocol_is_found_behind_headers(host: Lab) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 80, frames.TCP)
    host.allow(1, EGRESS, VM_IDENTITY, frames.ECHO6, frames.ICMPV6)
    chain = [padding(HOP_BY_HOP), fragment_header(), authentication(), padding(DESTINATION, 3)]
    assert host.send(1, frames.tcp(A, VM, 4000, 80, extensions=chain)).verdict == ACT_OK
    assert host.send(1, frames.tcp(A, VM, 4000, 81, extensions=chain)).verdict == ACT_SHOT
    assert host.send(1, frames.echo(A, VM, 7, extensions=chain)).verdict == ACT_OK
    assert {key.protocol for key in host.connections()} == {frames.TCP, frames.ICMPV6}


def test_headers_belong_to_the_packet_not_to_the_connection(host: Lab) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    assert host.send(1, frames.udp(A, B, 4000, 53)).verdict == ACT_REDIRECT
    reply = frames.udp(B, A, 53, 4000, extensions=[padding(HOP_BY_HOP), authentication()])
    assert host.send(2, reply).verdict == ACT_REDIRECT


def raw(protocol: int, payload: bytes, **ip: int) -> bytes:
    return frames.packet(A, VM, protocol, payload, **ip)


REFUSED: Sequence[tuple[str, bytes, int]] = (
    ("five", extended(*[OPTIONS] * 5), 156),
    ("many", extended(*[OPTIONS] * 20), 156),
    ("five with an atomic fragment", extended(fragment_header(), *[OPTIONS] * 4), 156),
    ("routing", extended(routing()), 156),
    ("routing that is over", extended(routing(left=0)), 156),
    ("segment routing", extended(routing(4)), 156),
    ("routing behind others", extended(padding(HOP_BY_HOP), OPTIONS, OPTIONS, routing()), 156),
    ("routing behind an atomic fragment", extended(fragment_header(), routing()), 156),
    ("too far", extended(padding(DESTINATION, 18)), 156),
    ("too far together", extended(*[padding(DESTINATION, 8)] * 2, OPTIONS), 156),
    ("no next header", extended(OPTIONS)[:20] + b"\x3b" + extended(OPTIONS)[21:], 137),
    ("no next header behind options", raw(DESTINATION, b"\x3b" + bytes(7)), 137),
    ("ESP", raw(50, bytes(40)), 137),
    ("mobility", raw(135, bytes(40)), 137),
    ("ICMP of IPv4", raw(1, bytes(8)), 137),
    ("only half a header", raw(DESTINATION, bytes(7)), 134),
    ("nothing where a header should be", raw(HOP_BY_HOP, b""), 134),
    ("header beyond the packet", raw(DESTINATION, bytes([17, 1]) + bytes(13)), 134),
    ("header in the padding", extended(OPTIONS)[:18] + bytes([0, 7]) + extended(OPTIONS)[20:], 134),
    ("L4 in the padding", extended(OPTIONS)[:18] + bytes([0, 15]) + extended(OPTIONS)[20:], 135),
    ("nothing behind a header", raw(AUTH, bytes([17, 4]) + bytes(22)), 135),
    ("jumbo option", raw(HOP_BY_HOP, bytes([17, 0, 0xC2, 4, 0, 1, 0, 0]) + bytes(20), total=0), 134),
    ("jumbo length of TCP", raw(frames.TCP, frames.tcp_segment(4000, 80, SYN), total=0), 135),
    ("fragment in a fragment", part(fragment_header(2, ident=3), fragment_header(3)), 156),
    ("options in a first fragment", part(fragment_header(more=True), OPTIONS), 156),
    ("cut first fragment", part(fragment_header(more=True), data=bytes(7)), 135),
)


@pytest.mark.parametrize(("frame", "reason"), [pytest.param(*each, id=name) for name, *each in REFUSED])
def test_what_is_wrong_is_dropped_by_its_reason(host: Lab, frame: bytes, reason: int) -> None:
    host.allow_all(1)
    assert host.send(1, frame).verdict == ACT_SHOT
    assert host.dropped() == {(reason, 2): 1}
    assert host.connections() == {}


def test_a_chain_cut_anywhere_is_dropped(host: Lab) -> None:
    """Whether the header says so, or says that there is more than there is."""
    host.allow_all(1)
    chain = [padding(HOP_BY_HOP), authentication(), fragment_header(), padding(DESTINATION, 2)]
    frame = extended(*chain)
    for length in range(54, len(frame)):
        cut = frame[:length]
        assert host.send(1, cut).verdict == ACT_SHOT, length
        told = cut[:18] + (length - 54).to_bytes(2, "big") + cut[20:]
        assert host.send(1, told).verdict == ACT_SHOT, length
    assert host.connections() == {}
    assert host.send(1, frame).verdict == ACT_OK


# --- fragments


@pytest.mark.parametrize(
    "before", [[], [padding(HOP_BY_HOP)], [padding(HOP_BY_HOP), OPTIONS, authentication()]]
)
def test_later_fragments_are_found_behind_headers(host: Lab, before: list[Extension]) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 53, frames.UDP)
    later = part(*before, fragment_header(3, ident=9))
    assert host.send(1, later).verdict == ACT_SHOT
    assert host.dropped() == {(175, 2): 1}
    first = extended(*before, fragment_header(more=True, ident=9), data=bytes(16))
    assert host.send(1, first).verdict == ACT_OK
    assert host.send(1, later).verdict == ACT_OK
    assert host.send(1, part(fragment_header(6, more=True, ident=9))).verdict == ACT_OK


@pytest.mark.parametrize("ident", [0x0000_0109, 0x0100_0009, 0xFFFF_FFFF])
def test_every_bit_of_a_datagrams_number_counts(host: Lab, ident: int) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 53, frames.UDP)
    assert host.send(1, extended(fragment_header(more=True, ident=9), data=bytes(16))).verdict == ACT_OK
    assert host.send(1, part(fragment_header(3, ident=ident))).verdict == ACT_SHOT
    assert host.dropped() == {(175, 2): 1}


def test_an_atomic_fragment_begins_nothing(host: Lab) -> None:
    """It is a whole datagram (RFC 6946): what claims to continue it does not."""
    host.allow(1, EGRESS, VM_IDENTITY, 53, frames.UDP)
    assert host.send(1, extended(fragment_header(ident=9))).verdict == ACT_OK
    assert host.send(1, part(fragment_header(3, ident=9))).verdict == ACT_SHOT


def test_reserved_bits_do_not_make_a_fragment(host: Lab) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 53, frames.UDP)
    reserved = Extension(FRAGMENT, bytes([0xFF, 0x00, 0x06]) + bytes(4))
    assert host.send(1, extended(reserved)).verdict == ACT_OK
    assert host.send(1, extended(reserved, OPTIONS)).verdict == ACT_OK


def test_a_later_fragment_is_judged_by_the_ports_of_its_first(host: Lab) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 99, frames.UDP)
    assert host.send(1, extended(fragment_header(more=True, ident=9), data=bytes(16))).verdict == ACT_SHOT
    assert host.send(1, part(fragment_header(3, ident=9))).verdict == ACT_SHOT
    assert host.dropped() == {(133, 2): 2}


# --- errors


@pytest.mark.parametrize(
    ("about", "related"),
    [
        pytest.param(extended(fragment_header(more=True), data=bytes(16)), True, id="first fragment"),
        pytest.param(extended(fragment_header()), True, id="atomic fragment"),
        pytest.param(part(fragment_header(3)), False, id="later fragment"),
        pytest.param(extended(routing()), False, id="what would not have left"),
        pytest.param(extended(fragment_header())[: 54 + 8 + 7], False, id="cut ports"),
        pytest.param(extended(fragment_header())[: 54 + 7], False, id="cut fragment header"),
        pytest.param(extended()[: 14 + 39], False, id="cut header"),
        pytest.param(frames.udp("fd00::1", VM, 4000, 53, version=4), False, id="IPv4"),
        pytest.param(extended(source=B), False, id="somebody else's"),
        pytest.param(extended(to=OUTSIDE), False, id="to somebody else"),
    ],
)
def test_packet_too_big_is_believed_about_what_was_sent(host: Lab, about: bytes, related: bool) -> None:
    host.allow(1, EGRESS)
    host.send(1, extended())
    error = frames.icmp_error(ROUTER, A, about, frames.PACKET_TOO_BIG)
    assert host.receive(error).verdict == (ACT_REDIRECT if related else ACT_SHOT)
    assert host.dropped() == ({} if related else {(133, 1): 1})


def test_an_error_is_found_behind_headers(host: Lab) -> None:
    host.allow(1, EGRESS)
    host.send(1, extended())
    message = frames.icmp_message(frames.PACKET_TOO_BIG, data=extended()[14:])
    for chain in ([padding(HOP_BY_HOP)], [authentication(), padding(DESTINATION, 3)]):
        error = frames.packet(ROUTER, A, frames.ICMPV6, message, extensions=chain)
        assert host.receive(error).verdict == ACT_REDIRECT


@pytest.mark.parametrize("kind", [0, 5, 100, 127, 133, 134, 136, 137])
def test_what_is_no_error_needs_a_rule(host: Lab, kind: int) -> None:
    host.allow(1, EGRESS)
    host.send(1, extended())
    other = frames.packet(ROUTER, A, frames.ICMPV6, frames.icmp_message(kind, data=extended()[14:]))
    assert host.receive(other).verdict == ACT_SHOT
    host.allow(1, INGRESS, 0, kind, frames.ICMPV6)
    assert host.receive(other).verdict == ACT_REDIRECT


# --- the host


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(frames.solicitation(NODE, sender=OUTSIDE), id="neighbour discovery"),
        pytest.param(frames.solicitation(NODE, sender="fe80::9", kind=134), id="router advertisement"),
        pytest.param(frames.solicitation("ff02::1", to="ff02::16", kind=143), id="multicast listeners"),
        pytest.param(extended(routing(), source=OUTSIDE, to=NODE), id="routing header"),
        pytest.param(extended(*[OPTIONS] * 9, source=OUTSIDE, to=NODE), id="many headers"),
        pytest.param(frames.ethernet(bytes(60), frames.ETH_IPV6), id="zeros"),
    ],
)
def test_what_is_not_for_an_endpoint_is_left_alone(host: Lab, frame: bytes) -> None:
    outcome = host.receive(frame)
    assert (outcome.verdict, outcome.packet, outcome.mark) == (ACT_OK, frame, 0)
    assert host.dropped() == {}


@pytest.mark.parametrize("frame", [extended(routing(), source=OUTSIDE, to=A)], ids=["routing header"])
def test_what_an_endpoint_must_not_send_does_not_reach_one(host: Lab, frame: bytes) -> None:
    host.allow_all(1)
    assert host.receive(frame).verdict == ACT_SHOT
    assert host.deliver(1, frame).verdict == ACT_SHOT
    assert host.dropped() == {(156, 1): 2}


def test_without_ipv6_every_packet_of_it_is_dropped() -> None:
    with lab(1, catalogue=MapCatalogue(ct_tcp_max=1024, ct_any_max=1024)) as host:
        host.allow_all(1)
        assert host.send(1, extended()).verdict == ACT_SHOT
        assert host.deliver(1, extended()).verdict == ACT_SHOT
        assert host.dropped() == {(139, 2): 1, (139, 1): 1}
