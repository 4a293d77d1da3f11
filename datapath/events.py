# SPDX-License-Identifier: Apache-2.0
"""Events of the programs: Cilium 1.11's drop, trace and policy-verdict notifications, decoded.

Responsible for: bytes from the ring to records; the layouts of bpf/include/events.h.  How they read is
`datapath.format`.  Called by: the agent's event pump, in batches, only while somebody listens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
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


class Header(NamedTuple):
    """What every event says: `endpoint` is the one whose program spoke, `length` the packet's."""

    endpoint: int
    flow: int  # the kernel's hash of the 5-tuple
    length: int


class DropEvent(NamedTuple):
    """A packet was dropped."""

    header: Header
    reason: int
    source_identity: int
    destination_identity: int
    destination_endpoint: int
    packet: bytes


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


Event = DropEvent | TraceEvent | VerdictEvent


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


def decode_many(records: Iterable[bytes]) -> tuple[list[Event], int]:
    """Return the events of a batch in order, and how many records were none."""
    events: list[Event] = []
    refused = 0
    for record in records:
        try:
            events.append(decode(record))
        except EventError:
            refused += 1
    return events, refused


def _payload(data: bytes, at: int, captured: int) -> bytes:
    """Return the captured bytes; the record may have more room than that."""
    return bytes(data[at : at + captured])


def _drop(header: Header, reason: int, data: bytes, captured: int) -> DropEvent:
    source, destination, endpoint, _ = _DROP.unpack_from(data, _HEADER.size)
    packet = _payload(data, _HEADER.size + _DROP.size, captured)
    return DropEvent(header, reason, source, destination, endpoint, packet)


def _trace(header: Header, point: int, data: bytes, captured: int) -> TraceEvent:
    source, destination, endpoint, state, bits, ifindex, ip = _TRACE.unpack_from(data, _HEADER.size)
    ipv6 = bool(bits & 1)
    original = unpack_address(FAMILY6 if ipv6 else FAMILY4, ip)
    packet = _payload(data, _HEADER.size + _TRACE.size, captured)
    return TraceEvent(header, point, source, destination, endpoint, state, ipv6, ifindex, original, packet)


def _verdict(header: Header, data: bytes, captured: int) -> VerdictEvent:
    remote, verdict, port, protocol, flags, _ = _VERDICT.unpack_from(data, _HEADER.size)
    packet = _payload(data, _HEADER.size + _VERDICT.size, captured)
    return VerdictEvent(
        header,
        remote,
        verdict,
        port,
        protocol,
        direction=flags & 3,
        ipv6=bool(flags & 4),
        match=flags >> 3 & 7,
        audited=bool(flags & 0x40),
        packet=packet,
    )
