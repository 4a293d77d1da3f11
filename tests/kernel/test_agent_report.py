# SPDX-License-Identifier: Apache-2.0
"""What is shown of an endpoint's policy before the agent knows any: what its pinned map enforces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.plumbing import PolicyMapStore
from agent.report_endpoints import held_policy
from datapath.mapspec import policy_map_name
from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.language import parse_policies
from tests.support.bpf import own_bpffs
from tests.support.bpflab import CATALOGUE

WEB, CLIENT = (Labels.parse(f"container:app={name};") for name in ("web", "client"))
CASES = {
    "no policy": ("", "none"),
    "one way in": ("ingress: [{fromEndpoints: [{matchLabels: {app: client}}]}]", "ingress"),
    "one way out": ("egress: [{toEndpoints: [{matchLabels: {app: client}}]}]", "egress"),
    "both ways": ("ingress: [{}], egress: [{toEndpoints: [{matchLabels: {app: client}}]}]", "both"),
    "all but one": ("ingress: [{fromEntities: [all]}], ingressDeny: [{fromEntities: [world]}]", "ingress"),
    "nobody": ("ingressDeny: [{fromEntities: [all]}], egressDeny: [{toEntities: [all]}]", "both"),
}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with own_bpffs(tmp_path) as made:
        made.mkdir(parents=True, exist_ok=True)
        yield made


@pytest.fixture
def store(root: Path) -> Iterator[PolicyMapStore]:
    made = PolicyMapStore(CATALOGUE, root)
    yield made
    made.remove(1)


@pytest.mark.parametrize(("rule", "shown"), CASES.values(), ids=CASES)
def test_the_map_tells_which_direction_is_restricted(store: PolicyMapStore, rule: str, shown: str) -> None:
    engine = PolicyEngine()
    engine.upsert_identity(300, CLIENT)
    engine.upsert_identity(2, Labels.parse("reserved:world;"))
    engine.upsert_endpoint(1, WEB)
    if rule:
        (parsed,) = parse_policies(
            f"[{{endpointSelector: {{matchLabels: {{app: web}}}}, {rule}}}]", "test", name="p"
        )
        engine.upsert_policy(parsed)
    store.get(1).sync(engine.map_state(1).items())
    found = held_policy(store, 1)
    assert (found.policy_enabled, found.error) == (shown, "")
    assert found.map_entries == len(engine.map_state(1)) > 0
    assert found.policy_revision == 0


def test_an_empty_map_and_none_let_nothing_through(store: PolicyMapStore, root: Path) -> None:
    assert held_policy(store, 1).policy_enabled == "both"
    assert not (root / policy_map_name(1)).exists(), "looking made a map"
    store.get(1)
    assert held_policy(store, 1).policy_enabled == "both"
