# SPDX-License-Identifier: Apache-2.0
"""Options: where values come from, and what an error says."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.options import Option, OptionError, Type, load, parse_duration, render, sample

OPTIONS = (
    Option("cluster-name", Type.TEXT, "default", "Name of the cluster"),
    Option("kvstore-lease-ttl", Type.DURATION, 86400.0, "Lifetime of the lease", low=30),
    Option("enable-policy", Type.TEXT, "default", "When", choices=("default", "always", "never")),
    Option("ipv4-range", Type.CIDR4, None, "Pool of this node", auto=True),
    Option("labels", Type.LIST, (), "Label filter"),
    Option("kvstore-opt", Type.MAP, {}, "Options of the kvstore"),
    Option("debug", Type.BOOL, False, "Say more"),
)


def test_later_places_win_and_are_named(tmp_path: Path) -> None:
    directory = tmp_path / "config"
    directory.mkdir()
    (directory / "cluster-name").write_text("from-dir\n")
    (directory / "debug").write_text("true")
    file = tmp_path / "agent.yaml"
    file.write_text("cluster-name: from-file\nlabels: [a, b]\n")
    config = load(
        OPTIONS,
        arguments=[("cluster-name", "from-args")],
        environment={"CILIUM_KVSTORE_LEASE_TTL": "15m"},
        config_dir=directory,
        config_file=file,
    )
    assert config["cluster-name"] == "from-args"
    assert config.origin("cluster-name") == "command line"
    assert config["kvstore-lease-ttl"] == 900
    assert config.origin("kvstore-lease-ttl") == "environment CILIUM_KVSTORE_LEASE_TTL"
    assert (config["labels"], config.origin("labels")) == (("a", "b"), f"file {file} line 2")
    assert (config["debug"], config.origin("debug")) == (True, f"file {directory}/debug")
    assert config["ipv4-range"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([("kvstore-lease-ttl", "soon")], "kvstore-lease-ttl='soon' from command line"),
        ([("kvstore-lease-ttl", "1s")], "must be at least 30"),
        ([("enable-policy", "often")], "one of default, always, never"),
        ([("ipv4-range", "10.0.0.1/16")], "ipv4-range='10.0.0.1/16'"),
        ([("debug", "maybe")], "true or false"),
        ([("kvstore-opt", "etcd.config")], "has no '='"),
        ([("clustername", "x")], "did you mean cluster-name?"),
        ([("debug", "true"), ("debug", "true")], "duplicate option --debug"),
    ],
)
def test_an_error_names_option_value_and_origin(arguments: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(OptionError, match="option") as raised:
        load(OPTIONS, arguments=arguments)
    assert message in str(raised.value)


def test_a_duplicate_or_unknown_option_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("debug: true\ndebug: false\n")
    with pytest.raises(OptionError, match=r"duplicate option 'debug' from file .* line 2"):
        load(OPTIONS, config_file=file)
    file.write_text("debug: true\nnonsense: 1\n")
    with pytest.raises(OptionError, match=r"unknown option 'nonsense' from file .* line 2"):
        load(OPTIONS, config_file=file)


def test_both_environment_names_at_once_are_refused() -> None:
    with pytest.raises(OptionError, match="given twice"):
        load(OPTIONS, environment={"CILIUM_DEBUG": "1", "HOLDFAST_DEBUG": "0"})


def test_the_sample_read_back_with_every_line_enabled_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "sample.yaml"
    lines = sample(OPTIONS).splitlines()
    file.write_text(
        "\n".join(line[1:] if line.startswith("#") and line[1] != " " else line for line in lines)
    )
    config = load(OPTIONS, config_file=file)
    assert {option.name: config[option.name] for option in OPTIONS} == {
        option.name: option.default for option in OPTIONS
    }


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_durations_are_summed(hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@given(st.text(max_size=20))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_duration(text) >= 0


def test_render_shows_what_was_parsed() -> None:
    assert render({"a": "1", "b": "2"}) == "a=1,b=2"
    assert render(("x", "y")) == "x y"
    assert render(True) == "true"
    assert [render(seconds) for seconds in (0.0, 0.5, 30.0, 86400.0, 31_536_000.0)] == [
        *("0s", "0.5s", "30s", "86400s", "31536000s")
    ]
