# SPDX-License-Identifier: Apache-2.0
"""Events: which packets cause one, what it says, and that the ring hands over each once, in order."""

from __future__ import annotations

import asyncio
import select

import pytest

from datapath.constants import Aggregation, DatapathOptions
from datapath.events import DropEvent, TraceEvent, VerdictEvent
from datapath.ring import EventRing
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, LOOPBACK, WORLD, Lab, address, identity, lab
from tests.support.families import NETS, Net
from tests.support.frames import ACK, FIN, SYN
from tests.support.require import require_root

A, B, OUTSIDE = address(1), address(2), "192.0.2.7"
TO_ENDPOINT, TO_STACK, FROM_ENDPOINT, FROM_NETWORK = 0, 3, 5, 10
NEW, ESTABLISHED, REPLY = 0, 1, 2


def listened(host: Lab) -> Lab:
    host.monitor.set(1)
    return host


def test_nothing_is_emitted_while_nobody_listens() -> None:
    with lab(1) as host:
        host.send(1, frames.tcp(A, OUTSIDE, 4000, 80))
        assert host.events() == []


def test_a_denied_packet_tells_verdict_and_drop() -> None:
    with lab(1) as host:
        listened(host)
        frame = frames.tcp(A, OUTSIDE, 4000, 80)
        host.send(1, frame)
        verdict, drop = host.events()
        assert isinstance(verdict, VerdictEvent)
        assert (verdict.remote_identity, verdict.verdict, verdict.port) == (WORLD, -133, 80)
        assert (verdict.protocol, verdict.direction, verdict.match) == (frames.TCP, 2, 0)
        assert isinstance(drop, DropEvent)
        assert (drop.reason, drop.source_identity, drop.destination_identity) == (133, identity(1), WORLD)
        assert (drop.header.endpoint, drop.header.length, drop.packet) == (1, len(frame), frame)


def test_a_new_connection_tells_its_verdict_at_both_ends_and_where_it_went() -> None:
    with lab(1, 2) as host:
        listened(host)
        host.allow(1, EGRESS, identity(2), 80, frames.TCP)
        host.allow(2, INGRESS)
        host.send(1, frames.tcp(A, B, 4000, 80))
        out, inside, trace = host.events()
        assert isinstance(out, VerdictEvent)
        assert isinstance(inside, VerdictEvent)
        assert (out.verdict, out.direction, out.match, out.header.endpoint) == (0, 2, 2, 1)
        assert (inside.verdict, inside.direction, inside.match, inside.header.endpoint) == (0, 1, 4, 2)
        assert isinstance(trace, TraceEvent)
        assert (trace.point, trace.state, trace.ifindex) == (TO_ENDPOINT, NEW, LOOPBACK)
        assert (trace.source_identity, trace.destination_identity) == (identity(1), identity(2))
        assert trace.destination_endpoint == 2


def test_of_a_connection_only_what_is_new_is_told() -> None:
    with lab(1) as host:
        listened(host)
        host.allow(1, EGRESS)
        told = []
        for flags in (SYN, ACK, ACK, FIN | ACK, FIN | ACK, ACK):
            host.send(1, frames.tcp(A, OUTSIDE, 4000, 80, flags))
            told.append([event.state for event in host.events() if isinstance(event, TraceEvent)])
        assert told == [[NEW], [], [], [ESTABLISHED], [], []]


def test_without_aggregation_every_packet_is_told_at_every_point() -> None:
    with lab(1, aggregation=Aggregation.NONE) as host:
        listened(host)
        host.allow(1, EGRESS)
        for _ in range(3):
            host.send(1, frames.udp(A, OUTSIDE, 4000, 53))
            points = [event.point for event in host.events() if isinstance(event, TraceEvent)]
            assert points == [FROM_ENDPOINT, TO_STACK]
        host.deliver(1, frames.udp(OUTSIDE, A, 53, 4000))
        assert [(e.point, e.state) for e in host.events() if isinstance(e, TraceEvent)] == [
            (TO_ENDPOINT, REPLY)
        ]
        host.receive(frames.udp(OUTSIDE, A, 53, 4000))
        points = [event.point for event in host.events() if isinstance(event, TraceEvent)]
        assert points == [FROM_NETWORK, TO_ENDPOINT]


def reported_long_ago(host: Lab) -> None:
    """Let the interval of every connection be over."""
    for key, entry in host.connections().items():
        host.ct_of(key).upsert([(key, entry._replace(last_tx_report=0, last_rx_report=0))])


# Level → where the packets of a connection are told of: SYN, its answer, two of data, one after the interval,
# FIN, one more.
ARRIVED, WENT = FROM_ENDPOINT, TO_ENDPOINT
LEVELS = {
    Aggregation.NONE: [[ARRIVED, WENT]] * 7,
    Aggregation.LOW: [[WENT]] * 7,
    Aggregation.MEDIUM: [[WENT], [WENT], [], [], [WENT], [WENT], []],
    Aggregation.MAXIMUM: [[WENT], [WENT], [], [], [], [WENT], []],
}


@pytest.mark.parametrize("net", NETS, ids=[str(net.family) for net in NETS])
@pytest.mark.parametrize("level", Aggregation)
def test_each_level_tells_less_of_a_connection(level: Aggregation, net: Net) -> None:
    told = []
    with lab(1, 2, aggregation=level) as host:
        listened(host)
        host.allow_all(1, 2)
        for number, flags in enumerate((SYN, SYN | ACK, ACK, ACK, ACK, FIN | ACK, ACK)):
            if number == 4:
                reported_long_ago(host)
            if flags == SYN | ACK:
                host.send(2, frames.tcp(net.b, net.a, 80, 4000, flags))
            else:
                host.send(1, frames.tcp(net.a, net.b, 4000, 80, flags))
            told.append([event.point for event in host.events() if isinstance(event, TraceEvent)])
    assert told == LEVELS[level]


@pytest.mark.parametrize("level", Aggregation)
def test_a_flow_without_flags_is_told_once_at_most_levels(level: Aggregation) -> None:
    """What the host's stack and the wire bring is told of where it goes."""
    with lab(1, aggregation=level) as host:
        listened(host)
        host.allow_all(1)
        told = []
        for _ in range(2):
            host.receive(frames.udp(OUTSIDE, A, 4000, 53))
            told.append([event.point for event in host.events() if isinstance(event, TraceEvent)])
        reported_long_ago(host)
        host.receive(frames.udp(OUTSIDE, A, 4000, 53))
        told.append([event.point for event in host.events() if isinstance(event, TraceEvent)])
    assert (
        told
        == {
            Aggregation.NONE: [[FROM_NETWORK, TO_ENDPOINT]] * 3,
            Aggregation.LOW: [[TO_ENDPOINT]] * 3,
            Aggregation.MEDIUM: [[TO_ENDPOINT], [], [TO_ENDPOINT]],
            Aggregation.MAXIMUM: [[TO_ENDPOINT], [], []],
        }[level]
    )


@pytest.mark.parametrize("length", [0, 1, 20, 128])
def test_an_event_carries_as_much_of_the_packet_as_is_wanted(length: int) -> None:
    with lab(1, options=DatapathOptions(payload_length=length)) as host:
        listened(host)
        frame = frames.udp(A, OUTSIDE, 4000, 53, bytes(200))
        host.send(1, frame)
        assert [event.packet for event in host.events()] == [frame[:length]] * 2


def test_what_finds_the_ring_full_is_counted() -> None:
    with lab(1) as host:
        listened(host)
        frame = frames.udp(A, OUTSIDE, 4000, 53)
        for _ in range(1000):
            host.send(1, frame)
        told = len(host.events())
        assert 0 < told < 2000
        assert told + host.lost.total() == 2000
        host.send(1, frame)
        assert len(host.events()) == 2


def test_batches_keep_the_order_over_the_end_of_the_ring() -> None:
    with lab(1) as host:
        listened(host)
        ports = []
        for port in range(1, 1200):
            host.send(1, frames.udp(A, OUTSIDE, 4000, port))
            if port % 50 == 0:
                while batch := host.ring.read(limit=7):
                    ports += [int.from_bytes(record[32 + 36 : 32 + 38], "big") for record in batch]
        assert ports[::2] == ports[1::2] == list(range(1, 1151))
        assert host.lost.total() == 0


async def test_the_ring_wakes_the_loop() -> None:
    with lab(1) as host:
        listened(host)
        woken = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(host.ring.fd, woken.set)
        try:
            host.send(1, frames.udp(A, OUTSIDE, 4000, 53))
            await asyncio.wait_for(woken.wait(), 5)
        finally:
            loop.remove_reader(host.ring.fd)
        assert len(host.events()) == 2


def test_an_empty_ring_is_not_readable() -> None:
    require_root()
    with EventRing.create(4096) as ring:
        poll = select.poll()
        poll.register(ring.fd, select.POLLIN)
        assert poll.poll(0) == []
        assert ring.read() == []
