# SPDX-License-Identifier: Apache-2.0
"""`holdfast vm register | unregister | list`: machines that join the identity model without an agent.

Their keys are in etcd, written with the operator's certificate; every agent then enforces for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.base import F, LazyGroup, Settings, examples, headers_option, output_option
from cli.errors import Missing, Unreachable
from cli.etcd import etcd_option, with_client
from cli.output import print_done, print_json, print_table, printable

if TYPE_CHECKING:
    from external_resources.registry import Listed, Registration

Json = dict[str, Any]
_HERE = "cli.commands.vm"


@click.group(
    cls=LazyGroup,
    lazy={
        "register": (f"{_HERE}:register", "Give a machine an identity"),
        "unregister": (f"{_HERE}:unregister", "Take it back"),
        "list": (f"{_HERE}:list_", "List registered machines"),
    },
    epilog=examples("holdfast vm register legacy-1 --ip 10.1.2.3 -l app=legacy", "holdfast vm list"),
)
def vm() -> None:
    """Give VMs and bare-metal machines an identity, so that policy knows them."""


def cluster_options(function: F) -> F:
    """Add the options of the cluster whose keys are written."""
    default = "[default: the agent's of this host]"
    function = click.option("--cluster-id", type=click.IntRange(0, 255), help=default)(function)
    return click.option("--ip-address-space", "space", help=default)(function)


@click.command(
    epilog=examples(
        "holdfast vm register legacy-1 --ip 10.1.2.3 -l app=legacy",
        "holdfast vm register rack7 --ip 10.78.0.0/24 -l app=batch -l env=prod",
    )
)
@click.argument("name")
@click.option("--ip", "addresses", multiple=True, required=True, help="Address or prefix; repeatable.")
@click.option("-l", "--label", "labels", multiple=True, required=True, help="[source:]key=value; repeatable.")
@click.option("--host-ip", default="", help="The registered node it is behind, if it is behind one.")
@click.option("--description", default="", help="A note for people.")
@cluster_options
@etcd_option
@output_option
@click.pass_obj
def register(
    settings: Settings,
    name: str,
    addresses: tuple[str, ...],
    labels: tuple[str, ...],
    host_ip: str,
    description: str,
    cluster_id: int | None,
    space: str | None,
    etcd_config: Path | None,
    output: str | None,
) -> None:
    """Register the machine NAME, or change it; the same again changes nothing."""
    from external_resources import registry
    from external_resources.resource import Resource

    wanted = Resource.of(name, addresses, labels, host_ip=host_ip, description=description)
    number, found = cluster(settings, cluster_id, space)
    done = with_client(
        etcd_config,
        lambda client: registry.register(client, wanted, cluster_id=number, space=found),
        writes=True,
    )
    if output:
        print_json(as_json(done) | {"changed": done.changed})
        return
    change = "registered" if done.changed else "unchanged"
    click.echo(f"{name}: {change}, identity {done.number}, {', '.join(wanted.addresses)}")


@click.command(epilog=examples("holdfast vm unregister legacy-1"))
@click.argument("name")
@cluster_options
@etcd_option
@output_option
@click.pass_obj
def unregister(
    settings: Settings,
    name: str,
    cluster_id: int | None,
    space: str | None,
    etcd_config: Path | None,
    output: str | None,
) -> None:
    """Remove the machine NAME and its addresses."""
    from external_resources import registry

    _, found = cluster(settings, cluster_id, space)
    gone = with_client(
        etcd_config, lambda client: registry.unregister(client, name, space=found), writes=True
    )
    if not gone:
        raise Missing(f"no machine {printable(name)} is registered")
    print_done(output, {"name": name, "deleted": True}, f"{name} is no longer registered")


@click.command("list", epilog=examples("holdfast vm list", "holdfast vm list -o json"))
@cluster_options
@etcd_option
@output_option
@headers_option
@click.pass_obj
def list_(
    settings: Settings,
    cluster_id: int | None,
    space: str | None,
    etcd_config: Path | None,
    output: str | None,
    no_headers: bool,
) -> None:
    """List the registered machines, and what is wrong with those whose keys are not complete."""
    from external_resources import registry

    _, address_space = cluster(settings, cluster_id, space)
    found = with_client(etcd_config, lambda client: registry.list_all(client, space=address_space))
    if output:
        print_json([as_json(each) | {"name": each.name, "problem": each.problem} for each in found])
        return
    headers = ("NAME", "IDENTITY", "LABELS", "ADDRESSES", "HOST", "PROBLEM")
    shown = headers if any(each.problem for each in found) else headers[:5]
    print_table(shown, (row(each)[: len(shown)] for each in found), no_headers=no_headers)


def row(found: Listed) -> tuple[object, ...]:
    resource = found.resource
    if resource is None:
        return found.name, "", "", "", "", found.problem
    labels, addresses = "\n".join(resource.labels.texts()), "\n".join(resource.addresses)
    return found.name, found.number or "", labels, addresses, resource.host_ip, found.problem


def as_json(found: Listed | Registration) -> Json:
    """Return what `register` and `list` say of one machine."""
    resource = found.resource
    if resource is None:
        return {"identity": 0}
    return {
        "name": resource.name,
        "identity": found.number,
        "labels": list(resource.labels.texts()),
        "addresses": list(resource.addresses),
        "host-ip": resource.host_ip,
        "description": resource.description,
    }


def cluster(settings: Settings, cluster_id: int | None, space: str | None) -> tuple[int, str]:
    """Return cluster id and address space: as given, else as this host's agent has them, else 0, default."""
    if cluster_id is not None and space is not None:
        return cluster_id, space
    try:
        options = settings.agent(timeout=5).get("config")["options"]
    except Unreachable:
        options = {}
    number = int(options.get("cluster-id", {}).get("value", 0)) if cluster_id is None else cluster_id
    name = str(options.get("ip-address-space", {}).get("value", "default")) if space is None else space
    return number, name
