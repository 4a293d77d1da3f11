# SPDX-License-Identifier: Apache-2.0
"""Events from bytes to Cilium's monitor lines, and whatever bytes a container may send."""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.errors import EventError
from datapath.events import DropEvent, TraceEvent, VerdictEvent, decode, heading
from datapath.format import describe
from datapath.packets import dissect
from datapath.reasons import direction_name, reason_name
from tests.support.events import decode_many

ETHERNET = bytes.fromhex("0a580a3200010a580a320005")


def frame(protocol: int, rest: bytes, *, fragment: int = 0) -> bytes:
    """Return an Ethernet frame from 10.50.0.5 to 10.50.0.6."""
    addresses = bytes([10, 50, 0, 5, 10, 50, 0, 6])
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(rest), 1, fragment, 64, protocol, 0)
    return ETHERNET + b"\x08\x00" + header + addresses + rest


def frame6(first: int, rest: bytes) -> bytes:
    """Return an Ethernet frame from fd00::5 to fd00::6; `first` is the header behind IPv6's."""
    addresses = bytes.fromhex("fd00" + "00" * 13 + "05" + "fd00" + "00" * 13 + "06")
    return ETHERNET + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(rest), first, 64) + addresses + rest


TCP_SYN = struct.pack("!HHIIBBHHH", 40020, 80, 1, 0, 0x50, 0x02, 64240, 0, 0)
SYN, SYN6 = frame(6, TCP_SYN), frame6(6, TCP_SYN)
PING = frame(1, bytes([8, 0, 0, 0, 0, 1, 0, 1]))


def record(
    kind: int, subtype: int, body: bytes, packet: bytes, *, room: int = 128, version: int = 1
) -> bytes:
    """Return an event as the programs write it: a fixed room for the packet, of which a part is used."""
    head = struct.pack("=BBHIIHH", kind, subtype, 373, 0xD6F0F3A9, len(packet), len(packet), version)
    return head + body + packet.ljust(room, b"\xee")


DROP = record(1, 133, struct.pack("=IIII", 13465, 6114, 52, 0), SYN)
TRACE_TO = record(4, 0, struct.pack("=IIHBBI16s", 13465, 6114, 52, 2, 0, 11, bytes(16)), SYN)
TRACE_FROM = record(4, 5, struct.pack("=IIHBBI16s", 13465, 0, 0, 0, 0, 0, bytes(16)), PING)
TRACE_STACK = record(4, 3, struct.pack("=IIHBBI16s", 13465, 2, 0, 1, 0, 0, bytes(16)), SYN)
DENIED = record(5, 0, struct.pack("=IiHBBI", 6114, -181, 80, 6, 1 | 2 << 3, 0), SYN)
DROP6 = record(1, 133, struct.pack("=IIII", 13465, 6114, 52, 0), SYN6)
TRACE6 = record(4, 0, struct.pack("=IIHBBI16s", 13465, 6114, 52, 2, 1, 11, bytes(15) + b"\1"), SYN6)
SOLICITING = record(
    4, 5, struct.pack("=IIHBBI16s", 13465, 0, 0, 0, 1, 0, bytes(16)), frame6(58, b"\x87\0" + bytes(22))
)
DENIED6 = record(5, 0, struct.pack("=IiHBBI", 6114, -133, 80, 6, 1 | 4, 0), SYN6)
ALLOWED = record(5, 0, struct.pack("=IiHBBI", 6114, 0, 80, 6, 2 | 4 << 3, 0), SYN)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            DROP,
            "xx drop (Policy denied) flow 0xd6f0f3a9 to endpoint 52, identity 13465->6114: "
            "10.50.0.5:40020 -> 10.50.0.6:80 tcp SYN",
        ),
        (
            TRACE_TO,
            "-> endpoint 52 flow 0xd6f0f3a9 identity 13465->6114 state reply ifindex lxc00034 "
            "orig-ip 0.0.0.0: 10.50.0.5:40020 -> 10.50.0.6:80 tcp SYN",
        ),
        (
            TRACE_FROM,
            "<- endpoint 373 flow 0xd6f0f3a9 identity 13465->0 state new ifindex 0 orig-ip 0.0.0.0: "
            "10.50.0.5 -> 10.50.0.6 icmp EchoRequest",
        ),
        (
            TRACE_STACK,
            "-> stack flow 0xd6f0f3a9 identity 13465->2 state established ifindex 0 orig-ip 0.0.0.0: "
            "10.50.0.5:40020 -> 10.50.0.6:80 tcp SYN",
        ),
        (
            DENIED,
            "Policy verdict log: flow 0xd6f0f3a9 local EP ID 373, remote ID 6114, dst port 80, proto 6, "
            "ingress true, action deny, match L3-L4, 10.50.0.5:40020 -> 10.50.0.6:80 tcp SYN",
        ),
        (
            ALLOWED,
            "Policy verdict log: flow 0xd6f0f3a9 local EP ID 373, remote ID 6114, dst port 80, proto 6, "
            "ingress false, action allow, match all, 10.50.0.5:40020 -> 10.50.0.6:80 tcp SYN",
        ),
        (
            DROP6,
            "xx drop (Policy denied) flow 0xd6f0f3a9 to endpoint 52, identity 13465->6114: "
            "[fd00::5]:40020 -> [fd00::6]:80 tcp SYN",
        ),
        (
            TRACE6,
            "-> endpoint 52 flow 0xd6f0f3a9 identity 13465->6114 state reply ifindex lxc00034 "
            "orig-ip ::1: [fd00::5]:40020 -> [fd00::6]:80 tcp SYN",
        ),
        (
            SOLICITING,
            "<- endpoint 373 flow 0xd6f0f3a9 identity 13465->0 state new ifindex 0 orig-ip ::: "
            "fd00::5 -> fd00::6 icmpv6 NeighborSolicitation",
        ),
        (
            DENIED6,
            "Policy verdict log: flow 0xd6f0f3a9 local EP ID 373, remote ID 6114, dst port 80, proto 6, "
            "ingress true, action deny, match none, [fd00::5]:40020 -> [fd00::6]:80 tcp SYN",
        ),
    ],
)
def test_monitor_lines(data: bytes, line: str) -> None:
    assert describe(decode(data), lambda index: {11: "lxc00034"}[index]).line == line


def test_sides_of_each_kind() -> None:
    drop, denied, allowed = (describe(decode(data)) for data in (DROP, DENIED, ALLOWED))
    assert (drop.kind, drop.reason, drop.source_endpoint, drop.destination_endpoint) == (
        "drop",
        "Policy denied",
        373,
        52,
    )
    assert (denied.kind, denied.destination_endpoint, denied.source_identity) == ("policy-verdict", 373, 6114)
    assert (allowed.reason, allowed.source_endpoint, allowed.destination_identity) == ("allow", 373, 6114)
    assert drop.details["packet"]["destination_port"] == 80
    assert allowed.details["protocol"] == "TCP"


def test_decoded_kinds() -> None:
    events, refused = decode_many([DROP, TRACE_TO, DENIED, b"", b"\x63" * 40, DROP[:20]])
    assert [type(event) for event in events] == [DropEvent, TraceEvent, VerdictEvent]
    assert refused == 3
    assert events[0].packet == SYN


def test_foreign_version_is_named() -> None:
    with pytest.raises(EventError, match="version 2, expected 1"):
        decode(record(1, 133, bytes(16), SYN, version=2))


@pytest.mark.parametrize(
    ("packet", "summary"),
    [
        (frame(17, struct.pack("!HHHH", 53, 4000, 8, 0)), "10.50.0.5:53 -> 10.50.0.6:4000 udp"),
        (frame(17, b"payload", fragment=185), "10.50.0.5 -> 10.50.0.6 udp fragment"),
        (frame(47, b""), "10.50.0.5 -> 10.50.0.6 protocol 47"),
        (frame(6, b""), "10.50.0.5 -> 10.50.0.6 tcp"),
        (
            ETHERNET
            + b"\x08\x06"
            + bytes.fromhex("0001080006040001")
            + ETHERNET[6:]
            + bytes([10, 50, 0, 5])
            + bytes(6)
            + bytes([169, 254, 1, 1]),
            "0a:58:0a:32:00:05 -> 0a:58:0a:32:00:01 ARP who has 169.254.1.1 from 10.50.0.5",
        ),
        (
            ETHERNET
            + b"\x86\xdd"
            + struct.pack("!IHBB", 6 << 28, 20, 6, 64)
            + bytes(15)
            + b"\1"
            + bytes(15)
            + b"\2"
            + struct.pack("!HHIIBB", 4000, 80, 0, 0, 0x50, 0x12),
            "[::1]:4000 -> [::2]:80 tcp SYN, ACK",
        ),
        (ETHERNET + b"\x88\xcc", "0a:58:0a:32:00:05 -> 0a:58:0a:32:00:01 ethertype 0x88cc"),
    ],
)
def test_packet_summaries(packet: bytes, summary: str) -> None:
    assert dissect(packet).summary == summary


def extension(following: int, *, units: int = 0) -> bytes:
    """Return a header of options, 8 * (`units` + 1) bytes."""
    return bytes([following, units]) + bytes(6 + 8 * units)


def fragment6(following: int, offset: int) -> bytes:
    return struct.pack("!BBHI", following, 0, offset << 3 | 1, 7)


@pytest.mark.parametrize(
    ("packet", "said"),
    [
        (frame6(0, extension(6) + TCP_SYN), "[fd00::5]:40020 -> [fd00::6]:80 tcp SYN"),
        (
            frame6(0, extension(60) + extension(6, units=1) + TCP_SYN),
            "[fd00::5]:40020 -> [fd00::6]:80 tcp SYN",
        ),
        (frame6(43, extension(17, units=2) + TCP_SYN), "[fd00::5]:40020 -> [fd00::6]:80 udp"),
        (frame6(51, bytes([6, 4]) + bytes(22) + TCP_SYN), "[fd00::5]:40020 -> [fd00::6]:80 tcp SYN"),
        (frame6(44, fragment6(6, 0) + TCP_SYN), "[fd00::5]:40020 -> [fd00::6]:80 tcp SYN"),
        (frame6(44, fragment6(6, 3) + TCP_SYN), "fd00::5 -> fd00::6 tcp fragment"),
        (frame6(44, fragment6(60, 3) + TCP_SYN), "fd00::5 -> fd00::6 protocol 60 fragment"),
        # Beyond what was captured, or cut: the header that should be there, without ports.
        (frame6(0, extension(6, units=200) + TCP_SYN)[:128], "fd00::5 -> fd00::6 tcp"),
        (frame6(0, extension(60) + b"\6"), "fd00::5 -> fd00::6 protocol 60"),
        (frame6(0, b""), "fd00::5 -> fd00::6 protocol 0"),
        (frame6(59, b"\0" * 8), "fd00::5 -> fd00::6 protocol 59"),
        (frame6(58, b"\x02\0" + bytes(6)), "fd00::5 -> fd00::6 icmpv6 PacketTooBig"),
        (
            frame6(0, extension(58) + b"\x8f\0" + bytes(6)),
            "fd00::5 -> fd00::6 icmpv6 MulticastListenerReportV2",
        ),
        (frame6(58, b"\x80\0" + bytes(6)), "fd00::5 -> fd00::6 icmpv6 EchoRequest"),
        (frame6(58, b"\xc8\0" + bytes(6)), "fd00::5 -> fd00::6 icmpv6 type 200"),
    ],
)
def test_summaries_of_ipv6(packet: bytes, said: str) -> None:
    assert dissect(packet).summary == said


@given(st.sampled_from([0, 43, 44, 51, 60]), st.binary(max_size=80))
def test_any_extension_headers_have_a_summary(first: int, data: bytes) -> None:
    assert dissect(frame6(first, data)).summary.startswith(("fd00::5 -> ", "[fd00::5]:"))


@given(st.binary(max_size=200))
def test_any_packet_has_a_summary(data: bytes) -> None:
    assert isinstance(dissect(data).summary, str)


@given(st.sampled_from([0x0800, 0x0806, 0x86DD]), st.binary(max_size=100))
def test_any_broken_header_has_a_summary(ethertype: int, data: bytes) -> None:
    assert isinstance(dissect(ETHERNET + ethertype.to_bytes(2) + data).summary, str)


@given(st.binary(max_size=250))
def test_any_record_is_an_event_or_refused(data: bytes) -> None:
    events, refused = decode_many([data])
    assert len(events) + refused == 1
    for event in events:
        assert describe(event).line


@given(st.sampled_from([1, 4, 5]), st.integers(0, 255), st.binary(min_size=16, max_size=200))
def test_any_body_can_be_described(kind: int, subtype: int, body: bytes) -> None:
    for event in decode_many([record(kind, subtype, body, SYN, room=0)])[0]:
        assert describe(event).line


@given(
    st.one_of(
        st.binary(max_size=250),
        st.builds(
            lambda kind, subtype, body, cut: record(kind, subtype, body, SYN, room=0)[:cut],
            st.sampled_from([1, 4, 5, 9]),
            st.integers(0, 255),
            st.binary(min_size=16, max_size=60),
            st.sampled_from([None, None, 20, 30, 40]),
        ),
    )
)
def test_the_heading_says_what_the_whole_event_does(data: bytes) -> None:
    try:
        event = decode(data)
    except EventError as error:
        with pytest.raises(EventError, match=re.escape(str(error))):
            heading(data)
    else:
        assert heading(data) == (event.kind, *event.endpoints)


@pytest.mark.parametrize("data", [DROP, TRACE_TO, DENIED, ALLOWED, TRACE6, SOLICITING, DENIED6])
def test_the_heading_of_what_programs_write(data: bytes) -> None:
    assert heading(data) == (decode(data).kind, *decode(data).endpoints)


def test_names_of_unknown_numbers() -> None:
    assert reason_name(181) == "Policy denied by denylist"
    assert reason_name(0) == "Success"
    assert reason_name(254) == "Unknown reason 254"
    assert (direction_name(1), direction_name(9)) == ("INGRESS", "9")
