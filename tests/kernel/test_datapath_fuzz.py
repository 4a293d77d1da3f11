# SPDX-License-Identifier: Apache-2.0
"""Malformed packets by the thousand, against a slow and obvious model of what the programs check.

The model (tests/support/packet_model.py) knows no conntrack and no policy: endpoint 1 may do everything, so
a frame passes if it is a packet at all, and is dropped for the first thing that is wrong with it otherwise.
Each test takes 300 frames of each family, with options, extension headers, fragments, flipped bytes and cut
ends: 3 300 in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import Lab, lab
from tests.support.families import NET4, NET6, Net
from tests.support.packet_model import L4_NEEDED, why_dropped

EXAMPLES = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def host() -> Iterator[Lab]:
    with lab(1, 2) as made:
        made.allow_all(1, 2)
        yield made


T = TypeVar("T")


def mostly(usual: T, strategy: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """The usual value nine times of ten: packets with much wrong are all dropped for the same reason."""
    return st.integers(0, 9).flatmap(lambda which: strategy if which == 9 else st.just(usual))


def mostly_one(*values: T) -> st.SearchStrategy[T]:
    return mostly(values[0], st.sampled_from(values))


protocols = st.one_of(st.sampled_from([*L4_NEEDED]), st.sampled_from([47, 50, 0, 255]))
packets4 = st.builds(
    frames.ipv4,
    mostly_one(NET4.a, NET4.b, NET4.unspecified),
    mostly_one(NET4.outside, NET4.b, NET4.loopback, "255.255.255.255", "224.0.0.1"),
    protocols,
    st.binary(max_size=80),
    ttl=st.integers(0, 255),
    options=st.integers(0, 10).map(lambda words: b"\x01" * 4 * words),
    fragment=st.sampled_from([0, 0, 0, 0x2000, 0x2001, 1, 0x1FFF, 0x4000, 0x8000]),
    ident=st.integers(0, 0xFFFF),
    version=mostly_one(4, 0, 6, 15),
    header_words=mostly(None, st.integers(0, 15)),
    total=mostly(None, st.integers(0, 0xFFFF)),
)
headers = st.one_of(
    st.builds(frames.padding, st.sampled_from([frames.HOP_BY_HOP, frames.DESTINATION]), st.integers(0, 6)),
    st.builds(frames.authentication, st.integers(0, 20)),
    st.builds(frames.fragment_header, st.sampled_from([0, 0, 1, 0x1FFF]), st.booleans(), st.integers(0, 99)),
    st.builds(frames.padding, st.just(frames.DESTINATION)),
    st.builds(frames.routing),
    st.builds(  # anything that calls itself a header
        frames.Extension,
        st.sampled_from([frames.HOP_BY_HOP, frames.DESTINATION, frames.AUTH, frames.FRAGMENT, 135]),
        st.binary(min_size=7, max_size=23),
    ),
)
packets6 = st.builds(
    frames.ipv6,
    mostly_one(NET6.a, NET6.b, NET6.unspecified),
    mostly_one(NET6.outside, NET6.b, NET6.loopback, "ff02::1", "fe80::1", "::ffff:10.0.0.2"),
    st.one_of(protocols, st.just(frames.DESTINATION)),
    st.binary(max_size=80),
    ttl=st.integers(0, 255),
    extensions=st.one_of(st.just([]), st.lists(headers, max_size=6)),
    version=mostly_one(6, 0, 4, 15),
    total=mostly(None, st.one_of(st.integers(0, 60), st.integers(0, 0xFFFF))),
)
PACKETS = {4: packets4, 6: packets6}
ETHERTYPES = {4: frames.ETH_IPV4, 6: frames.ETH_IPV6}
flips = mostly([], st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=4))


def framed(net: Net, packet: bytes) -> bytes:
    return frames.ethernet(packet, ETHERTYPES[net.family])


def shortest(net: Net) -> int:
    """Bytes of a frame; a test run takes none without a whole header."""
    return 14 + net.header


def ends(net: Net, frame: bytes) -> tuple[bytes, bytes]:
    """Source and destination as they stand in a frame."""
    size = 4 if net.family == 4 else 16
    at = shortest(net) - 2 * size
    return frame[at : at + size], frame[at + size : at + 2 * size]


def flipped(packet: bytes, changes: list[tuple[int, int]]) -> bytes:
    body = bytearray(packet)
    for position, value in changes:
        if position < len(body):
            body[position] = value
    return bytes(body)


def drops(host: Lab) -> dict[tuple[int, int], int]:
    return {key: count for key, count in host.dropped().items() if count}


@EXAMPLES
@given(data=st.data(), changes=flips, cut=mostly(0, st.integers(0, 40)))
def test_a_frame_is_dropped_for_what_is_wrong_with_it(
    host: Lab, net: Net, data: st.DataObject, changes: list[tuple[int, int]], cut: int
) -> None:
    frame = framed(net, flipped(data.draw(PACKETS[net.family]), changes))
    frame = frame[: max(shortest(net), len(frame) - cut)]
    before = drops(host)
    outcome = host.send(1, frame)
    after = drops(host)
    changed = {
        reason for reason, direction in after if after[reason, direction] != before.get((reason, direction))
    }
    reason = why_dropped(frame)
    if reason == 175 and not changed:
        return  # an earlier example was the first fragment of this one
    assert changed == ({reason} if reason > 0 else set())
    assert (outcome.verdict == ACT_SHOT) == bool(reason)
    assert outcome.verdict in (ACT_SHOT, ACT_OK, ACT_REDIRECT)
    if outcome.verdict == ACT_OK:
        assert outcome.packet == frame


@EXAMPLES
@given(noise=st.binary(min_size=42, max_size=300), typed=st.booleans())
def test_noise_never_passes(host: Lab, net: Net, noise: bytes, typed: bool) -> None:
    frame = framed(net, noise) if typed else bytes(12) + noise
    if ends(net, frame)[0] == ip_address(net.a).packed:
        return  # noise that is a packet of the endpoint
    assert host.send(1, frame).verdict == ACT_SHOT


@EXAMPLES
@given(data=st.data(), changes=flips)
def test_the_hosts_own_traffic_is_never_touched(
    host: Lab, net: Net, data: st.DataObject, changes: list[tuple[int, int]]
) -> None:
    body = flipped(data.draw(PACKETS[net.family]), changes)
    node = ip_address(net.node).packed
    frame = framed(net, body[: net.header - len(node)] + node + body[net.header :])  # whatever it is
    before = drops(host)
    outcome = host.receive(frame)
    assert (outcome.verdict, outcome.packet, outcome.mark) == (ACT_OK, frame, 0)
    assert drops(host) == before


@EXAMPLES
@given(data=st.data(), changes=flips)
def test_from_outside_only_packets_arrive(
    host: Lab, net: Net, data: st.DataObject, changes: list[tuple[int, int]]
) -> None:
    body = flipped(data.draw(PACKETS[net.family]), changes)
    outside = ip_address(net.outside).packed
    at = net.header - 2 * len(outside)
    frame = framed(net, body[:at] + outside + body[at + len(outside) :])
    outcome = host.receive(frame)
    assert outcome.verdict in (ACT_SHOT, ACT_OK, ACT_REDIRECT)
    if outcome.verdict == ACT_REDIRECT:
        assert frame[14] >> 4 == net.family
        assert ends(net, frame)[1] in (ip_address(net.a).packed, ip_address(net.b).packed)
        assert outcome.packet[net.hops_at] == frame[net.hops_at] - 1


@EXAMPLES
@given(data=st.data(), changes=flips, kept=st.integers(0, 120))
def test_errors_about_anything_are_survived(
    host: Lab, net: Net, data: st.DataObject, changes: list[tuple[int, int]], kept: int
) -> None:
    about = flipped(data.draw(PACKETS[net.family]), changes)[:kept]
    message = frames.icmp_message(data.draw(st.sampled_from(net.errors)), data=about)
    frame = frames.packet(net.router, net.a, net.icmp, message)
    assert host.deliver(1, frame).verdict == ACT_OK  # the endpoint may receive everything
    assert not [key for key in host.connections() if key.protocol == net.icmp and key.source == net.router]


@EXAMPLES
@given(changes=st.lists(st.tuples(st.integers(0, 85), st.integers(0, 255)), min_size=1, max_size=3))
def test_only_the_gateways_neighbours_are_answered(host: Lab, changes: list[tuple[int, int]]) -> None:
    """A solicitation with some bytes changed: answered if those are none that RFC 4861, 7.1.1, looks at."""
    asked = frames.solicitation("fe80::1")
    frame = asked[:14] + flipped(asked[14:], changes)
    outcome = host.send(1, frame)
    if asked_rightly(frame[14:], asked[14:]):
        assert outcome.verdict == ACT_REDIRECT
        sender = str(ip_address(frame[22:38]))
        assert frames.checksum6("fe80::1", sender, frames.ICMPV6, outcome.packet[54:]) == 0
    else:
        assert outcome.verdict in (ACT_SHOT, ACT_OK)
        assert outcome.packet == frame


def asked_rightly(packet: bytes, model: bytes) -> bool:
    # class and flow, addresses, checksum, reserved, the sender's MAC address
    free = {1, 2, 3, *range(8, 40), *range(42, 48), *range(66, 72)}
    fixed = set(range(1, len(model))) - free
    return packet[0] >> 4 == 6 and all(packet[at] == model[at] for at in fixed)
