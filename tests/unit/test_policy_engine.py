# SPDX-License-Identifier: Apache-2.0
"""The engine under change: what it publishes adds up to what a fresh engine would resolve."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.errors import PolicyMapOverflow
from policy.language import parse_policies
from policy.model import (
    ALLOW,
    MAX_ENTRIES,
    TCP,
    Clause,
    Direction,
    Enforcement,
    MapChange,
    NamedPort,
    Policy,
    PolicyEntry,
    PolicyKey,
    Requires,
    Rule,
    Transport,
)
from policy.selectors import WILDCARD, Operator, Selector, requirement, selector
from tests.support import policy_strategies as some
from tests.support.policy_reference import lookup, verdict

Maps = dict[int, dict[PolicyKey, PolicyEntry]]
numbers = st.integers(256, 260)
endpoint_ids = st.integers(1, 3)


def apply(maps: Maps, changes: dict[int, MapChange]) -> None:
    for endpoint_id, change in changes.items():
        held = maps[endpoint_id]
        assert not change.deletes & change.upserts.keys()
        for key in change.deletes:
            del held[key]  # what was never there must not be deleted
        for key, entry in change.upserts.items():
            assert held.get(key) != entry, "an upsert that changes nothing"
            held[key] = entry


class EngineMachine(RuleBasedStateMachine):
    """Random policies, identities and endpoints come, change and go; changes are taken now and then."""

    @initialize(
        policies=st.lists(some.policies, min_size=1, max_size=3),
        identities=st.dictionaries(numbers, some.peer_labels, min_size=3),
        endpoints=st.dictionaries(endpoint_ids, some.endpoint_labels, min_size=1),
    )
    def start(
        self, policies: list[Policy], identities: dict[int, Labels], endpoints: dict[int, Labels]
    ) -> None:
        self.engine = PolicyEngine()
        self.policies: dict[str, Policy] = {}
        self.identities: dict[int, Labels] = {}
        self.endpoints: dict[int, Labels] = {}
        self.maps: Maps = {}
        # Numbers that stopped to mean what they meant when changes were last taken.
        self.gone: set[int] = set()
        for endpoint_id, labels in endpoints.items():
            self.upsert_endpoint(endpoint_id, labels)
        for number, labels in identities.items():
            self.upsert_identity(number, labels)
        for policy in policies:
            self.upsert_policy(policy)
        self.take_changes()

    @rule(policy=some.policies)
    def upsert_policy(self, policy: Policy) -> None:
        self.engine.upsert_policy(policy)
        self.policies[policy.name] = policy

    @rule(name=st.sampled_from(["p1", "p2", "p3", "p4"]))
    def delete_policy(self, name: str) -> None:
        assert self.engine.delete_policy(name) == (self.policies.pop(name, None) is not None)

    @rule(number=numbers, labels=some.peer_labels)
    def upsert_identity(self, number: int, labels: Labels) -> None:
        self.engine.upsert_identity(number, labels)
        if self.identities.get(number, labels) != labels:
            self.gone.add(number)
        self.identities[number] = labels

    @rule(number=numbers)
    def delete_identity(self, number: int) -> None:
        self.engine.delete_identity(number)
        if self.identities.pop(number, None) is not None:
            self.gone.add(number)

    @rule(endpoint_id=endpoint_ids, labels=some.endpoint_labels)
    def upsert_endpoint(self, endpoint_id: int, labels: Labels) -> None:
        self.engine.upsert_endpoint(endpoint_id, labels)
        self.endpoints[endpoint_id] = labels
        self.maps.setdefault(endpoint_id, {})

    @rule(endpoint_id=endpoint_ids)
    def delete_endpoint(self, endpoint_id: int) -> None:
        self.engine.delete_endpoint(endpoint_id)
        self.endpoints.pop(endpoint_id, None)
        self.maps.pop(endpoint_id, None)

    @rule()
    def take_changes(self) -> None:
        before = {endpoint_id: dict(held) for endpoint_id, held in self.maps.items()}
        apply(self.maps, self.engine.take_changes())
        assert self.engine.take_changes() == {}
        fresh = PolicyEngine()
        for endpoint_id, labels in self.endpoints.items():
            fresh.upsert_endpoint(endpoint_id, labels)
        for number, labels in self.identities.items():
            fresh.upsert_identity(number, labels)
        for policy in self.policies.values():
            fresh.upsert_policy(policy)
        for endpoint_id in self.endpoints:
            wanted = dict(fresh.map_state(endpoint_id))
            if len(wanted) > self.engine.limit:
                assert self.engine.errors()[endpoint_id].entries == len(wanted)
                held = before[endpoint_id].items()
                assert self.maps[endpoint_id] == {k: e for k, e in held if k.identity not in self.gone}
            else:
                assert endpoint_id not in self.engine.errors()
                assert self.maps[endpoint_id] == wanted
            if self.maps[endpoint_id]:
                assert self.maps[endpoint_id] == dict(self.engine.map_state(endpoint_id))
        self.gone.clear()

    @rule(transport=st.sampled_from(some.TRANSPORTS), direction=st.sampled_from(list(Direction)))
    def send(self, transport: Transport, direction: Direction) -> None:
        rules = [each for policy in self.policies.values() for each in policy.rules]
        for endpoint_id, subject in self.endpoints.items():
            state = self.engine.map_state(endpoint_id)
            for number, labels in self.identities.items():
                meant = verdict(rules, subject, direction, labels, transport)
                assert lookup(state, number, transport, direction) is meant

    @invariant()
    def keeps_no_selector_without_a_rule(self) -> None:
        """Narrowed ones are let go of when the policies that used them are looked at again."""
        if not self.policies:
            for endpoint_id in self.endpoints:
                self.engine.enforcement(endpoint_id)
            assert list(self.engine.selectors()) == []


EngineMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestChangesAddUp = pytest.mark.timeout(300)(EngineMachine.TestCase)


class DenseWorld:
    """The same with a plain random generator and few distinct values: long runs in which every step
    meets what earlier steps did."""

    def __init__(self, seed: int, limit: int) -> None:
        self.random = random.Random(seed)
        self.machine = EngineMachine()
        self.machine.start([], {}, {})
        self.machine.engine = PolicyEngine(limit=limit)
        self.machine.upsert_endpoint(1, app("a"))
        self.machine.upsert_endpoint(2, app("b"))

    def app_selector(self) -> Selector:
        names = self.random.sample("abc", self.random.choice((1, 1, 2)))
        return selector([requirement("any", "app", Operator.IN, names)])

    def clause(self) -> Clause:
        peers = self.random.choice((None, (WILDCARD,), *((self.app_selector(),) for _ in range(5))))
        transports = self.random.choice((None, (), some.TRANSPORTS[:1], some.TRANSPORTS[:2]))
        names = () if transports else (NamedPort("web", TCP),) * (transports is not None)
        direction = self.random.choice((Direction.INGRESS, Direction.INGRESS, Direction.EGRESS))
        endpoints = peers is not None and self.random.random() < 0.5
        return Clause(direction, self.random.random() < 0.3, peers, transports, names, endpoints)

    def policy(self) -> Policy:
        subject = self.random.choice((WILDCARD, self.app_selector()))
        clauses = tuple(self.clause() for _ in range(self.random.randint(0, 2)))
        enforces = Enforcement(self.random.random() < 0.8, self.random.random() < 0.5)
        requires: tuple[Requires, ...] = ()
        if self.random.random() < 0.2:
            required = self.app_selector().requirements
            requires = (Requires(Direction.INGRESS, self.random.random() < 0.3, required),)
        rule = Rule(subject, clauses, enforces, requires)
        return Policy(self.random.choice(("p1", "p2", "p3")), "test", (rule,))

    def labels(self) -> Labels:
        port = self.random.choice(("", "", "80", "80/TCP", "4242"))
        return app(self.random.choice("abc"), **({"holdfast.port.web": port} if port else {}))

    def send(self) -> None:
        """Compare verdicts; where a map overflowed it says what was meant before."""
        transport = self.random.choice((some.TRANSPORTS[0], some.OTHER_TRANSPORT))
        self.machine.take_changes()
        if not self.machine.engine.errors():
            self.machine.send(transport, self.random.choice(list(Direction)))

    def step(self) -> None:
        labels, number = self.labels(), self.random.randint(256, 260)
        steps: tuple[tuple[int, Callable[[], object]], ...] = (
            (4, lambda: self.machine.upsert_identity(number, labels)),
            (2, lambda: self.machine.delete_identity(number)),
            (2, lambda: self.machine.upsert_policy(self.policy())),
            (1, lambda: self.machine.delete_policy(self.random.choice(("p1", "p2", "p3")))),
            (1, lambda: self.machine.upsert_endpoint(self.random.randint(1, 3), labels)),
            (1, lambda: self.machine.engine.enforcement(min(self.machine.endpoints))),
            (3, self.machine.take_changes),
            (2, self.send),
        )
        weights, actions = zip(*steps, strict=True)
        self.random.choices(actions, weights)[0]()


@pytest.mark.parametrize("limit", [MAX_ENTRIES, 4])
@pytest.mark.parametrize("seed", range(8))
def test_long_runs_add_up(seed: int, limit: int) -> None:
    """With a limit of 4 entries maps overflow and fit again all the time."""
    world = DenseWorld(seed, limit)
    for _ in range(400):
        world.step()
    world.machine.take_changes()


def rules_allowing(*apps: str, subject: str = "web") -> Policy:
    peers = ", ".join(f"{{matchLabels: {{app: {app}}}}}" for app in apps)
    section = (
        f"endpointSelector: {{matchLabels: {{app: {subject}}}}}, ingress: [{{fromEndpoints: [{peers}]}}]"
    )
    return parse_policies(f"[{{{section}}}]", "test", name=f"allow-{subject}")[0]


def app(name: str, **more: str) -> Labels:
    return Labels.of(dict(more, app=name))


def entry(identity: int) -> PolicyKey:
    return PolicyKey(identity, 0, 0, Direction.INGRESS)


def test_new_identity_changes_only_its_entry() -> None:
    engine = PolicyEngine()
    engine.upsert_policy(rules_allowing("api"))
    engine.upsert_endpoint(1, app("web"))
    engine.upsert_endpoint(2, app("db"))
    engine.take_changes()
    engine.upsert_identity(300, app("api"))
    engine.upsert_identity(301, app("other"))
    assert engine.take_changes() == {1: MapChange({entry(300): ALLOW}, set())}
    engine.delete_identity(300)
    assert engine.take_changes() == {1: MapChange({}, {entry(300)})}


def test_new_identity_after_a_rule_changed() -> None:
    """Where selectors stand is looked up anew after each resolution."""
    engine = PolicyEngine()
    engine.upsert_policy(rules_allowing("api"))
    engine.upsert_endpoint(1, app("web"))
    engine.take_changes()
    engine.upsert_identity(300, app("api"))
    engine.upsert_policy(rules_allowing("api", "db"))
    engine.take_changes()
    engine.upsert_identity(301, app("db"))
    assert engine.take_changes() == {1: MapChange({entry(301): ALLOW}, set())}


def test_rule_touches_only_the_endpoints_it_selects() -> None:
    engine = PolicyEngine()
    engine.upsert_identity(300, app("api"))
    engine.upsert_endpoint(1, app("web"))
    engine.upsert_endpoint(2, app("db"))
    engine.take_changes()
    engine.upsert_policy(rules_allowing("api"))
    assert engine.take_changes() == {1: MapChange({entry(300): ALLOW}, {entry(0)})}


def test_change_that_is_taken_back_is_no_change() -> None:
    engine = PolicyEngine()
    engine.upsert_policy(rules_allowing("api"))
    engine.upsert_endpoint(1, app("web"))
    engine.take_changes()
    engine.upsert_identity(300, app("api"))
    engine.delete_identity(300)
    engine.upsert_policy(rules_allowing("api", "db"))
    engine.upsert_policy(rules_allowing("api"))
    assert engine.take_changes() == {}


def test_equal_rules_are_no_new_revision() -> None:
    engine = PolicyEngine()
    engine.upsert_policy(rules_allowing("api"))
    revision = engine.revision
    engine.upsert_policy(replace(rules_allowing("api"), origin="elsewhere"))
    assert engine.revision == revision
    assert engine.policies["allow-web"].origin == "elsewhere"
    assert not engine.delete_policy("nobody")
    assert engine.delete_policy("allow-web")
    assert engine.revision == revision + 1


def test_relabelled_endpoint_gets_the_difference() -> None:
    engine = PolicyEngine()
    engine.upsert_identity(300, app("api"))
    engine.upsert_policy(rules_allowing("api"))
    engine.upsert_policy(rules_allowing("api", subject="shop"))
    engine.upsert_endpoint(1, app("web"))
    engine.take_changes()
    engine.upsert_endpoint(1, app("shop"))
    assert engine.take_changes() == {}
    engine.upsert_endpoint(1, app("free"))
    assert engine.take_changes() == {1: MapChange({entry(0): ALLOW}, {entry(300)})}


def test_endpoints_with_equal_labels_share_one_policy() -> None:
    engine = PolicyEngine()
    engine.upsert_identity(300, app("api"))
    engine.upsert_policy(rules_allowing("api"))
    for endpoint_id in (1, 2):
        engine.upsert_endpoint(endpoint_id, app("web"))
    changes = engine.take_changes()
    assert changes[1] == changes[2]
    engine.upsert_identity(301, app("api"))
    changes = engine.take_changes()
    assert changes[1] is changes[2]


def test_overflow_keeps_the_last_state_that_fitted() -> None:
    engine = PolicyEngine(limit=3)
    engine.upsert_policy(rules_allowing("api"))
    engine.upsert_endpoint(1, app("web"))
    engine.upsert_identity(300, app("api"))
    engine.upsert_identity(301, app("api"))
    maps: Maps = {1: {}}
    apply(maps, engine.take_changes())
    last = dict(maps[1])
    assert len(last) == 3
    for number in (302, 303, 304):
        engine.upsert_identity(number, app("api"))
    assert engine.take_changes() == {}
    assert dict(engine.map_state(1)) == last
    error = engine.errors()[1]
    assert isinstance(error, PolicyMapOverflow)
    assert (error.endpoint_id, error.entries, error.limit) == (1, 6, 3)
    for number in (300, 303, 304):
        engine.delete_identity(number)
    apply(maps, engine.take_changes())
    assert engine.errors() == {}
    assert maps[1].keys() == {entry(301), entry(302), PolicyKey(0, 0, 0, Direction.EGRESS)}


def ports_for_db(subject: str) -> Policy:
    ports = "toPorts: [{ports: [{port: '8000', endPort: 8010, protocol: TCP}]}]"
    peer = "fromEndpoints: [{matchLabels: {app: db}}]"
    text = f"[{{endpointSelector: {{matchLabels: {{app: {subject}}}}}, ingress: [{{{peer}, {ports}}}]}}]"
    return parse_policies(text, "test", name=f"allow-{subject}")[0]


@pytest.mark.parametrize("told", [True, False], ids=["later", "at once"])
@pytest.mark.parametrize("subject", ["web", "shop"], ids=["other rules", "other labels"])
def test_number_that_may_be_used_again_leaves_a_map_that_is_kept(subject: str, told: bool) -> None:
    """Of 300 and 301, which only the last policy that fitted knows, one is gone and one is somebody else."""
    engine, maps = PolicyEngine(limit=4), Maps({1: {}})
    engine.upsert_policy(rules_allowing("api"))
    for number, labels in ((300, app("api")), (301, app("api")), (302, app("db"))):
        engine.upsert_identity(number, labels)
    engine.upsert_endpoint(1, app("web"))
    apply(maps, engine.take_changes())
    assert maps[1].keys() >= {entry(300), entry(301)}
    engine.upsert_policy(ports_for_db(subject))
    engine.upsert_endpoint(1, app(subject))
    if told:
        assert engine.take_changes() == {}
    engine.delete_identity(300)
    engine.upsert_identity(301, app("evil"))
    apply(maps, engine.take_changes())
    assert maps[1].keys() == {PolicyKey(0, 0, 0, Direction.EGRESS)}
    engine.upsert_identity(300, app("evil"))
    assert engine.take_changes() == {}
    assert dict(engine.map_state(1)) == maps[1]
    engine.upsert_policy(rules_allowing("db", subject=subject))
    apply(maps, engine.take_changes())
    assert maps[1].keys() == {entry(302), PolicyKey(0, 0, 0, Direction.EGRESS)}


def test_map_of_a_former_life_is_kept_without_those_who_are_gone() -> None:
    engine = PolicyEngine(limit=4)
    engine.upsert_policy(ports_for_db("web"))
    for number, labels in ((301, app("api")), (302, app("db"))):
        engine.upsert_identity(number, labels)
    engine.upsert_endpoint(1, app("web"))
    assert engine.take_changes() == {}
    kept = engine.adopt(1, dict.fromkeys([(each, 0, 0, 0) for each in (0, 300, 301)], (False, 0, 0)))
    assert kept == dict(engine.map_state(1)) == dict.fromkeys((entry(0), entry(301)), ALLOW)
    assert engine.errors().keys() == {1}
    engine.delete_identity(301)
    assert engine.take_changes() == {1: MapChange({}, {entry(301)})}
    engine.upsert_policy(rules_allowing("db"))
    changes = engine.take_changes()
    assert changes == {
        1: MapChange({entry(302): ALLOW, PolicyKey(0, 0, 0, Direction.EGRESS): ALLOW}, {entry(0)})
    }


def test_overflow_of_a_new_endpoint_is_not_an_empty_map() -> None:
    engine = PolicyEngine(limit=1)
    engine.upsert_policy(rules_allowing("api"))
    engine.upsert_identity(300, app("api"))
    engine.upsert_endpoint(1, app("web"))
    assert engine.take_changes() == {}
    with pytest.raises(PolicyMapOverflow, match="endpoint 1 needs 2 map entries, its map holds 1"):
        engine.map_state(1)
    engine.delete_endpoint(1)
    assert engine.errors() == {}


def test_overflow_of_one_endpoint_leaves_the_others_alone() -> None:
    engine = PolicyEngine(limit=2)
    engine.upsert_policy(rules_allowing("api"))
    engine.upsert_endpoint(1, app("web"))
    engine.upsert_endpoint(2, app("free"))
    for number in range(300, 310):
        engine.upsert_identity(number, app("api"))
    assert engine.take_changes().keys() == {2}
    assert engine.errors().keys() == {1}


def test_prefixes_are_known_while_a_rule_names_them() -> None:
    text = "[{endpointSelector: {}, egress: [{toCIDR: [10.1.2.3/8, 0.0.0.0/0, 'fd00::1']}]}]"
    engine = PolicyEngine()
    engine.upsert_policy(parse_policies(text, "test", name="one")[0])
    engine.upsert_policy(parse_policies(text, "test", name="two")[0])
    assert engine.cidrs() == {"10.0.0.0/8", "fd00::1/128"}
    engine.delete_policy("one")
    assert engine.cidrs() == {"10.0.0.0/8", "fd00::1/128"}
    engine.delete_policy("two")
    assert engine.cidrs() == frozenset()


def test_selectors_say_what_they_select() -> None:
    engine = PolicyEngine()
    engine.upsert_identity(300, app("api"))
    engine.upsert_policy(rules_allowing("api", "db"))
    uses = {str(each.selector): (each.users, set(each.identities)) for each in engine.selectors()}
    assert uses == {"any:app=api": (1, {300}), "any:app=db": (1, set())}


def test_unknown_endpoint_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        PolicyEngine().map_state(1)
