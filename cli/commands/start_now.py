# SPDX-License-Identifier: Apache-2.0
"""`holdfast start-now`: an operator's override of the start window, for one start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.base import Settings, examples, output_option, state_dir_option, user
from cli.commands.status import duration
from cli.errors import CliError, Unreachable
from cli.output import print_json
from core.files import write_atomic
from prestart.state import ORDER


@click.command(
    "start-now",
    epilog=examples("holdfast start-now", "holdfast start-now --by 'alice, incident 4711'"),
)
@click.option("--by", default="", help="Who orders it, for the log.  [default: the user]")
@state_dir_option("Where a start hook that holds the agent back looks.")
@output_option
@click.pass_obj
def start_now(settings: Settings, by: str, state_dir: Path, output: str | None) -> None:
    """End the wait of this start for its slot in the start window.

    A running agent asks etcd at once; one that the hook still holds back (gate start) is started within a
    second. The next start waits for its slot again. Of a whole cluster that comes back from a power cut,
    order only what has to be there first: the window is what keeps etcd alive.
    """
    who = (by or user()).encode(errors="replace").decode()
    try:
        found: Any = settings.agent().request("PUT", "/v1/start-now", {"by": who})
    except Unreachable:
        left = _leave(state_dir, who)
        if output:
            print_json({"order": str(left)})
        return
    if output:
        print_json(found)
    elif found["seconds"] > 0:
        click.echo(f"etcd is asked now, {duration(found['seconds'])} before this host's slot")
    else:
        click.echo("nothing was waited for")


def _leave(directory: Path, who: str) -> Path:
    """Leave the order where the start hook looks for it; return the file."""
    if not directory.is_dir():
        raise CliError(f"no agent answers, and there is no {directory} where a start hook would look")
    path = directory / ORDER
    try:
        write_atomic(path, who.encode())
    except OSError as error:
        raise CliError(
            f"no agent answers, and the order can not be left in {path}: {error.strerror}"
        ) from error
    click.echo(f"no agent answers; the start hook finds the order in {path}", err=True)
    return path
