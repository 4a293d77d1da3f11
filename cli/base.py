# SPDX-License-Identifier: Apache-2.0
"""What all commands share: lazily loaded groups, examples in the help, and the common options."""

from __future__ import annotations

import getpass
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.client import AgentClient
from cli.errors import Failure
from core.errors import HoldfastError
from prestart.options import STATE_DIR, STATE_DIR_VARIABLE

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_SOCKET = Path("/var/run/holdfast/holdfast.sock")
# The start hook's name of the option, then the agent's.
STATE_DIR_VARIABLES = (STATE_DIR_VARIABLE, "HOLDFAST_STATE_DIR")


@dataclass(frozen=True)
class Settings:
    """The global options; every command gets them by `click.pass_obj`."""

    socket: Path = DEFAULT_SOCKET

    def agent(self, *, timeout: float = 30.0) -> AgentClient:
        """Return a client of the agent's API; nothing is opened yet."""
        return AgentClient(self.socket, timeout=timeout)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used.

    `lazy` maps a name to ("module:attribute", one line of help): the list of commands needs no import.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lazy[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it raises on purpose becomes a message and an exit code."""
        try:
            return super().invoke(ctx)
        except HoldfastError as error:
            raise Failure(error) from error


def examples(*lines: str) -> str:
    """Return the epilog of a command: examples that can be pasted."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def output_option(function: F) -> F:
    """Add ``-o json``."""
    return click.option(
        "-o", "--output", type=click.Choice(["json"]), help="Print JSON instead of text or a table."
    )(function)


def headers_option(function: F) -> F:
    """Add ``--no-headers``."""
    return click.option("--no-headers", is_flag=True, help="Leave the header line out.")(function)


def state_dir_option(text: str) -> Callable[[F], F]:
    """Add ``--state-dir``."""
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path),
        default=STATE_DIR,
        envvar=STATE_DIR_VARIABLES,
        show_default=True,
        help=text,
    )


def state_dir() -> Path:
    """Return the state directory for commands that have no ``--state-dir``."""
    return Path(next(filter(None, map(os.environ.get, STATE_DIR_VARIABLES)), STATE_DIR))


def user() -> str:
    """Return who types, behind sudo too."""
    return os.environ.get("SUDO_USER") or getpass.getuser()
