# SPDX-License-Identifier: Apache-2.0
"""`holdfast node list | pools | add | release` and `holdfast ip list | get`."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Network, ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.errors import Missing
from cli.etcd import etcd_option, with_client
from cli.output import print_json, print_table

if TYPE_CHECKING:
    from kvstore.client import Client
    from kvstore.pools import Registered, Registrar

Json = dict[str, Any]
_HERE = "cli.commands.node"
F = TypeVar("F", bound=Callable[..., Any])


class Network4(click.ParamType[IPv4Network]):
    """An IPv4 network such as 10.50.2.0/24."""

    name = "network"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> IPv4Network:
        try:
            return IPv4Network(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def cluster_option(function: F) -> F:
    """Add ``--cluster-name``."""
    return click.option(
        "--cluster-name", "cluster", default="default", show_default=True, help="Cluster of the node."
    )(function)


@click.group(
    cls=LazyGroup,
    lazy={
        "list": (f"{_HERE}:node_list", "List nodes"),
        "pools": (f"{_HERE}:node_pools", "List the pools that are claimed in etcd"),
        "add": (f"{_HERE}:node_add", "Claim a pool for a node that is to come"),
        "release": (f"{_HERE}:node_release", "Give up the pool of a node that is gone"),
    },
    epilog=examples("holdfast node list", "holdfast node pools", "holdfast node release old-host"),
)
def node() -> None:
    """Show the nodes of the cluster, and say who has which pool."""


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


@click.command(
    "pools", epilog=examples("holdfast node pools", "holdfast node pools --cluster-name prod -o json")
)
@cluster_option
@etcd_option
@output_option
@headers_option
def node_pools(cluster: str, etcd_config: Path | None, output: str | None, no_headers: bool) -> None:
    """List the pools that nodes have claimed, and whether the node is there.

    `away` is a node whose lease has ended: its pool stays its own until it is released.
    """
    known = with_client(etcd_config, lambda client: _registrar(client, cluster).known())
    found = [_claim(each.node, str(each.pool), known.nodes.get(each.node)) for each in known.claims]
    found.sort(key=lambda each: order(each["pool"]))
    if output:
        print_json(found)
        return
    rows = ([each["pool"], each["node"], each["state"], each["address"]] for each in found)
    print_table(("POOL", "NODE", "STATE", "ADDRESS"), rows, no_headers=no_headers)


def _registrar(client: Client, cluster: str) -> Registrar:
    from kvstore.pools import Registrar

    return Registrar(client, cluster)


def _claim(name: str, pool: str, there: Registered | None) -> Json:
    state, address = ("registered", there.address) if there is not None else ("away", "")
    return {"pool": pool, "node": name, "state": state, "address": address}


@click.command(
    "add",
    epilog=examples(
        "holdfast node add host-b --pool 10.50.2.0/24",
        "holdfast node add host-b --from 10.50.0.0/16",
    ),
)
@click.argument("name")
@click.option("--pool", type=Network4(), help="The pool, fixed.")
@click.option("--from", "whole", type=Network4(), help="Range of the cluster: a free block of it is chosen.")
@click.option("--mask-size", default=24, show_default=True, help="Length of such a block.")
@cluster_option
@etcd_option
@output_option
def node_add(
    name: str,
    pool: IPv4Network | None,
    whole: IPv4Network | None,
    mask_size: int,
    cluster: str,
    etcd_config: Path | None,
    output: str | None,
) -> None:
    """Claim a pool for the node NAME before its agent starts.

    Where etcd has users no agent may claim one: this is done together with the host's certificate. Its agent
    finds the claim by its name (option cluster-pool-ipv4-cidr), or has the same pool configured (ipv4-range).
    """
    from kvstore.pools import Wish

    if (pool is None) == (whole is None):
        raise click.UsageError("give either --pool or --from")
    if whole is not None and not whole.prefixlen <= mask_size <= 29:
        raise click.BadParameter(f"{mask_size} is no length of a block of {whole}", param_hint="--mask-size")
    wish = Wish(name, "", fixed=pool, cluster_range=whole, length=mask_size)
    claimed = with_client(
        etcd_config, lambda client: _registrar(client, cluster).claim_for(wish), writes=True
    )
    if output:
        print_json({"node": name, "pool": str(claimed)})
    else:
        click.echo(f"{name}: pool {claimed}")


@click.command("release", epilog=examples("holdfast node release old-host"))
@click.argument("name")
@cluster_option
@etcd_option
@output_option
def node_release(name: str, cluster: str, etcd_config: Path | None, output: str | None) -> None:
    """Give up the pools of the node NAME, which must be gone: others may then claim them.

    A node that is registered is refused; it is gone once its agent was cleaned up or its lease has ended.
    """
    released = with_client(etcd_config, lambda client: _registrar(client, cluster).release(name), writes=True)
    if not released:
        raise Missing(f"node {name} has claimed no pool in cluster {cluster}", hint="holdfast node pools")
    if output:
        print_json({"node": name, "released": [str(each) for each in released]})
    else:
        click.echo(f"{name}: released {', '.join(map(str, released))}")


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
