# SPDX-License-Identifier: Apache-2.0
"""`holdfast monitor`: events of the data path and of the agent as they happen."""

from __future__ import annotations

import json
import sys

import click

from cli.base import Settings, examples, output_option
from cli.client import api_path
from cli.output import printable

TYPES = ("drop", "trace", "policy-verdict", "agent")


@click.command(
    epilog=examples(
        "holdfast monitor -t drop", "holdfast monitor --related-to 373 -v", "holdfast monitor -j | jq .reason"
    )
)
@click.option(
    "-t", "--type", "types", multiple=True, type=click.Choice(TYPES), help="Only this type; repeatable."
)
@click.option("--from", "source", multiple=True, type=int, help="Only from this endpoint; repeatable.")
@click.option("--to", "destination", multiple=True, type=int, help="Only to this endpoint; repeatable.")
@click.option("--related-to", "related", multiple=True, type=int, help="Either side; repeatable.")
@click.option("-v", "--verbose", is_flag=True, help="Also the time and every field of the event.")
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object a line, as -o json.")
@output_option
@click.pass_obj
def monitor(
    settings: Settings,
    types: tuple[str, ...],
    source: tuple[int, ...],
    destination: tuple[int, ...],
    related: tuple[int, ...],
    verbose: bool,
    as_json: bool,
    output: str | None,
) -> None:
    """Follow drops, policy verdicts, traces and what the agent does until interrupted.

    Events of the data path exist only while somebody listens.  How many were lost, because the agent or
    this reader was too slow, is told whatever the filter.
    """
    query = {"type": ",".join(types), "from_": csv(source), "to": csv(destination), "related": csv(related)}
    if sys.stderr.isatty():
        click.echo("Listening for events. Press Ctrl-C to quit", err=True)
    try:
        for line in settings.agent().stream(api_path("monitor", **query)):
            click.echo(line.decode().rstrip("\n") if as_json or output else text(line, verbose))
    except KeyboardInterrupt:
        return
    click.echo("The agent ended the stream", err=True)


def csv(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def text(line: bytes, verbose: bool) -> str:
    """Return the event's line, with its fields below when `verbose`."""
    event = json.loads(line)
    summary = printable(event["summary"])
    if not verbose:
        return summary
    known = {key: value for key, value in event.items() if key not in ("summary", "details") and value}
    fields = known | event["details"]
    return summary + "".join(f"\n  {key}={printable(value)}" for key, value in fields.items())
