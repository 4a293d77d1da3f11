# SPDX-License-Identifier: Apache-2.0
"""`holdfast node list` and `holdfast ip list | get`."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.errors import Missing
from cli.output import print_json, print_table

Json = dict[str, Any]
_HERE = "cli.commands.node"


@click.group(
    cls=LazyGroup,
    lazy={"list": (f"{_HERE}:node_list", "List nodes")},
    epilog=examples("holdfast node list"),
)
def node() -> None:
    """Show the nodes of the cluster."""


@click.command("list", epilog=examples("holdfast node list", "holdfast node list -o json"))
@output_option
@headers_option
@click.pass_obj
def node_list(settings: Settings, output: str | None, no_headers: bool) -> None:
    """List the nodes that are registered in the kvstore."""
    found: list[Json] = settings.agent().get("cluster", "nodes")
    if output:
        print_json(found)
        return
    headers = ("Name", "IPv4 Address", "Endpoint CIDR", "IPv6 Address", "Endpoint CIDR", "Source")
    keys = ("name", "ipv4-address", "ipv4-endpoint-cidr", "ipv6-address", "ipv6-endpoint-cidr", "source")
    print_table(headers, ([each[key] for key in keys] for each in found), no_headers=no_headers)


@click.group(
    cls=LazyGroup,
    lazy={
        "list": (f"{_HERE}:ip_list", "List addresses and their identities"),
        "get": (f"{_HERE}:ip_get", "Show the identity of one address"),
    },
    epilog=examples("holdfast ip list", "holdfast ip get 10.50.68.48"),
)
def ip() -> None:
    """Show which address has which identity, and who said so."""


@click.command("list", epilog=examples("holdfast ip list", "holdfast ip list -n", "holdfast ip list -v"))
@click.option("-n", "--numeric", is_flag=True, help="Numbers instead of labels.")
@click.option("-v", "--verbose", is_flag=True, help="Also the host and the encryption key.")
@output_option
@headers_option
@click.pass_obj
def ip_list(settings: Settings, numeric: bool, verbose: bool, output: str | None, no_headers: bool) -> None:
    """List addresses and prefixes with their identity."""
    found: list[Json] = sorted(settings.agent().get("ip"), key=lambda each: order(each["cidr"]))
    if output:
        print_json(found)
        return
    names = {} if numeric else labels_by_number(settings)
    headers = ("IP", "IDENTITY", "SOURCE", "HOST", "ENCRYPT_KEY")[: 5 if verbose else 3]
    rows = (address_row(each, names)[: len(headers)] for each in found)
    print_table(headers, rows, no_headers=no_headers)


def address_row(found: Json, names: dict[int, str]) -> tuple[object, ...]:
    identity = names.get(found["identity"]) or found["identity"]
    return found["cidr"], identity, found["source"], found["host-ip"], found["encrypt-key"]


def labels_by_number(settings: Settings) -> dict[int, str]:
    """Return number → labels, one a line."""
    return {each["id"]: "\n".join(each["labels"]) for each in settings.agent().get("identity")}


def order(cidr: str) -> tuple[int, int, int]:
    network = ip_network(cidr, strict=False)
    return network.version, int(network.network_address), network.prefixlen


@click.command("get", epilog=examples("holdfast ip get 10.50.68.48", "holdfast ip get 10.78.0.3 -o json"))
@click.argument("address")
@output_option
@click.pass_obj
def ip_get(settings: Settings, address: str, output: str | None) -> None:
    """Show the entry that decides for ADDRESS: the longest prefix that holds it."""
    try:
        wanted = ip_address(address)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ADDRESS") from error
    networks = [(ip_network(each["cidr"], strict=False), each) for each in settings.agent().get("ip")]
    holding = [(network, each) for network, each in networks if wanted in network]
    if not holding:
        raise Missing(f"no entry holds {address}", hint="it is treated as reserved:world (2)")
    found = max(holding, key=lambda pair: pair[0].prefixlen)[1]
    if output:
        print_json(found)
        return
    identity: Json = settings.agent().get("identity", str(found["identity"]))
    print_table(
        ("IP", "IDENTITY", "LABELS"), [(found["cidr"], found["identity"], "\n".join(identity["labels"]))]
    )
