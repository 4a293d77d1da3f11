# SPDX-License-Identifier: Apache-2.0
"""Random packets in random order, against a slow and obvious model of what connections are.

The model (tests/support/conntrack_reference.py) and the programs meet the same packets of one flow: in both
directions, with any TCP flags, and ICMP errors about them; meanwhile policy changes, time passes and what is
over is collected.  After each packet its verdict, whether it counts as an answer, and all connections agree.
For each family 250 sequences of up to 40 steps: some 15 000 packets in all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from datapath import ctgc
from datapath.constants import DatapathOptions
from datapath.layouts import CT_BITS
from datapath.records import CtFlags, CtKey
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT, Outcome
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, WORLD, Lab, identity, lab
from tests.support.conntrack_reference import (
    Connection,
    Direction,
    Endpoint,
    Flow,
    Host,
    Packet,
    State,
    Timeouts,
)
from tests.support.families import Net
from tests.support.frames import ACK, FIN, RST, SYN, TCP

TIMESTAMP, NODE_QUERY = 13, 139  # ICMP and ICMPv6 that are neither echo nor errors
NO_MASQUERADE = 0x0008_0000
# A life of n ticks ends in the middle of one: the seconds that a test takes decide nothing.
TICK_S = 1_000
TIMEOUTS = Timeouts(regular_tcp=20, regular_tcp_syn=2, regular_tcp_fin=1, regular_any=3)
OPTIONS = DatapathOptions(
    timeout_tcp=TIMEOUTS.regular_tcp * TICK_S + TICK_S // 2,
    timeout_tcp_syn=TIMEOUTS.regular_tcp_syn * TICK_S + TICK_S // 2,
    timeout_tcp_fin=TIMEOUTS.regular_tcp_fin * TICK_S + TICK_S // 2,
    timeout_any=TIMEOUTS.regular_any * TICK_S + TICK_S // 2,
)
POLICY_DIRECTION = {Direction.IN: INGRESS, Direction.OUT: EGRESS}
LOCAL = (1, 2)


class Policy(NamedTuple):
    """An endpoint's policy in one direction from now on: everything is allowed, denied, or not spoken of."""

    endpoint: int
    direction: Direction
    says: str


class Wait(NamedTuple):
    ticks: int


class Collect(NamedTuple):
    """What is over is cleared away."""


Step = Packet | Policy | Wait | Collect


# --- what may happen


def flows_of(net: Net) -> list[Flow]:
    """Flows between everybody: of each protocol, with the higher port on either side, on both, on none."""
    kinds = [(TCP, 2000, 80), (TCP, 80, 2000), (TCP, 80, 80), (frames.UDP, 2000, 53), (frames.UDP, 53, 2000)]
    kinds += [(frames.SCTP, 2000, 80), (net.icmp, 7, 0), (net.icmp, 0, 0)]
    pairs = permutations((net.a, net.b, net.outside), 2)
    return [Flow(protocol, a, x, b, y) for (a, b), (protocol, x, y) in product(pairs, kinds)]


def packets_of(net: Net, flow: Flow) -> list[Packet]:
    """All packets of one direction; those from outside come by the host's device or by its stack."""
    packets = [Packet(flow)]
    if flow.protocol == TCP:
        packets = [Packet(flow, flags=each) for each in (SYN, SYN | ACK, ACK, FIN | ACK, RST)]
    if flow.protocol == net.icmp:
        packets = [Packet(flow, icmp_type=each) for each in messages_of(net, flow)]
    if flow.source == net.outside:
        packets += [replace(each, by_stack=True) for each in packets]
    return packets


def messages_of(net: Net, flow: Flow) -> list[int]:
    """Types of ICMP that a flow may be of: an identifier says which echo it is, all else has none."""
    if flow.source_port or flow.destination_port:
        return [net.echo if flow.source_port else net.echo_reply]
    return [net.echo, net.echo_reply, TIMESTAMP if net.family == 4 else NODE_QUERY]


def errors_about(net: Net, packet: Packet) -> list[Packet]:
    """Errors about a packet, from whoever got it and from routers, to whoever sent it and to others."""
    endpoints, everybody = (net.a, net.b), (net.a, net.b, net.outside)
    return [
        Packet(Flow(net.icmp, sender, 0, receiver, 0), icmp_type=net.errors[0], about=packet)
        for sender, receiver in product((*everybody, net.router), everybody)
        if sender != receiver and (sender in endpoints or receiver in endpoints)
    ]


@cache
def steps_about(net: Net, flow: Flow) -> list[Step]:
    """What may happen to a flow, as often as it should; the first is nothing at all."""
    there, back = packets_of(net, flow), packets_of(net, flow.back())
    errors = errors_about(net, there[0]) + errors_about(net, back[0])
    policies = [Policy(*of) for of in product(LOCAL, Direction, ("allow", "allow", "deny", "nothing"))]
    others = packets_of(net, flow._replace(source_port=flow.source_port + 1))
    waits = [Wait(ticks) for ticks in (1, 1, 2, 3, 4, 21)]
    return [
        Wait(0),
        *(there + back) * (60 // len(there + back)),
        *errors,
        *policies,
        *others,
        *waits,
        Collect(),
    ]


def sequences(net: Net) -> st.SearchStrategy[list[Step]]:
    """Sequences of up to 40 steps about one flow."""

    def sequence(flow: Flow, choices: bytes) -> list[Step]:
        steps = steps_about(net, flow)
        return [steps[each % len(steps)] for each in choices]

    return st.builds(sequence, st.sampled_from(flows_of(net)), st.binary(min_size=40, max_size=40))


# --- the programs and the model side by side


class Known(NamedTuple):
    """A connection as one of its ends knows it."""

    bits: frozenset[str]
    sent: int
    received: int
    ticks_left: int
    opener: int  # identity


class Sides:
    """The programs of a lab and the model; at first no connection is known and everything is allowed."""

    def __init__(self, host: Lab, net: Net) -> None:
        self.host, self.net = host, net
        self.numbers = {net.endpoint(number): number for number in LOCAL}
        self.model = Host({address: Endpoint(TIMEOUTS) for address in self.numbers})
        self.maps = [each for name, each in host.ct.items() if f"{net.family}_global" in name]
        for connections in self.maps:
            connections.delete(list(connections.keys()))
        for policy in product(LOCAL, Direction, ["allow"]):
            self._set_policy(Policy(*policy))

    def take(self, step: Step) -> None:
        match step:
            case Policy():
                self._set_policy(step)
            case Wait():
                self._wait(step.ticks)
            case Collect():
                self._collect()
            case Packet():
                self._pass_on(step)

    def _set_policy(self, policy: Policy) -> None:
        endpoint = self.model.endpoints[self.net.endpoint(policy.endpoint)]
        endpoint.allowed.discard(policy.direction)
        key = self.host.allow(policy.endpoint, POLICY_DIRECTION[policy.direction], deny=policy.says == "deny")
        if policy.says == "allow":
            endpoint.allowed.add(policy.direction)
        if policy.says == "nothing":
            self.host.policies[policy.endpoint].delete([key])

    def _wait(self, ticks: int) -> None:
        """Nobody can turn the kernel's clock, but every connection's end can be brought nearer."""
        self.model.wait(ticks)
        for connections in self.maps:
            aged = [
                (key, entry._replace(lifetime=max(0, entry.lifetime - ticks * TICK_S)))
                for key, entry in connections.items()
            ]
            assert not connections.upsert(aged)

    def _collect(self) -> None:
        for connections in self.maps:
            ctgc.collect(connections)
        assert sum(len(list(connections.keys())) for connections in self.maps) == len(self._known())

    def _pass_on(self, packet: Packet) -> None:
        states = self.model.pass_on(packet)
        outcome = self._run(packet)
        to_stack = packet.by_stack or packet.flow.destination not in self.numbers
        passed = ACT_OK if to_stack else ACT_REDIRECT
        assert outcome.verdict == (ACT_SHOT if State.DENIED in states else passed), states
        if outcome.verdict == ACT_OK and not packet.by_stack:
            # The stack is told of what it must not masquerade: its conntrack has not seen the other half.
            answers = states[0] in (State.REPLY, State.RELATED)
            assert outcome.mark == (NO_MASQUERADE if answers else 0), states
        assert self._known() == self._meant(), states

    def _run(self, packet: Packet) -> Outcome:
        frame = frame_of(packet)
        if packet.flow.source in self.numbers:
            return self.host.send(self.numbers[packet.flow.source], frame)
        if packet.by_stack:
            return self.host.deliver(self.numbers[packet.flow.destination], frame)
        return self.host.receive(frame)

    def _known(self) -> dict[CtKey, Known]:
        """What the maps hold that is not over."""
        now = int(time.monotonic())
        return {
            key: Known(
                frozenset(name for at, name in enumerate(CT_BITS) if entry.bits >> at & 1),
                entry.tx_packets,
                entry.rx_packets,
                (entry.lifetime - now) // TICK_S,
                entry.source_identity,
            )
            for connections in self.maps
            for key, entry in connections.items()
            if entry.lifetime >= now
        }

    def _meant(self) -> dict[CtKey, Known]:
        """The same of the model."""
        return {
            key_of(address, flow): Known(
                frozenset(name for name, is_set in bits_of(connection) if is_set),
                connection.sent,
                connection.received,
                connection.ends - endpoint.now,
                identity(self.numbers[flow.source]) if flow.source in self.numbers else WORLD,
            )
            for address, endpoint in self.model.endpoints.items()
            for flow, connection in endpoint.connections.items()
            if endpoint.alive(flow)
        }


def key_of(endpoint: str, flow: Flow) -> CtKey:
    flags = 0 if flow.source == endpoint else CtFlags.IN
    return CtKey(flow.source, flow.destination, flow.source_port, flow.destination_port, flow.protocol, flags)


def bits_of(connection: Connection) -> Iterator[tuple[str, bool]]:
    yield "tx_closing", connection.closed_by_endpoint
    yield "rx_closing", connection.closed_by_peer
    yield "seen_non_syn", connection.open
    yield "from_stack", connection.by_stack


def frame_of(packet: Packet) -> bytes:
    protocol, source, source_port, destination, port = packet.flow
    if packet.about:
        return frames.icmp_error(source, destination, frame_of(packet.about), packet.icmp_type)
    if protocol in (frames.ICMP, frames.ICMPV6):
        payload = frames.icmp_message(packet.icmp_type, source_port or port)
    else:
        payload = frames.with_ports(protocol, source_port, port, packet.flags)
    return frames.packet(source, destination, protocol, payload)


# --- tests


@pytest.fixture(scope="module")
def host() -> Iterator[Lab]:
    with lab(*LOCAL, options=OPTIONS) as made:
        yield made


EXAMPLES = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(data=st.data())
def test_random_sequences(host: Lab, net: Net, data: st.DataObject) -> None:
    sides = Sides(host, net)
    for step in data.draw(sequences(net)):
        if step != Wait(0):
            note(step)
            sides.take(step)
