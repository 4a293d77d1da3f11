# SPDX-License-Identifier: Apache-2.0
"""Tables and JSON on stdout.

Tables have no borders and fixed headers, and look the same on a terminal, in a pipe and in a file: every
line is complete, so that `grep` and `awk` see what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

# Lines are never cut: wider than any of them.
UNLIMITED_WIDTH = 100_000


def print_json(value: Any) -> None:
    """Print `value` as JSON, indented, keys in the order they came."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_done(output: str | None, value: Any, *lines: str) -> None:
    """Say what a command did: `value` as JSON where ``-o json`` asks for it, else the lines."""
    if output:
        print_json(value)
        return
    for line in lines:
        click.echo(line)


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, no_headers: bool = False
) -> None:
    """Print rows under headers.  Both headers and cells may have several lines; none is cut or folded."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, width=UNLIMITED_WIDTH)
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0), pad_edge=False)
    for _ in headers:
        table.add_column(no_wrap=True)
    if not no_headers:
        # As a row of its own: rich would move the names down to the second line of a header that has two.
        table.add_row(*headers, style="bold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def printable(value: object) -> str:
    """Return `value` as text that can not steer a terminal; line feeds stay."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plural(number: int, noun: str) -> str:
    """Return ``1 rule``, ``2 rules``; nouns that end in -y or -s get what English wants."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}s"


def rounded(number: float) -> str:
    """Return a number in three digits, or in all where it has more."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
