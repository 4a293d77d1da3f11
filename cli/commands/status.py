# SPDX-License-Identifier: Apache-2.0
"""`holdfast status` and `holdfast version`.

The lines have Cilium's labels and order.  Exit code 0 means healthy, 1 that something needs a person, 3 that
no agent answers: health checks of compose use that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from cli.base import Settings, examples, output_option
from cli.errors import Unreachable
from cli.output import plural, print_json, printable

NAMED_WAITS = 3  # of one kind; of more, status says how many
LABEL_WIDTH = 24
NOT_KNOWN = "not known yet"  # the agent could not start so far
PARTS = ("kvstore", "container-runtime", "network-driver", "masquerading", "holdfast")

Json = dict[str, Any]


@click.command(
    epilog=examples(
        "holdfast status", "holdfast status --brief || alert", "holdfast status -o json | jq .kvstore"
    )
)
@click.option("--brief", is_flag=True, help="One line: OK, or what is wrong.")
@click.option("--verbose", is_flag=True, help="Also every controller, table, map and container left out.")
@click.option("--timeout", default=10.0, show_default=True, help="Seconds to wait for the agent.")
@output_option
@click.pass_obj
def status(settings: Settings, brief: bool, verbose: bool, timeout: float, output: str | None) -> None:
    """Show how the agent, the kvstore and the engine are.

    Exits 0 when all is well, 1 when something has failed, 3 when no agent answers.
    """
    found: Json = settings.agent(timeout=timeout).get("healthz")
    wrong = failures(found)
    if output:
        print_json(found)
    elif brief:
        click.echo(printable("; ".join([*(wrong or ["OK"]), *opened(found)])))
    else:
        for line in lines(found, verbose):
            click.echo(printable(line))
    click.get_current_context().exit(1 if wrong else 0)


def failures(found: Json) -> list[str]:
    """Return a sentence for each part that has failed; warnings are none."""
    return [f"{name}: {found[name]['msg']}" for name in PARTS if found[name]["state"] == "Failure"]


def lines(found: Json, verbose: bool) -> Iterator[str]:
    """Yield the lines of the text form."""
    yield line("KVStore", component(found["kvstore"]))
    yield line("ContainerRuntime", component(found["container-runtime"]))
    yield line("NetworkDriver", component(found["network-driver"]))
    yield line("Holdfast", component(found["holdfast"]))
    for each in opened(found):
        yield line("AllowAll", each)
    yield line("Node", node(found["node"]))
    yield line("NodeMonitor", monitor(found["node-monitor"]))
    yield line("IPAM", ipam(found["ipam"]))
    yield line("Masquerading", component(found["masquerading"]))
    yield line("Controller Status", controllers(found["controllers"]))
    yield line("Endpoints", endpoints(found["endpoints"]))
    yield line("Policy", policy(found))
    yield line("Identities", identities(found))
    yield line("Staleness", staleness(found["staleness"], found.get("staleness-threshold", 0)))
    if "checkpoint" in found:  # an older agent does not say
        yield line("Checkpoint", component(found["checkpoint"]))
    yield from cluster_health(found.get("cluster-health"))
    yield from cluster_dns(found.get("cluster-dns"))
    if found["maps"]:
        yield line("BPF Maps", maps(found["maps"]))
    yield from waits(found["waits"])
    for refused in found["policy-errors"]:
        yield line("Policy refused", f"{refused['name']} from {refused['origin']}: {refused['error']}")
    yield from ignored(found)
    yield from dead_controllers(found["controllers"])
    yield from unmanaged(found["unmanaged"], verbose)
    if verbose:
        yield from details(found)


def opened(found: Json) -> Iterator[str]:
    """Yield a sentence for each order to allow all that is in force, and what is wrong with them."""
    for each in found.get("allow-all", []):
        left = duration(each["seconds"])
        yield f"ALL IS ALLOWED {place(each['endpoint'])} for {left} more, by {each['by']}: {each['reason']}"
    if found.get("allow-all-error"):
        yield found["allow-all-error"]


def place(endpoint: int) -> str:
    """Return where an order to allow all holds; 0 is the whole host."""
    return f"to and from endpoint {endpoint}" if endpoint else "to and from every endpoint of this host"


def line(label: str, text: str) -> str:
    return f"{label + ':':<{LABEL_WIDTH}}{text}"


def component(part: Json) -> str:
    return f"{part['state']:<4} {part['msg']}".rstrip()


def waits(all_: list[Json]) -> Iterator[str]:
    """One line for each kind of thing that the same is waited for: how long, for what, and why."""
    kinds: dict[tuple[str, str], list[Json]] = {}
    for each in all_:
        kinds.setdefault((each["subject"], each["purpose"].partition(" of ")[0]), []).append(each)
    for (subject, _), same in kinds.items():
        longest = max(same, key=lambda each: float(each["seconds"]))
        names = "; ".join(each["purpose"] for each in same[:NAMED_WAITS])
        more = f"; {len(same) - NAMED_WAITS} more" if len(same) > NAMED_WAITS else ""
        note = next((f": {each['note']}" for each in [longest, *same] if each["note"]), "")
        yield line("Waiting", f"{duration(longest['seconds'])} for {subject} ({names}{more}){note}")


def node(this: Json) -> str:
    if not this["name"]:
        return NOT_KNOWN
    return (
        f"{this['cluster']}/{this['name']} {this['ipv4-address']}, endpoints in {this['ipv4-endpoint-cidr']}"
    )


def monitor(info: Json) -> str:
    if not info["listeners"]:
        return "Disabled (nobody listens)"
    return f"{plural(info['listeners'], 'listener')}, {info['seen']} events, {info['lost']} lost"


def ipam(info: Json) -> str:
    if not info["pool"]:
        return NOT_KNOWN
    text = f"IPv4: {info['used']}/{info['used'] + info['available']} allocated from {info['pool']}"
    text = f"{text}, IPv6: {info['pool6']}" if info.get("pool6") else text
    return f"{text} ({info['lacking']})" if info.get("lacking") else text


def controllers(all_: list[Json]) -> str:
    healthy = sum(not each["error"] for each in all_)
    return f"{healthy}/{len(all_)} healthy"


def dead_controllers(all_: list[Json]) -> Iterator[str]:
    for each in all_:
        if each["error"]:
            yield f"  {each['name']}: {each['state']}, {each['restarts']} restarts: {each['error']}"


def endpoints(by_state: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(by_state.items()) if number) or "0"


def policy(found: Json) -> str:
    refused = len(found["policy-errors"])
    tail = f", {refused} refused" if refused else ""
    return f"{plural(found['policies'], 'policy')} at revision {found['policy-revision']}{tail}"


def identities(found: Json) -> str:
    return f"{found['identities']}, range {found['identity-range']}" if found["identity-range"] else NOT_KNOWN


def staleness(seconds: float, threshold: float) -> str:
    """`threshold` is 0 where an older agent has none."""
    if seconds < 0:
        return "the kvstore has not been heard since the start"
    text = f"the kvstore confirmed this view {duration(seconds)} ago"
    if 0 < threshold < seconds:
        return f"Warning {text}: longer than kvstore-staleness-threshold, {duration(threshold)}"
    return text


def cluster_health(found: Json | None) -> Iterator[str]:
    """Say how many nodes answered their last probe, and which did not."""
    if found is None:  # an older agent
        return
    if found["state"] == "Disabled":
        yield line("Cluster health", f"Probe disabled ({found['msg']})")
        return
    known = found["reachable"] + found["unreachable"]
    unknown = f", {found['nodes'] - known} unknown" if known < found["nodes"] else ""
    last = f"{duration(found['age'])} ago" if found["age"] >= 0 else "no probe yet"
    times = f"({last}, each every {duration(found['interval'])})"
    yield line("Cluster health", f"{found['reachable']}/{found['nodes']} reachable{unknown} {times}")
    if found["msg"]:
        yield f"  {found['state']}: {found['msg']}"
    for each in found["unreachable-nodes"]:
        yield f"  {each['name']} {each['ip']}: {each['error']}"
    if found["unreachable"] > len(found["unreachable-nodes"]):
        yield "  … (holdfast health shows all)"
    for each in found.get("narrow-paths", []):
        yield f"  {each['name'] or 'node'} {each['ip']}: {narrow(each)}"
    if found.get("narrow", 0) > len(found.get("narrow-paths", [])):
        yield f"  … {found['narrow']} like this (holdfast health shows all)"
    yield from clocks(found.get("clock"))


def clocks(found: Json | None) -> Iterator[str]:
    """Say whose clock is wrong."""
    if found is None:  # an older agent
        return
    if found["ahead"]:
        yield f"  this host: its clock is {own_clock(found)}"
    for each in found["wrong-nodes"]:
        yield f"  {each['name']}: its clock is {beside(each['ahead'])} most"
    if found["wrong"] > len(found["wrong-nodes"]):
        yield f"  … {found['wrong']} clocks like this (holdfast health shows all)"


def own_clock(found: Json) -> str:
    nodes = f"{found['differing']} of {found['others']} other nodes"
    return f"{beside(found['ahead'])} most, and differs from {nodes}"


def beside(ahead: float) -> str:
    """Return `30s ahead of` or `1m15s behind`."""
    return f"{duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'}"


def narrow(path: Json) -> str:
    """Say what a way carries that carries less than this host sends."""
    return f"only packets of up to {path['mtu']} bytes arrive, this host sends {path['device-mtu']}: lowered"


def cluster_dns(found: Json | None) -> Iterator[str]:
    """Say where names are answered, when they are."""
    if found is None or found["state"] == "Disabled":
        return
    where = ", ".join(found["addresses"])
    yield line("Cluster DNS", f"{plural(found['names'], 'name')} of {found['domain']}, answered at {where}")
    if found["msg"]:
        yield f"  {found['state']}: {found['msg']}"
    if found["unusable"]:
        more = " …" if found["unusable"] > len(found["unusable-names"]) else ""
        services = plural(found["unusable"], "service")
        yield f"  {services} can have no name: {', '.join(found['unusable-names'])}{more}"


def maps(all_: list[Json]) -> str:
    """Return the fullest map: the one that will be in trouble first."""
    fullest = max(all_, key=lambda each: float(each["pressure"]))
    errors = sum(each["errors"] for each in all_)
    text = f"{len(all_)}, fullest {fullest['name']} {fullest['pressure']:.0%}"
    return text + (f", {plural(errors, 'write')} failed" if errors else "")


def ignored(found: Json) -> Iterator[str]:
    """Say which records in etcd can not be used."""
    if found.get("ignored"):
        yield line("Records ignored", f"{found['ignored']} in etcd can not be used:")
        for each in found["ignored-records"]:
            yield f"  {each['key']}: {each['error']}"


def unmanaged(all_: list[Json], verbose: bool) -> Iterator[str]:
    """Say which containers policy does not reach."""
    if not all_:
        return
    them = "it" if len(all_) == 1 else "them"
    yield line("Not managed", f"{plural(len(all_), 'container')}: policy does not reach {them}")
    for each in all_ if verbose else all_[:3]:
        yield f"  {each['name']}: {each['reason']}"
    if len(all_) > 3 and not verbose:
        yield "  … (--verbose shows all)"


def details(found: Json) -> Iterator[str]:
    """Yield what --verbose adds."""
    yield "Controllers:"
    for each in found["controllers"]:
        since = f"  since {each['since']}" if each["since"] else ""
        yield f"  {each['name']:<38} {each['state']:<9} {plural(each['restarts'], 'restart')}{since}"
    yield "Tables:"
    for each in found["tables"]:
        waiting = f", waits for {', '.join(each['waiting-for'])}" if each["waiting-for"] else ""
        missing = f", {each['missing']} missing and kept" if each["missing"] else ""
        yield f"  {each['name']:<38} {plural(each['entries'], 'entry')}{waiting}{missing}"
    if found["maps"]:
        yield "Maps:"
    for each in found["maps"]:
        yield f"  {each['name']:<38} {each['entries']}/{each['max-entries']} ({each['pressure']:.1%})"
    yield line("Version", f"{found['version']}, up {duration(found['uptime'])}")


def duration(seconds: float) -> str:
    """Return ``5s``, ``3m20s``, ``2h5m``, ``4d3h``: two units are enough."""
    left = int(seconds)
    units = [("d", 86400), ("h", 3600), ("m", 60), ("s", 1)]
    parts: list[str] = []
    for name, size in units:
        number, left = divmod(left, size)
        if number or parts:
            parts.append(f"{number}{name}")
    return "".join(parts[:2]) or "0s"


@click.command(epilog=examples("holdfast version", "holdfast version -o json"))
@output_option
@click.pass_obj
def version(settings: Settings, output: str | None) -> None:
    """Show the version of this command, and of the agent if it runs."""
    from importlib.metadata import version as installed

    found = {"client": installed("holdfast"), "agent": ""}
    try:
        found["agent"] = settings.agent(timeout=5).get("healthz")["version"]
    except Unreachable:
        found["agent"] = "not running"
    if output:
        print_json(found)
        return
    click.echo(f"Client: {found['client']}")
    click.echo(f"Agent:  {printable(found['agent'])}")
