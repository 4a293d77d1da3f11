# SPDX-License-Identifier: Apache-2.0
"""What policy means, written as plainly as possible: the yardstick for the resolution and the data path.

`verdict` evaluates rules for one packet, with no map, index or set in between.  `lookup` does what the
data path does with a policy map.  They must always agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum

from identity.labels import Labels
from policy.model import (
    SCTP,
    TCP,
    UDP,
    Clause,
    Direction,
    NamedPort,
    PolicyEntry,
    PolicyKey,
    Rule,
    Transport,
)
from policy.selectors import Operator, Requirement, Selector

PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}


class Verdict(Enum):
    ALLOWED = "allowed"
    DENIED = "denied"  # by a deny rule
    NO_RULE = "no rule"  # default deny


def verdict(
    rules: Iterable[Rule], subject: Labels, direction: Direction, peer: Labels | None, transport: Transport
) -> Verdict:
    """Return what `rules` say about one packet of the endpoint `subject`.

    `peer` are the labels of the other side, None when nobody knows its identity.
    """
    mine = [rule for rule in rules if is_for(rule, subject)]
    clauses = [clause for rule in mine for clause in rule.clauses if clause.direction == direction]
    for clause in clauses:
        if clause.deny and covers(clause, mine, subject, peer, transport):
            return Verdict.DENIED
    for clause in clauses:
        if not clause.deny and covers(clause, mine, subject, peer, transport):
            return Verdict.ALLOWED
    if is_init(subject) or any(rule.enforces[direction] for rule in mine):
        return Verdict.NO_RULE
    return Verdict.ALLOWED


def is_init(subject: Labels) -> bool:
    return len(subject) == 0 or subject.get("reserved", "init") is not None


def is_for(rule: Rule, subject: Labels) -> bool:
    if is_init(subject):
        subject = subject or Labels.of(["reserved:init"])
        names_init = any(
            each.key == "init"
            and each.source in ("any", "reserved")
            and each.operator in (Operator.IN, Operator.EXISTS)
            for each in rule.subject.requirements
        )
        return names_init and matches(rule.subject, subject)
    return matches(rule.subject, subject)


def covers(
    clause: Clause, mine: list[Rule], subject: Labels, peer: Labels | None, transport: Transport
) -> bool:
    if clause.transports is not None and transport not in clause.transports:
        receiver = subject if clause.direction == Direction.INGRESS else peer
        if not any(calls_it(receiver, each, transport) for each in clause.names):
            return False
    if clause.peers is None:
        return True
    if clause.endpoints and not has_what_is_required(clause, mine, peer):
        return False
    return any(each.wildcard or (peer is not None and matches(each, peer)) for each in clause.peers)


def has_what_is_required(clause: Clause, mine: list[Rule], peer: Labels | None) -> bool:
    for rule in mine:
        for each in rule.requires:
            if (each.direction, each.deny) != (clause.direction, clause.deny):
                continue
            if peer is None or not all(holds(one, peer) for one in each.requirements):
                return False
    return True


def calls_it(receiver: Labels | None, named: NamedPort, transport: Transport) -> bool:
    """True if `receiver` has a label that says that the port of this name is `transport`."""
    for label in receiver or ():
        if label.key == "holdfast.port." + named.name and label.source != "cidr":
            number, slash, protocol = label.value.partition("/")
            says = Transport(int(number), PROTOCOLS[protocol.upper() if slash else "TCP"])
            return says == transport and named.protocol == transport.protocol
    return False


def matches(selector: Selector, labels: Labels) -> bool:
    return all(holds(each, labels) for each in selector.requirements)


def holds(requirement: Requirement, labels: Labels) -> bool:
    values = []
    for label in labels:
        if label.key != requirement.key:
            continue
        if label.source == requirement.source or (requirement.source == "any" and label.source != "cidr"):
            values.append(label.value)
    match requirement.operator:
        case Operator.EXISTS:
            return len(values) > 0
        case Operator.DOES_NOT_EXIST:
            return len(values) == 0
        case Operator.IN:
            return any(value in requirement.values for value in values)
        case Operator.NOT_IN:
            return not any(value in requirement.values for value in values)


def lookup(
    state: Mapping[PolicyKey, PolicyEntry], identity: int, transport: Transport, direction: Direction
) -> Verdict:
    """Return what the data path makes of a policy map: four lookups, the first hit decides."""
    for who, port, protocol in (
        (identity, *transport),
        (0, *transport),
        (identity, 0, 0),
        (0, 0, 0),
    ):
        entry = state.get(PolicyKey(who, port, protocol, direction))
        if entry is not None:
            return Verdict.DENIED if entry.deny else Verdict.ALLOWED
    return Verdict.NO_RULE
