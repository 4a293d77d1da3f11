# SPDX-License-Identifier: Apache-2.0
"""Events as people and programs read them: Cilium's monitor lines, and JSON.

Called by: the agent's event pump, which hands the result to `holdfast monitor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from datapath.events import INGRESS, DropEvent, Event, TraceEvent, VerdictEvent
from datapath.packets import Packet, dissect
from datapath.reasons import CT_STATES, MATCHES, TRACE_POINTS, protocol_name, reason_name

DeviceName = Callable[[int], str]  # index → name, or the number as text


class Described(NamedTuple):
    """One event, said: `kind` drop, trace or policy-verdict; endpoints are ids, 0 for none of this host."""

    kind: str
    line: str
    reason: str  # why it was dropped, where it passed, what was decided
    source_endpoint: int
    destination_endpoint: int
    source_identity: int
    destination_identity: int
    details: dict[str, Any]  # for JSON


def describe(event: Event, device_name: DeviceName = str) -> Described:
    """Return what `event` means; identities that its kind does not carry are 0."""
    packet = dissect(event.packet)
    if isinstance(event, DropEvent):
        return _drop(event, packet)
    if isinstance(event, TraceEvent):
        return _trace(event, packet, device_name)
    return _verdict(event, packet)


def _drop(event: DropEvent, packet: Packet) -> Described:
    reason = reason_name(event.reason)
    line = (
        f"xx drop ({reason}) flow {event.header.flow:#x} to endpoint {event.destination_endpoint}, "
        f"identity {event.source_identity}->{event.destination_identity}: {packet.summary}"
    )
    return Described(
        event.kind,
        line,
        reason,
        *event.endpoints,
        event.source_identity,
        event.destination_identity,
        {"reason_code": event.reason, **_common(event, packet)},
    )


def _trace(event: TraceEvent, packet: Packet, device_name: DeviceName) -> Described:
    point = TRACE_POINTS.get(event.point, f"to-point-{event.point}")
    state = CT_STATES.get(event.state, str(event.state))
    device = device_name(event.ifindex) if event.ifindex else "0"
    line = (
        f"{_where(event, point)} flow {event.header.flow:#x} "
        f"identity {event.source_identity}->{event.destination_identity} state {state} "
        f"ifindex {device} orig-ip {event.original_ip}: {packet.summary}"
    )
    return Described(
        event.kind,
        line,
        point,
        *event.endpoints,
        event.source_identity,
        event.destination_identity,
        {"state": state, "ifindex": event.ifindex, "orig_ip": event.original_ip, **_common(event, packet)},
    )


def _where(event: TraceEvent, point: str) -> str:
    """Return "-> endpoint 5", "<- endpoint 5", "-> stack", …"""
    side, _, what = point.partition("-")
    arrow = "->" if side == "to" else "<-"
    if what != "endpoint":
        return f"{arrow} {what}"
    return f"{arrow} endpoint {event.destination_endpoint if side == 'to' else event.header.endpoint}"


def _verdict(event: VerdictEvent, packet: Packet) -> Described:
    header, ingress = event.header, event.direction == INGRESS
    action, match = _action(event), MATCHES.get(event.match, str(event.match))
    line = (
        f"Policy verdict log: flow {header.flow:#x} local EP ID {header.endpoint}, "
        f"remote ID {event.remote_identity}, dst port {event.port}, proto {event.protocol}, "
        f"ingress {str(ingress).lower()}, action {action}, match {match}, {packet.summary}"
    )
    details = {
        "port": event.port,
        "protocol": protocol_name(event.protocol),
        "ingress": ingress,
        "match": match,
        "verdict": event.verdict,
        **_common(event, packet),
    }
    identities = (event.remote_identity, 0) if ingress else (0, event.remote_identity)
    return Described(event.kind, line, action, *event.endpoints, *identities, details)


def _action(event: VerdictEvent) -> str:
    if event.verdict < 0:
        return "deny"
    if event.verdict > 0:
        return "redirect"
    return "audit" if event.audited else "allow"


def _common(event: Event, packet: Packet) -> dict[str, Any]:
    """Return what every event says in JSON: the flow, the length, and the packet as far as it was seen."""
    seen = {key: value for key, value in zip(packet._fields, packet, strict=True) if value}
    return {"flow": f"{event.header.flow:#x}", "length": event.header.length, "packet": seen}
