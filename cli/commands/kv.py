# SPDX-License-Identifier: Apache-2.0
"""`holdfast kvstore get | list | set | delete`: keys in etcd, for debugging."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.base import LazyGroup, examples, output_option
from cli.errors import CliError, Missing
from cli.etcd import etcd_option, with_client
from cli.output import plural, print_done, print_json, printable

if TYPE_CHECKING:
    from kvstore.client import Client

_HERE = "cli.commands.kv"


@click.group(
    cls=LazyGroup,
    lazy={
        "get": (f"{_HERE}:get", "Show a key, or all below a prefix"),
        "list": (f"{_HERE}:list_", "List keys below a prefix"),
        "set": (f"{_HERE}:set_", "Write a key"),
        "delete": (f"{_HERE}:delete", "Delete a key, or all below a prefix"),
        "status": ("cli.commands.kv_status:status", "Show etcd's members, their sizes and snapshots"),
        "maintain": ("cli.commands.kv_maintain:maintain", "Take snapshots and defragment, beside a member"),
    },
    epilog=examples("holdfast kvstore status", "holdfast kvstore get --recursive cilium/state/ip/v1/"),
)
def kvstore() -> None:
    """See how etcd is; read and write its keys.

    Keys are for debugging: agents write their own again when they change; change others' only if
    you know why.
    """


@click.command(
    epilog=examples(
        "holdfast kvstore get cilium/.heartbeat",
        "holdfast kvstore get --recursive cilium/state/identities/v1/id/",
    )
)
@click.argument("key")
@click.option("--recursive", is_flag=True, help="KEY is a prefix: show everything below it.")
@etcd_option
@output_option
def get(key: str, recursive: bool, etcd_config: Path | None, output: str | None) -> None:
    """Show the value of KEY."""
    found = with_client(etcd_config, lambda client: read(client, key, recursive))
    if not found:
        raise Missing(f"etcd has no key {printable(key)}")
    if output:
        print_json(found)
        return
    for name, value in found.items():
        click.echo(f"{printable(name)} => {printable(value)}")


async def read(client: Client, key: str, recursive: bool) -> dict[str, str]:
    """Return key → value as text; bytes that are none are escaped."""
    if recursive:
        found = (await client.list(key)).items
    else:
        one = await client.get(key)
        found = [one] if one else []
    return {kv.key: kv.value.decode("utf-8", "backslashreplace") for kv in found}


@click.command(
    "list", epilog=examples("holdfast kvstore list cilium/state/nodes/v1/", "holdfast kvstore list")
)
@click.argument("prefix", default="")
@etcd_option
@output_option
def list_(prefix: str, etcd_config: Path | None, output: str | None) -> None:
    """List the keys below PREFIX, without their values."""

    async def work(client: Client) -> list[str]:
        return [kv.key for kv in (await client.list(prefix, keys_only=True)).items]

    found = with_client(etcd_config, work)
    if output:
        print_json(found)
        return
    for name in found:
        click.echo(printable(name))


@click.command(
    "set", epilog=examples("holdfast kvstore set test/key value", "holdfast kvstore set --key a --value b")
)
@click.argument("pair", nargs=-1)
@click.option("--key", help="The key, as Cilium's command takes it.")
@click.option("--value", help="The value, as Cilium's command takes it.")
@etcd_option
@output_option
def set_(
    pair: tuple[str, ...], key: str | None, value: str | None, etcd_config: Path | None, output: str | None
) -> None:
    """Write a key: KEY VALUE, or --key and --value."""
    words = pair or tuple(word for word in (key, value) if word is not None)
    if len(words) != 2 or (pair and (key or value)):
        raise click.UsageError("give KEY VALUE, or --key KEY --value VALUE")
    revision = with_client(etcd_config, lambda client: client.put(words[0], words[1]), writes=True)
    done = {"key": words[0], "revision": revision}
    print_done(output, done, f"{printable(words[0])} is written at revision {revision}")


@click.command(
    epilog=examples("holdfast kvstore delete test/key", "holdfast kvstore delete --recursive test/")
)
@click.argument("key")
@click.option("--recursive", is_flag=True, help="KEY is a prefix: delete everything below it.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@etcd_option
@output_option
def delete(key: str, recursive: bool, force: bool, etcd_config: Path | None, output: str | None) -> None:
    """Delete KEY."""
    if not key:
        raise click.UsageError("an empty prefix would delete everything in etcd")
    if recursive:
        number = with_client(etcd_config, lambda client: client.count(key), writes=True)
        if number and not force:
            ask(f"Delete {plural(number, 'key')} below {printable(key)}?")
        gone = with_client(etcd_config, lambda client: client.delete_prefix(key), writes=True)
    else:
        gone = int(with_client(etcd_config, lambda client: client.delete(key), writes=True))
    if not gone:
        raise Missing(f"etcd has no key {printable(key)}")
    print_done(output, {"key": key, "deleted": gone}, f"{plural(gone, 'key')} deleted")


def ask(question: str) -> None:
    """Ask a person; without a terminal there is none, and the answer is no."""
    try:
        agreed = click.confirm(question)
    except click.Abort:
        agreed = False
    if not agreed:
        raise CliError("nothing was changed", hint="-f answers the question with yes")
