# SPDX-License-Identifier: Apache-2.0
"""`holdfast policy apply | get | delete | validate | wait | selectors | trace`.

`apply` and `delete` write to etcd, for the whole cluster, with the operator's certificate; with --local to
the directory that this host's agent watches, through its API.  One name lives in one of the two.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.client import api_path
from cli.commands.kv import ask
from cli.errors import CliError, Missing, Unreachable
from cli.etcd import etcd_option, with_client
from cli.output import plural, print_done, print_json, print_table, printable
from cli.policy_files import PolicyFiles, read_files

Json = dict[str, Any]
_HERE = "cli.commands.policy"
FILE_HELP = "FILE is a file, a directory (its *.yaml, *.yml, *.json) or - for standard input."


@click.group(
    cls=LazyGroup,
    lazy={
        "apply": (f"{_HERE}:apply", "Put policies into force"),
        "get": (f"{_HERE}:get", "Show the policies in force on this host"),
        "delete": (f"{_HERE}:delete", "Take policies back"),
        "validate": (f"{_HERE}:validate", "Check policies without applying them"),
        "wait": (f"{_HERE}:wait", "Wait until endpoints enforce a revision"),
        "selectors": (f"{_HERE}:selectors", "Show which identities selectors select"),
        "trace": (f"{_HERE}:trace", "Say what policy decides for a flow, and why"),
    },
    epilog=examples(
        "holdfast policy apply -f allow.yaml", "holdfast policy get", "holdfast policy delete allow"
    ),
)
def policy() -> None:
    """Apply, show, check and trace policy."""


files_option = click.option("-f", "--file", "files", multiple=True, required=True, help=FILE_HELP)


@click.command(
    epilog=examples(
        "holdfast policy apply -f allow.yaml",
        "holdfast policy apply -f policies/ --wait",
        "generate | holdfast policy apply -f - --name generated --local",
    )
)
@files_option
@click.option("--name", default="", help="The name of a document that has none (a bare rule).")
@click.option("--local", is_flag=True, help="For this host only, through its agent.")
@click.option("--wait", "wait_s", is_flag=True, help="Wait until this host's endpoints enforce it.")
@etcd_option
@output_option
@click.pass_obj
def apply(
    settings: Settings,
    files: tuple[str, ...],
    name: str,
    local: bool,
    wait_s: bool,
    etcd_config: Path | None,
    output: str | None,
) -> None:
    """Put policies into force: for the whole cluster, or with --local for this host.

    All files are checked first; if one is refused nothing is written.
    """
    found = read_files(files, name)
    show_warnings(found)
    if local:
        refuse_in_store(found, etcd_config)
        results = [put_local(settings, each, text) for each, text in found.texts.items()]
    else:
        from cli.policy_store import write_all

        refuse_local(settings, set(found.texts))
        results = with_client(etcd_config, lambda client: write_all(client, found.texts), writes=True)
    if wait_s:
        wait_for(settings, found)
    if output:
        print_json(results)
        return
    for result in results:
        click.echo(f"{result['name']}: {result['change']}")


def put_local(settings: Settings, name: str, text: str) -> Json:
    """Hand one policy to the agent, which writes it into the watched directory."""
    change: Json = settings.agent().request("PUT", api_path("policy", *name.split("/")), {"text": text})
    return {"name": name, "change": f"applied on this host, revision {change['revision']}", **change}


def refuse_local(settings: Settings, names: set[str]) -> None:
    """CliError when this host has one of the names in its directory; without an agent nobody can say."""
    for each in known_policies(settings):
        if each["source"] == "local" and each["name"] in names:
            raise CliError(
                f"policy {each['name']} exists on this host already: {each['origin']}",
                hint=f"`holdfast policy delete --local {each['name']}` first, or choose another name",
            )


def known_policies(settings: Settings) -> list[Json]:
    """Return the policies this host's agent has, or none when no agent answers."""
    try:
        found: list[Json] = settings.agent(timeout=5).get("policy")["policies"]
    except Unreachable:
        return []
    return found


def refuse_in_store(found: PolicyFiles, etcd_config: Path | None) -> None:
    """CliError when etcd has one of the names.

    Without credentials, or with etcd away, the agent decides: it knows what etcd had.
    """
    from cli.policy_store import in_store
    from kvstore.errors import Unavailable

    try:
        taken = with_client(etcd_config, lambda client: in_store(client, found.texts))
    except (Missing, Unavailable, Unreachable):
        return
    if taken:
        raise CliError(
            f"policy {taken[0]} exists in etcd already",
            hint=f"`holdfast policy delete {taken[0]}` first, or choose another name",
        )


def wait_for(settings: Settings, found: PolicyFiles, timeout: float = 30.0) -> None:
    """Wait until the agent has the documents and every endpoint enforces that revision."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        repository = settings.agent().get("policy")
        present = {each["name"]: each["document"] for each in repository["policies"]}
        if all(present.get(name) == document for name, document in found.documents.items()):
            wait_revision(settings, repository["revision"], deadline)
            return
        time.sleep(0.1)
    raise CliError(
        f"the agent did not take the policies over within {timeout:g} s", hint="see holdfast status"
    )


class Late(NamedTuple):
    """What is not at a revision yet, as a sentence, and whether that is because of an error."""

    sentence: str
    failed: bool = False


def wait_revision(
    settings: Settings, revision: int, deadline: float, pause: float = 0.1, *, give_up: float | None = None
) -> None:
    """Wait until the agent has `revision` and every endpoint enforces it; CliError says what does not.

    From `give_up` on (as `deadline`, of the monotonic clock) an endpoint in error is not waited for.
    """
    while (late := _late(settings, revision)) is not None:
        now = time.monotonic()
        if now >= deadline or (late.failed and give_up is not None and now >= give_up):
            raise CliError(late.sentence)
        time.sleep(pause)


def _late(settings: Settings, revision: int) -> Late | None:
    known = settings.agent().get("healthz")["policy-revision"]
    if known < revision:
        return Late(f"the agent is at revision {known}, it has no {revision} yet")
    behind = [
        each
        for each in settings.agent().get("endpoint")
        if each["status"]["policy"]["policy-revision"] < revision
    ]
    if not behind:
        return None
    first = next(filter(_error_of, behind), behind[0])
    late = f"{plural(len(behind), 'endpoint')} not at revision {revision} yet, endpoint {first['id']} first"
    error = _error_of(first)
    return Late(f"{late}: {printable(error)}" if error else late, bool(error))


def _error_of(endpoint: Json) -> str:
    error: str = endpoint["status"]["policy"]["error"]
    return error or ("it is not ready" if endpoint["status"]["state"] == "not-ready" else "")


@click.command(
    epilog=examples("holdfast policy get", "holdfast policy get allow-web", "holdfast policy get --etcd")
)
@click.argument("name", required=False)
@click.option("--etcd", "from_etcd", is_flag=True, help="What etcd holds, not what this host enforces.")
@etcd_option
@output_option
@click.pass_obj
def get(
    settings: Settings, name: str | None, from_etcd: bool, etcd_config: Path | None, output: str | None
) -> None:
    """Show the policies in force on this host as JSON, then their revision."""
    if from_etcd:
        from cli.policy_store import stored

        repository: Json = with_client(etcd_config, stored)
    else:
        repository = settings.agent().get("policy")
    if name is not None:
        repository["policies"] = [each for each in repository["policies"] if each["name"] == name]
        if not repository["policies"]:
            raise Missing(f"there is no policy {printable(name)}")
    print_json(repository if output else repository["policies"])
    if not output:
        click.echo(f"Revision: {repository['revision']}")
        for refused in repository["errors"]:
            click.echo(f"Refused: {printable(refused['name'])}: {printable(refused['error'])}", err=True)


@click.command(
    epilog=examples(
        "holdfast policy delete allow-web",
        "holdfast policy delete --local web",
        "holdfast policy delete -l team=shop",
        "holdfast policy delete --all",
    )
)
@click.argument("names", nargs=-1)
@click.option(
    "--all", "everything", is_flag=True, help="Every policy in etcd, or with --local in the directory."
)
@click.option(
    "-l", "--label", "labels", multiple=True, help="The policies whose rules have this label; repeatable."
)
@click.option("--local", is_flag=True, help="From this host's directory, through its agent.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@etcd_option
@output_option
@click.pass_obj
def delete(
    settings: Settings,
    names: tuple[str, ...],
    everything: bool,
    labels: tuple[str, ...],
    local: bool,
    force: bool,
    etcd_config: Path | None,
    output: str | None,
) -> None:
    """Take policies back, by name or by the labels of their rules.

    Endpoints that no policy selects any more allow everything.
    """
    if [bool(names), bool(labels), everything].count(True) != 1:
        raise click.UsageError("give names, or --label, or --all")
    if everything and not force:
        ask("Delete all policies? Where none is left, everything is allowed.")
    if local:
        names = names or _local_names(settings, labels)
        for name in names:
            settings.agent().request("DELETE", api_path("policy", *name.split("/")))
    else:
        from cli.policy_store import delete_all

        names = names or _stored_names(etcd_config, labels)
        names = tuple(with_client(etcd_config, lambda client: delete_all(client, names), writes=True))
    results = [{"name": name, "change": "deleted"} for name in names]
    print_done(output, results, *(f"{name}: deleted" for name in names))


def _local_names(settings: Settings, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the policies of this host's directory that have all `labels`: every one without labels."""
    local = [each for each in known_policies(settings) if each["source"] == "local"]
    return _with_labels(local, labels) if labels else tuple(each["name"] for each in local)


def _stored_names(etcd_config: Path | None, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the policies in etcd that have all `labels`; none, which means all, without labels."""
    from cli.policy_store import stored

    return _with_labels(with_client(etcd_config, stored)["policies"], labels) if labels else ()


def _with_labels(policies: list[Json], labels: tuple[str, ...]) -> tuple[str, ...]:
    from cli.policy_labels import named_by_labels

    return named_by_labels(policies, labels)


@click.command(
    epilog=examples("holdfast policy validate -f allow.yaml", "holdfast policy validate -f policies/ --print")
)
@click.argument("arguments", nargs=-1)
@click.option("-f", "--file", "files", multiple=True, help=FILE_HELP)
@click.option("--name", default="", help="The name of a document that has none (a bare rule).")
@click.option("--print", "show", is_flag=True, help="Print the policies as they were understood.")
@output_option
def validate(
    arguments: tuple[str, ...], files: tuple[str, ...], name: str, show: bool, output: str | None
) -> None:
    """Check policies; nothing is sent anywhere.

    What is valid but hardly meant is a warning, on stderr.
    """
    if not (files + arguments):
        raise click.UsageError("give a file")
    found = read_files(files + arguments, name)
    policies = list(found.documents.values())
    if output:
        print_json({"policies": policies, "warnings": [each._asdict() for each in found.warnings]})
        return
    if show:
        print_json(policies)
    show_warnings(found)
    click.echo("All policy elements are valid.")


def show_warnings(found: PolicyFiles) -> None:
    """Say what is valid and hardly meant."""
    for each in found.warnings:
        click.echo(f"Warning: {printable(each)}", err=True)


@click.command(epilog=examples("holdfast policy wait 12", "holdfast policy wait 12 --max-wait-time 60"))
@click.argument("revision", type=click.IntRange(0))
@click.option("--sleep-time", default=1.0, show_default=True, help="Seconds between two looks.")
@click.option(
    "--fail-wait-time", default=60.0, show_default=True, help="The same where an endpoint is in error."
)
@click.option("--max-wait-time", default=360.0, show_default=True, help="Seconds after which it has failed.")
@output_option
@click.pass_obj
def wait(
    settings: Settings,
    revision: int,
    sleep_time: float,
    fail_wait_time: float,
    max_wait_time: float,
    output: str | None,
) -> None:
    """Wait until this host's agent has REVISION, or a later one, and every endpoint enforces it."""
    now = time.monotonic()
    wait_revision(settings, revision, now + max_wait_time, sleep_time, give_up=now + fail_wait_time)
    print_done(output, {"revision": revision}, f"Every endpoint is at revision {revision} or later")


@click.command(epilog=examples("holdfast policy selectors", "holdfast policy selectors -o json"))
@output_option
@headers_option
@click.pass_obj
def selectors(settings: Settings, output: str | None, no_headers: bool) -> None:
    """Show each selector, how many rules use it and which identities it selects."""
    found: list[Json] = settings.agent().get("policy", "selectors")
    if output:
        print_json(found)
        return
    rows = ((each["selector"], each["users"], "\n".join(map(str, each["identities"]))) for each in found)
    print_table(("SELECTOR", "USERS", "IDENTITIES"), rows, no_headers=no_headers)


@click.command(
    epilog=examples(
        "holdfast policy trace -s container:app=a -d container:app=b --dport 80/TCP",
        "holdfast policy trace --src-identity 13465 --dst-endpoint 373",
    )
)
@click.option("-s", "--src", "source", multiple=True, help="A label of the source; repeatable.")
@click.option("-d", "--dst", "destination", multiple=True, help="A label of the destination; repeatable.")
@click.option("--src-identity", type=int, default=0, help="The source's identity.")
@click.option("--dst-identity", type=int, default=0, help="The destination's identity.")
@click.option("--src-endpoint", type=int, default=0, help="The source, an endpoint of this host.")
@click.option("--dst-endpoint", type=int, default=0, help="The destination, an endpoint of this host.")
@click.option("--dport", default="", help="Port, or port/PROTOCOL, of the destination.")
@output_option
@click.pass_obj
def trace(
    settings: Settings,
    source: tuple[str, ...],
    destination: tuple[str, ...],
    src_identity: int,
    dst_identity: int,
    src_endpoint: int,
    dst_endpoint: int,
    dport: str,
    output: str | None,
) -> None:
    """Say what policy decides for a flow and why.  Exits 0 if it is allowed, 1 if denied."""
    port, _, protocol = dport.partition("/")
    if port and not port.isdigit():
        raise click.BadParameter(f"{dport!r} is not PORT or PORT/PROTOCOL", param_hint="--dport")
    body = {
        "source-endpoint": src_endpoint,
        "source-identity": src_identity,
        "source-labels": list(source),
        "destination-endpoint": dst_endpoint,
        "destination-identity": dst_identity,
        "destination-labels": list(destination),
        "dport": int(port or 0),
        "protocol": protocol.upper() or "ANY",
    }
    found: Json = settings.agent().request("POST", api_path("policy", "resolve"), body)
    if output:
        print_json(found)
    else:
        for line in found["log"]:
            click.echo(printable(line))
    click.get_current_context().exit(0 if found["verdict"] == "ALLOWED" else 1)
