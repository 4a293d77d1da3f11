# SPDX-License-Identifier: Apache-2.0
"""Random labels, selectors, rules and policies for hypothesis, from an alphabet small enough to collide."""

from __future__ import annotations

from hypothesis import strategies as st

from identity.labels import Label, Labels
from identity.local import prefix_labels
from policy.model import (
    ICMP,
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
    requirement,
    reserved,
    selector,
)

TRANSPORTS = (
    Transport(80, TCP),
    Transport(53, UDP),
    Transport(80, SCTP),
    Transport(0, ICMP),  # echo reply: port 0, and yet not "any port"
    Transport(8, ICMP),
)
# One that no rule names.
OTHER_TRANSPORT = Transport(4242, TCP)
PREFIXES = ("10.0.0.0/8", "10.1.0.0/16", "192.168.7.7/32")

keys = st.sampled_from(["app", "env"])
values = st.sampled_from(["a", "b", "c"])
sources = st.sampled_from(["container", "k8s"])

# Labels that name ports; two of the values are one port.
port_labels = st.dictionaries(
    st.sampled_from(["holdfast.port.web", "holdfast.port.dns"]),
    st.tuples(sources, st.sampled_from(["80", "80/tcp", "53/UDP", "80/SCTP", "4242"])),
    max_size=2,
)
names = st.builds(NamedPort, st.sampled_from(["web", "dns"]), st.sampled_from([TCP, UDP, SCTP]))

workload_labels = st.builds(
    lambda *parts: Labels(
        Label(source, key, value) for part in parts for key, (source, value) in part.items()
    ),
    st.dictionaries(keys, st.tuples(sources, values), min_size=1),
    st.one_of(st.just({}), port_labels),
)
reserved_labels = st.sampled_from(["host", "world", "init", "remote-node"]).map(
    lambda name: Labels.of([f"reserved:{name}"])
)
peer_labels = st.one_of(
    workload_labels, workload_labels, reserved_labels, st.sampled_from(PREFIXES).map(prefix_labels)
)
endpoint_labels = st.one_of(
    workload_labels, workload_labels, st.just(Labels()), st.just(Labels.of(["reserved:init"]))
)


@st.composite
def requirements(draw: st.DrawFn) -> Requirement:
    operator = draw(st.sampled_from(list(Operator)))
    listed = draw(st.sets(values, min_size=1)) if operator in (Operator.IN, Operator.NOT_IN) else ()
    return requirement(draw(st.one_of(st.just("any"), sources)), draw(keys), operator, listed)


# Half of all selectors are the plain kind, so that rules meet often enough to contradict each other.
plain_selectors = values.map(lambda value: selector([requirement("any", "app", Operator.IN, [value])]))
label_selectors: st.SearchStrategy[Selector] = st.one_of(
    plain_selectors, st.lists(requirements(), max_size=3).map(selector)
)
cidr_selectors = st.sampled_from(PREFIXES).map(
    lambda text: Selector((Requirement("cidr", text, Operator.EXISTS),))
)
peer_selectors = st.one_of(
    label_selectors,
    label_selectors,
    cidr_selectors,
    st.sampled_from([WILDCARD, WORLD, CLUSTER, reserved("host")]),
)
subjects = st.one_of(st.just(WILDCARD), label_selectors, st.just(reserved("init")))


@st.composite
def clauses(draw: st.DrawFn) -> Clause:
    peers = draw(st.one_of(st.none(), st.lists(peer_selectors, max_size=2).map(tuple)))
    transports = draw(st.one_of(st.none(), st.lists(st.sampled_from(TRANSPORTS), max_size=2).map(tuple)))
    named = () if transports is None else tuple(draw(st.lists(names, max_size=2, min_size=not transports)))
    endpoints = peers is not None and draw(st.booleans())
    direction, deny = draw(st.sampled_from(list(Direction))), draw(st.booleans())
    return Clause(direction, deny, peers, transports, named, endpoints)


requires = st.builds(
    Requires,
    st.sampled_from(list(Direction)),
    st.booleans(),
    st.lists(requirements(), min_size=1, max_size=2).map(tuple),
)
rules = st.builds(
    Rule,
    subject=subjects,
    clauses=st.lists(clauses(), max_size=4).map(tuple),
    enforces=st.builds(Enforcement, st.booleans(), st.booleans()),
    requires=st.one_of(st.just(()), st.just(()), st.lists(requires, max_size=2).map(tuple)),
)
policies = st.builds(
    Policy,
    name=st.sampled_from(["p1", "p2", "p3", "p4"]),
    origin=st.just("test"),
    rules=st.lists(rules, min_size=1, max_size=3).map(tuple),
)
