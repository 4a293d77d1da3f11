# SPDX-License-Identifier: Apache-2.0
"""The verbs of `python -m certs`: init, issue, fleet, list, check.

They say what they do line by line on stdout (``-o json``: in one object), warn and fail on stderr, and can be
run again at any time: what is there and good stays as it is.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import click
from cryptography import x509

from certs import authority as authorities
from certs import etcd_config, inventory, issue
from certs.apply import apply, survey
from certs.errors import CertificateError
from certs.fleet import SEEN_AT, fleet_folders, plan_fleet, write_fleet
from certs.inspect import Condition, Finding, examine
from certs.issue import Request
from certs.layout import Folder, Holder, Layout
from certs.material import load_certificate
from certs.plan import Action, Step, plan

ENDPOINT = "https://127.0.0.1:2379"
HOLDERS = click.Choice([holder.value for holder in Holder])
DIRECTORY = click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("/etc/holdfast/pki"),
    show_default=True, help="Where the folders ca, etcd, agent and operator are.",
)  # fmt: skip
ENDPOINTS = click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    help=f"etcd's URL for etcd.config (repeat). [default: {ENDPOINT}]",
)
DAYS = click.option(
    "--days", type=click.IntRange(1, 3650), default=issue.VALIDITY.days, show_default=True,
    help="How long the certificates are valid.",
)  # fmt: skip
AUTHORITY_DAYS = click.option(
    "--ca-days", type=click.IntRange(1, 36500), default=authorities.VALIDITY.days, show_default=True,
    help="How long a new CA is valid.",
)  # fmt: skip
RENEW = click.option(
    "--renew", type=HOLDERS, multiple=True, help="Replace this holder's key and certificate (repeat)."
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only show what would be done.")
OUTPUT = click.option("-o", "--output", type=click.Choice(["json"]), help="Print JSON instead of text.")


@click.group(
    epilog="Example: python -m certs init --dir pki --etcd-name etcd --agent $(hostname) --operator admin"
)
def certs() -> None:
    """Make and check the certificates of etcd, agents and operators."""


@certs.command()
@DIRECTORY
@click.option("--etcd-name", help="Make a certificate for the etcd member of this name.")
@click.option("--etcd-address", "addresses", multiple=True, help="IP or DNS name it is reached at (repeat).")
@click.option("--agent", help="Make a certificate for the agent of the host of this name.")
@click.option(
    "--operator", is_flag=False, flag_value="admin", help="Make an operator's certificate. [name: admin]"
)
@ENDPOINTS
@click.option(
    "--agent-path", default=str(SEEN_AT[Holder.AGENT]), show_default=True,
    help="Folder in which the agent sees its files (for its etcd.config).",
)  # fmt: skip
@click.option(
    "--operator-path",
    default=str(SEEN_AT[Holder.OPERATOR]),
    show_default=True,
    help="The same for the operator.",
)
@DAYS
@AUTHORITY_DAYS
@RENEW
@DRY_RUN
@OUTPUT
def init(
    directory: Path,
    etcd_name: str | None,
    addresses: tuple[str, ...],
    agent: str | None,
    operator: str | None,
    endpoints: tuple[str, ...],
    agent_path: str,
    operator_path: str,
    days: int,
    ca_days: int,
    renew: tuple[str, ...],
    dry_run: bool,
    output: str | None,
) -> None:
    """Make what is missing of a CA and of the certificates that are named."""
    requests = [
        Request(holder, name, addresses if holder is Holder.ETCD else ())
        for holder, name in ((Holder.ETCD, etcd_name), (Holder.AGENT, agent), (Holder.OPERATOR, operator))
        if name is not None
    ]
    paths = {Holder.AGENT: PurePosixPath(agent_path), Holder.OPERATOR: PurePosixPath(operator_path)}
    where = Layout(directory)
    _carry_out(where, requests, {}, renew, (days, ca_days), endpoints, paths, dry_run, output)


@certs.command("issue")
@DIRECTORY
@click.argument("holder", type=click.Choice([each.value for each in Holder if each is not Holder.AUTHORITY]))
@click.argument("name")
@click.option("--into", type=click.Path(path_type=Path), help="Write into this folder, not into DIR's.")
@click.option("--etcd-address", "addresses", multiple=True, help="IP or DNS name of the member (repeat).")
@ENDPOINTS
@click.option("--seen-at", help="Folder in which the holder will see the files (for etcd.config).")
@DAYS
@click.option("--renew", is_flag=True, help="Replace a key and certificate that are there.")
@OUTPUT
def issue_command(
    directory: Path,
    holder: str,
    name: str,
    into: Path | None,
    addresses: tuple[str, ...],
    endpoints: tuple[str, ...],
    seen_at: str | None,
    days: int,
    renew: bool,
    output: str | None,
) -> None:
    """Make one certificate with the CA in DIR, for the HOLDER called NAME."""
    kind = Holder(holder)
    folders = {kind: into} if into else {}
    paths = {**SEEN_AT, **({kind: PurePosixPath(seen_at)} if seen_at else {})}
    request = Request(kind, name, addresses)
    renewed = (holder,) if renew else ()
    where = Layout(directory)
    _carry_out(where, [request], folders, renewed, (days, 0), endpoints, paths, False, output)


@certs.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where to. [default: FILE's]")
@DAYS
@AUTHORITY_DAYS
@click.option("--renew", multiple=True, metavar="NAME", help="Replace this one's certificate (repeat).")
@DRY_RUN
@OUTPUT
def fleet(
    file: Path,
    directory: Path | None,
    days: int,
    ca_days: int,
    renew: tuple[str, ...],
    dry_run: bool,
    output: str | None,
) -> None:
    """Make a folder for each machine of the inventory FILE: etcd's members, hosts, operators."""
    machines = inventory.load(file)
    steps = plan_fleet(machines, directory or file.parent, set(renew))
    _show(steps, dry_run, output)
    if len(machines.members) % 2 == 0:
        click.echo(f"{len(machines.members)} members bear no more losses than one less does", err=True)
    validity, authority = (datetime.timedelta(days=each) for each in (days, ca_days))
    _finish(steps, [] if dry_run else write_fleet(machines, steps, validity, authority), output)


@certs.command("list")
@DIRECTORY
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to show it.")
def list_command(directory: Path, output: str) -> None:
    """Show every certificate below DIR: user, group, end, state."""
    findings = look(directory)
    if output == "json":
        click.echo(json.dumps([_row(finding) for finding in findings], indent=2))
        return
    click.echo(f"{'HOLDER':<10}{'USER':<28}{'GROUP':<20}{'UNTIL':<12}STATE")
    for row in map(_row, findings):
        end = str(row["not-after"])[:10]
        click.echo(f"{row['holder']:<10}{row['user']:<28}{row['group']:<20}{end:<12}{row['state']}")


@certs.command()
@DIRECTORY
@click.option("--agent", help="The agent's certificate must be that of the host of this name.")
@OUTPUT
def check(directory: Path, agent: str | None, output: str | None) -> None:
    """Check every certificate below DIR; status 1 if one is broken, each problem on a line of its own."""
    findings = [_of_host(each, agent) for each in look(directory)]
    for finding in findings:
        if finding.detail and finding.condition is not Condition.ABSENT:
            click.echo(f"{finding.holder.value}: {finding.condition.value}: {finding.detail}", err=True)
    bad = [each for each in findings if each.condition in (Condition.BROKEN, Condition.KEY_ONLY)]
    present = [each for each in findings if each.condition is not Condition.ABSENT]
    if output:
        counts = {"checked": len(present), "broken": len(bad)}
        click.echo(json.dumps(counts | {"certificates": [_row(each) for each in findings]}, indent=2))
    else:
        click.echo(f"{len(present)} checked, {len(bad)} broken")
    sys.exit(1 if bad or not present else 0)


def _of_host(finding: Finding, agent: str | None) -> Finding:
    """Return a finding as it is, or broken where it is another host's certificate."""
    if agent is None or finding.holder is not Holder.AGENT or finding.condition is Condition.BROKEN:
        return finding
    found = finding.summary.common_name if finding.summary else "nobody"
    if found == Request(Holder.AGENT, agent).common_name:
        return finding
    detail = f"{finding.folder.certificate} is for {found}, and this host is called {agent}"
    return replace(finding, condition=Condition.BROKEN, detail=detail)


def look(directory: Path) -> list[Finding]:
    """Return the state of each of DIR's folders, the CA's first, and of those of a fleet.

    Where the CA itself is not (an agent's host), each folder's own copy of its certificate counts.
    """
    layout, now = Layout(directory), issue.utc_now()
    first = examine(layout.folder(Holder.AUTHORITY), None, now)
    certificate = load_certificate(first.folder.certificate) if first.summary else None
    others = [holder for holder in Holder if holder is not Holder.AUTHORITY]
    machines = fleet_folders(directory)
    folders = [layout.folder(holder) for holder in others]
    present = [each for each in folders if not machines or each.path.exists()]
    return [
        first, *(examine(each, certificate or _own_authority(each), now) for each in (*present, *machines))
    ]  # fmt: skip


def _own_authority(folder: Folder) -> x509.Certificate | None:
    return authorities.load_public(folder) if folder.authority.exists() else None


def main() -> None:
    """Run the command line; an error of ours is one line on stderr and status 1."""
    try:
        certs(prog_name="python -m certs")
    except CertificateError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


def _carry_out(
    layout: Layout,
    requests: Sequence[Request],
    folders: Mapping[Holder, Path],
    renew: Sequence[str],
    days: tuple[int, int],
    endpoints: Sequence[str],
    seen_at: Mapping[Holder, PurePosixPath],
    dry_run: bool,
    output: str | None,
) -> None:
    authority, wanted = survey(layout, requests, into=folders)
    steps = plan(authority, wanted, {Holder(each) for each in renew})
    _show(steps, dry_run, output)
    _finish(steps, [] if dry_run else _write(steps, days, endpoints, seen_at), output)


def _show(steps: Sequence[Step], dry_run: bool, output: str | None) -> None:
    for step in steps:
        if step.warning or (not output and (dry_run or step.action is not Action.REFUSE)):
            click.echo(str(step), err=step.warning)


def _finish(steps: Sequence[Step], written: Sequence[Path], output: str | None) -> None:
    if output:
        shown = [_shown(step) for step in steps]
        click.echo(json.dumps({"steps": shown, "written": [str(file) for file in written]}, indent=2))
        return
    for file in written:
        click.echo(f"wrote {file}")


def _write(
    steps: Sequence[Step],
    days: tuple[int, int],
    endpoints: Sequence[str],
    seen_at: Mapping[Holder, PurePosixPath],
) -> list[Path]:
    """Carry out the steps, return the files written; CertificateError, and nothing done, if one refuses."""
    leaf_days, authority_days = (datetime.timedelta(days=each) for each in days)
    written = apply(steps, validity=leaf_days, authority_validity=authority_days or authorities.VALIDITY)
    for step in steps:
        if step.folder.holder.has_config:
            urls = endpoints or (ENDPOINT,)
            path = seen_at[step.folder.holder]
            written += etcd_config.write(step.folder, urls, path, overwrite=bool(endpoints))
    return written


def _shown(step: Step) -> dict[str, Any]:
    return {"holder": step.folder.holder.value, "action": step.action.value, "reason": step.reason}


def _row(finding: Finding) -> dict[str, Any]:
    summary = finding.summary
    return {
        "holder": finding.holder.value,
        "user": summary.common_name if summary else "",
        "group": summary.group if summary else "",
        "issuer": summary.issuer if summary else "",
        "serial": summary.serial if summary else "",
        "not-before": summary.not_before.isoformat() if summary else "",
        "not-after": summary.not_after.isoformat() if summary else "",
        "names": sorted(summary.names) if summary else [],
        "state": finding.condition.value,
        "detail": finding.detail,
        "path": str(finding.folder.certificate),
    }
