# SPDX-License-Identifier: Apache-2.0
"""Malformed packets by the hundred, against a slow and obvious model of what the programs check.

The model knows no conntrack and no policy: endpoint 1 may do everything, so a frame passes if it is a
packet at all, and is dropped for the first thing that is wrong with it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, Lab, address, lab

A, B, OUTSIDE, NODE = address(1), address(2), "192.0.2.7", "10.8.0.1"
HEAD = 34  # a test run takes no IPv4 frame without a whole header
NEEDED = {frames.TCP: 14, frames.UDP: 8, frames.SCTP: 8, frames.ICMP: 8}
EXAMPLES = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def host() -> Iterator[Lab]:
    with lab(1, 2) as made:
        for number in (1, 2):
            made.allow(number, EGRESS)
            made.allow(number, INGRESS)
        yield made


protocols = st.sampled_from([*NEEDED, 47, 50, 0, 255])
packets = st.builds(
    frames.ipv4,
    st.sampled_from([A, A, A, B, "0.0.0.0"]),
    st.sampled_from([B, OUTSIDE, "127.0.0.1", "255.255.255.255", "224.0.0.1"]),
    protocols,
    st.binary(max_size=80),
    ttl=st.integers(0, 255),
    options=st.integers(0, 10).map(lambda words: b"\x01" * 4 * words),
    fragment=st.sampled_from([0, 0, 0, 0x2000, 0x2001, 1, 0x1FFF, 0x4000, 0x8000]),
    ident=st.integers(0, 0xFFFF),
    version=st.sampled_from([4, 4, 4, 4, 4, 0, 6, 15]),
    header_words=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 15)),
    total=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 0xFFFF)),
)


def model(frame: bytes) -> int:
    """Return why the frame is dropped, or 0."""
    packet = frame[14:]
    words, total = packet[0] & 0xF, int.from_bytes(packet[2:4], "big")
    header = words * 4
    if packet[0] >> 4 != 4 or header < 20 or total < header or total > len(packet):
        return 134
    if packet[12:16] != bytes([10, 0, 0, 1]):
        return 132
    if packet[16] == 127:
        return 151
    protocol, fragment = packet[9], int.from_bytes(packet[6:8], "big")
    if fragment & 0x1FFF:
        return 175
    if protocol not in NEEDED:
        return 137
    return 135 if total < header + NEEDED[protocol] else 0


def drops(host: Lab) -> dict[tuple[int, int], int]:
    return {key: count for key, count in host.dropped().items() if count}


@EXAMPLES
@given(packet=packets, cut=st.integers(0, 200))
def test_a_frame_is_dropped_for_what_is_wrong_with_it(host: Lab, packet: bytes, cut: int) -> None:
    frame = frames.ethernet(packet)
    frame = frame[: max(HEAD, len(frame) - cut if cut < 40 else len(frame))]
    before = drops(host)
    outcome = host.send(1, frame)
    after = drops(host)
    changed = {
        reason for reason, direction in after if after[reason, direction] != before.get((reason, direction))
    }
    reason = model(frame)
    if reason == 175 and not changed:
        return  # an earlier example was the first fragment of this one
    assert changed == ({reason} if reason else set())
    assert (outcome.verdict == ACT_SHOT) == bool(reason)
    if outcome.verdict == ACT_OK:
        assert outcome.packet == frame


@EXAMPLES
@given(data=st.binary(min_size=HEAD - 12, max_size=300))
def test_noise_never_passes(host: Lab, data: bytes) -> None:
    frame = bytes(12) + data
    if frame[12:14] == b"\x08\x00" and frame[26:30] == bytes([10, 0, 0, 1]):
        return  # noise that is a packet of the endpoint
    assert host.send(1, frame).verdict == ACT_SHOT


@EXAMPLES
@given(packet=packets, flips=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 255)), max_size=4))
def test_the_hosts_own_traffic_is_never_touched(
    host: Lab, packet: bytes, flips: list[tuple[int, int]]
) -> None:
    body = bytearray(packet)
    for position, value in flips:
        if position < len(body):
            body[position] = value
    body[16:20] = bytes([10, 8, 0, 1])  # whatever it is, it is for the host
    frame = frames.ethernet(bytes(body))
    before = drops(host)
    outcome = host.receive(frame)
    assert (outcome.verdict, outcome.packet, outcome.mark) == (ACT_OK, frame, 0)
    assert drops(host) == before


@EXAMPLES
@given(packet=packets)
def test_from_outside_only_packets_arrive(host: Lab, packet: bytes) -> None:
    frame = frames.ethernet(packet)
    outcome = host.receive(frame)
    if outcome.verdict == ACT_REDIRECT:
        assert frame[14] >> 4 == 4
        assert frame[30:34] == bytes([10, 0, 0, 2])
        assert frame[26:30] not in (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
        assert outcome.packet[22] == frame[22] - 1


@EXAMPLES
@given(about=packets, kind=st.sampled_from([3, 11, 12]), cut=st.integers(0, 28))
def test_errors_about_anything_are_survived(host: Lab, about: bytes, kind: int, cut: int) -> None:
    message = frames.icmp_message(kind, data=about[: 28 - cut])
    frame = frames.ethernet(frames.ipv4(OUTSIDE, A, frames.ICMP, message))
    assert host.deliver(1, frame).verdict == ACT_OK  # the endpoint may receive everything
    assert not [key for key in host.connections() if key.protocol == frames.ICMP and key.source == OUTSIDE]
