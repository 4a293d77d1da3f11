# SPDX-License-Identifier: Apache-2.0
"""Random labels, selectors, rules and policies for hypothesis, from an alphabet small enough to collide.

What has few values is chosen from the list of them all: one draw instead of many, so that there is time for
thousands.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network
from itertools import combinations, product
from typing import TypeVar

from hypothesis import strategies as st

from identity.labels import Label, Labels
from identity.local import prefix_labels
from policy.model import (
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    Clause,
    Direction,
    Enforcement,
    NamedPort,
    Policy,
    Requires,
    Rule,
    Transport,
)
from policy.selectors import (
    CLUSTER,
    WILDCARD,
    WORLD,
    Operator,
    Requirement,
    Selector,
    prefix,
    requirement,
    reserved,
    selector,
)

T = TypeVar("T")

TRANSPORTS = (
    Transport(80, TCP),
    Transport(53, UDP),
    Transport(80, SCTP),
    Transport(0, ICMP),  # echo reply: port 0, and yet not "any port"
    Transport(8, ICMP),
    Transport(129, ICMPV6),
    Transport(128, ICMPV6),
)
# One that no rule names.
OTHER_TRANSPORT = Transport(4242, TCP)
PREFIXES = {
    4: ("10.0.0.0/8", "10.1.0.0/16", "192.168.7.7/32"),
    6: ("2001::/16", "2001:db8::/32", "fc00:7::7/128"),
}

KEYS, VALUES, SOURCES = ("app", "env"), ("a", "b", "c"), ("container", "k8s")
# Labels that name ports; two of the values are one port.
PORT_KEYS = ("holdfast.port.web", "holdfast.port.dns")
PORTS = ("80", "80/tcp", "53/UDP", "80/SCTP", "4242")

NAMES = [NamedPort(*each) for each in product(("web", "dns"), (TCP, UDP, SCTP))]

values = st.sampled_from(VALUES)


def chosen_from(values: Sequence[T]) -> st.SearchStrategy[T]:
    """One of many values; `sampled_from` would list them all where a state machine names its strategies."""
    return st.integers(0, len(values) - 1).map(lambda index: values[index])


def labellings(keys: Sequence[str], values: Sequence[str]) -> list[tuple[Label, ...]]:
    """Every way to give keys a value, from either source, or none; the first has no label at all."""
    ways = [None, *product(SOURCES, values)]
    return [
        tuple(Label(each[0], key, each[1]) for key, each in zip(keys, chosen, strict=True) if each)
        for chosen in product(ways, repeat=len(keys))
    ]


def few(values: Sequence[T], least: int = 0) -> list[tuple[T, ...]]:
    """None, one or two of `values` in every way; each number of them is as likely."""
    sizes = range(least, 3)
    return [each for size in sizes for each in [*product(values, repeat=size)] * len(values) ** (2 - size)]


workload_labels = st.builds(
    lambda own, ports: Labels([*own, *ports]),
    chosen_from(labellings(KEYS, VALUES)[1:]),
    st.one_of(st.just(()), chosen_from(labellings(PORT_KEYS, PORTS))),
)
reserved_labels = st.sampled_from(["host", "world", "init", "remote-node"]).map(
    lambda name: Labels.of([f"reserved:{name}"])
)


def peers_of(*families: int) -> st.SearchStrategy[Labels]:
    """Labels of a peer that has an address of one of these families."""
    named = [prefix_labels(each) for family in families for each in PREFIXES[family]]
    return st.one_of(workload_labels, workload_labels, reserved_labels, chosen_from(named))


peer_labels = peers_of(4, 6)
endpoint_labels = st.one_of(
    workload_labels, workload_labels, st.just(Labels()), st.just(Labels.of(["reserved:init"]))
)


def requirements_of(operator: Operator) -> list[Requirement]:
    """All requirements with one operator; each operator has as many."""
    listed = [[*each] for size in (1, 2, 3) for each in combinations(VALUES, size)]
    if operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST):
        listed = [[]] * len(listed)
    names = product(("any", *SOURCES), KEYS)
    return [requirement(source, key, operator, each) for (source, key), each in product(names, listed)]


requirements = chosen_from([each for operator in Operator for each in requirements_of(operator)])

# Half of all selectors are the plain kind, so that rules meet often enough to contradict each other.
plain_selectors = values.map(lambda value: selector([requirement("any", "app", Operator.IN, [value])]))
label_selectors: st.SearchStrategy[Selector] = st.one_of(
    plain_selectors, st.lists(requirements, max_size=3).map(selector)
)
cidr_selectors = chosen_from([prefix(ip_network(each)) for each in PREFIXES[4] + PREFIXES[6]])
peer_selectors = st.one_of(
    label_selectors,
    label_selectors,
    cidr_selectors,
    st.sampled_from([WILDCARD, WORLD, CLUSTER, reserved("host")]),
)
subjects = st.one_of(st.just(WILDCARD), label_selectors, st.just(reserved("init")))


_transports = few(TRANSPORTS)
some_transports = chosen_from([*[None] * len(_transports), *_transports])
flags = chosen_from([*product(Direction, (False, True), (False, True))])
some_names, names = chosen_from(few(NAMES)), chosen_from(few(NAMES, least=1))


@st.composite
def clauses(draw: st.DrawFn) -> Clause:
    peers = draw(st.one_of(st.none(), st.lists(peer_selectors, max_size=2).map(tuple)))
    transports = draw(some_transports)
    named = () if transports is None else draw(some_names if transports else names)
    direction, deny, endpoints = draw(flags)
    return Clause(direction, deny, peers, transports, named, peers is not None and endpoints)


requires = st.builds(
    Requires,
    st.sampled_from(list(Direction)),
    st.booleans(),
    st.lists(requirements, min_size=1, max_size=2).map(tuple),
)
rules = st.builds(
    Rule,
    subject=subjects,
    clauses=st.lists(clauses(), max_size=4).map(tuple),
    enforces=chosen_from([Enforcement(*each) for each in product((False, True), repeat=2)]),
    requires=st.one_of(st.just(()), st.just(()), st.lists(requires, max_size=2).map(tuple)),
)
policies = st.builds(
    Policy,
    name=st.sampled_from(["p1", "p2", "p3", "p4"]),
    origin=st.just("test"),
    rules=st.lists(rules, min_size=1, max_size=3).map(tuple),
)
