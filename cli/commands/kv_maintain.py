# SPDX-License-Identifier: Apache-2.0
"""`holdfast kvstore maintain`: the daemon beside an etcd member, and the check of its health."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.base import F, examples, output_option
from cli.etcd import choose, etcd_option
from cli.output import print_json, printable
from core.options import parse_duration

if TYPE_CHECKING:
    from kvstore.client import Client
    from kvstore.maintenance import Maintainer

DIRECTORY = Path("/var/lib/holdfast-etcd")


def seconds(_: click.Context, parameter: click.Parameter, text: str) -> float:
    """Return the seconds of a duration on the command line."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is {error}; such as 6h, 90s", param=parameter) from error


def duration_option(name: str, default: str, text: str) -> Callable[[F], F]:
    """Add an option whose value is a duration."""
    return click.option(
        name, metavar="DURATION", callback=seconds, default=default, show_default=True, help=text
    )


@click.command(
    epilog=examples(
        "holdfast kvstore maintain --member etcd-1 --snapshot-interval 6h",
        "holdfast kvstore maintain --member etcd-1 --check",
    )
)
@click.option("--member", required=True, help="Name of the etcd member beside which this runs.")
@click.option(
    "--directory", type=click.Path(path_type=Path), default=DIRECTORY, show_default=True,
    help="Where snapshots and state are kept.",
)  # fmt: skip
@duration_option("--snapshot-interval", "6h", "A snapshot is taken every so long.")
@click.option(
    "--snapshot-keep", type=click.IntRange(1), default=8, show_default=True,
    help="The newest so many are kept.",
)  # fmt: skip
@click.option(
    "--quota", type=click.IntRange(1), default=8 << 30, show_default=True,
    help="etcd's --quota-backend-bytes.",
)  # fmt: skip
@duration_option("--defragment-interval", "24h", "At most one attempt in so long.")
@click.option(
    "--defragment-minimum", type=click.IntRange(1), default=256 << 20, show_default=True,
    help="Bytes of free pages for which it is worth it.",
)  # fmt: skip
@duration_option("--defragment-timeout", "20m", "An attempt is given up after so long.")
@click.option("--check", is_flag=True, help="Only say how the maintenance in DIRECTORY is: exit 0 or 1.")
@etcd_option
@output_option
def maintain(
    member: str,
    directory: Path,
    snapshot_interval: float,
    snapshot_keep: int,
    quota: int,
    defragment_interval: float,
    defragment_minimum: int,
    defragment_timeout: float,
    check: bool,
    etcd_config: Path | None,
    output: str | None,
) -> None:
    """Take snapshots of an etcd member, and defragment it when that is worth it.

    Runs until it is stopped, beside the member; of all that run for one etcd, one works on its
    member at a time. -o json logs in JSON.
    """
    if check:
        say_health(directory, output)
        return
    from core import log
    from kvstore.maintenance import Maintainer, Schedule
    from kvstore.upkeep import Rules

    rules = Rules(quota=quota, minimum=defragment_minimum, every=defragment_interval)
    schedule = Schedule(snapshot=snapshot_interval, keep=snapshot_keep, defragmentation=defragment_timeout)
    log.setup("json" if output else "text")

    def made(client: Client) -> Maintainer:
        return Maintainer(client, member, directory, rules=rules, schedule=schedule)

    asyncio.run(until_stopped(choose(etcd_config, writes=True), made))


async def until_stopped(path: Path, made: Callable[[Client], Maintainer]) -> None:
    """Run a maintenance until SIGTERM or SIGINT."""
    from kvstore.client import Client
    from kvstore.config import EtcdConfig

    client = Client(EtcdConfig.load(path))
    try:
        task = asyncio.create_task(made(client).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        await client.close()


def say_health(directory: Path, output: str | None) -> None:
    """Print how the maintenance is and exit."""
    from kvstore.maintenance import health

    healthy, sentence = health(directory, datetime.now(UTC))
    if output:
        print_json({"healthy": healthy, "message": sentence})
    else:
        click.echo(printable(sentence))
    click.get_current_context().exit(0 if healthy else 1)
