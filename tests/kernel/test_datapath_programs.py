# SPDX-License-Identifier: Apache-2.0
"""What the programs do with single packets of either family: verdicts, counters, conntrack, and what is
rewritten.

Frames go through BPF_PROG_TEST_RUN, so that a redirect is decided but goes nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from datapath.layouts import CT_BITS
from datapath.records import CtKey, IpcacheEntry, LxcEntry
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import (
    EGRESS,
    HOST,
    INGRESS,
    LOOPBACK,
    VM_IDENTITY,
    WORLD,
    Lab,
    identity,
    lab_with_neighbours,
)
from tests.support.families import Net
from tests.support.frames import ACK, SYN

NO_MASQUERADE = 0x0008_0000
FROM_STACK = 1 << CT_BITS.index("from_stack")
BOTH_CLOSING = 0b11

# A frame between addresses of whichever family is tested.
Framed = Callable[[Net], bytes]


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab_with_neighbours() as made:
        yield made


# --- who may speak to whom


def test_nothing_passes_without_policy(host: Lab, net: Net) -> None:
    assert host.send(1, frames.tcp(net.a, net.b, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(133, 2): 1}
    assert host.connections() == {}


def test_a_local_packet_needs_both_sides(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS, identity(2), 80, frames.TCP)
    assert host.send(1, frames.tcp(net.a, net.b, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(133, 1): 1}
    host.allow(2, INGRESS, identity(1), 80, frames.TCP)
    assert host.send(1, frames.tcp(net.a, net.b, 4000, 80)).verdict == ACT_REDIRECT
    assert host.counted(0, 1).packets == 1


def test_a_local_packet_is_addressed_to_the_receiver_and_one_hop_older(host: Lab, net: Net) -> None:
    host.allow_all(1, 2)
    after = host.send(1, frames.tcp(net.a, net.b, 4000, 80)).packet
    assert after[:12].hex(":") == "02:00:00:00:00:c2:02:00:00:00:00:a2"
    assert after[net.hops_at] == 63
    if net.family == 4:
        assert frames.checksum(after[14:34]) == 0


@pytest.mark.parametrize("protocol", [frames.TCP, frames.UDP, frames.SCTP], ids=["tcp", "udp", "sctp"])
def test_each_protocol_is_matched_by_port(host: Lab, net: Net, protocol: int) -> None:
    frame = frames.packet(net.a, net.b, protocol, frames.tcp_segment(4000, 80, SYN))
    only_with(host, frame, 80, protocol)


def test_icmp_is_matched_by_type(host: Lab, net: Net) -> None:
    only_with(host, frames.echo(net.a, net.b, 7), net.echo, net.icmp)


def only_with(host: Lab, frame: bytes, port: int, protocol: int) -> None:
    """Assert that a frame from endpoint 1 to 2 passes with entries for `port`, not with those for another."""
    for each, verdict in ((port + 1, ACT_SHOT), (port, ACT_REDIRECT)):
        host.allow(1, EGRESS, identity(2), each, protocol)
        host.allow(2, INGRESS, identity(1), each, protocol)
        assert host.send(1, frame).verdict == verdict


@pytest.mark.parametrize(
    ("entries", "hit", "verdict"),
    [
        # exact, then port, then identity, then all: the first hit decides, deny or not
        ([(VM_IDENTITY, 80, 6, False), (0, 80, 6, True)], 0, ACT_OK),
        ([(0, 80, 6, False), (VM_IDENTITY, 0, 0, True)], 0, ACT_OK),
        ([(VM_IDENTITY, 0, 0, False), (0, 0, 0, True)], 0, ACT_OK),
        ([(0, 0, 0, False)], 0, ACT_OK),
        ([(VM_IDENTITY, 80, 6, True), (0, 80, 6, False)], 0, ACT_SHOT),
        ([(0, 80, 6, True), (VM_IDENTITY, 0, 0, False)], 0, ACT_SHOT),
    ],
)
def test_the_first_hit_decides_and_is_counted(
    host: Lab, net: Net, entries: list[tuple[int, int, int, bool]], hit: int, verdict: int
) -> None:
    keys = [host.allow(1, EGRESS, *entry[:3], deny=entry[3]) for entry in entries]
    frame = frames.tcp(net.a, net.vm, 4000, 80)
    assert host.send(1, frame).verdict == verdict
    counted = {key: (one.packets, one.bytes) for key, one in host.hits(1).items() if one.packets}
    assert counted == {keys[hit]: (1, len(frame))}
    assert host.dropped() == ({(181, 2): 1} if verdict == ACT_SHOT else {})


def test_an_unknown_address_is_the_world(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS, WORLD)
    assert host.send(1, frames.udp(net.a, net.outside, 4000, 53)).verdict == ACT_OK
    assert host.send(1, frames.udp(net.a, net.vm, 4000, 53)).verdict == ACT_SHOT


def test_the_longest_prefix_says_who_an_address_is(host: Lab, net: Net) -> None:
    host.ipcache.upsert([(net.wide[0], IpcacheEntry(501)), (net.narrow[0], IpcacheEntry(502))])
    host.allow(1, EGRESS, 502)
    assert host.send(1, frames.udp(net.a, net.narrow[1], 4000, 53)).verdict == ACT_OK
    assert host.send(1, frames.udp(net.a, net.wide[1], 4000, 53)).verdict == ACT_SHOT


# --- what never passes


def to_vm(protocol: int, payload: bytes, **ip: int) -> Framed:
    return lambda net: frames.packet(net.a, net.vm, protocol, payload, **ip)


@pytest.mark.parametrize(
    ("framed", "reason"),
    [
        pytest.param(lambda net: frames.tcp(net.b, net.vm, 4000, 80), 132, id="source of another endpoint"),
        pytest.param(lambda net: frames.tcp(net.unspecified, net.vm, 4000, 80), 132, id="no source"),
        pytest.param(lambda net: frames.tcp(net.a, net.loopback, 4000, 80), 151, id="loopback"),
        pytest.param(to_vm(6, bytes(20), version=5), 134, id="version"),
        pytest.param(to_vm(6, bytes(20), total=99), 134, id="length too long"),
        pytest.param(to_vm(6, bytes(13)), 135, id="cut TCP"),
        pytest.param(
            lambda net: frames.packet(net.a, net.vm, 6, bytes(20), total=net.counted + 13),
            135,
            id="TCP in the padding",
        ),
        pytest.param(to_vm(17, bytes(7)), 135, id="cut UDP"),
        pytest.param(to_vm(132, bytes(7)), 135, id="cut SCTP"),
        pytest.param(lambda net: frames.packet(net.a, net.vm, net.icmp, bytes(7)), 135, id="cut ICMP"),
        pytest.param(to_vm(6, b""), 135, id="nothing"),
        pytest.param(to_vm(47, bytes(20)), 137, id="GRE"),
    ],
)
def test_what_is_wrong_is_dropped_by_its_reason(host: Lab, net: Net, framed: Framed, reason: int) -> None:
    host.allow_all(1)
    assert host.send(1, framed(net)).verdict == ACT_SHOT
    assert host.dropped() == {(reason, 2): 1}
    assert host.connections() == {}


def test_a_packet_cut_anywhere_is_dropped(host: Lab, net: Net) -> None:
    """The length in its header says more than there is."""
    host.allow_all(1)
    frame = frames.tcp(net.a, net.vm, 4000, 80)
    for length in range(14 + net.header, len(frame)):
        assert host.send(1, frame[:length]).verdict == ACT_SHOT, length
    assert host.dropped() == {(134, 2): 20}


# --- the host, and the way to it


def test_the_hosts_own_address_is_reached_through_the_stack(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS, HOST)
    assert host.send(1, frames.tcp(net.a, net.node, 4000, 22)).verdict == ACT_OK
    assert host.counted(0, 2).packets == 1


def test_a_packet_at_the_end_of_its_life_goes_to_the_stack(host: Lab, net: Net) -> None:
    host.allow_all(1, 2)
    outcome = host.send(1, frames.tcp(net.a, net.b, 4000, 80, ttl=1))
    assert outcome.verdict == ACT_OK
    assert outcome.packet[net.hops_at] == 1


def test_a_receiver_without_a_program_is_no_hole(host: Lab, net: Net) -> None:
    host.allow_all(1)
    host.lxc.upsert([(net.endpoint(9), LxcEntry(LOOPBACK, 9, 0, "02:00:00:00:00:09", "02:00:00:00:00:0a"))])
    assert host.send(1, frames.tcp(net.a, net.endpoint(9), 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(140, 2): 1}


def test_the_host_needs_permission_too(host: Lab, net: Net) -> None:
    assert host.deliver(1, frames.tcp(net.node, net.a, 4000, 80)).verdict == ACT_SHOT
    host.allow(1, INGRESS, HOST, 80, frames.TCP)
    assert host.deliver(1, frames.tcp(net.node, net.a, 4000, 80)).verdict == ACT_OK


def test_what_came_through_the_stack_is_answered_there(host: Lab, net: Net) -> None:
    """As a published port: endpoint 2 asked the host, which translated to endpoint 1."""
    host.allow(1, INGRESS, identity(2))
    assert host.deliver(1, frames.tcp(net.b, net.a, 4000, 80), arrived_by=LOOPBACK).verdict == ACT_OK
    assert host.connections()[CtKey(net.b, net.a, 4000, 80, frames.TCP, 1)].bits & FROM_STACK
    answer = host.send(1, frames.tcp(net.a, net.b, 80, 4000, SYN | ACK))
    assert answer.verdict == ACT_OK  # not redirected to endpoint 2, though it is local
    assert answer.mark & NO_MASQUERADE


def test_an_error_about_what_came_through_the_stack_goes_back_there(host: Lab, net: Net) -> None:
    host.allow(1, INGRESS, identity(2))
    request = frames.udp(net.b, net.a, 4000, 80)
    host.deliver(1, request, arrived_by=LOOPBACK)
    assert host.send(1, frames.icmp_error(net.a, net.b, request)).verdict == ACT_OK


@pytest.mark.parametrize("arrived_by", [0, LOOPBACK + 1], ids=["the host itself", "another device"])
def test_nobody_else_speaks_with_an_endpoints_address(host: Lab, net: Net, arrived_by: int) -> None:
    """A container on a bridge that nobody watches, or a machine on a wire, may write any source address."""
    host.allow(1, INGRESS, identity(2))
    assert host.deliver(1, frames.tcp(net.b, net.a, 4000, 80), arrived_by=arrived_by).verdict == ACT_SHOT
    assert host.dropped() == {(132, 1): 1}
    assert host.connections() == {}


def test_only_replies_are_marked_against_masquerading(host: Lab, net: Net) -> None:
    host.allow_all(1)
    assert host.send(1, frames.udp(net.a, net.outside, 4000, 53)).mark == 0
    assert host.receive(frames.udp(net.vm, net.a, 4000, 53)).verdict == ACT_REDIRECT
    assert host.send(1, frames.udp(net.a, net.vm, 53, 4000)).mark == NO_MASQUERADE


# --- the host's device


def test_a_vm_is_known_by_its_address(host: Lab, net: Net) -> None:
    host.allow(1, INGRESS, VM_IDENTITY, 80, frames.TCP)
    outcome = host.receive(frames.tcp(net.vm, net.a, 4000, 80))
    assert outcome.verdict == ACT_REDIRECT
    assert outcome.packet[:6].hex(":") == "02:00:00:00:00:c1"
    assert host.receive(frames.tcp(net.outside, net.a, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(133, 1): 1}


def test_nobody_outside_is_the_host(host: Lab, net: Net) -> None:
    host.allow(1, INGRESS, HOST)
    assert host.receive(frames.tcp(net.node, net.a, 4000, 80)).verdict == ACT_SHOT
    host.allow(1, INGRESS, WORLD)
    assert host.receive(frames.tcp(net.node, net.a, 4001, 80)).verdict == ACT_REDIRECT


def test_nobody_outside_is_a_local_endpoint(host: Lab, net: Net) -> None:
    host.allow_all(1)
    assert host.receive(frames.tcp(net.b, net.a, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(132, 1): 1}


def to_node(protocol: int, payload: bytes, **ip: int) -> Framed:
    return lambda net: frames.packet(net.outside, net.node, protocol, payload, **ip)


@pytest.mark.parametrize(
    "framed",
    [
        pytest.param(lambda net: frames.tcp(net.outside, net.node, 4000, 22), id="ssh"),
        pytest.param(lambda net: frames.tcp(net.outside, net.beyond, 4000, 22), id="forwarded"),
        pytest.param(lambda net: frames.tcp(net.b, net.node, 4000, 22), id="endpoint's address to the host"),
        pytest.param(to_node(47, bytes(20)), id="GRE"),
        pytest.param(to_node(6, bytes(3)), id="cut TCP"),
        pytest.param(to_node(6, bytes(20), version=7), id="nonsense"),
    ],
)
def test_what_is_not_for_an_endpoint_is_left_alone(host: Lab, net: Net, framed: Framed) -> None:
    frame = framed(net)
    outcome = host.receive(frame)
    assert (outcome.verdict, outcome.packet, outcome.mark) == (ACT_OK, frame, 0)
    assert host.dropped() == {}


def test_a_full_conntrack_map_makes_room(host: Lab, net: Net) -> None:
    host.allow_all(1)
    for port in range(6000):
        assert host.send(1, frames.udp(net.a, net.vm, 10_000 + port, 53)).verdict == ACT_OK
    assert 0 < len(host.connections()) <= 4096
