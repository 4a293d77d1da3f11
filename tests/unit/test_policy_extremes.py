# SPDX-License-Identifier: Apache-2.0
"""Policies beyond reason: 10 000 rules, rules that contradict each other, selectors of nobody and of all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.errors import DocumentError, PolicyMapOverflow
from policy.language import MAX_STORED, parse_policies, stored_text
from policy.model import DENY, TCP, Direction, Policy, PolicyKey, Transport
from tests.support.policy_reference import Verdict, lookup, verdict

WEB = Labels.of({"app": "web"})
RULES = 10_000
HTTP = Transport(80, TCP)


def policy(rules: list[dict[str, Any]], name: str = "p") -> Policy:
    (parsed,) = parse_policies(json.dumps(rules), "test", name=name)
    return parsed


def allow(peer: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "endpointSelector": {"matchLabels": {"app": "web"}},
        "ingress": [{"fromEndpoints": [peer], **more}],
    }


def many(**more: Any) -> list[Policy]:
    """Return two policies: all rules together take more bytes than one may have."""
    rules = [allow({"matchLabels": {"app": f"app-{number}"}}, **more) for number in range(RULES)]
    return [policy(rules[: RULES // 2], "p"), policy(rules[RULES // 2 :], "q")]


def engine_with(*policies: Policy, identities: int = RULES) -> PolicyEngine:
    engine = PolicyEngine()
    for number in range(identities):
        engine.upsert_identity(256 + number, Labels.of({"app": f"app-{number}"}))
    for each in policies:
        engine.upsert_policy(each)
    engine.upsert_endpoint(1, WEB)
    return engine


def test_ten_thousand_rules_say_what_each_says() -> None:
    engine = engine_with(*many(toPorts=[{"ports": [{"port": 80, "protocol": "TCP"}]}]), identities=RULES + 50)
    wanted = {PolicyKey(256 + number, 80, TCP, Direction.INGRESS) for number in range(RULES)}
    assert engine.map_state(1).keys() == wanted | {PolicyKey(0, 0, 0, Direction.EGRESS)}
    assert engine.delete_policy("p")
    assert engine.delete_policy("q")
    assert engine.map_state(1).keys() == {PolicyKey(0, 0, 0, direction) for direction in Direction}
    assert list(engine.selectors()) == []


def test_ten_thousand_rules_under_a_requirement_of_one() -> None:
    required = policy(
        [{"endpointSelector": {}, "ingress": [{"fromRequires": [{"matchLabels": {"env": "x"}}]}]}], "r"
    )
    engine = engine_with(*many(), required)
    assert not [key for key in engine.map_state(1) if key.direction is Direction.INGRESS]
    engine.upsert_identity(256, Labels.of({"app": "app-0", "env": "x"}))
    assert [key for key in engine.map_state(1) if key.direction is Direction.INGRESS] == [
        PolicyKey(256, 0, 0, Direction.INGRESS)
    ]


def test_ten_thousand_rules_on_two_ports_do_not_fit_and_leave_what_was() -> None:
    engine = engine_with(policy([allow({"matchLabels": {"app": "app-1"}})]))
    engine.take_changes()
    before = dict(engine.map_state(1))
    ports = [{"ports": [{"port": 80, "endPort": 81, "protocol": "TCP"}]}]
    for each in many(toPorts=ports):
        engine.upsert_policy(each)
    assert engine.take_changes() == {}
    assert dict(engine.map_state(1)) == before
    error = engine.errors()[1]
    assert isinstance(error, PolicyMapOverflow)
    assert error.entries == 2 * RULES + 1


def test_a_policy_that_etcd_would_not_take_is_refused_wherever_it_comes_from() -> None:
    """By the bytes it takes as it is stored: how it was written does not count."""
    whole = {"kind": "CiliumNetworkPolicy", "spec": allow({"matchLabels": {"app": "x"}})}

    def noted(characters: int) -> dict[str, Any]:
        return {**whole, "metadata": {"name": "p", "annotations": {"note": "é" * characters}}}

    fitting = (MAX_STORED - len(stored_text(noted(0)))) // 2
    assert len(stored_text(noted(fitting)).encode()) in (MAX_STORED - 1, MAX_STORED)
    for text in (json.dumps(noted(fitting), indent=2, ensure_ascii=False), stored_text(noted(fitting))):
        (parsed,) = parse_policies(text, "test")
        assert parsed.document == noted(fitting)
    with pytest.raises(
        DocumentError, match=rf"policy p takes 150000\d bytes .* than the {MAX_STORED}"
    ) as caught:
        parse_policies(stored_text(noted(fitting + 1)), "test")
    assert "split" in caught.value.hint


def test_a_text_of_more_values_than_allowed_is_refused_whole() -> None:
    rule = allow({"matchLabels": {f"key-{number}": "x" for number in range(20)}})
    with pytest.raises(DocumentError, match="more than 200000 values"):
        policy([rule] * RULES)


def test_everything_allowed_and_denied_is_denied() -> None:
    """By everybody to everybody, in both orders, with and without ports."""
    everybody: list[dict[str, Any]] = [{"fromEntities": ["all"]}, {"fromEndpoints": [{}]}]
    for peers in everybody:
        allows = {"endpointSelector": {}, "ingress": [peers]}
        denies = {"endpointSelector": {}, "ingressDeny": [peers]}
        for rules in ([allows, denies], [denies, allows]):
            engine = engine_with(policy(rules), identities=3)
            ingress = {key: e for key, e in engine.map_state(1).items() if key.direction is Direction.INGRESS}
            assert ingress == {PolicyKey(0, 0, 0, Direction.INGRESS): DENY}


NOBODY = [
    {"matchLabels": {"app": "nobody"}},
    {"matchExpressions": [{"key": "app", "operator": "In", "values": ["a"]}], "matchLabels": {"app": "b"}},
    {
        "matchExpressions": [
            {"key": "app", "operator": "Exists"},
            {"key": "app", "operator": "DoesNotExist"},
        ]
    },
]


@pytest.mark.parametrize("section", ["ingress", "ingressDeny"])
@pytest.mark.parametrize("selector", NOBODY, ids=["unknown", "two values", "there and not there"])
def test_selector_of_nobody_says_nothing(selector: dict[str, Any], section: str) -> None:
    rule = {"endpointSelector": {}, section: [{"fromEndpoints": [selector]}]}
    parsed = policy([rule])
    engine = engine_with(parsed, identities=3)
    assert lookup(engine.map_state(1), 256, HTTP, Direction.INGRESS) is Verdict.NO_RULE
    peer = Labels.of({"app": "app-0"})
    assert verdict(parsed.rules, WEB, Direction.INGRESS, peer, HTTP) is Verdict.NO_RULE


def test_subject_of_nobody_changes_nothing() -> None:
    engine = engine_with(identities=3)
    engine.take_changes()
    engine.upsert_policy(
        policy([{"endpointSelector": NOBODY[2], "ingressDeny": [{"fromEntities": ["all"]}]}])
    )
    assert engine.take_changes() == {}


def test_selector_of_everybody_who_lacks_a_label() -> None:
    """NotIn alone selects the world too: an entry for each identity, none for those nobody knows."""
    nobody_else = {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["app-0"]}]}
    engine = engine_with(policy([allow(nobody_else)]), identities=3)
    engine.upsert_identity(2, Labels.of(["reserved:world"]))
    allowed = [
        number
        for number in (2, 256, 257, 258, 999)
        if lookup(engine.map_state(1), number, HTTP, Direction.INGRESS) is Verdict.ALLOWED
    ]
    assert allowed == [2, 257, 258]
