# SPDX-License-Identifier: Apache-2.0
"""The label filter, against a slow and obvious reading of its rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity.errors import FilterError, LabelError
from identity.filter import CILIUM, HOLDFAST, Base, LabelFilter
from identity.labels import Labels

COMPOSE = {
    "com.docker.compose.project": "shop",
    "com.docker.compose.project.working_dir": "/srv/shop",
    "com.docker.compose.service": "web",
    "com.docker.compose.container-number": "3",
    "app": "web",
    "application": "shop",
    "env": "prod",
    "maintainer": "someone",
    "holdfast.network": "holdfast",
    "holdfast.port.http": "8080",
    "holdfast.portly": "no",
}


def test_default_is_an_allow_list_of_exact_keys() -> None:
    identity, info = LabelFilter().apply(Labels.of(COMPOSE))
    assert [each.key for each in identity] == [
        "app", "com.docker.compose.project", "com.docker.compose.service", "env", "holdfast.network",
        "holdfast.port.http",
    ]  # fmt: skip
    assert [each.key for each in info] == [
        "application", "com.docker.compose.container-number",
        "com.docker.compose.project.working_dir", "holdfast.portly", "maintainer",
    ]  # fmt: skip


def test_default_keeps_reserved_and_the_cluster_label_of_any_source() -> None:
    labels = Labels.of(["reserved:init", "k8s:io.cilium.k8s.policy.cluster=c8", "k8s:app=web"])
    identity, info = LabelFilter().apply(labels)
    assert identity.serialized == "reserved:init=;k8s:io.cilium.k8s.policy.cluster=c8;"
    assert info.serialized == "k8s:app=web;"


def test_expressions_of_the_operator_are_added_and_can_take_away() -> None:
    chosen = LabelFilter(["container:team", "container:!env"])
    assert chosen.relevant("container", "team")
    assert chosen.relevant("container", "app")
    assert not chosen.relevant("container", "env")
    assert not chosen.relevant("k8s", "team")


def test_cilium_base_takes_all_until_the_first_inclusive_expression() -> None:
    everything = LabelFilter(base=CILIUM)
    assert everything.relevant("container", "whatever")
    assert not everything.relevant("k8s", "pod-template-hash")
    assert not everything.relevant("k8s", "app.beta.kubernetes.io/x")
    # Longest include (app.kubernetes.io/name) against shortest ignore.
    assert everything.relevant("k8s", "app.kubernetes.io/name")
    only_ignoring = LabelFilter(["!whatever"], base=CILIUM)
    assert not only_ignoring.relevant("container", "whatever")
    assert only_ignoring.relevant("container", "other")
    listed = LabelFilter([r"k8s:com\.trip/appid"], base=CILIUM)
    assert listed.relevant("k8s", "com.trip/appid")
    assert listed.relevant("k8s", "io.kubernetes.pod.namespace")
    assert not listed.relevant("container", "whatever")


@pytest.mark.parametrize("bad", ["", "!", "container:", "container:!", "a(", "k8s:[[:alpha:]]+"])
def test_expressions_that_can_not_be_used(bad: str) -> None:
    with pytest.raises(FilterError, match=re.escape(bad) if bad else "empty"):
        LabelFilter([bad])


def slow_relevant(expressions: list[str], allow_list: bool, source: str, key: str) -> bool:
    """The rule of the documentation, word by word, with every prefix length tried in turn."""
    includes: list[int] = []
    ignores: list[int] = []
    for text in expressions:
        scope, colon, rest = text.rpartition(":")
        if colon and scope and scope != source:
            continue
        pattern = rest.lstrip("!")
        match = re.search(pattern, key)
        if match is None or match.start() != 0:
            continue
        (ignores if rest.startswith("!") else includes).append(len(match.group()))
    has_inclusive = allow_list or any(not text.rpartition(":")[2].startswith("!") for text in expressions)
    if not has_inclusive and not [length for length in ignores if length]:
        return True
    longest = max(includes, default=0)
    shortest = min([length for length in ignores if length], default=0)
    return longest > shortest


patterns = st.sampled_from(["a", "ab", "abc", "a.*", ".*", "b", ".*c", "a$", "x?", "ab|a", "(a|b)+"])
expressions = st.builds(
    lambda source, bang, pattern: f"{source}{bang}{pattern}",
    st.sampled_from(["", "k8s:", "container:"]),
    st.sampled_from(["", "!"]),
    patterns,
)


@given(
    st.lists(expressions, max_size=5),
    st.booleans(),
    st.sampled_from(["k8s", "container"]),
    st.text("abcx", min_size=1, max_size=5),
)
def test_filter_equals_the_obvious_reading(texts: list[str], allow_list: bool, source: str, key: str) -> None:
    fast = LabelFilter(texts, base=Base((), allow_list))
    assert fast.relevant(source, key) == slow_relevant(texts, allow_list, source, key)


def test_select_refuses_a_bad_label_only_where_it_counts() -> None:
    chosen = LabelFilter()
    selection = chosen.select({"app": "web", "traefik.rule": "Host(`a`);x", "notes": "two\nlines", "x": "1"})
    assert selection.identity.serialized == "container:app=web;"
    assert selection.info.serialized == "container:x=1;"
    assert set(selection.unusable) == {"traefik.rule", "notes"}
    with pytest.raises(LabelError, match="container:app"):
        chosen.select({"app": "web;k8s:role=admin"})


def test_hundreds_of_labels_of_an_image_do_not_stop_its_container() -> None:
    raw = {f"vendor.{number}": "x" * 500 for number in range(500)} | {"app": "web"}
    selection = LabelFilter().select(raw)
    assert selection.identity.serialized == "container:app=web;"
    assert len(selection.unusable) == 500


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "prefixes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_prefix_file_replaces_the_list(tmp_path: Path) -> None:
    entries = [
        {"source": "reserved", "prefix": ".*"},
        {"source": "k8s", "prefix": "com.trip"},
        {"prefix": "com.trip/tmp", "invert": True},
    ]
    chosen = LabelFilter.from_file(write(tmp_path, {"version": 1, "valid-prefixes": entries}))
    assert chosen.allow_list
    assert chosen.relevant("k8s", "com.trip/appid")
    assert not chosen.relevant("k8s", "com.trip/tmp")
    assert not chosen.relevant("container", "app")
    assert chosen.relevant("reserved", "world")


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        {"version": 2, "valid-prefixes": [{"prefix": ".*"}]},
        {"version": 1, "valid-prefixes": [{"prefix": ""}]},
        {"version": 1, "valid-prefixes": [{"prefix": "a", "sauce": "k8s"}]},
        {"version": 1, "valid-prefixes": [{"prefix": "app", "source": "container"}]},
        {"version": "1", "valid-prefixes": []},
    ],
)
def test_prefix_files_that_can_not_be_used_name_the_file(tmp_path: Path, content: object) -> None:
    path = write(tmp_path, content)
    with pytest.raises(FilterError, match=str(path)):
        LabelFilter.from_file(path)


def test_missing_prefix_file(tmp_path: Path) -> None:
    with pytest.raises(FilterError, match=r"absent\.json"):
        LabelFilter.from_file(tmp_path / "absent.json")


def test_built_in_lists_parse() -> None:
    for base in (HOLDFAST, CILIUM):
        assert LabelFilter(base=base).relevant("reserved", "init")
