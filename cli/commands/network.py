# SPDX-License-Identifier: Apache-2.0
"""`holdfast network create | list | delete`: docker networks that the agent's driver serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.client import HttpClient
from cli.errors import CliError
from cli.output import print_done, print_json, print_table, printable

Json = dict[str, Any]
_HERE = "cli.commands.network"
DRIVER = "holdfast"
# Creating a network goes through the engine to the agent and back.
TIMEOUT_S = 60.0


@click.group(
    cls=LazyGroup,
    lazy={
        "create": (f"{_HERE}:create", "Create a network"),
        "delete": (f"{_HERE}:delete", "Remove a network"),
        "list": (f"{_HERE}:list_", "List the driver's networks"),
    },
    epilog=examples("holdfast network create web", "docker run --network web -l app=web ..."),
)
def network() -> None:
    """Create and list docker networks whose containers have identity and policy."""


def docker_option(function: Any) -> Any:
    return click.option(
        "--docker",
        "docker",
        default="unix:///var/run/docker.sock",
        show_default=True,
        envvar="DOCKER_HOST",
        help="The engine's socket.",
    )(function)


def engine(address: str) -> HttpClient:
    """Return a client of the engine's API; CliError for an engine that is not on this host."""
    scheme, separator, path = address.partition("://")
    if separator and scheme != "unix":
        raise CliError(
            f"the engine at {address} is not on a unix socket", hint="the driver serves this host's only"
        )
    hint = "is docker running, and may this user open its socket?"
    return HttpClient(Path(path if separator else address), name="docker", hint=hint, timeout=TIMEOUT_S)


@click.command(epilog=examples("holdfast network create web", "holdfast network create db --label team=data"))
@click.argument("name")
@click.option("--label", "labels", multiple=True, help="key=value; repeatable.")
@click.option("--internal", is_flag=True, help="Mark it internal, as docker does.")
@docker_option
@output_option
def create(name: str, labels: tuple[str, ...], internal: bool, docker: str, output: str | None) -> None:
    """Create a network: `docker network create -d holdfast --ipam-driver null NAME`.

    Its containers get addresses from this node's pool; several networks share it.
    """
    body = {
        "Name": name,
        "CheckDuplicate": True,
        "Driver": DRIVER,
        "Internal": internal,
        "IPAM": {"Driver": "null"},
        "Labels": dict(label.partition("=")[::2] for label in labels),
    }
    answer: Json = engine(docker).request("POST", "/networks/create", body)
    if output:
        print_json(answer)
        return
    if answer.get("Warning"):
        click.echo(printable(answer["Warning"]), err=True)
    click.echo(answer["Id"])


@click.command(epilog=examples("holdfast network delete web"))
@click.argument("name")
@docker_option
@output_option
def delete(name: str, docker: str, output: str | None) -> None:
    """Remove a network that has no containers."""
    engine(docker).request("DELETE", f"/networks/{quote(name, safe='')}")
    print_done(output, {"name": name, "deleted": True}, f"Network {printable(name)} is removed")


@click.command("list", epilog=examples("holdfast network list", "holdfast network list -o json"))
@docker_option
@output_option
@headers_option
@click.pass_obj
def list_(settings: Settings, docker: str, output: str | None, no_headers: bool) -> None:
    """List the docker networks of this driver."""
    filters = urlencode({"filters": json.dumps({"driver": [DRIVER]})})
    found: list[Json] = engine(docker).request("GET", f"/networks?{filters}")
    if output:
        print_json(found)
        return
    rows = ((each["Id"][:12], each["Name"], each["Scope"], each["Created"][:19]) for each in found)
    print_table(("NETWORK ID", "NAME", "SCOPE", "CREATED"), rows, no_headers=no_headers)
