# SPDX-License-Identifier: Apache-2.0
"""`holdfast map list | get`: the BPF maps as the agent knows them."""

from __future__ import annotations

from typing import Any

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.output import print_json, print_table

Json = dict[str, Any]
_HERE = "cli.commands.maps"


@click.group(
    "map",
    cls=LazyGroup,
    lazy={
        "list": (f"{_HERE}:list_", "List maps"),
        "get": (f"{_HERE}:get", "Show the entries of a map"),
    },
    epilog=examples("holdfast map list", "holdfast map get cilium_ipcache"),
)
def map_() -> None:
    """Show the BPF maps as the agent knows them; `holdfast bpf` reads the kernel's."""


@click.command("list", epilog=examples("holdfast map list", "holdfast map list --verbose"))
@click.option("--verbose", is_flag=True, help="Also type, size, fill level and kernel memory.")
@output_option
@headers_option
@click.pass_obj
def list_(settings: Settings, verbose: bool, output: str | None, no_headers: bool) -> None:
    """List the maps with their number of entries and failed writes."""
    found: list[Json] = settings.agent().get("map")
    if output:
        print_json(found)
        return
    headers = (
        "Name",
        "Num entries",
        "Num errors",
        "Cache enabled",
        "Type",
        "Max entries",
        "Pressure",
        "Memory",
    )
    shown = headers if verbose else headers[:4]
    print_table(shown, (row(each)[: len(shown)] for each in found), no_headers=no_headers)


def row(found: Json) -> tuple[object, ...]:
    entries = found["entries"] if found["entries"] >= 0 else "unknown"
    cached = "true" if found["cached"] else "false"
    size, pressure = found["max-entries"], f"{found['pressure']:.1%}"
    memory = f"{found['memory'] / 1e6:.1f} MB"
    return found["name"], entries, found["errors"], cached, found["type"], size, pressure, memory


@click.command(epilog=examples("holdfast map get cilium_lxc", "holdfast map get cilium_policy_00373 -o json"))
@click.argument("name")
@output_option
@headers_option
@click.pass_obj
def get(settings: Settings, name: str, output: str | None, no_headers: bool) -> None:
    """Show the entries of the map NAME."""
    found: Json = settings.agent().get("map", name)
    if output:
        print_json(found)
        return
    rows = ((each["key"], each["value"], each["state"], each["error"]) for each in found["entries"])
    print_table(("Key", "Value", "State", "Error"), rows, no_headers=no_headers)
