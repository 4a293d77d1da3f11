# SPDX-License-Identifier: Apache-2.0
"""`policy trace`: what policy decides for one flow, read from the same state that is in the maps.

Each side that is an endpoint of this host is judged by its own map state, in the order that the programs
look: identity and port, port, identity, anything.  A side that is not on this host is not judged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agent.api import models
from agent.api.errors import BadRequest, NotFound
from agent.parts import Parts
from identity.labels import Labels
from policy.model import Direction, PolicyKey

PROTOCOLS = {"ANY": 0, "ICMP": 1, "TCP": 6, "UDP": 17, "SCTP": 132}
ALLOWED, DENIED, ELSEWHERE = "ALLOWED", "DENIED", "not on this host"


@dataclass(frozen=True)
class Side:
    """One end of the flow: `endpoint` is 0 when it is not on this host."""

    identity: int
    endpoint: int
    labels: str


def trace(parts: Parts, request: models.TraceRequest) -> models.TraceResult:
    """Return the verdict for one flow.  Raises BadRequest, NotFound."""
    protocol = PROTOCOLS.get(request.protocol.upper())
    if protocol is None:
        raise BadRequest(f"protocol {request.protocol!r} is not one of {', '.join(PROTOCOLS)}")
    source = _side(parts, request.source_endpoint, request.source_identity, request.source_labels)
    destination = _side(
        parts, request.destination_endpoint, request.destination_identity, request.destination_labels
    )
    lines = [
        f"Tracing From: [{source.labels}] => To: [{destination.labels}] "
        f"Ports: [{request.dport}/{request.protocol.upper()}]"
    ]
    egress = _judge(parts, source, destination.identity, request.dport, protocol, Direction.EGRESS, lines)
    ingress = _judge(parts, destination, source.identity, request.dport, protocol, Direction.INGRESS, lines)
    verdict = DENIED if DENIED in (egress, ingress) else ALLOWED
    lines.append(f"Final verdict: {verdict}")
    return models.TraceResult(verdict=verdict, ingress=ingress, egress=egress, log=lines)


def _side(parts: Parts, endpoint: int, identity: int, labels: list[str]) -> Side:
    if endpoint:
        found = parts.endpoints.get(endpoint)
        return Side(found.enforced_identity, found.id, found.labels)
    number = identity or _number_of(parts, Labels.of(labels))
    known = parts.identities.get(number)
    if known is None:
        raise NotFound(f"identity {number} is not known on this host")
    local = (each.id for _, each in parts.endpoints.table.items() if each.identity == number)
    return Side(number, next(local, 0), known.serialized)


def _number_of(parts: Parts, labels: Labels) -> int:
    """Return the identity of exactly these labels, else the only one that has them among others."""
    exact = parts.identities.number_of(labels)
    if exact is not None:
        return exact
    wanted = set(labels)
    having = [number for number, known in parts.identities.table.items() if wanted <= set(known)]
    if len(having) == 1:
        return having[0]
    text = ", ".join(labels.texts())
    if not having:
        raise NotFound(f"no identity of this cluster has the labels {text}")
    raise BadRequest(
        f"{len(having)} identities have the labels {text}: {', '.join(map(str, sorted(having)[:8]))}",
        hint="name one by its number, or more of its labels",
    )


def _judge(
    parts: Parts,
    subject: Side,
    peer: int,
    port: int,
    protocol: int,
    direction: Direction,
    lines: list[str],
) -> str:
    name = direction.name.capitalize()
    if not subject.endpoint:
        lines.append(f"{name} verdict: {ELSEWHERE}")
        return ELSEWHERE
    lines.append(f"Resolving {direction.name.lower()} policy for endpoint {subject.endpoint}")
    state = parts.policy_maps.engine.map_state(subject.endpoint)
    for what, key in _keys(peer, port, protocol, direction):
        entry = state.get(key)
        if entry is not None:
            verdict = DENIED if entry.deny else ALLOWED
            lines.append(f"* {what}: found {'deny' if entry.deny else 'allow'} entry")
            lines.append(f"{name} verdict: {verdict.lower()}")
            return verdict
        lines.append(f"* {what}: no entry")
    lines.append(f"{name} verdict: denied")
    return DENIED


def _keys(peer: int, port: int, protocol: int, direction: Direction) -> Iterator[tuple[str, PolicyKey]]:
    yield "L3-L4", PolicyKey(peer, port, protocol, direction)
    yield "L4-only", PolicyKey(0, port, protocol, direction)
    yield "L3-only", PolicyKey(peer, 0, 0, direction)
    yield "all", PolicyKey(0, 0, 0, direction)
