# SPDX-License-Identifier: Apache-2.0
"""`holdfast endpoint list | get | log | health | create | delete`."""

from __future__ import annotations

from typing import Any

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.client import api_path
from cli.output import print_done, print_json, print_table

Json = dict[str, Any]

HEADERS = (
    "ENDPOINT",
    "POLICY (ingress)\nENFORCEMENT",
    "POLICY (egress)\nENFORCEMENT",
    "IDENTITY",
    "LABELS (source:key[=value])",
    "IPv6",
    "IPv4",
    "STATUS",
)
_HERE = "cli.commands.endpoint"

REFERENCE_HELP = """An endpoint is its number, or container-name:NAME, container-id:PREFIX, ipv4:ADDRESS,
ipv6:ADDRESS."""


@click.group(
    cls=LazyGroup,
    lazy={
        "list": (f"{_HERE}:list_", "List the endpoints of this host"),
        "get": (f"{_HERE}:get", "Show all about one endpoint"),
        "log": (f"{_HERE}:log", "Show an endpoint's history"),
        "health": (f"{_HERE}:health", "Show an endpoint's health"),
        "create": (f"{_HERE}:create", "Make an endpoint for a network namespace"),
        "delete": (f"{_HERE}:delete", "Remove an endpoint made by create"),
    },
    epilog=examples("holdfast endpoint list", "holdfast endpoint get container-name:web"),
)
def endpoint() -> None:
    """Show and make the endpoints of this host."""


@click.command(
    "list", epilog=examples("holdfast endpoint list", "holdfast endpoint list -o json | jq '.[].id'")
)
@output_option
@headers_option
@click.pass_obj
def list_(settings: Settings, output: str | None, no_headers: bool) -> None:
    """List the endpoints of this host, one label a line."""
    found: list[Json] = settings.agent().get("endpoint")
    if output:
        print_json(found)
        return
    print_table(HEADERS, (row(each) for each in found), no_headers=no_headers)


def row(found: Json) -> tuple[object, ...]:
    """Return one endpoint's cells."""
    status = found["status"]
    addresses = status["networking"]["addressing"] or [{}]
    enforced = status["policy"]["policy-enabled"]
    opened = "ALLOW-ALL" if status["policy"].get("allow-all-until") else ""
    return (
        found["id"],
        opened or enforcement(enforced, "ingress"),
        opened or enforcement(enforced, "egress"),
        status["identity"]["id"],
        "\n".join(status["labels"]["security-relevant"]) or "no labels",
        addresses[0].get("ipv6", ""),
        addresses[0].get("ipv4", ""),
        status["state"],
    )


def enforcement(enabled: str, direction: str) -> str:
    return "Enabled" if enabled in (direction, "both") else "Disabled"


@click.command(
    epilog=REFERENCE_HELP
    + "\n\n"
    + examples(
        "holdfast endpoint get 373", "holdfast endpoint get container-name:web | jq '.[0].status.policy'"
    )
)
@click.argument("endpoint")
@output_option
@click.pass_obj
def get(settings: Settings, endpoint: str, output: str | None) -> None:
    """Show all about one endpoint, as a JSON array with it alone."""
    print_json([settings.agent().get("endpoint", endpoint)])


@click.command(epilog=REFERENCE_HELP + "\n\n" + examples("holdfast endpoint log 373"))
@click.argument("endpoint")
@output_option
@headers_option
@click.pass_obj
def log(settings: Settings, endpoint: str, output: str | None, no_headers: bool) -> None:
    """Show what happened to an endpoint, the latest last."""
    found: list[Json] = settings.agent().get("endpoint", endpoint, "log")
    if output:
        print_json(found)
        return
    rows = ((each["timestamp"], each["code"], each["state"], each["message"]) for each in found)
    print_table(("Timestamp", "Status", "State", "Message"), rows, no_headers=no_headers)


@click.command(epilog=REFERENCE_HELP + "\n\n" + examples("holdfast endpoint health ipv4:10.50.68.48"))
@click.argument("endpoint")
@output_option
@click.pass_obj
def health(settings: Settings, endpoint: str, output: str | None) -> None:
    """Show an endpoint's health."""
    found: Json = settings.agent().get("endpoint", endpoint, "healthz")
    if output:
        print_json(found)
        return
    click.echo(f"Overall Health:   {found['overallHealth']}")
    click.echo(f"BPF Health:       {found['bpf']}")
    click.echo(f"Policy Health:    {found['policy']}")
    click.echo(f"Connected:        {'yes' if found['connected'] else 'no'}")


@click.command(
    epilog=examples(
        "holdfast endpoint create /run/netns/vm1 -l app=legacy -l env=prod",
        "holdfast endpoint create /proc/4711/ns/net --ipv4 10.50.0.9 -l app=db",
    )
)
@click.argument("netns")
@click.option("-l", "--label", "labels", multiple=True, help="[source:]key=value; repeat for more.")
@click.option("--ipv4", default="", help="Its address; otherwise one from the pool.")
@click.option("--id", "number", type=click.IntRange(0, 65535), default=0, help="Its number; 0 chooses one.")
@click.option("--name", default="", help="A name to find it by.")
@click.option("--interface", default="eth0", show_default=True, help="The device's name inside.")
@output_option
@click.pass_obj
def create(
    settings: Settings,
    netns: str,
    labels: tuple[str, ...],
    ipv4: str,
    number: int,
    name: str,
    interface: str,
    output: str | None,
) -> None:
    """Make an endpoint for anything that has a network namespace.

    NETNS is the namespace's path as the agent sees it.
    """
    body = {"netns": netns, "labels": list(labels), "ipv4": ipv4, "name": name, "interface": interface}
    found: Json = settings.agent().request("PUT", api_path("endpoint", str(number)), body)
    if output:
        print_json(found)
        return
    address = found["status"]["networking"]["addressing"][0]["ipv4"]
    click.echo(f"Endpoint {found['id']} with address {address}, identity {found['status']['identity']['id']}")


@click.command(epilog=examples("holdfast endpoint delete 373"))
@click.argument("number", type=click.IntRange(1, 65535))
@output_option
@click.pass_obj
def delete(settings: Settings, number: int, output: str | None) -> None:
    """Remove an endpoint that `create` made; containers' go with their container."""
    settings.agent().request("DELETE", api_path("endpoint", str(number)))
    print_done(output, {"id": number, "deleted": True}, f"Endpoint {number} is removed")
