# SPDX-License-Identifier: Apache-2.0
"""What only IPv4 has: options, header lengths, ARP; and what is neither family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import EGRESS, VM_IDENTITY, Lab, lab_with_neighbours
from tests.support.families import NET4
from tests.support.frames import SYN

A, VM, NODE, OUTSIDE = NET4.a, NET4.vm, NET4.node, NET4.outside
GATEWAY = "169.254.1.1"


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab_with_neighbours() as made:
        yield made


def test_options_move_the_ports(host: Lab) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 80, frames.TCP)
    segment = frames.tcp_segment(4000, 80, SYN)
    for words in range(11):
        frame = frames.packet(A, VM, frames.TCP, segment, options=b"\x01" * 4 * words)
        assert host.send(1, frame).verdict == ACT_OK, words
    assert len(host.connections()) == 1


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        pytest.param(frames.tcp(A, "127.9.9.9", 4000, 80), 151, id="loopback network"),
        pytest.param(frames.packet(A, VM, 6, bytes(20), header_words=4), 134, id="short header"),
        pytest.param(frames.packet(A, VM, 6, b"", header_words=15), 134, id="header too long"),
        pytest.param(frames.packet(A, VM, 6, bytes(20), total=19), 134, id="total too short"),
        pytest.param(frames.packet(A, VM, 58, bytes(20)), 137, id="ICMP of IPv6"),
        pytest.param(frames.ethernet(bytes(40), 0x88CC), 139, id="LLDP"),
        pytest.param(frames.arp_request(NET4.b), 166, id="ARP for a neighbour"),
        pytest.param(frames.arp_request(GATEWAY, operation=2), 166, id="ARP answer"),
        pytest.param(frames.arp_request(GATEWAY)[:30], 166, id="cut ARP"),
    ],
)
def test_what_is_wrong_is_dropped_by_its_reason(host: Lab, frame: bytes, reason: int) -> None:
    host.allow_all(1)
    assert host.send(1, frame).verdict == ACT_SHOT
    assert host.dropped() == {(reason, 2): 1}
    assert host.connections() == {}


def test_the_gateway_answers_arp(host: Lab) -> None:
    outcome = host.send(1, frames.arp_request(GATEWAY, sender=A))
    assert outcome.verdict == ACT_REDIRECT
    frame = outcome.packet
    assert frame[:12].hex(":") == "02:00:00:00:00:01:02:00:00:00:00:a1"
    assert frame[20:22] == b"\0\2"
    assert frame[22:28].hex(":") == "02:00:00:00:00:a1"
    assert frame[28:32] == bytes([169, 254, 1, 1])
    assert frame[38:42] == bytes([10, 0, 0, 1])


def test_the_hosts_own_arp_reaches_an_endpoint(host: Lab) -> None:
    assert host.deliver(1, frames.arp_request(A)).verdict == ACT_OK


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(frames.arp_request(NODE), id="ARP"),
        pytest.param(frames.packet(OUTSIDE, NODE, 6, b"", header_words=15), id="header too long"),
        pytest.param(frames.ethernet(bytes(40), 0x88CC), id="LLDP"),
    ],
)
def test_what_is_not_for_an_endpoint_is_left_alone(host: Lab, frame: bytes) -> None:
    outcome = host.receive(frame)
    assert (outcome.verdict, outcome.packet, outcome.mark) == (ACT_OK, frame, 0)
    assert host.dropped() == {}
