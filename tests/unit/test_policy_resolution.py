# SPDX-License-Identifier: Apache-2.0
"""The resolved map against the plain meaning of the rules, for random rules and every packet."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.model import (
    ALLOW,
    ANY_TRANSPORT,
    DENY,
    TCP,
    Clause,
    Direction,
    Enforcement,
    EnforcementMode,
    Policy,
    PolicyKey,
    Rule,
    Transport,
)
from policy.selectors import WILDCARD, Operator, Selector, requirement, selector
from tests.support import policy_strategies as some
from tests.support.policy_reference import Verdict, lookup, verdict

WEB = Labels.of({"app": "web"})
API = Labels.of({"app": "api"})
HTTP = Transport(80, TCP)
API_NUMBER, OTHER_NUMBER = 300, 301
UNKNOWN_NUMBER = 65_000


def is_app(name: str) -> Selector:
    return selector([requirement("any", "app", Operator.IN, [name])])


def engine_for(clauses: Iterable[Clause], *, enforced: bool = True) -> PolicyEngine:
    engine = PolicyEngine()
    rule = Rule(is_app("web"), tuple(clauses), Enforcement(enforced, enforced))
    engine.upsert_policy(Policy("p", "test", (rule,)))
    engine.upsert_identity(API_NUMBER, API)
    engine.upsert_identity(OTHER_NUMBER, Labels.of({"app": "other"}))
    engine.upsert_endpoint(1, WEB)
    return engine


def ingress(*, deny: bool = False, peers: tuple[Selector, ...] | None, ports: bool) -> Clause:
    return Clause(Direction.INGRESS, deny, peers, (HTTP,) if ports else None)


def from_api(engine: PolicyEngine, transport: Transport = HTTP, number: int = API_NUMBER) -> Verdict:
    return lookup(engine.map_state(1), number, transport, Direction.INGRESS)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(some.policies, max_size=4, unique_by=lambda policy: policy.name),
    st.dictionaries(st.integers(256, 262), some.peer_labels, max_size=7),
    some.endpoint_labels,
    st.booleans(),
)
def test_map_says_what_the_rules_say(
    policies: list[Policy], identities: dict[int, Labels], subject: Labels, rules_first: bool
) -> None:
    engine = PolicyEngine()
    for policy in policies if rules_first else ():
        engine.upsert_policy(policy)
    for number, labels in identities.items():
        engine.upsert_identity(number, labels)
    engine.upsert_endpoint(1, subject)
    for policy in policies:
        engine.upsert_policy(policy)
    rules = [rule for policy in policies for rule in policy.rules]
    peers: dict[int, Labels | None] = {**identities, UNKNOWN_NUMBER: None}
    state = engine.map_state(1)
    for direction in Direction:
        for number, peer in peers.items():
            for transport in (*some.TRANSPORTS, some.OTHER_TRANSPORT):
                meant = verdict(rules, subject, direction, peer, transport)
                assert lookup(state, number, transport, direction) is meant, (number, transport, direction)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(some.policies, max_size=4, unique_by=lambda policy: policy.name),
    st.dictionaries(st.integers(256, 262), some.peer_labels, max_size=7),
    some.workload_labels,
)
def test_no_entry_repeats_what_the_lookup_finds_without_it(
    policies: list[Policy], identities: dict[int, Labels], subject: Labels
) -> None:
    engine = PolicyEngine()
    for policy in policies:
        engine.upsert_policy(policy)
    for number, labels in identities.items():
        engine.upsert_identity(number, labels)
    engine.upsert_endpoint(1, subject)
    state = dict(engine.map_state(1))
    for key, entry in state.items():
        if key.identity == 0 and (key.dport, key.protocol) == ANY_TRANSPORT:
            continue
        rest = {other: value for other, value in state.items() if other != key}
        transport = Transport(key.dport, key.protocol)
        if transport == ANY_TRANSPORT or key.identity == 0:
            continue  # these answer for more than one packet
        found = lookup(rest, key.identity, transport, key.direction)
        assert found is not (Verdict.DENIED if entry.deny else Verdict.ALLOWED), key


# Who is spoken of, whether denied, whether on one port only: all that rules can say about a packet.
STATEMENTS = tuple(product((None, (is_app("api"),)), (False, True), (False, True)))


@pytest.mark.parametrize("order", ["rules first", "identities first"])
def test_every_combination_of_statements(order: str) -> None:
    """All 256: one map resolved at once, the other by an identity that comes later; both must be right."""
    for chosen in product((False, True), repeat=len(STATEMENTS)):
        clauses = tuple(
            ingress(peers=peers, deny=deny, ports=ports)
            for (peers, deny, ports), use in zip(STATEMENTS, chosen, strict=True)
            if use
        )
        rule = Rule(is_app("web"), clauses, Enforcement(True, False))
        engine = PolicyEngine()
        engine.upsert_endpoint(1, WEB)
        if order == "identities first":
            engine.upsert_identity(API_NUMBER, API)
        engine.upsert_policy(Policy("p", "test", (rule,)))
        engine.map_state(1)
        engine.upsert_identity(API_NUMBER, API)
        for (number, peer), transport in product(
            ((API_NUMBER, API), (UNKNOWN_NUMBER, None)), (HTTP, Transport(81, TCP))
        ):
            meant = verdict([rule], WEB, Direction.INGRESS, peer, transport)
            assert from_api(engine, transport, number) is meant, (clauses, number, transport)


def test_identity_denied_everywhere_and_port_open_to_everybody() -> None:
    engine = engine_for(
        [
            ingress(peers=None, ports=True),
            ingress(deny=True, peers=(is_app("api"),), ports=False),
        ]
    )
    assert from_api(engine) is Verdict.DENIED
    assert from_api(engine, number=OTHER_NUMBER) is Verdict.ALLOWED
    assert engine.map_state(1)[PolicyKey(API_NUMBER, 80, TCP, Direction.INGRESS)] == DENY


def test_port_denied_to_everybody_and_identity_allowed_everywhere() -> None:
    engine = engine_for(
        [
            ingress(deny=True, peers=None, ports=True),
            ingress(peers=(is_app("api"),), ports=False),
        ]
    )
    assert from_api(engine) is Verdict.DENIED
    assert from_api(engine, Transport(81, TCP)) is Verdict.ALLOWED


def test_deny_of_one_port_under_an_allow_of_everything() -> None:
    engine = engine_for(
        [
            ingress(peers=(WILDCARD,), ports=False),
            ingress(deny=True, peers=(is_app("api"),), ports=True),
        ]
    )
    assert from_api(engine) is Verdict.DENIED
    assert from_api(engine, Transport(81, TCP)) is Verdict.ALLOWED
    assert from_api(engine, number=UNKNOWN_NUMBER) is Verdict.ALLOWED


def test_deny_everything_leaves_one_entry() -> None:
    engine = engine_for(
        [
            ingress(deny=True, peers=(WILDCARD,), ports=False),
            ingress(peers=(is_app("api"),), ports=True),
        ]
    )
    entries = {key for key in engine.map_state(1) if key.direction is Direction.INGRESS}
    assert entries == {PolicyKey(0, 0, 0, Direction.INGRESS)}


def test_echo_reply_is_not_any_port() -> None:
    """ICMP type 0 stands as port 0 with protocol 1, beside the entry for everything."""
    reply = Transport(0, 1)
    engine = engine_for([Clause(Direction.INGRESS, False, None, (reply,))])
    assert from_api(engine, reply) is Verdict.ALLOWED
    assert from_api(engine) is Verdict.NO_RULE


def test_direction_that_no_rule_enforces_is_open() -> None:
    engine = engine_for([], enforced=False)
    assert dict(engine.map_state(1)) == {PolicyKey(0, 0, 0, direction): ALLOW for direction in Direction}
    assert engine.enforcement(1) == Enforcement(False, False)


def test_deny_rule_without_default_deny() -> None:
    engine = engine_for([ingress(deny=True, peers=(is_app("api"),), ports=True)], enforced=False)
    assert from_api(engine) is Verdict.DENIED
    assert from_api(engine, number=OTHER_NUMBER) is Verdict.ALLOWED


def test_endpoint_without_labels_is_closed_even_to_rules_for_everybody() -> None:
    engine = PolicyEngine()
    open_all = Rule(WILDCARD, (ingress(peers=(WILDCARD,), ports=False),), Enforcement(True, False))
    engine.upsert_policy(Policy("open", "test", (open_all,)))
    engine.upsert_endpoint(1, Labels())
    assert dict(engine.map_state(1)) == {}
    assert engine.enforcement(1) == Enforcement(True, True)
    engine.upsert_endpoint(1, WEB)
    assert engine.map_state(1)[PolicyKey(0, 0, 0, Direction.INGRESS)] == ALLOW


def test_modes() -> None:
    deny_all = Rule(WILDCARD, (), Enforcement(True, True))
    for mode, expected in (
        (EnforcementMode.NEVER, Enforcement(False, False)),
        (EnforcementMode.ALWAYS, Enforcement(True, True)),
    ):
        engine = PolicyEngine(mode=mode)
        engine.upsert_endpoint(1, WEB)
        assert engine.enforcement(1) == expected
        engine.upsert_policy(Policy("p", "test", (deny_all,)))
        assert engine.enforcement(1) == expected
