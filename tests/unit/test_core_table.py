# SPDX-License-Identifier: Apache-2.0
"""Tables: precedence of sources, missing is not deleted, what a subscriber sees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.table import Deadlines, Source, Table


def two_sources() -> Table[str, int]:
    return Table("test", ("first", "second"))


def test_the_higher_source_wins_and_the_lower_becomes_visible_when_it_lets_go() -> None:
    table = two_sources()
    table.source("second").upsert("10.0.0.1", 2)
    table.source("first").upsert("10.0.0.1", 1)
    assert table.get("10.0.0.1") == 1
    assert table.owner("10.0.0.1") == "first"
    table.source("first").delete("10.0.0.1")
    assert table.get("10.0.0.1") == 2
    assert table.owner("10.0.0.1") == "second"


def test_a_change_below_a_higher_source_is_no_change() -> None:
    table = two_sources()
    table.source("first").upsert("a", 1)
    subscription = table.subscribe()
    subscription.take()
    revision = table.revision
    table.source("second").upsert("a", 5)
    assert (len(subscription), table.revision) == (0, revision)


def test_a_relist_keeps_what_it_lacks_until_the_grace_has_ended() -> None:
    table = two_sources()
    source = table.source("first")
    source.relist({"a": 1, "b": 2}, grace=60, now=0)
    assert source.relist({"a": 1}, grace=60, now=10) == 1
    assert table.get("b") == 2
    assert source.expire(now=69) == []
    assert source.expire(now=70) == ["b"]
    assert table.get("b") is None


def test_a_second_relist_does_not_prolong_the_grace() -> None:
    source = two_sources().source("first")
    source.relist({"a": 1}, grace=60, now=0)
    source.relist({}, grace=60, now=10)
    assert source.relist({}, grace=60, now=50) == 0
    assert source.expire(now=70) == ["a"]


def test_what_comes_back_is_no_longer_missing() -> None:
    source = two_sources().source("first")
    source.upsert("a", 1)
    source.relist({}, grace=60, now=0)
    source.upsert("a", 1)
    assert source.expire(now=1000) == []


def test_a_delivered_deletion_counts_at_once() -> None:
    table = two_sources()
    table.source("first").upsert("a", 1)
    table.source("first").delete("a")
    assert "a" not in table


def test_in_sync_means_every_source() -> None:
    table = two_sources()
    table.source("first").mark_in_sync()
    assert not table.in_sync
    table.source("second").mark_in_sync()
    assert table.in_sync


async def test_a_subscriber_starts_with_everything_and_is_woken_by_a_change() -> None:
    table = two_sources()
    table.source("second").upsert("old", 1)
    subscription = table.subscribe()
    assert subscription.take() == ["old"]
    waiter = asyncio.create_task(subscription.wait())
    await asyncio.sleep(0)
    assert not waiter.done()
    table.source("first").upsert("new", 1)
    await asyncio.wait_for(waiter, 1)
    assert subscription.take() == ["new"]


def test_take_with_a_limit_leaves_the_rest_in_order() -> None:
    table = two_sources()
    subscription = table.subscribe()
    for name in "abc":
        table.source("first").upsert(name, 1)
    assert subscription.take(2) == ["a", "b"]
    assert subscription.take(2) == ["c"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["first", "second"]), st.sampled_from("abc"), st.none() | st.integers(0, 2))
)


@given(STEPS)
def test_a_subscriber_that_follows_every_change_holds_the_table(
    steps: list[tuple[str, str, int | None]],
) -> None:
    table = two_sources()
    subscription = table.subscribe()
    copy: dict[str, int] = {}
    for source, key, value in steps:
        if value is None:
            table.source(source).delete(key)
        else:
            table.source(source).upsert(key, value)
        for changed in subscription.take():
            current = table.get(changed)
            if current is None:
                copy.pop(changed, None)
            else:
                copy[changed] = current
    assert copy == dict(table.items())
    assert len(table) == len(copy)


# --- many at once


class Tables:
    """The same changes one by one and many at once."""

    def __init__(self) -> None:
        self.one, self.many = two_sources(), two_sources()
        self.seen = [each.subscribe() for each in (self.one, self.many)]

    def agree(self) -> None:
        for name in ("first", "second"):
            assert dict(self.one.source(name).entries()) == dict(self.many.source(name).entries())
            assert self.one.source(name).missing == self.many.source(name).missing
        assert self.one.revision == self.many.revision
        assert sorted(self.seen[0].take()) == sorted(self.seen[1].take())
        assert sorted(self.many.keys()) == sorted(dict(self.many.items()))
        assert len(self.many) == len(dict(self.many.items()))
        every = [*"abcd"]
        assert dict(self.many.get_many(every)) == {
            key: value for key in every if (value := self.one.get(key)) is not None
        }


ROUNDS = st.lists(
    st.tuples(
        st.sampled_from(["first", "second"]),
        st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2), max_size=4),
        st.booleans(),
    )
)


@given(ROUNDS)
def test_many_at_once_are_what_they_are_one_by_one(rounds: list[tuple[str, dict[str, int], bool]]) -> None:
    tables = Tables()
    for now, (source, items, is_list) in enumerate(rounds):
        one, many = tables.one.source(source), tables.many.source(source)
        if is_list:
            _relist_plainly(one, items, grace=2, now=now)
            listing = many.listing()
            for item in items.items():
                listing.add([item])
            listing.end(grace=2, now=now)
        else:
            for key, value in items.items():
                one.upsert(key, value)
            many.upsert_many(list(items.items()))
        assert sorted(one.expire(now)) == sorted(many.expire(now))
        tables.agree()


def _relist_plainly(source: Source[str, int], items: dict[str, int], *, grace: float, now: float) -> None:
    """The obvious way: compare the keys, write all, remember what was lacking."""
    absent = [key for key in source.entries() if key not in items]
    for key, value in items.items():
        source.upsert(key, value)
    for key in absent:
        if key not in source.missing:
            source.mark_missing([key], now + grace)


def test_a_list_that_breaks_off_makes_nothing_missing() -> None:
    source = two_sources().source("first")
    source.upsert_many([("a", 1), ("b", 2)])
    source.listing().add([("a", 3), ("c", 4)])
    listing = source.listing()
    listing.add([("a", 5), ("b", 2)])
    assert listing.end(grace=60, now=0) == 1
    assert dict(source.entries()) == {"a": 5, "b": 2, "c": 4}
    assert list(source.missing) == ["c"]


def test_a_listed_record_that_can_not_be_used_is_not_missing() -> None:
    source = two_sources().source("first")
    source.upsert_many([("a", 1), ("b", 2)])
    listing = source.listing()
    listing.keep("a")
    listing.keep("unknown")
    assert listing.end(grace=60, now=0) == 1
    assert (list(source.missing), dict(source.entries())) == (["b"], {"a": 1, "b": 2})


# --- deletions that may be a loss


def test_a_deletion_that_is_held_changes_nothing_until_its_time_has_ended() -> None:
    table = two_sources()
    source, changes = table.source("first"), table.subscribe()
    said = source.subscribe()
    source.upsert_many([("a", 1), ("b", 2)])
    source.hold("a", 10.0)
    source.hold("unknown", 10.0)
    assert dict(table.items()) == {"a": 1, "b": 2}
    assert (source.held, source.missing, table.is_doubtful("a"), table.is_doubtful("b")) == (
        *({"a": 10.0}, {}),
        *(True, False),
    )
    assert (changes.take(), said.take()) == (["a", "b"], ["a", "b"])
    assert source.expire(9.0) == []
    assert source.expire(10.0) == ["a"]
    assert (dict(table.items()), source.held, changes.take()) == ({"b": 2}, {}, ["a"])


@pytest.mark.parametrize("value", [1, 5], ids=["as it was", "changed"])
def test_what_is_written_again_is_not_held_any_more(value: int) -> None:
    table = two_sources()
    source = table.source("first")
    source.upsert_many([("a", 1), ("b", 2)])
    writes: list[Callable[[], None]] = [
        lambda: source.upsert("a", value),
        lambda: source.upsert_many([("a", value)]),
    ]
    for write in writes:
        source.hold("a", 10.0)
        changes = table.subscribe()
        changes.take()
        write()
        assert (source.held, table.is_doubtful("a"), changes.take()) == ({}, False, ["a"])
        assert source.expire(1e9) == []


def test_what_is_kept_is_missing_and_what_is_held_is_not_made_missing_by_a_list() -> None:
    source = two_sources().source("first")
    source.upsert_many([("a", 1), ("b", 2), ("c", 3)])
    source.hold("a", 10.0)
    listing = source.listing()
    listing.add([("c", 3)])
    assert listing.end(grace=60, now=0) == 1
    assert (source.held, source.missing) == ({"a": 10.0}, {"b": 60.0})
    said = source.subscribe()
    source.keep(["a", "b", "c", "unknown"], 90.0)
    assert (source.held, source.missing) == ({}, {"a": 90.0, "b": 90.0})
    assert said.take() == ["a"], "b was missing before: a checkpoint has that"
    source.hold("b", 20.0)
    assert (source.held, source.missing) == ({"b": 20.0}, {"a": 90.0})
    source.delete("b")
    source.remove(["a"])
    assert (source.held, source.missing, dict(source.entries())) == ({}, {}, {"c": 3})


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([None, 1.0, 2.0, 3.0, 5.0])), max_size=30))
def test_what_has_ended_is_what_a_look_at_all_would_find(steps: list[tuple[str, float | None]]) -> None:
    deadlines: Deadlines[str] = Deadlines()
    for now, (key, until) in enumerate(steps):
        if until is None:
            deadlines.pop(key, None)
        else:
            deadlines.put([key], now + until)
        wanted = {each for each, end in deadlines.items() if end <= now}
        assert set(deadlines.ended(now)) == wanted
        if now % 3 == 0:  # what has ended may stay for a while
            for each in wanted:
                del deadlines[each]
