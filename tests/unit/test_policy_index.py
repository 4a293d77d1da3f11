# SPDX-License-Identifier: Apache-2.0
"""The two indexes against looking at everything, while their members come and go."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from identity.labels import Labels
from policy.index import LabelIndex, SelectorIndex
from policy.selectors import Selector
from tests.support import policy_strategies as some
from tests.support.policy_reference import matches

labels_by_number = st.dictionaries(st.integers(1, 8), some.peer_labels, max_size=8)


@settings(max_examples=300, deadline=None)
@given(labels_by_number, labels_by_number, st.lists(some.peer_selectors, max_size=6))
def test_labelled_things_by_selector(
    first: dict[int, Labels], second: dict[int, Labels], selectors: list[Selector]
) -> None:
    index: LabelIndex[int] = LabelIndex()
    held: dict[int, Labels] = {}
    for wave in (first, second):
        for number, labels in wave.items():
            assert index.remove(number) == held.pop(number, None)
            index.add(number, labels)
            held[number] = labels
        for each in selectors:
            assert index.find(each) == {n for n, labels in held.items() if matches(each, labels)}
    assert len(index) == len(held)
    for number in held:
        index.remove(number)
    assert not any(index.find(each) for each in selectors)


@settings(max_examples=300, deadline=None)
@given(
    st.sets(some.peer_selectors, max_size=8),
    st.sets(some.peer_selectors, max_size=4),
    st.lists(some.peer_labels, max_size=5),
)
def test_selectors_by_labels(selectors: set[Selector], gone: set[Selector], asked: list[Labels]) -> None:
    index: SelectorIndex[str] = SelectorIndex()
    for each in selectors | gone:
        index.add(each, str(each))
    for each in gone:
        index.remove(each)
    for labels in asked:
        wanted = sorted(str(each) for each in selectors - gone if matches(each, labels))
        assert sorted(index.find(labels)) == wanted


@given(some.label_selectors, some.peer_labels)
def test_selector_against_the_reference(selector: Selector, labels: Labels) -> None:
    assert selector.selects(labels) == matches(selector, labels)
