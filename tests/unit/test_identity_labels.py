# SPDX-License-Identifier: Apache-2.0
"""Labels: the serialized form, its limits, and what must never pass through it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity import labels as labels_module
from identity.errors import LabelError
from identity.labels import EMPTY, MAX_KEY, MAX_TEXT, MAX_VALUE, Label, Labels, label, parse_label

# What a real cilium-agent 1.11 wrote into etcd.
WRITTEN_BY_CILIUM = [
    "k8s:app=web;reserved:init=;k8s:io.cilium.k8s.policy.cluster=c8;",
    "container:app=web;container:env=prod;reserved:init=;",
    "k8s:app=web;reserved:init=;k8s:io.cilium.k8s.policy.cluster=default;"
    "k8s:io.cilium.k8s.policy.serviceaccount=default;k8s:io.kubernetes.pod.namespace=default;",
]

sources = st.sampled_from(["container", "k8s", "reserved", "unspec", "cilium-generated"])
text = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=";"), max_size=30)
keys = text.filter(lambda key: bool(key) and "=" not in key)
label_lists = st.lists(st.builds(Label, sources, keys, text), max_size=12, unique_by=lambda each: each.key)


@pytest.mark.parametrize("written", WRITTEN_BY_CILIUM)
def test_reads_and_writes_what_cilium_wrote(written: str) -> None:
    assert Labels.parse(written).serialized == written


def slow_serialized(labels: list[Label]) -> str:
    """The obvious way: sort by the key's bytes as Go does, write each label, end it with ';'."""
    result = ""
    for each in sorted(labels, key=lambda item: item.key.encode()):
        result += each.source + ":" + each.key + "=" + each.value + ";"
    return result


@given(label_lists)
def test_serialized_equals_the_obvious_way_and_survives_a_round_trip(given_labels: list[Label]) -> None:
    labels = Labels(given_labels)
    assert labels.serialized == slow_serialized(given_labels)
    assert list(Labels.parse(labels.serialized)) == list(labels)
    assert Labels.parse(labels.serialized) == labels
    assert hash(Labels.parse(labels.serialized)) == hash(labels)


@given(label_lists, st.randoms())
def test_order_of_building_does_not_matter(given_labels: list[Label], random: object) -> None:
    shuffled = list(given_labels)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert Labels(shuffled) == Labels(given_labels)


@given(st.text(max_size=60))
def test_any_text_parses_to_labels_or_a_label_error(garbage: str) -> None:
    try:
        labels = Labels.parse(garbage)
    except LabelError:
        return
    # The order may differ, the labels may not: nothing was invented and nothing was lost.
    parts = {part if "=" in part else f"{part}=" for part in garbage.split(";") if part}
    assert {str(each) for each in labels} == parts


@given(sources, keys, st.text(max_size=20), st.text(max_size=20))
def test_no_value_can_become_a_second_label(source: str, key: str, left: str, right: str) -> None:
    with pytest.raises(LabelError, match="can not be printed"):
        label(source, key, f"{left};{right}")


@pytest.mark.parametrize("bad", ["a\nb", "a\0b", "\x7f", "a\u2028b", "\u202eb", "\ud800", "\t"])
def test_control_characters_are_refused_in_key_and_value(bad: str) -> None:
    with pytest.raises(LabelError, match="value of label container:app"):
        label("container", "app", bad)
    with pytest.raises(LabelError, match="key of label"):
        label("container", bad)


def test_the_docker_injection_is_refused_with_the_label_named() -> None:
    with pytest.raises(LabelError, match=r"container:app.*role=admin"):
        Labels.of({"app": "web;k8s:role=admin"})


def test_sizes_are_limited_and_the_message_says_the_limit() -> None:
    with pytest.raises(LabelError, match=str(MAX_VALUE)):
        label("container", "app", "x" * 65_536)
    with pytest.raises(LabelError, match=str(MAX_KEY)):
        label("container", "x" * (MAX_KEY + 1))
    with pytest.raises(LabelError, match=str(MAX_TEXT)):
        Labels.of({f"key{number}": "x" * 2000 for number in range(20)})
    with pytest.raises(LabelError, match=str(MAX_TEXT)):
        Labels.parse("container:a=" + "x" * MAX_TEXT + ";")
    with pytest.raises(LabelError, match=str(labels_module.MAX_LABELS)):
        Labels.of({f"key{number}": "" for number in range(500)})
    assert len(label("container", "k" * MAX_KEY, "v" * MAX_VALUE).value) == MAX_VALUE


@pytest.mark.parametrize(
    "bad",
    ["a:b=c", "a:b=c;;", ";", "b=c;", "x:=;", ":a=b;", "x:a=1;y:a=2;", "x:a=1;x:a=2;", "bad source:a=b;"],
)
def test_texts_that_are_no_labels(bad: str) -> None:
    with pytest.raises(LabelError):
        Labels.parse(bad)


def test_empty_key_and_equals_in_key() -> None:
    with pytest.raises(LabelError, match="no key"):
        label("container", "")
    with pytest.raises(LabelError, match="'='"):
        label("container", "a=b")


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("app", Label("unspec", "app")),
        ("app=web", Label("unspec", "app", "web")),
        ("k8s:app=web", Label("k8s", "app", "web")),
        ("k8s:app=web=1", Label("k8s", "app", "web=1")),
        ("image=registry:5000/web", Label("unspec", "image", "registry:5000/web")),
        ("reserved:host", Label("reserved", "host")),
        ("$host", Label("reserved", "host")),
        ("cidr:10.0.0.0/8", Label("cidr", "10.0.0.0/8")),
        ("container:a:b=c", Label("container", "a:b", "c")),
    ],
)
def test_parse_label(given_text: str, expected: Label) -> None:
    assert parse_label(given_text) == expected


def test_lookup_by_source_and_by_any() -> None:
    labels = Labels.of(["container:app=web", "reserved:init"])
    assert labels.get("container", "app") == "web"
    assert labels.get("any", "app") == "web"
    assert labels.get("k8s", "app") is None
    assert labels.get("reserved", "init") == ""
    assert labels.texts() == ["container:app=web", "reserved:init"]
    assert Label("reserved", "init") in labels


def test_union_and_empty() -> None:
    assert Labels.of({"a": "1"}).union(Labels.of({"b": "2"})).serialized == "container:a=1;container:b=2;"
    assert Labels.of({"a": "1"}).union(Labels.of({"a": "1"})) == Labels.of({"a": "1"})
    with pytest.raises(LabelError, match="same key"):
        Labels.of({"a": "1"}).union(Labels.of({"a": "2"}))
    assert Labels.parse("") == EMPTY == Labels()
    assert not len(EMPTY)


def test_every_permutation_is_one_identity() -> None:
    parts = ["container:c=3", "k8s:a=1", "reserved:b"]
    assert len({Labels.of(order) for order in itertools.permutations(parts)}) == 1


texts_in_any_order = st.lists(
    st.sampled_from(["container:a=1", "container:b=", "k8s:b=2", "container:a", "$init", "a:b=c:d=e"]),
    max_size=5,
).map(lambda parts: "".join(f"{part};" for part in parts))


@given(texts_in_any_order)
def test_a_text_means_what_its_labels_do_one_by_one(text: str) -> None:
    """In order or not, canonical or not: a set that is read whole is the one that is built of its labels."""
    parts = text[:-1].split(";") if text else []
    try:
        expected = Labels([parse_label(part) for part in parts])
        sources = all(":" in part.partition("=")[0] for part in parts)
    except LabelError:
        sources = False
    if not sources:
        with pytest.raises(LabelError):
            Labels.parse(text)
        return
    found = Labels.parse(text)
    assert (found, found.serialized, list(found)) == (expected, expected.serialized, list(expected))
    assert hash(found) == hash(expected)
