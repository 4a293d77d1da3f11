# SPDX-License-Identifier: Apache-2.0
"""`holdfast prestart simulate`: what the start window does to etcd when a whole fleet comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cli.base import LazyGroup, examples, output_option
from cli.chart import Panel, require_pillow, save
from cli.commands.kv_maintain import duration_option
from cli.commands.status import duration
from cli.output import plural, print_json, print_table, printable, rounded
from prestart.options import LONGEST_WINDOW_S, parse_window
from prestart.simulation import (
    ENTRIES_OF_A_HOST,
    ENTRY_BYTES,
    MOST_HOSTS,
    PEAK_S,
    Ask,
    History,
    Outage,
    Phase,
    Plan,
    Way,
    rates,
    simulate,
    step_for,
)

# Rows of the table over time, and points of the chart and of JSON.
ROWS, POINTS = 12, 120
# What only some outages have; given with another, an option is a misunderstanding.
ONLY = {
    "boot_spread": (Outage.POWER_CUT, Outage.RACKS, Outage.ROLLING),
    "racks": (Outage.RACKS,),
    "over": (Outage.RACKS, Outage.ROLLING, Outage.ETCD),
}
STARTED = {Way.WINDOW: "start window", Way.JITTER: "random jitter", Way.NONE: "none"}
RECONNECTED = {Way.WINDOW: "back-off, full jitter", Way.JITTER: "random delay", Way.NONE: "none"}
TITLES = {Ask.CONNECT: "First contact", Ask.LIST: "Full lists"}
OUTAGES = {
    Outage.POWER_CUT: "after a power cut, booted within {spread}",
    Outage.RACKS: "in {racks} racks that come back over {over}, each booted within {spread}",
    Outage.ROLLING: "restarted one after another over {over}, each booted within {spread}",
    Outage.ETCD: "after etcd was away for {over}",
}
HISTORIES = {
    History.KEPT: "the watch resumes: only what has changed is asked for",
    History.COMPACTED: "etcd has lost what came after the checkpoint: everything is listed",
    History.LOST: "checkpoints name no revision: everything is listed",
    History.NONE: "no host has a checkpoint: everything is listed, for the first time",
}


@click.group(
    cls=LazyGroup,
    lazy={"simulate": ("cli.commands.prestart:simulate_", "Show what the start window does to etcd")},
    epilog=examples("holdfast prestart simulate --nodes 5000 --outage racks --racks 50"),
)
def prestart() -> None:
    """The start window, which keeps a fleet that comes back from asking etcd all at once."""


@click.command(
    "simulate",
    epilog=examples(
        "holdfast prestart simulate --nodes 5000",
        "holdfast prestart simulate --nodes 800 --outage racks --racks 40 --over 1h",
        "holdfast prestart simulate --nodes 5000 --history kept --boot-spread 5m",
        "holdfast prestart simulate --nodes 5000 --outage etcd --over 10m -o json",
        "holdfast prestart simulate --nodes 5000 --window 30m --chart starts.png",
    ),
)
@click.option(
    "--nodes", type=click.IntRange(1, MOST_HOSTS), default=5_000, show_default=True,
    help="Hosts of the cluster.",
)  # fmt: skip
@click.option(
    "--outage", type=click.Choice([each.value for each in Outage]), default=Outage.POWER_CUT.value,
    show_default=True, help="What happened.",
)  # fmt: skip
@click.option(
    "--history", type=click.Choice([each.value for each in History]), default=History.COMPACTED.value,
    show_default=True, help="What hosts and etcd have kept.",
)  # fmt: skip
@duration_option("--boot-spread", "60s", "Hosts that come back together boot within so long.")
@click.option(
    "--racks", type=click.IntRange(1), default=20, show_default=True,
    help="Of outage racks: how many come back, one after another.",
)  # fmt: skip
@duration_option("--over", "30m", "From the first rack or host to the last; how long etcd was away.")
@click.option(
    "--window", metavar="DURATION", default="auto", show_default=True,
    help="Length of the long window; auto: by cluster size.",
)  # fmt: skip
@click.option(
    "--entries", type=click.IntRange(1), help=f"Keys of a list.  [default: {ENTRIES_OF_A_HOST} a host]"
)
@click.option(
    "--entry-bytes", type=click.IntRange(1), default=ENTRY_BYTES, show_default=True,
    help="Bytes of a key in a list.",
)  # fmt: skip
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Of boots and jitter; the window draws none."
)
@click.option(
    "--chart", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png",
    help="Draw starts a second over time into this file.",
)  # fmt: skip
@output_option
@click.pass_context
def simulate_(
    ctx: click.Context,
    nodes: int,
    outage: str,
    history: str,
    boot_spread: float,
    racks: int,
    over: float,
    window: str,
    entries: int | None,
    entry_bytes: int,
    seed: int,
    chart: Path | None,
    output: str | None,
) -> None:
    """Show how many hosts ask etcd at a time when a fleet comes back.

    By three ways: the start window, by the functions that decide on a host; a random delay over the
    same window from each host's own boot; and none, at once. Nothing is asked of anybody.

    \b
    Outages:
      power-cut  all hosts boot together, within --boot-spread
      racks      --racks of neighbours boot one after another, --over
      rolling    host after host boots, --over
      etcd       etcd was away for --over; no agent restarts. Agents back off
                 with full jitter; compacted: etcd came back without history,
                 and each lists in its slot while it follows what changes

    \b
    What hosts and etcd have kept:
      kept       a checkpoint, and all changes since: the watch resumes
      compacted  a checkpoint, not the changes: first contact, then a list
      lost       a checkpoint that names no revision: a list
      none       no checkpoint: a list, for the first time

    The peak on etcd is of the busiest ten seconds: starts a second, and where they list, times entries
    and bytes of an entry.
    """
    plan = Plan(nodes, Outage(outage), History(history), boot_spread, racks, over, _window(window), seed)
    _refuse(ctx, plan)
    if chart is not None:
        _check_chart(chart)
    if plan.outage is Outage.ETCD:
        from kvstore.patience import RETRY_BASE_S, RETRY_CAP_S

        plan = plan._replace(retry_base=RETRY_BASE_S, retry_cap=RETRY_CAP_S)
    phases = simulate(plan)
    list_bytes = (entries or ENTRIES_OF_A_HOST * nodes) * entry_bytes
    if chart is not None:
        save(chart, _outage(plan), [_panel(plan, phase) for phase in phases])
    if output:
        print_json(_json(plan, phases, list_bytes, chart))
        return
    click.echo(f"{_outage(plan)}; {HISTORIES[plan.history]}")
    for phase in phases:
        _print_phase(plan, phase, list_bytes)
    if chart is not None:
        click.echo(f"\nChart: {printable(chart)}")


def _window(text: str) -> float | None:
    try:
        return parse_window(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint="'--window'") from error


def _refuse(ctx: click.Context, plan: Plan) -> None:
    """Raise UsageError for what makes no sense together."""
    for name, outages in ONLY.items():
        if plan.outage not in outages and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            of = ", ".join(each.value for each in outages)
            raise click.UsageError(
                f"--{name.replace('_', '-')} says nothing of --outage {plan.outage.value}; it is for {of}",
                ctx,
            )
    if plan.outage is Outage.RACKS and plan.racks > plan.nodes:
        raise click.UsageError(f"--racks {plan.racks} are more than --nodes {plan.nodes}", ctx)
    if plan.outage is Outage.ETCD and plan.history in (History.LOST, History.NONE):
        raise click.UsageError(
            f"--history {plan.history.value} is of hosts that start; in --outage etcd agents live and keep "
            "their view: kept or compacted",
            ctx,
        )
    given = ctx.get_parameter_source("window") is not ParameterSource.DEFAULT
    if plan.outage is Outage.ETCD and plan.history is History.KEPT and given:
        raise click.UsageError("--window says nothing of agents that live and whose watch resumes", ctx)
    for name, value in (("boot-spread", plan.boot_spread), ("over", plan.over)):
        if value > LONGEST_WINDOW_S:
            raise click.UsageError(f"--{name} {value:.0f}s is longer than a day", ctx)
    if not plan.over:
        raise click.UsageError("--over 0s is no time: hosts that boot together are --outage power-cut", ctx)


def _check_chart(path: Path) -> None:
    """Refuse a chart before anything is computed."""
    if path.suffix != ".png":
        raise click.BadParameter(f"{str(path)!r} does not end in .png", param_hint="'--chart'")
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no directory {str(path.parent)!r}", param_hint="'--chart'")
    require_pillow()


def _labels(plan: Plan, phase: Phase) -> dict[Way, str]:
    return RECONNECTED if plan.outage is Outage.ETCD and phase.ask is Ask.CONNECT else STARTED


def _outage(plan: Plan) -> str:
    spread, over = duration(plan.boot_spread), duration(plan.over)
    what = OUTAGES[plan.outage].format(spread=spread, racks=plan.racks, over=over)
    return f"{plural(plan.nodes, 'host')} {what}"


def _window_text(phase: Phase) -> str:
    if not phase.window:
        return "no window"
    return f"window {duration(phase.window)}, {rounded(phase.even)} a second if even"


def _megabytes(phase: Phase, way: Way, list_bytes: int) -> float:
    """Return megabytes a second that etcd is asked for in the busiest ten seconds."""
    return phase.peak(way) * list_bytes / 1e6 if phase.ask is Ask.LIST else 0.0


def _print_phase(plan: Plan, phase: Phase, list_bytes: int) -> None:
    labels, lists = _labels(plan, phase), phase.ask is Ask.LIST
    of_a_list = f", {rounded(list_bytes / 1e6)} MB each" if lists else ""
    click.echo(f"\n{TITLES[phase.ask]} ({_window_text(phase)}{of_a_list})\n")
    rows = []
    for way, instants in phase.instants.items():
        ratio = phase.ratio(way)
        row = [labels[way], duration(instants[0]), duration(instants[-1]), f"{phase.peak(way):.1f}"]
        row.append("-" if ratio is None else f"{ratio:.2f}")
        rows.append([*row, f"{rounded(_megabytes(phase, way, list_bytes))}"] if lists else row)
    headers = ["WAY", "FIRST", "LAST", f"STARTS/S, BUSIEST {PEAK_S:.0f} S", "X EVEN"]
    print_table([*headers, "MB/S FROM ETCD"] if lists else headers, rows)
    step = step_for(phase.end, ROWS)
    columns = {way: rates(instants, step, phase.end) for way, instants in phase.instants.items()}
    click.echo("")
    print_table(
        ["FROM", *(f"{label} /S".upper() for label in labels.values())],
        (
            [duration(number * step), *(f"{each:.2f}" for each in row)]
            for number, row in enumerate(zip(*columns.values(), strict=True))
        ),
    )


def _json(plan: Plan, phases: list[Phase], list_bytes: int, chart: Path | None) -> dict[str, Any]:
    return {
        "nodes": plan.nodes,
        "outage": plan.outage.value,
        "history": plan.history.value,
        "seed": plan.seed,
        "list-bytes": list_bytes,
        "chart": str(chart) if chart else "",
        "phases": [_json_phase(phase, list_bytes) for phase in phases],
    }


def _json_phase(phase: Phase, list_bytes: int) -> dict[str, Any]:
    step = step_for(phase.end, POINTS)
    return {
        "ask": phase.ask.value,
        "window": phase.window,
        "even": phase.even,
        "step": step,
        "ways": {
            way.value: {
                "starts": len(instants),
                "first": instants[0],
                "last": instants[-1],
                "peak": phase.peak(way),
                "ratio": phase.ratio(way),
                "bytes-per-second": round(_megabytes(phase, way, list_bytes) * 1e6),
                "rates": rates(instants, step, phase.end),
            }
            for way, instants in phase.instants.items()
        },
    }


def _panel(plan: Plan, phase: Phase) -> Panel:
    step = step_for(phase.end, POINTS)
    return Panel(
        f"{TITLES[phase.ask]}, hosts a second ({_window_text(phase)})",
        step,
        {_labels(plan, phase)[way]: rates(each, step, phase.end) for way, each in phase.instants.items()},
        phase.even,
    )
