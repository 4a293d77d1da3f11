# SPDX-License-Identifier: Apache-2.0
"""What the command line says when it can not do what it was asked, and its exit codes.

0  done
1  refused, failed, or not healthy
2  the command line itself is wrong
3  the agent, etcd or the engine can not be reached
4  the named thing does not exist

HoldfastError                1
└── CliError                 1
    ├── Unreachable          3
    └── Missing              4
"""

from __future__ import annotations

import sys

import click

from core.errors import HoldfastError


class CliError(HoldfastError):
    """Raised when a command can not go on."""

    exit_code = 1


class Unreachable(CliError):
    """Raised when nobody answers: agent, etcd or engine."""

    exit_code = 3


class Missing(CliError):
    """Raised when the named thing does not exist."""

    exit_code = 4


class Failure(click.ClickException):
    """Any error of ours on its way out: ``Error: …`` and the hint on stderr, never a traceback."""

    def __init__(self, error: HoldfastError) -> None:
        super().__init__(error.message)
        self.hint = error.hint
        self.code = exit_code_of(error)

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # click reads it from the instance
        return self.code

    def show(self, file: object = None) -> None:
        click.echo(f"Error: {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)


def exit_code_of(error: HoldfastError) -> int:
    """Return the exit code of an error; kvstore's are only known where somebody imported it."""
    if isinstance(error, CliError):
        return error.exit_code
    kvstore = sys.modules.get("kvstore.errors")
    unavailable = getattr(kvstore, "Unavailable", ())
    return Unreachable.exit_code if isinstance(error, unavailable) else 1
