# SPDX-License-Identifier: Apache-2.0
"""`holdfast kvstore status`: how etcd's members are, and what was done for them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.base import examples, output_option
from cli.commands.status import duration
from cli.etcd import etcd_option, with_client
from cli.output import print_json, print_table, printable

if TYPE_CHECKING:
    from kvstore.client import Client
    from kvstore.members import Cluster, Member
    from kvstore.schema import MaintenanceRecord

Json = dict[str, Any]
# Seconds: a maintenance tells of itself every ten minutes.
SILENT_S = 1800.0


@click.command(
    epilog=examples("holdfast kvstore status", "holdfast kvstore status -o json | jq .alarms"),
)
@etcd_option
@output_option
def status(etcd_config: Path | None, output: str | None) -> None:
    """Show etcd's members: alarms, sizes, last snapshot, last defragmentation.

    Exits 0 when all serve and nothing is wrong, 1 when something is, 3 when none answers.
    """
    cluster, records = with_client(etcd_config, look)
    wrong = troubles(cluster, records, datetime.now(UTC))
    if output:
        print_json(as_json(cluster, records, wrong))
    else:
        for sentence in wrong:
            click.echo(printable(sentence))
        headers = ("MEMBER", "ENDPOINT", "STATE", "SIZE", "FREE", "SNAPSHOT", "DEFRAGMENTED")
        print_table(headers, (row(each, records.get(each.name)) for each in cluster.members))
    silent = not any(each.id and not each.error for each in cluster.members)
    click.get_current_context().exit(3 if silent else 1 if wrong else 0)


async def look(client: Client) -> tuple[Cluster, dict[str, MaintenanceRecord]]:
    """Return how the members are, and what the maintenance of each has told."""
    from kvstore.errors import KvstoreError, RecordError
    from kvstore.members import Members
    from kvstore.schema import MAINTENANCE, parse_maintenance

    cluster = await Members(client).look()
    records: dict[str, MaintenanceRecord] = {}
    if all(each.error for each in cluster.members):
        return cluster, records
    try:
        found = (await client.list(MAINTENANCE)).items
    except KvstoreError as error:
        click.echo(f"What the maintenance tells is not known: {error}", err=True)
        return cluster, records
    for item in found:
        try:
            record = parse_maintenance(item.key, item.value)
        except RecordError as error:
            click.echo(str(error), err=True)
            continue
        records[record.member] = record
    return cluster, records


def troubles(cluster: Cluster, records: dict[str, MaintenanceRecord], now: datetime) -> list[str]:
    """Return a sentence for everything that a person should look after, alarms first."""
    found = [f"ALARM {each.kind} on {each.member}" for each in cluster.alarms] + cluster.troubles()
    for member in cluster.members:
        record = records.get(member.name)
        if record is None:
            continue
        silent = (now - record.seen).total_seconds()
        if silent > SILENT_S:
            found.append(f"{member.name}: its maintenance has said nothing for {ago(record.seen, now)}")
        elif record.trouble:
            found.append(f"{member.name}: {record.trouble}")
    return found


def row(member: Member, record: MaintenanceRecord | None) -> tuple[object, ...]:
    """Return a line of the table."""
    from kvstore.upkeep import size_text

    state = "not serving" if member.error else "leader" if member.leader else "follower"
    sizes = (size_text(member.size), size_text(member.free)) if member.size else ("", "")
    return member.name, member.endpoint, state, *sizes, snapshot(record), defragmented(record)


def snapshot(record: MaintenanceRecord | None) -> str:
    from kvstore.upkeep import size_text

    if record is None or record.snapshot is None:
        return "none"
    return f"{ago(record.snapshot.taken, datetime.now(UTC))} ago, {size_text(record.snapshot.size)}"


def defragmented(record: MaintenanceRecord | None) -> str:
    from kvstore.upkeep import size_text

    if record is None or record.defragmentation is None:
        return "never"
    last = record.defragmentation
    what = "failed" if last.error else f"{size_text(last.before)} to {size_text(last.after)}"
    return f"{ago(last.at, datetime.now(UTC))} ago, {what}"


def ago(then: datetime, now: datetime) -> str:
    return duration(max((now - then).total_seconds(), 0))


def as_json(cluster: Cluster, records: dict[str, MaintenanceRecord], wrong: list[str]) -> Json:
    import msgspec

    members = [
        {**msgspec.to_builtins(each), "free": each.free, "maintenance": records.get(each.name)}
        for each in cluster.members
    ]
    alarms = [{"kind": each.kind, "member": each.member} for each in cluster.alarms]
    found: Json = msgspec.to_builtins(
        {"healthy": not wrong, "alarms": alarms, "troubles": wrong, "members": members}
    )
    return found
