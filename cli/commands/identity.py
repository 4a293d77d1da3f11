# SPDX-License-Identifier: Apache-2.0
"""`holdfast identity list | get`."""

from __future__ import annotations

from typing import Any

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.output import print_json, print_table

Json = dict[str, Any]
_HERE = "cli.commands.identity"


@click.group(
    cls=LazyGroup,
    lazy={
        "list": (f"{_HERE}:list_", "List identities"),
        "get": (f"{_HERE}:get", "Show one identity, or the one that has labels"),
    },
    epilog=examples("holdfast identity list", "holdfast identity get 13465"),
)
def identity() -> None:
    """Show identities: numbers that stand for a set of labels."""


@click.command(
    "list",
    epilog=examples(
        "holdfast identity list",
        "holdfast identity list container:app=web",
        "holdfast identity list --endpoints",
    ),
)
@click.argument("labels", nargs=-1)
@click.option("--endpoints", is_flag=True, help="Only those that endpoints of this host have.")
@output_option
@headers_option
@click.pass_obj
def list_(
    settings: Settings, labels: tuple[str, ...], endpoints: bool, output: str | None, no_headers: bool
) -> None:
    """List identities, one label a line; with LABELS only those that have all of them.

    REFCOUNT says how many endpoints of this host have the identity.
    """
    found = [each for each in settings.agent().get("identity") if has_labels(each, labels)]
    if endpoints:
        found = [each for each in found if each["reference-count"]]
    if output:
        print_json(found)
        return
    rows = ((each["id"], "\n".join(each["labels"]), each["reference-count"]) for each in found)
    print_table(("ID", "LABELS", "REFCOUNT"), rows, no_headers=no_headers)


def has_labels(identity: Json, wanted: tuple[str, ...]) -> bool:
    """True when every wanted label is among the identity's; one without a source matches any source."""
    have = set(identity["labels"])
    return have.issuperset(each for each in wanted if ":" in each) and have_any_source(have, wanted)


def have_any_source(have: set[str], wanted: tuple[str, ...]) -> bool:
    bare = {label.partition(":")[2] for label in have}
    return bare.issuperset(each for each in wanted if ":" not in each)


@click.command(
    epilog=examples("holdfast identity get 13465", "holdfast identity get --label container:app=web")
)
@click.argument("number", type=click.IntRange(0), required=False)
@click.option("--label", "labels", multiple=True, help="Show those that have this label; repeat for more.")
@output_option
@click.pass_obj
def get(settings: Settings, number: int | None, labels: tuple[str, ...], output: str | None) -> None:
    """Show the identity with a NUMBER, or those with labels."""
    if (number is None) == (not labels):
        raise click.UsageError("give either a NUMBER or --label")
    found = matching(settings, number, labels)
    if output:
        print_json(found)
        return
    print_table(("ID", "LABELS"), ((each["id"], "\n".join(each["labels"])) for each in found))


def matching(settings: Settings, number: int | None, labels: tuple[str, ...]) -> list[Json]:
    if number is not None:
        return [settings.agent().get("identity", str(number))]
    return [each for each in settings.agent().get("identity") if has_labels(each, labels)]
