# SPDX-License-Identifier: Apache-2.0
"""The option table, the checks of the configuration as a whole, and that the docs page is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.configuration import docs_page, load_config, parse_arguments
from agent.options import ETCD_QPS, OPTIONS
from agent.programs import speaks_ipv6
from agent.standing import requests_per_s
from core.options import OptionError, Type, parse, render, sample


def test_names_are_unique_and_each_default_survives_its_own_text() -> None:
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        if option.default is not None:
            assert parse(option, render(option.default), "test").value == option.default


def test_the_docs_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == docs_page(), (
        "run: python -m agent.configuration > docs/options.md"
    )


def test_the_sample_uncommented_is_the_default(tmp_path: Path) -> None:
    lines = [line.removeprefix("#") if line.startswith("#") and line[1] != " " else line
             for line in sample(OPTIONS).splitlines()]  # fmt: skip
    path = tmp_path / "all.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith("config")))
    config = load_config(["--config", str(path)], {})
    assert config["kvstore-lease-ttl"] == 86400.0
    assert config["kvstore-opt"] == {"etcd.config": "/etc/holdfast/etcd.config"}


def test_later_places_win(tmp_path: Path) -> None:
    (tmp_path / "cluster-name").write_text("from-directory\n")
    (tmp_path / "mtu").write_text("1400")
    environment = {"CILIUM_MTU": "1450", "HOLDFAST_DEBUG": "true"}
    config = load_config(["--config-dir", str(tmp_path), "--cluster-id=3"], environment)
    assert (config["cluster-name"], config["mtu"], config["debug"]) == ("from-directory", 1450, True)
    assert config.origin("mtu") == "environment CILIUM_MTU"
    assert config.origin("cluster-name") == f"file {tmp_path / 'cluster-name'}"


def test_arguments_in_all_their_forms() -> None:
    argv = ["--debug", "--mtu", "1400", "--cluster-name=x", "--enable-ipv4-masquerade", "false"]
    assert parse_arguments(argv) == [
        ("debug", "true"),
        ("mtu", "1400"),
        ("cluster-name", "x"),
        ("enable-ipv4-masquerade", "false"),
    ]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--no-such", "1"], "no-such"),
        (["mtu"], "mtu"),
        (["--mtu"], "mtu"),
        (["--mtu", "1", "--mtu", "2"], "duplicate"),
        (["--cluster-id", "5"], "cluster-name"),
        (["--cluster-id", "256"], "at most 255"),
        (["--kvstore-opt", "etcd.user=x"], "etcd.address"),
        (["--kvstore-opt", "etcd.qps=0"], "'0'.*1 to 100000"),
        (["--kvstore-opt", "etcd.qps=-5"], "'-5'.*1 to 100000"),
        (["--kvstore-opt", "etcd.qps=fast"], "'fast'.*whole number"),
        (["--kvstore-opt", "etcd.qps=2.5"], "'2.5'.*whole number"),
        (["--kvstore-opt", "etcd.qps="], "''.*whole number"),
        (["--kvstore-opt", "etcd.qps=100001"], "from command line.*1 to 100000"),
        (["--kvstore-opt", f"etcd.qps={'9' * 5000}"], "1 to 100000"),
        (["--log-opt", "level=loud"], "loud"),
        (["--prometheus-serve-addr", "9090"], "host:port"),
        (["--prometheus-serve-addr", ":0"], "host:port"),
        (["--ipv4-range", "10.1.1.1/16"], "ipv4-range"),
        (["--ipv4-range", "10.1.1.0/30"], "/29"),
        (["--ip-address-space", "elsewhere"], "elsewhere"),
        (["--trace-payloadlen", "129"], "at most 128"),
        (["--labels", "container:app container:(("], "labels"),
        (["--kvstore-lease-ttl", "10s"], "at least 30"),
        (["--bpf-ct-timeout-regular-tcp", "4294967295"], "at most 31536000s"),
        (["--bpf-ct-timeout-regular-any", "9" * 400], "bpf-ct-timeout-regular-any"),
        (["--monitor-aggregation-interval", "366d"], "at most 31536000s"),
        (["--cluster-dns-domain", "Holdfast"], "cluster-dns-domain"),
        (["--cluster-dns-domain", ""], "cluster-dns-domain"),
        (["--cluster-dns-domain", "holdfast."], "joined by dots"),
        (["--cluster-dns-domain", "a-.example"], "joined by dots"),
        (["--cluster-dns-domain", "a" * 64], "joined by dots"),
        (["--cluster-dns-domain", "a.b" * 50], "at most 125 characters"),
        (["--conntrack-gc-interval", "500ms"], "0 or at least 1s"),
        (["--conntrack-gc-interval", "25h"], "at most 86400s"),
        (["--config", "/nonexistent/file.yaml"], "/nonexistent/file.yaml"),
        (["--state-dir", "relative"], "absolute"),
    ],
)
def test_what_can_not_be_used_is_named(argv: list[str], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        load_config(argv, {})


@pytest.mark.parametrize(
    ("given", "expected"),
    [("etcd.config=/elsewhere", ETCD_QPS), ("etcd.qps=7", 7), ("etcd.qps=100000", 100000)],
)
def test_requests_a_second_are_the_options_or_the_default(given: str, expected: int) -> None:
    assert requests_per_s(load_config(["--kvstore-opt", given], {})) == expected


def test_ipv6_is_not_had_from_a_kernel_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["--enable-ipv6=true"], {})
    assert speaks_ipv6(config) == Path("/proc/net/if_inet6").exists()
    monkeypatch.setattr("agent.host.IF_INET6", tmp_path / "absent")
    assert not speaks_ipv6(config)


def test_every_duration_has_an_end() -> None:
    """In the programs time is 32 bits of seconds, and what is added to it must not turn it over."""
    durations = [option for option in OPTIONS if option.type is Type.DURATION]
    assert len(durations) > 10
    assert [each.name for each in durations if each.high is None or each.high > 366 * 86400] == []
