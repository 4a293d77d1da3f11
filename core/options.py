# SPDX-License-Identifier: Apache-2.0
"""The option table: one declaration of an option gives everything else.

`--help`, environment names, the sample configuration, the docs page and validation all come from the
same `Option` records.  Values are taken, later ones winning, from: the default, the files of a
``config-dir`` (one file an option, named like it), a YAML file, the environment
(``CILIUM_<NAME>`` or ``HOLDFAST_<NAME>``, upper case, underscores), the command line.

A configuration is frozen once parsed; its hash is a metric.  An error names option, value, meaning and
where the value came from.  Unknown and duplicate options are errors.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import yaml

from core.errors import HoldfastError, shorten


class OptionError(HoldfastError):
    """Raised for a value, name or file of the configuration that can not be used."""


class Type(enum.Enum):
    """How an option's text becomes a value; the member's value is what error messages call it."""

    TEXT = "text"
    BOOL = "true or false"
    INT = "a whole number"
    DURATION = "a duration such as 500ms, 30s, 5m, 24h"
    LIST = "a list, separated by spaces or commas"
    MAP = "a map such as key=value,key=value or a JSON object"
    SETTINGS = "a map of settings such as name=key:value,key:value or a JSON object"
    CIDR4 = "an IPv4 network such as 10.16.0.0/16"
    CIDR6 = "an IPv6 network such as fd00:1::/96"
    ADDRESS = "an IP address"
    PATH = "an absolute path"


@dataclass(frozen=True)
class Option:
    """One option: `default` is a parsed value; `choices` restricts a TEXT; `low`/`high` bound numbers."""

    name: str
    type: Type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    section: str = "Agent"
    auto: bool = False  # the word "auto" (and the empty string) is accepted and means None

    @property
    def environment(self) -> str:
        return "CILIUM_" + self.name.upper().replace("-", "_")


@dataclass(frozen=True)
class Value:
    """A parsed value and where it came from."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Config:
    """The frozen configuration.  Read it with ``config["kvstore-lease-ttl"]``."""

    values: Mapping[str, Value]
    hash: str = field(default="")

    def __getitem__(self, name: str) -> Any:
        return self.values[name].value

    def origin(self, name: str) -> str:
        return self.values[name].origin

    def shown(self) -> dict[str, dict[str, str]]:
        """Return name → {value, origin} as text, for `holdfast config` and the API."""
        return {
            name: {"value": render(value.value), "origin": value.origin}
            for name, value in sorted(self.values.items())
        }


def parse_duration(text: str) -> float:
    """Return seconds for ``1h30m``, ``500ms``, ``30s``; a bare number is seconds.  ValueError otherwise."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("not a duration")
    scale = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return sum(float(number) * scale[unit] for number, unit in parts)


def _parse_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("true", "yes", "on", "1"):
        return True
    if lowered in ("false", "no", "off", "0"):
        return False
    raise ValueError("neither true nor false")


def _parse_map(text: str) -> dict[str, str]:
    if text.lstrip().startswith("{"):
        loaded = json.loads(text)
        if not isinstance(loaded, dict):
            raise ValueError("not a JSON object")
        return {str(key): str(value) for key, value in loaded.items()}
    result: dict[str, str] = {}
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"{part!r} has no '='")
        result[key] = value
    return result


def _parse_settings(text: str) -> dict[str, str]:
    """Return name → its settings, still as text; the commas inside them are theirs."""
    if text.lstrip().startswith("{"):
        return {name: _settings_text(each) for name, each in json.loads(text).items()}
    result: dict[str, str] = {}
    last = ""
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        name, separator, value = part.partition("=")
        if separator and name in result:
            raise ValueError(f"{shorten(name)!r} is given twice")
        if separator:
            last, result[name] = name, value
        elif last:
            result[last] += f",{part}"
        else:
            raise ValueError(f"{shorten(part)!r} has no '='")
    return result


def _settings_text(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{_settings_text(each)}" for key, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError("not absolute")
    return Path(text)


_PARSERS: dict[Type, Callable[[str], Any]] = {
    Type.TEXT: str,
    Type.BOOL: _parse_bool,
    Type.INT: lambda text: int(text, 10),
    Type.DURATION: parse_duration,
    Type.LIST: lambda text: tuple(filter(None, re.split(r"[,\s]+", text.strip()))),
    Type.MAP: _parse_map,
    Type.SETTINGS: _parse_settings,
    Type.CIDR4: IPv4Network,
    Type.CIDR6: IPv6Network,
    Type.ADDRESS: ip_address,
    Type.PATH: _parse_path,
}


def parse(option: Option, text: str, origin: str) -> Value:
    """Parse and check one value; OptionError names option, value, meaning and origin."""
    stripped = text.strip()
    if option.auto and stripped in ("", "auto"):
        return Value(None, origin)
    try:
        value = _PARSERS[option.type](stripped)
    except (ValueError, TypeError) as error:
        raise _refused(option, stripped, origin, f"it must be {option.type.value}: {error}") from error
    if option.choices and value not in option.choices:
        raise _refused(option, stripped, origin, f"it must be one of {', '.join(option.choices)}")
    if option.low is not None and value < option.low:
        raise _refused(option, stripped, origin, f"it must be at least {_bound(option, option.low)}")
    if option.high is not None and value > option.high:
        raise _refused(option, stripped, origin, f"it must be at most {_bound(option, option.high)}")
    return Value(value, origin)


def _bound(option: Option, value: float) -> str:
    return render(float(value)) if option.type is Type.DURATION else render(int(value))


def _refused(option: Option, text: str, origin: str, reason: str) -> OptionError:
    return OptionError(
        f"option {option.name}={shorten(text)!r} from {origin} is refused: {reason}", hint=option.help
    )


def render(value: Any) -> str:
    """Return a value as the text that `parse` would read."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".") + "s"
    return str(value)


def load(
    options: Sequence[Option],
    *,
    arguments: Iterable[tuple[str, str]] = (),
    environment: Mapping[str, str] | None = None,
    config_dir: Path | None = None,
    config_file: Path | None = None,
) -> Config:
    """Return the configuration from all places; OptionError for the first thing that is wrong."""
    table = {option.name: option for option in options}
    values = {option.name: Value(option.default, "default") for option in options}
    for layer in (
        _from_directory(config_dir, table),
        _from_yaml(config_file),
        _from_environment(environment or {}, table),
        _from_arguments(arguments),
    ):
        for name, text, origin in layer:
            if name not in table:
                raise OptionError(
                    f"unknown option {shorten(name)!r} from {origin}", hint=_similar(name, table)
                )
            values[name] = parse(table[name], text, origin)
    digest = hashlib.sha256(json.dumps({k: render(v.value) for k, v in values.items()}).encode()).hexdigest()
    return Config(values, digest)


def _similar(name: str, table: Mapping[str, Option]) -> str:
    import difflib

    close = difflib.get_close_matches(name, table, n=1)
    return f"did you mean {close[0]}?" if close else "holdfast config --list-options shows all"


def _from_directory(directory: Path | None, table: Mapping[str, Option]) -> Iterable[tuple[str, str, str]]:
    if directory is None:
        return
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file() and path.name[0] != ".")
    except OSError as error:
        raise OptionError(f"config-dir {directory} can not be read: {error.strerror}") from error
    for path in files:
        yield path.name, _read(path), f"file {path}"


def _from_yaml(path: Path | None) -> Iterable[tuple[str, str, str]]:
    if path is None:
        return
    try:
        node = yaml.compose(_read(path), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise OptionError(f"config file {path} is not YAML: {error}") from error
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise OptionError(f"config file {path} must hold a mapping of option: value")
    seen: set[str] = set()
    for key_node, value_node in node.value:
        name = str(key_node.value)
        origin = f"file {path} line {key_node.start_mark.line + 1}"
        if name in seen:
            raise OptionError(f"duplicate option {shorten(name)!r} from {origin}")
        seen.add(name)
        yield name, _yaml_text(value_node), origin


def _yaml_text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    value = yaml.SafeLoader("").construct_object(node, deep=True)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return json.dumps(value)


def _from_environment(
    environment: Mapping[str, str], table: Mapping[str, Option]
) -> Iterable[tuple[str, str, str]]:
    for option in table.values():
        holdfast = option.environment.replace("CILIUM_", "HOLDFAST_", 1)
        present = [name for name in (option.environment, holdfast) if name in environment]
        if len(present) == 2:
            raise OptionError(f"option {option.name} is given twice: {present[0]} and {present[1]}")
        for name in present:
            yield option.name, environment[name], f"environment {name}"


def _from_arguments(arguments: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str, str]]:
    seen: set[str] = set()
    for name, text in arguments:
        if name in seen:
            raise OptionError(f"duplicate option --{name} on the command line")
        seen.add(name)
        yield name, text, "command line"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"file {path} can not be read: {error}") from error


def sample(options: Sequence[Option]) -> str:
    """Return a commented YAML file with every option at its default."""
    lines: list[str] = ["# Every option of the agent, at its default. Remove the '#' to change one."]
    for section in dict.fromkeys(option.section for option in options):
        lines.append(f"\n# --- {section}")
        for option in (each for each in options if each.section == section):
            lines.append(f"# {option.help}")
            lines.append(f"#{option.name}: {json.dumps(render(option.default))}")
    return "\n".join(lines) + "\n"
