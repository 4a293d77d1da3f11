# SPDX-License-Identifier: Apache-2.0
"""The table of identities: sources, reverse lookup, records that are not used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.cache import IdentityCache, parse_record
from identity.labels import Labels
from identity.local import LocalIdentities, prefix_labels
from identity.numbers import HOST, INIT, LOCAL_FLAG
from identity.transactions import Slot, first_match
from kvstore import schema
from kvstore.errors import RecordError
from kvstore.ops import KeyValue
from tests.support.lists import deliver_list

WEB = Labels.of({"app": "web"})


def key(number: int) -> str:
    return schema.identity_id_key(number)


def test_reserved_identities_are_there_from_the_start() -> None:
    cache = IdentityCache()
    assert cache.get(HOST) == Labels.of(["reserved:host"])
    assert cache.number_of(Labels.of(["reserved:init"])) == INIT
    assert not cache.table.in_sync


def test_kvstore_and_local_sources_meet_in_one_table() -> None:
    cache = IdentityCache()
    number = LocalIdentities(cache.local).acquire("10.0.0.0/8")
    cache.put(key(4242), WEB.serialized.encode())
    assert cache.number_of(prefix_labels("10.0.0.0/8")) == number
    assert cache.number_of(WEB) == 4242
    assert cache.table.owner(number) == "local"
    cache.deleted(key(4242))
    assert cache.number_of(WEB) is None


def test_reverse_lookup_prefers_the_own_cluster() -> None:
    cache = IdentityCache()
    for number in (4242, 4000, 1 << 16 | 7):
        cache.put(key(number), WEB.serialized.encode())
    assert cache.number_of(WEB) == 4000
    assert cache.number_of(WEB, range(1 << 16, 2 << 16)) == 1 << 16 | 7
    assert cache.number_of(WEB, range(5 << 16, 6 << 16)) is None


def test_a_number_that_was_deleted_is_held_and_told_and_taken_only_where_there_is_no_other() -> None:
    cache = IdentityCache(hold=10.0)
    told: list[int] = []
    cache.on_deleted.append(told.append)
    cache.put(key(4000), WEB.serialized.encode())
    cache.put(key(4242), WEB.serialized.encode())
    cache.deleted(key(4000))
    assert told == [4000]
    assert cache.get(4000) == WEB
    assert cache.number_of(WEB) == 4242
    cache.deleted(key(4242))
    assert cache.number_of(WEB) == 4000
    cache.put(key(4242), WEB.serialized.encode())
    assert cache.number_of(WEB) == 4242
    assert list(cache.source.held) == [4000]


def test_what_a_relist_lacks_stays_for_the_grace() -> None:
    cache = IdentityCache(grace=3600)
    cache.put(key(4242), WEB.serialized.encode())
    deliver_list(cache, {}, 5)
    assert cache.get(4242) == WEB
    assert cache.source.expire(now=1e12) == [4242]
    assert cache.get(4242) is None


@pytest.mark.parametrize(
    ("bad_key", "value"),
    [
        (key(1), b"container:app=web;"),
        (key(255), b"container:app=web;"),
        (schema.IDENTITY_IDS + str(LOCAL_FLAG | 1), b"container:app=web;"),
        (schema.IDENTITY_IDS + "007", b"container:app=web;"),
        (schema.IDENTITY_IDS, b"container:app=web;"),
        (key(300), b""),
        (key(300), b"container:app=web"),
        (key(300), b"container:a=1;k8s:a=2;"),
        (key(300), b"container:a=1\n;"),
        (key(300), b"\xff;"),
    ],
)
def test_records_that_are_not_used(bad_key: str, value: bytes) -> None:
    cache = IdentityCache()
    before = dict(cache.table.items())
    cache.put(bad_key, value)
    deliver_list(cache, {bad_key: value}, 3)
    assert dict(cache.table.items()) == before
    assert bad_key in cache.ignored


@given(st.text(max_size=20), st.binary(max_size=60))
def test_any_record_parses_or_is_a_record_error(name: str, value: bytes) -> None:
    try:
        number, labels = parse_record(schema.IDENTITY_IDS + name, value)
    except RecordError:
        return
    assert str(number) == name
    assert len(labels)


steps = st.lists(st.tuples(st.sampled_from(["put", "delete"]), st.integers(256, 262), st.sampled_from("abc")))


@given(steps)
def test_reverse_lookup_equals_a_search(changes: list[tuple[str, int, str]]) -> None:
    cache = IdentityCache()
    for what, number, app in changes:
        if what == "put":
            cache.put(key(number), f"container:app={app};".encode())
        else:
            cache.deleted(key(number))
        for each in "abc":
            labels = Labels.of({"app": each})
            found = [number for number, known in cache.table.items() if known == labels]
            assert cache.number_of(labels) == min(found, default=None)


def value_item(text: str, value: bytes) -> KeyValue:
    return KeyValue(schema.IDENTITY_VALUES + text, value, 1, 1, 0, 1)


parts = st.sampled_from(["a=1;", "b=2;", "/x:y=z;", "10.0.0.1", "/", "fd00::1"])


@given(st.lists(st.tuples(st.lists(parts, max_size=4).map("".join), st.integers(250, 260)), max_size=6))
def test_only_whole_label_parts_match(entries: list[tuple[str, int]]) -> None:
    slot = Slot(WEB, "10.0.0.1")
    items = [value_item(WEB.serialized + tail, str(number).encode()) for tail, number in entries]
    # The obvious way: what stands before the last slash, compared as text.
    expected = 0
    for item, (_, number) in zip(items, entries, strict=True):
        text = item.key[len(schema.IDENTITY_VALUES) :]
        if "/" in text and text[: text.rindex("/")] == WEB.serialized and not text.endswith("/"):
            expected = expected or (number if number >= 256 else 0)
    assert first_match(slot, items, range(256, 65_536)) == expected
