# SPDX-License-Identifier: Apache-2.0
"""`holdfast metrics list`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.client import api_path
from cli.output import print_json, print_table

_HERE = "cli.commands.metrics"
# name, labels (may be missing), value; Prometheus' text format
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)$")


@click.group(
    cls=LazyGroup,
    lazy={"list": (f"{_HERE}:list_", "List metrics and their values")},
    epilog=examples("holdfast metrics list"),
)
def metrics() -> None:
    """Show the agent's metrics."""


@click.command("list", epilog=examples("holdfast metrics list", "holdfast metrics list -p drop"))
@click.option(
    "-p", "--match-pattern", "pattern", default="", help="Only names that this regular expression finds."
)
@output_option
@headers_option
@click.pass_obj
def list_(settings: Settings, pattern: str, output: str | None, no_headers: bool) -> None:
    """List the metrics with their labels and values."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise click.BadParameter(f"{pattern!r}: {error}", param_hint="--match-pattern") from error
    text = settings.agent().text(api_path("metrics"))
    found = [sample for sample in samples(text) if wanted.search(sample[0])]
    if output:
        print_json([dict(zip(("name", "labels", "value"), sample, strict=True)) for sample in found])
        return
    print_table(("Metric", "Labels", "Value"), found, no_headers=no_headers)


def samples(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name, labels, value) of each sample."""
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.match(line)
        if match:
            yield match[1], match[2] or "", match[3]
