# SPDX-License-Identifier: Apache-2.0
"""`holdfast cleanup`: removes from this host what the agent put there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.base import Settings, examples, output_option
from cli.commands.kv import ask
from cli.errors import CliError
from cli.output import plural, print_json
from core.errors import HoldfastError

if TYPE_CHECKING:
    from cli.host_state import Item, Scope


@click.command(
    epilog=examples(
        "holdfast cleanup --dry-run", "holdfast cleanup --bpf", "make down && holdfast cleanup --all -f"
    )
)
@click.option("--all", "everything", is_flag=True, help="Also the checkpoint: addresses and endpoints.")
@click.option("--bpf", "only_bpf", is_flag=True, help="Only programs and maps; devices and rules stay.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--bpf-root", type=click.Path(path_type=Path), default=Path("/sys/fs/bpf"), show_default=True)
@click.option(
    "--state-dir", type=click.Path(path_type=Path), default=Path("/var/lib/holdfast"), show_default=True
)
@output_option
@click.pass_obj
def cleanup(
    settings: Settings,
    everything: bool,
    only_bpf: bool,
    force: bool,
    dry_run: bool,
    bpf_root: Path,
    state_dir: Path,
    output: str | None,
) -> None:
    """Remove what the agent put on this host: programs, maps, devices, routes, firewall rules.

    Says what it will remove and asks.  The agent must be stopped.  Containers on its networks lose
    their network; nothing is enforced any more.
    """
    from cli.host_state import Scope, is_served

    if everything and only_bpf:
        raise click.UsageError("--all and --bpf exclude each other")
    if not dry_run and is_served(settings.socket):
        raise CliError(
            f"an agent is running: it answers at {settings.socket}", hint="stop it first: `make down`"
        )
    scope = Scope(bpf_root / "tc" / "globals", state_dir, network=not only_bpf, checkpoint=everything)
    asyncio.run(work(scope, dry_run, force, output))


async def work(scope: Scope, dry_run: bool, force: bool, output: str | None) -> None:
    """Find, show, ask, remove."""
    from cli.host_state import survey
    from datapath.netlink import Netlink

    async with Netlink() as netlink:
        found = await survey(netlink, scope)
        for error in found.errors:
            click.echo(f"Warning: {error}", err=True)
        if output:
            print_json([{"kind": item.kind, "name": item.name} for item in found.items])
        else:
            show(found.items)
        if dry_run or not found.items:
            return
        if not force:
            ask(f"Remove {plural(len(found.items), 'thing')} from this host?")
        failed = await remove(found.items)
    if failed or found.errors:
        raise CliError(
            f"{plural(len(failed) + len(found.errors), 'thing')} could not be looked at or removed"
        )
    click.echo(f"{plural(len(found.items), 'thing')} removed", err=bool(output))


def show(items: list[Item]) -> None:
    for item in items:
        click.echo(f"{item.kind:<9} {item.name}")
    if not items:
        click.echo("Nothing of Holdfast's is on this host")


async def remove(items: list[Item]) -> list[Item]:
    """Remove all items; return those that would not go, having said why."""
    failed: list[Item] = []
    for item in items:
        try:
            await item.remove()
        except (HoldfastError, OSError) as error:
            click.echo(f"Warning: {item.kind} {item.name}: {error}", err=True)
            failed.append(item)
    return failed
