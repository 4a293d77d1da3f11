# SPDX-License-Identifier: Apache-2.0
"""Events of the programs: Cilium 1.11's drop, trace and policy-verdict notifications, decoded.

Responsible for: bytes from the ring to records; the layouts of bpf/include/events.h.  How they read is
`datapath.format`.  Called by: the agent's event pump, only while somebody listens.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from datapath.addresses import FAMILY4, FAMILY6, unpack_address
from datapath.errors import EventError

DROP, TRACE, POLICY_VERDICT = 1, 4, 5
VERSION = 1
INGRESS, EGRESS = 1, 2

_HEADER = struct.Struct("=BBHIIHH")  # type, subtype, source, hash, original length, captured, version
_DROP = struct.Struct("=IIII")
_TRACE = struct.Struct("=IIHBBI16s")
_VERDICT = struct.Struct("=IiHBBI")
_DROP_SIZE, _TRACE_SIZE, _VERDICT_SIZE = (_HEADER.size + body.size for body in (_DROP, _TRACE, _VERDICT))
_NO_ADDRESS = bytes(16)
# The little of it that filters ask for: type, source, version; and where the rest of that stands.
_HEADING = struct.Struct("=BxH10xH")
_DROP_RECEIVER, _TRACE_RECEIVER = (struct.Struct(f"={_HEADER.size + 8}x{size}") for size in "IH")
_VERDICT_FLAGS = _HEADER.size + 11


class Header(NamedTuple):
    """What every event says: `endpoint` is the one whose program spoke, `length` the packet's."""

    endpoint: int
    flow: int  # the kernel's hash of the 5-tuple
    length: int


def _sides(speaker: int, receiver: int) -> tuple[int, int]:
    """Return sender and receiver: a receiver's own program does not know which endpoint sent."""
    return (0 if speaker == receiver else speaker, receiver)


class DropEvent(NamedTuple):
    """A packet was dropped."""

    header: Header
    reason: int
    source_identity: int
    destination_identity: int
    destination_endpoint: int
    packet: bytes

    @property
    def kind(self) -> str:
        return "drop"

    @property
    def endpoints(self) -> tuple[int, int]:
        """The sender's and the receiver's id, 0 for none of this host."""
        return _sides(self.header.endpoint, self.destination_endpoint)


class TraceEvent(NamedTuple):
    """A packet passed a point; `state` is conntrack's."""

    header: Header
    point: int
    source_identity: int
    destination_identity: int
    destination_endpoint: int
    state: int
    ipv6: bool
    ifindex: int
    original_ip: str
    packet: bytes

    @property
    def kind(self) -> str:
        return "trace"

    @property
    def endpoints(self) -> tuple[int, int]:
        """The sender's and the receiver's id, 0 for none of this host."""
        return _sides(self.header.endpoint, self.destination_endpoint)


class VerdictEvent(NamedTuple):
    """Policy decided about a new connection: `verdict` 0 allow, negative a drop reason, positive a proxy."""

    header: Header
    remote_identity: int
    verdict: int
    port: int
    protocol: int
    direction: int  # INGRESS, EGRESS
    ipv6: bool
    match: int
    audited: bool
    packet: bytes

    @property
    def kind(self) -> str:
        return "policy-verdict"

    @property
    def endpoints(self) -> tuple[int, int]:
        """The sender's and the receiver's id, 0 for none of this host."""
        own = self.header.endpoint
        return (0, own) if self.direction == INGRESS else (own, 0)


Event = DropEvent | TraceEvent | VerdictEvent


def heading(data: bytes) -> tuple[str, int, int]:
    """Return an event's kind, and its sender's and receiver's ids (0 for none of this host).

    Most events interest nobody who listens, and this takes a fraction of the time of `decode`, whose events
    have the same as `kind` and `endpoints`.  Raises EventError for what is none of this version.
    """
    try:
        kind, own, version = _HEADING.unpack_from(data)
        if version == VERSION:
            if kind == TRACE and len(data) >= _TRACE_SIZE:
                return ("trace", *_sides(own, *_TRACE_RECEIVER.unpack_from(data)))
            if kind == DROP and len(data) >= _DROP_SIZE:
                return ("drop", *_sides(own, *_DROP_RECEIVER.unpack_from(data)))
            if kind == POLICY_VERDICT and len(data) >= _VERDICT_SIZE:
                inwards = data[_VERDICT_FLAGS] & 3 == INGRESS
                return ("policy-verdict", 0, own) if inwards else ("policy-verdict", own, 0)
    except struct.error:
        pass  # `decode` says what is wrong
    event = decode(data)
    return (event.kind, *event.endpoints)


def decode(data: bytes) -> Event:
    """Return one event.  Raises EventError for anything that is none of this version."""
    try:
        kind, subtype, endpoint, flow, length, captured, version = _HEADER.unpack_from(data)
        if version != VERSION:
            raise EventError(f"event of version {version}, expected {VERSION}")
        header = Header(endpoint, flow, length)
        if kind == DROP:
            return _drop(header, subtype, data, captured)
        if kind == TRACE:
            return _trace(header, subtype, data, captured)
        if kind == POLICY_VERDICT:
            return _verdict(header, data, captured)
    except struct.error as error:
        raise EventError(f"event of {len(data)} bytes is too short: {error}") from error
    raise EventError(f"event of unknown type {kind}")


def _drop(header: Header, reason: int, data: bytes, captured: int) -> DropEvent:
    source, destination, endpoint, _ = _DROP.unpack_from(data, _HEADER.size)
    return DropEvent(header, reason, source, destination, endpoint, data[_DROP_SIZE : _DROP_SIZE + captured])


def _trace(header: Header, point: int, data: bytes, captured: int) -> TraceEvent:
    source, destination, endpoint, state, bits, ifindex, ip = _TRACE.unpack_from(data, _HEADER.size)
    ipv6 = bool(bits & 1)
    packet = data[_TRACE_SIZE : _TRACE_SIZE + captured]
    return TraceEvent(
        header, point, source, destination, endpoint, state, ipv6, ifindex, _original(ipv6, ip), packet
    )


def _original(ipv6: bool, ip: bytes) -> str:
    """Return the address a packet had before translation; of most it was none."""
    if ip == _NO_ADDRESS:
        return "::" if ipv6 else "0.0.0.0"
    return unpack_address(FAMILY6 if ipv6 else FAMILY4, ip)


def _verdict(header: Header, data: bytes, captured: int) -> VerdictEvent:
    remote, verdict, port, protocol, flags, _ = _VERDICT.unpack_from(data, _HEADER.size)
    direction, ipv6, match, audited = flags & 3, bool(flags & 4), flags >> 3 & 7, bool(flags & 0x40)
    packet = data[_VERDICT_SIZE : _VERDICT_SIZE + captured]
    return VerdictEvent(header, remote, verdict, port, protocol, direction, ipv6, match, audited, packet)
