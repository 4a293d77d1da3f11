# SPDX-License-Identifier: Apache-2.0
"""The options of the start hook: one table gives flags, environment names, checks and `--help`.

The agent's option table (`core.options`) needs YAML, which is not there yet when this runs; the rules are
the same: unknown and repeated options are errors, an error says value, meaning and where it came from, the
command line wins over the environment.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Callable, Mapping, Sequence

from core.errors import shorten
from prestart.cluster import MOST_NODES
from prestart.errors import OptionRefused
from prestart.values import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any

PREFIX = "HOLDFAST_PRESTART_"
STATE_DIR = "/var/lib/holdfast"
STATE_DIR_VARIABLE = PREFIX + "STATE_DIR"
OVERRIDE = "HOLDFAST_START_NOW"
LONGEST_WINDOW_S = 24 * 3600.0
LONGEST_OVERRIDE = 64


class Gate(enum.Enum):
    """What is held back until the slot."""

    CONNECT = "connect"  # the agent runs at once, enforces from its checkpoint, and asks etcd later
    START = "start"  # the agent's process itself


class Option(NamedTuple):
    """One option; `parse` raises ValueError with the reason."""

    name: str
    default: str
    parse: Callable[[str], Any]
    help: str

    @property
    def environment(self) -> str:
        return PREFIX + self.name.upper().replace("-", "_")


class Options(NamedTuple):
    """The parsed options and the agent's command line."""

    state_dir: str
    node_name: str
    nodes: int
    window: float | None
    gate: Gate
    override: str
    command: tuple[str, ...]


def _directory(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("it must be an absolute path")
    return text


def _name(text: str) -> str:
    name = text or os.uname().nodename
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", name):
        raise ValueError("it must be a host name")
    return name


def _nodes(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > MOST_NODES:
        raise ValueError(f"it must be a whole number up to {MOST_NODES}")
    return int(text)


def parse_window(text: str) -> float | None:
    """Return the seconds of a window, None for auto; ValueError with the reason."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", text)
    if match is None:
        raise ValueError("it must be auto or a duration such as 45s, 20m, 1h")
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if seconds > LONGEST_WINDOW_S:
        raise ValueError("it must be at most 24h")
    return seconds


def _gate(text: str) -> Gate:
    if text not in (names := [gate.value for gate in Gate]):
        raise ValueError(f"it must be one of {', '.join(names)}")
    return Gate(text)


TABLE = (
    Option("state-dir", STATE_DIR, _directory, "Where the checkpoint and this hook's state are."),
    Option("node-name", "", _name, "This host's name among the cluster's nodes; empty: the host name."),
    Option(
        "nodes", "0", _nodes, "Hosts in the cluster until a checkpoint tells; 0: unknown, 1: alone, no wait."
    ),
    Option(
        "window", "auto", parse_window, "Length of the window; auto: by cluster size (1000: 20m, 5000: 60m)."
    ),
    Option("gate", "connect", _gate, "connect: start at once, talk to etcd later; start: hold the process."),
)

_EXAMPLES = """\
Examples:
  prestart -- holdfast agent                        slot by the checkpoint; the agent starts at once
  prestart --nodes 1 -- holdfast agent              a host on its own: no wait
  prestart --nodes 5000 --gate start -- holdfast agent
  HOLDFAST_START_NOW=alice prestart -- holdfast agent     this one start without waiting, and logged
"""


def usage() -> str:
    """Return the text of `--help`."""
    lines = ["Usage: prestart [--OPTION VALUE]… -- COMMAND [ARGUMENT]…", ""]
    for option in TABLE:
        lines.append(f"  --{option.name} (environment {option.environment}, default {option.default or '-'})")
        lines.append(f"      {option.help}")
    return "\n".join([*lines, "", _EXAMPLES])


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Return the options; OptionRefused for the first thing that makes no sense."""
    flags, command = _split(arguments)
    texts = {option.name: (option.default, "default") for option in TABLE}
    texts |= _from_environment(environment)
    texts |= _from_flags(flags)
    values = {option.name.replace("-", "_"): _value(option, *texts[option.name]) for option in TABLE}
    return Options(**values, override=_override(environment), command=command)


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    if "--" not in arguments or arguments[-1] == "--":
        raise OptionRefused("no command to start", hint="prestart [--OPTION VALUE]… -- COMMAND…")
    end = arguments.index("--")
    return arguments[:end], tuple(arguments[end + 1 :])


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    known = {option.environment: option.name for option in TABLE}
    given = {name: text for name, text in environment.items() if name.startswith(PREFIX)}
    for name in given:
        if name not in known:
            raise OptionRefused(
                f"unknown environment variable {shorten(name)}", hint=f"known: {', '.join(known)}"
            )
    return {known[name]: (text, f"environment {name}") for name, text in given.items()}


def _from_flags(flags: Sequence[str]) -> dict[str, tuple[str, str]]:
    known = [option.name for option in TABLE]
    found: dict[str, tuple[str, str]] = {}
    rest = list(flags)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--") or name[2:] not in known:
            raise OptionRefused(f"unknown flag {shorten(name)}", hint=f"known: --{', --'.join(known)}")
        if not equals and not rest:
            raise OptionRefused(f"flag {name} has no value")
        if name[2:] in found:
            raise OptionRefused(f"flag {name} is given twice")
        found[name[2:]] = (text if equals else rest.pop(0), "the command line")
    return found


def _value(option: Option, text: str, origin: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        message = f"option {option.name}={shorten(text)!r} from {origin} is refused: {error}"
        raise OptionRefused(message, hint=option.help) from error


def _override(environment: Mapping[str, str]) -> str:
    who = environment.get(OVERRIDE, "").strip()
    if len(who) > LONGEST_OVERRIDE or not who.isprintable():
        raise OptionRefused(f"environment {OVERRIDE}={shorten(who)!r} is not a name of at most 64 characters")
    return who
