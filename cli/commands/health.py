# SPDX-License-Identifier: Apache-2.0
"""`holdfast health`: which nodes of the cluster this host reaches, as `cilium-health status` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from cli.base import Settings, examples, output_option
from cli.commands.status import beside, duration, own_clock
from cli.output import print_json, print_table, printable

Json = dict[str, Any]
LABEL_WIDTH = 16
UNITS = (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1_000), ("ns", 1))


@click.command(
    epilog=examples("holdfast health", "holdfast health --probe --succinct", "holdfast health -o json")
)
@click.option("--probe", is_flag=True, help="Probe all nodes now, and wait for what comes of it.")
@click.option("--succinct", is_flag=True, help="One line a node.")
@click.option("--verbose", is_flag=True, help="Every address of every node.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds to wait for the agent.")
@output_option
@click.pass_obj
def health(
    settings: Settings, probe: bool, succinct: bool, verbose: bool, timeout: float, output: str | None
) -> None:
    """Show which nodes this host reaches, and how long a round trip takes.

    Exits 0 when every node that was probed answered, 1 when one did not.
    """
    agent = settings.agent(timeout=timeout)
    found: Json = agent.request("PUT", "/v1/health/probe") if probe else agent.get("health")
    if output:
        print_json(found)
    elif succinct and not verbose:
        print_succinct(found)
    else:
        for line in lines(found, verbose):
            click.echo(printable(line))
    failed = any(each["state"] == "unreachable" for each in found["nodes"])
    click.get_current_context().exit(1 if failed else 0)


def print_succinct(found: Json) -> None:
    nodes = found["nodes"]
    reachable = sum(each["state"] == "reachable" for each in nodes)
    click.echo(
        f"Cluster health:   {reachable}/{len(nodes)} reachable   ({found['timestamp'] or 'no probe yet'})"
    )
    rows = ((title(each, found), ips(each), state(each, found), age(each)) for each in nodes)
    print_table(("Name", "IP", "Node", "Probed"), rows)


def lines(found: Json, verbose: bool) -> Iterator[str]:
    """Yield the lines of the long form: further addresses with --verbose, or when one has failed."""
    yield f"Probe time:   {found['timestamp'] or 'no probe yet'}"
    if found.get("clock", {}).get("ahead"):
        yield f"Clock:        {own_clock(found['clock'])}"
    yield "Nodes:"
    for node in found["nodes"]:
        yield f"  {title(node, found)}: {age(node)}"
        if node.get("clock-wrong"):
            yield f"    Clock: {beside(node['clock-ahead'])} this host's"
        first, others = node["host"]["primary-address"], node["host"]["secondary-addresses"]
        full = found.get("device-mtu", 0)
        if first:
            yield from path(first, "Host", "    ", full)
        if verbose or any(failed(each) or narrow(each, full) for each in others):
            for each in others:
                yield from path(each, "Secondary", "      ", full)


def title(node: Json, found: Json) -> str:
    return f"{node['name']} (localhost)" if node["name"] == found["local"]["name"] else str(node["name"])


def age(node: Json) -> str:
    return "not probed yet" if node["age"] < 0 else f"{duration(node['age'])} ago"


def ips(node: Json) -> str:
    first, others = node["host"]["primary-address"], node["host"]["secondary-addresses"]
    return ",".join(each["ip"] for each in (first, *others) if each)


def failed(address: Json) -> bool:
    return any(probe and probe["status"] for probe in (address["icmp"], address["http"]))


def narrow(address: Json, full: int) -> bool:
    """True when less arrives at an address than this host sends."""
    return 0 < int(address.get("mtu", 0)) < full


def state(node: Json, found: Json) -> str:
    """Return the state of a node, how long packets to it may be if not as usual, and whether its clock is."""
    first, others = node["host"]["primary-address"], node["host"]["secondary-addresses"]
    full = found.get("device-mtu", 0)
    mtus = [each["mtu"] for each in (first, *others) if each and narrow(each, full)]
    more = [f"MTU {min(mtus)}"] if mtus else []
    more += [f"clock {node['clock-ahead']:+g}s"] if node.get("clock-wrong") else []
    return ", ".join([node["state"], *more])


def path(address: Json, kind: str, indent: str, full: int) -> Iterator[str]:
    """Yield the lines of one address."""
    yield f"{indent}{kind} connectivity to {address['ip']}:"
    for name, probe in (("ICMP to stack", "icmp"), ("TCP to agent", "tcp"), ("HTTP to agent", "http")):
        yield f"{indent}  {name + ':':<{LABEL_WIDTH}}{outcome(address[probe])}"
    if narrow(address, full):
        yield f"{indent}  {'Packets:':<{LABEL_WIDTH}}up to {address['mtu']} bytes arrive, of {full}"


def outcome(probe: Json | None) -> str:
    if probe is None:
        return "not granted"
    return probe["status"] or f"OK, RTT={rtt(probe['latency'])}"


def rtt(nanoseconds: int) -> str:
    """Return ``350.5µs``, ``1.204ms``, ``2s``: the largest unit that leaves something before the point."""
    unit, size = next((each for each in UNITS if nanoseconds >= each[1]), UNITS[-1])
    return f"{round(nanoseconds / size, 3):g}{unit}"
