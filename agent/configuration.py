# SPDX-License-Identifier: Apache-2.0
"""The agent's configuration: options from all their places, checked as a whole, then frozen.

`load_config` is what the agent starts with and what `holdfast config validate` calls; `python -m
agent.configuration` prints docs/options.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from agent.limit_settings import LimitError, limits_of
from agent.names_wire import why_no_domain
from agent.options import CONFIG_DIR, OPTIONS
from core.errors import shorten
from core.options import Config, OptionError, Type, load, render
from identity.errors import FilterError
from identity.filter import LabelFilter

_KVSTORE_KEYS = frozenset({"etcd.config", "etcd.address", "etcd.qps"})
# More than any etcd answers.
_QPS_MAX = 100_000
_LOG_KEYS = frozenset({"level", "syslog.address", "syslog.facility"})
_LEVELS = frozenset({"TRACE", "DEBUG", "INFO", "WARNING", "ERROR"})


def parse_arguments(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, value) of ``--name value``, ``--name=value``, ``--flag``; OptionError for anything else.

    A boolean option may stand alone and then means true.
    """
    flags = {option.name for option in OPTIONS if option.type is Type.BOOL}
    found: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, separator, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise OptionError(f"argument {word!r} is not an option", hint="options start with --")
        if not separator and name in flags and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not separator:
            if not rest:
                raise OptionError(f"option --{name} on the command line has no value")
            value = rest.pop(0)
        found.append((name, value))
    return found


def load_config(argv: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Config:
    """Return the checked configuration from config-dir, YAML file, environment and command line.

    OptionError names option, value, meaning and origin.  Where the first two are is taken from the command
    line, else the environment.
    """
    arguments = parse_arguments(argv)
    known = os.environ if environment is None else environment
    given = load(OPTIONS, arguments=arguments, environment=known)
    directory = given["config-dir"] or (CONFIG_DIR if CONFIG_DIR.is_dir() else None)
    config = load(
        OPTIONS, arguments=arguments, environment=known, config_dir=directory, config_file=given["config"]
    )
    check(config)
    return config


def check(config: Config) -> None:
    """Raise OptionError for values that are right each by itself but not as a whole."""
    _check_keys(config, "kvstore-opt", _KVSTORE_KEYS)
    qps = config["kvstore-opt"].get("etcd.qps", "1")
    _require(
        config,
        "kvstore-opt",
        qps.isascii() and qps.isdigit() and 1 <= int(qps[:20]) <= _QPS_MAX,
        f"etcd.qps is {shorten(qps)!r}, and must be a whole number of requests a second, 1 to {_QPS_MAX}",
    )
    _check_keys(config, "log-opt", _LOG_KEYS)
    level = config["log-opt"].get("level", "INFO").upper()
    _require(config, "log-opt", level in _LEVELS, f"level must be one of {', '.join(sorted(_LEVELS))}")
    _check_labels(config)
    _check_limits(config)
    meshed = config["cluster-id"] > 0
    _require(
        config, "cluster-id", not meshed or config["cluster-name"] != "default", "it needs a cluster-name"
    )
    spaces = ("default", config["cluster-name"])
    _require(
        config, "ip-address-space", config["ip-address-space"] in spaces, f"it must be {' or '.join(spaces)}"
    )
    pool = config["ipv4-range"]
    _require(config, "ipv4-range", pool is None or pool.prefixlen <= 29, "a pool smaller than /29 is no use")
    whole, block = config["cluster-pool-ipv4-cidr"], config["cluster-pool-ipv4-mask-size"]
    _require(
        config,
        "cluster-pool-ipv4-mask-size",
        whole is None or whole.prefixlen <= block,
        f"cluster-pool-ipv4-cidr {whole} is smaller than one such block",
    )
    range6 = config["ipv6-range"]
    _require(config, "ipv6-range", range6 is None or range6.prefixlen <= 96, "it must be a /96 or shorter")
    node6 = config["ipv6-node"]
    _require(config, "ipv6-node", node6 is None or node6.version == 6, "it must be an IPv6 address")
    _require(
        config,
        "auto-direct-node-routes",
        not config["auto-direct-node-routes"] or config["tunnel"] == "disabled",
        "with a tunnel pools are reached by it; set tunnel to disabled",
    )
    _check_address(config)
    reason = why_no_domain(config["cluster-dns-domain"])
    _require(config, "cluster-dns-domain", not reason, reason)
    interval = config["conntrack-gc-interval"]
    _require(config, "conntrack-gc-interval", interval == 0 or interval >= 1, "it must be 0 or at least 1s")


def _check_keys(config: Config, name: str, allowed: frozenset[str]) -> None:
    unknown = sorted(set(config[name]) - allowed)
    _require(config, name, not unknown, f"it may hold {', '.join(sorted(allowed))}")


def _check_labels(config: Config) -> None:
    try:
        LabelFilter(config["labels"])
    except FilterError as error:
        _require(config, "labels", False, error.message)


def _check_limits(config: Config) -> None:
    try:
        limits_of(config["api-rate-limit"])
    except LimitError as error:
        _require(config, "api-rate-limit", False, error.message)


def _check_address(config: Config) -> None:
    address = config["prometheus-serve-addr"]
    if address:
        port = address.rpartition(":")[2]
        right = ":" in address and port.isdigit() and 0 < int(port) < 65536
        _require(config, "prometheus-serve-addr", right, "it must be host:port or :port")


def _require(config: Config, name: str, right: bool, reason: str) -> None:
    if not right:
        text = render(config[name])
        raise OptionError(
            f"option {name}={text!r} from {config.origin(name)} is refused: {reason}",
            hint=next(option.help for option in OPTIONS if option.name == name),
        )


def docs_page() -> str:
    """Return docs/options.md."""
    return "\n".join(_docs_lines()) + "\n"


def _docs_lines() -> Iterator[str]:
    yield "# Options of the agent"
    yield ""
    yield "Generated by `python -m agent.configuration > docs/options.md`; do not edit."
    yield ""
    yield "A value is taken from, later ones winning: the default, a file in `config-dir` named like the"
    yield "option, the YAML file `config`, the environment (`CILIUM_…` or `HOLDFAST_…`, upper case,"
    yield "underscores), the command line of `holdfast agent`. An unknown or duplicate option is an error."
    for section in dict.fromkeys(option.section for option in OPTIONS):
        yield f"\n## {section}\n"
        yield "| Option | Default | Value | Meaning |"
        yield "|---|---|---|---|"
        for option in (each for each in OPTIONS if each.section == section):
            kind = ", ".join(option.choices) or option.type.value
            yield f"| `{option.name}` | `{render(option.default) or ' '}` | {kind} | {option.help} |"


if __name__ == "__main__":
    sys.stdout.write(docs_page())
