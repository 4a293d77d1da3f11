# SPDX-License-Identifier: Apache-2.0
"""What connections mean, written as plainly as possible: the yardstick for the programs' conntrack.

Each endpoint knows the connections that it is an end of, and nobody else's.  A packet

* continues a connection that was opened in its direction: policy is asked, as for a new one;
* or answers one that was opened in the other direction: it may pass because the connection could be opened;
* or is an ICMP error about a packet that the endpoint sent or got in a connection: it may pass likewise;
* or it is new, and if policy allows it, begins a connection (an error begins none).

A packet that may not pass changes nothing.  Time is in ticks that the test chooses, and has no other clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tests.support.frames import ACK, ECHO_REPLY, ECHO_REPLY6, FIN, ICMP, ICMPV6, RST, SYN, TCP

ECHO_REPLIES = {(ICMP, ECHO_REPLY), (ICMPV6, ECHO_REPLY6)}


class Direction(Enum):
    """Which way a packet goes, seen from the endpoint."""

    IN = "in"
    OUT = "out"


class State(Enum):
    """What a packet is to an endpoint."""

    NEW = "new"
    ESTABLISHED = "established"
    REPLY = "reply"
    RELATED = "related"
    DENIED = "denied"


class Flow(NamedTuple):
    """From whom to whom.  Of an echo the identifier is the asking side's port; other ICMP has none."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int

    def back(self) -> Flow:
        """The other direction."""
        return Flow(self.protocol, self.destination, self.destination_port, self.source, self.source_port)


@dataclass(frozen=True)
class Packet:
    """One packet; `about` is the one that an ICMP error carries."""

    flow: Flow
    flags: int = 0  # of TCP
    icmp_type: int = 0
    about: Packet | None = None
    by_stack: bool = False  # the host's stack delivers it

    @property
    def is_syn(self) -> bool:
        """Whether it opens a TCP connection."""
        return self.flow.protocol == TCP and self.flags & (SYN | ACK) == SYN

    @property
    def may_answer(self) -> bool:
        """A SYN answers nothing, and of all messages of ICMP only an echo reply does."""
        if self.flow.protocol in (ICMP, ICMPV6):
            return (self.flow.protocol, self.icmp_type) in ECHO_REPLIES
        return not self.is_syn


@dataclass(frozen=True)
class Timeouts:
    """For how many ticks a connection is kept after its last packet; named as the options."""

    regular_tcp: int
    regular_tcp_syn: int
    regular_tcp_fin: int
    regular_any: int


@dataclass
class Connection:
    """One connection as the endpoint at one of its ends knows it."""

    ends: int = 0  # its last tick
    open: bool = False  # more than SYNs were seen
    closed_by_endpoint: bool = False
    closed_by_peer: bool = False
    by_stack: bool = False  # a packet of it was delivered by the host's stack
    sent: int = 0
    received: int = 0

    def lifetime(self, protocol: int, timeouts: Timeouts) -> int:
        if protocol != TCP:
            return timeouts.regular_any
        if self.closed_by_endpoint and self.closed_by_peer:
            return timeouts.regular_tcp_fin
        return timeouts.regular_tcp if self.open else timeouts.regular_tcp_syn

    def follow(self, packet: Packet, direction: Direction) -> None:
        """Take note of a packet that passed.  FIN closes its sender's side of TCP, RST closes both."""
        self.open |= not packet.flags & SYN
        self.by_stack |= packet.by_stack and direction is Direction.IN
        if packet.flags & RST:
            self.closed_by_endpoint = self.closed_by_peer = True
        if direction is Direction.OUT:
            self.sent += 1
            self.closed_by_endpoint |= bool(packet.flags & FIN)
        else:
            self.received += 1
            self.closed_by_peer |= bool(packet.flags & FIN)


@dataclass
class Endpoint:
    """What one endpoint's conntrack holds, by the flow of each connection's first packet."""

    timeouts: Timeouts
    allowed: set[Direction] = field(default_factory=set)  # by policy
    connections: dict[Flow, Connection] = field(default_factory=dict)
    now: int = 0

    def alive(self, flow: Flow) -> Connection | None:
        """A connection that is over is none, whether or not anybody cleared it away."""
        found = self.connections.get(flow)
        return found if found and found.ends >= self.now else None

    def judge(self, packet: Packet, direction: Direction) -> State:
        """Decide about one packet, and remember what it does to a connection."""
        if packet.about:
            return self.judge_error(packet.flow, packet.about.flow, direction)
        continued = self.alive(packet.flow)
        answered = self.alive(packet.flow.back()) if packet.may_answer else None
        if packet.is_syn and continued and (continued.closed_by_endpoint or continued.closed_by_peer):
            continued = None  # a new connection with the ports of one that ends
        if not answered and direction not in self.allowed:
            return State.DENIED
        opener = opened_by(packet.flow, bool(continued), bool(answered))
        if not continued and not answered:
            self.connections[opener] = Connection()
        connection = self.connections[opener]
        connection.follow(packet, direction)
        connection.ends = self.now + connection.lifetime(opener.protocol, self.timeouts)
        if not continued and not answered:
            return State.NEW
        return State.ESTABLISHED if opener == packet.flow and direction in self.allowed else State.REPLY

    def judge_error(self, error: Flow, about: Flow, direction: Direction) -> State:
        """An error goes to whoever sent what it is about, in a connection that this endpoint has."""
        if about.source == error.destination and (self.alive(about) or self.alive(about.back())):
            return State.RELATED
        return State.NEW if direction in self.allowed else State.DENIED


def opened_by(flow: Flow, continues: bool, answers: bool) -> Flow:
    """Return the first packet's flow of the connection that a packet belongs to.

    Both ends may have opened one with the same ports.  Then it is that of the higher port: clients have it.
    """
    if continues and answers:
        return flow if flow.source_port >= flow.destination_port else flow.back()
    return flow.back() if answers else flow


@dataclass
class Host:
    """Endpoints of one host by address; everybody else is outside."""

    endpoints: dict[str, Endpoint]

    def pass_on(self, packet: Packet) -> list[State]:
        """Return what a packet is to its sender, then to its receiver, of those that live here.

        After a denial nobody meets it any more.
        """
        states = []
        for address, direction in (
            (packet.flow.source, Direction.OUT),
            (packet.flow.destination, Direction.IN),
        ):
            if address in self.endpoints and State.DENIED not in states:
                states.append(self.endpoints[address].judge(packet, direction))
        return states

    def wait(self, ticks: int) -> None:
        for endpoint in self.endpoints.values():
            endpoint.now += ticks
