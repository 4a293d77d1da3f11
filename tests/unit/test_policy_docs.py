# SPDX-License-Identifier: Apache-2.0
"""docs/policy.md: its examples hold, its table of fields is the code's, its bench exists."""

from __future__ import annotations

import pytest

from policy.engine import PolicyEngine
from policy.fields import SECTIONS, Status, markdown_table
from policy.language import parse_policies
from tests.support.policy_examples import DOCUMENT, Example, examples
from tests.support.policy_reference import lookup, verdict

PEER = 1_000


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.text.splitlines()[3].strip())
def test_example(example: Example) -> None:
    policies = parse_policies(example.text, "docs/policy.md", name="example")
    rules = [rule for policy in policies for rule in policy.rules]
    assert len(example.packets) >= 3
    for packet in example.packets:
        engine = PolicyEngine()
        for policy in policies:
            engine.upsert_policy(policy)
        engine.upsert_identity(PEER, packet.peer)
        engine.upsert_endpoint(1, packet.endpoint)
        found = lookup(engine.map_state(1), PEER, packet.transport, packet.direction)
        assert found is packet.verdict, packet
        meant = verdict(rules, packet.endpoint, packet.direction, packet.peer, packet.transport)
        assert meant is packet.verdict, packet


def test_table_of_fields_is_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text.partition("prints it -->\n")[2].partition("<!-- end of fields -->")[0]
    assert table == markdown_table(), "paste the output of python -m policy.fields between the markers"


def test_every_field_has_a_note_that_fits_a_table() -> None:
    for fields in SECTIONS.values():
        names = [field.name for field in fields]
        assert len(names) == len(set(names))
        for field in fields:
            assert field.note
            assert "|" not in field.note
            assert isinstance(field.status, Status)
