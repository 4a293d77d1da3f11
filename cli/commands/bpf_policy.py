# SPDX-License-Identifier: Apache-2.0
"""`holdfast bpf policy get | list`: policy maps with their counters, as Cilium 1.11 shows them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.commands.bpf import globals_dir, labels_of_identities, reading
from cli.commands.status import duration
from cli.output import print_json, print_table
from datapath.reasons import protocol_name

if TYPE_CHECKING:
    from datapath.records import PolicyCounters

Json = dict[str, Any]
_HERE = "cli.commands.bpf_policy"
PREFIX = "cilium_policy_"
DIRECTIONS = ("Ingress", "Egress")


@click.group(
    cls=LazyGroup,
    lazy={
        "get": (f"{_HERE}:get", "Show an endpoint's policy map"),
        "list": (f"{_HERE}:list_", "List the policy maps"),
    },
    epilog=examples("holdfast bpf policy get 373", "holdfast bpf policy get --all -n"),
)
def policy() -> None:
    """What each endpoint may receive and send, with counters."""


@click.command(
    epilog=examples(
        "holdfast bpf policy get 373",
        "holdfast bpf policy get 373 -n",
        "holdfast bpf policy get --all -o json",
    )
)
@click.argument("endpoint", required=False)
@click.option("--all", "everything", is_flag=True, help="The maps of all endpoints.")
@click.option("-n", "--numeric", is_flag=True, help="Identities as numbers.")
@output_option
@headers_option
@click.pass_obj
def get(
    settings: Settings,
    endpoint: str | None,
    everything: bool,
    numeric: bool,
    output: str | None,
    no_headers: bool,
) -> None:
    """Show the policy map of ENDPOINT, a number or the path of a pin."""
    if (endpoint is None) == (not everything):
        raise click.UsageError("give either an ENDPOINT or --all")
    found = {name: dump(name) for name in ([map_name(endpoint)] if endpoint else map_names())}
    if output:
        print_json({name: [as_json(each) for each in entries] for name, entries in found.items()})
        return
    names = {} if numeric else labels_of_identities(settings)
    for name, entries in found.items():
        if everything:
            click.echo(f"Endpoint ID: {int(name.removeprefix(PREFIX))}\nPath: {globals_dir() / name}\n")
        show(entries, names, numeric, no_headers)


def map_name(endpoint: str) -> str:
    """Return the map's name for an endpoint's number, a map's name or a path."""
    if endpoint.isdecimal():
        return f"{PREFIX}{int(endpoint):05d}"
    name = Path(endpoint).name
    if not name.startswith(PREFIX):
        raise click.UsageError(
            f"{endpoint} is neither an endpoint's number (holdfast endpoint list) nor a pinned {PREFIX}…"
        )
    return name


def map_names() -> list[str]:
    """Return the pinned policy maps."""
    root = globals_dir()
    return sorted(pin.name for pin in root.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", pin.name))


def dump(name: str) -> list[PolicyCounters]:
    from datapath.maps import PolicyMap

    with reading(PolicyMap, name) as opened:
        return sorted(opened.dump(), key=lambda each: (each.key.direction, each.key))


def show(
    entries: Iterable[PolicyCounters], names: Mapping[int, str], numeric: bool, no_headers: bool
) -> None:
    who = "IDENTITY" if numeric else "LABELS (source:key[=value])"
    headers = ("POLICY", "DIRECTION", who, "PORT/PROTO", "PROXY PORT", "BYTES", "PACKETS")
    print_table(headers, (row(each, names) for each in entries), no_headers=no_headers)


def row(found: PolicyCounters, names: Mapping[int, str]) -> tuple[object, ...]:
    """Return the cells of one entry; identity 0 is everybody."""
    key, entry = found.key, found.entry
    labels = names.get(key.identity) or ("ANY" if names and key.identity == 0 else key.identity)
    return (
        verdict(found),
        DIRECTIONS[key.direction],
        labels,
        port(key.dport, key.protocol),
        entry.proxy_port or "NONE",
        found.bytes,
        found.packets,
    )


def verdict(found: PolicyCounters) -> str:
    """Return Allow or Deny; of an operator's order also how long it is in force."""
    if not found.entry.until:
        return "Deny" if found.entry.deny else "Allow"
    left = found.entry.until - time.monotonic()
    return f"Allow, by order, for {duration(left)}" if left > 0 else "Ended order"


def port(dport: int, protocol: int) -> str:
    """Return ``80/TCP``, ``8/ICMP`` (a type), or ``ANY``."""
    return "ANY" if protocol == dport == 0 else f"{dport}/{protocol_name(protocol)}"


def as_json(found: PolicyCounters) -> Json:
    counters = {"packets": found.packets, "bytes": found.bytes}
    return found.key._asdict() | found.entry._asdict() | counters


@click.command("list", epilog=examples("holdfast bpf policy list", "holdfast bpf policy list -o json"))
@output_option
@headers_option
def list_(output: str | None, no_headers: bool) -> None:
    """List the policy maps with their number of entries."""
    found = [
        (int(name.removeprefix(PREFIX)), len(dump(name)), str(globals_dir() / name)) for name in map_names()
    ]
    if output:
        print_json([dict(zip(("endpoint", "entries", "path"), each, strict=True)) for each in found])
        return
    print_table(("ENDPOINT", "ENTRIES", "PATH"), found, no_headers=no_headers)
