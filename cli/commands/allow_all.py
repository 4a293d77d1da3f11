# SPDX-License-Identifier: Apache-2.0
"""`holdfast allow-all`: everything passes, to and from an endpoint or all of this host, for a time.

Needs the pinned maps alone: no agent, no etcd.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.base import examples, output_option, state_dir, state_dir_option, user
from cli.commands.bpf_policy import PREFIX, map_name
from cli.commands.status import duration, place
from cli.errors import CliError, Missing
from cli.output import plural, print_json, print_table
from core.options import parse_duration

if TYPE_CHECKING:
    from datapath.allowall import Now, Order, Outcome

Json = dict[str, Any]
REFERENCES = ("container-name", "container-id", "ipv4", "ipv6")


@dataclass(frozen=True)
class Place:
    """Where orders and maps are."""

    state: Path
    pins: Path


@click.command(
    "allow-all",
    epilog="""An endpoint is its number, or container-name:NAME, container-id:PREFIX, ipv4:ADDRESS,
ipv6:ADDRESS. One that is restarted is another one: order again, or for the whole host.\n\n"""
    + examples(
        "holdfast allow-all --endpoint container-name:web --reason 'incident 4711'",
        "holdfast allow-all --host --for 2h --reason 'policy is wrong, see 4711'",
        "holdfast allow-all",
        "holdfast allow-all --end",
    ),
)
@click.option("--endpoint", "endpoints", multiple=True, help="Whom everything may reach; repeat for more.")
@click.option("--host", "whole", is_flag=True, help="All endpoints of this host, those to come too.")
@click.option("--for", "length", default="30m", show_default=True, help="How long; 24h at most.")
@click.option("--reason", default="", help="Why, for everybody who sees it.  [required]")
@click.option("--by", default="", help="Who orders it.  [default: the user]")
@click.option("--end", is_flag=True, help="Take it back, of these or, with none named, all.")
@state_dir_option("Where the orders are kept for the agent.")
@click.option("--bpf-root", type=click.Path(path_type=Path), default=Path("/sys/fs/bpf"), show_default=True)
@output_option
def allow_all(
    endpoints: tuple[str, ...],
    whole: bool,
    length: str,
    reason: str,
    by: str,
    end: bool,
    state_dir: Path,
    bpf_root: Path,
    output: str | None,
) -> None:
    """Let everything pass, for a time: for a moment in which being open is the smaller evil.

    In force with the next packet, with agent and etcd dead; the kernel ends it on time by itself. Shown in
    status, metrics, log and every list. Entries that deny somebody by name still win. Without options: what
    is in force.
    """
    from datapath.allowall import WHOLE_HOST, Now

    if endpoints and whole:
        raise click.UsageError("--endpoint and --host exclude each other")
    where = Place(state_dir, bpf_root / "tc" / "globals")
    targets = {WHOLE_HOST} if whole else {find(each, state_dir) for each in endpoints}
    now = Now.read()
    if end:
        orders, final = take_back(where, targets, now)
        finish(written(where, targets, orders, now), output, "no longer allowed by order: {}", done=final)
    elif targets:
        seconds = checked(length, reason)
        orders = give_orders(where, targets, seconds, reason, by or user(), now)
        more = ", and those to come" if whole else ""
        said = f"ALL IS ALLOWED for {duration(seconds)}, to and from {{}}{more}"
        finish(written(where, targets, orders, now), output, said)
    else:
        show(known(state_dir), now, output)


def checked(length: str, reason: str) -> float:
    """Return the length in seconds; refuses what makes no sense."""
    from datapath.allowall import LONGEST_S

    try:
        seconds = parse_duration(length)
    except ValueError as error:
        raise click.UsageError(f"--for {length} is not a duration such as 30m or 2h") from error
    if not 1 <= seconds <= LONGEST_S:
        raise click.UsageError(f"--for {length} is not between 1s and {LONGEST_S / 3600:.0f}h")
    if not reason.strip():
        raise click.UsageError("--reason is missing: who finds this host open has to know why")
    return seconds


def find(reference: str, state_dir: Path) -> int:
    """Return the number of an endpoint, from its checkpoint, which is there without an agent."""
    if reference.isdecimal() and 0 < int(reference) <= 0xFFFF:
        return int(reference)
    kind, _, value = reference.partition(":")
    if kind not in REFERENCES or not value:
        raise click.UsageError(f"{reference} is no endpoint: give its number, or {':…, '.join(REFERENCES)}:…")
    found = [each["id"] for each in saved(state_dir) if matches(each, kind, value)]
    if len(found) != 1:
        raise Missing(
            f"{len(found) or 'no'} endpoints of this host are {reference}",
            hint="holdfast bpf endpoint list shows them, with the agent dead too",
        )
    return int(found[0])


def matches(endpoint: Json, kind: str, value: str) -> bool:
    held = str(endpoint.get(kind.replace("-", "_"), ""))
    return held.startswith(value) if kind == "container-id" else held == value


def saved(state_dir: Path) -> Iterator[Json]:
    """Yield the endpoints of the checkpoint; one that can not be read is the agent's to report."""
    for path in sorted((state_dir / "endpoints").glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and isinstance(content.get("id"), int):
                yield content


def give_orders(
    where: Place, targets: set[int], seconds: float, reason: str, by: str, now: Now
) -> list[Order]:
    """Write down orders; return all that are in force.  Raises Missing for an endpoint that has no map.

    A file that can not be written must not keep the maps from being opened.
    """
    from datapath import allowall

    for each in targets - {allowall.WHOLE_HOST}:
        if not (pin := where.pins / map_name(str(each))).exists():
            raise Missing(f"there is no endpoint {each} on this host", hint=f"no map is pinned as {pin}")
    made = [allowall.order(each, seconds, reason=reason, by=by, now=now) for each in sorted(targets)]
    with alone(where.state):
        orders = [each for each in standing(where.state, now) if each.endpoint not in targets] + made
        try:
            allowall.write(where.state, orders)
        except OSError as error:
            path = where.state / allowall.FILE
            click.echo(
                f"Warning: {path} can not be written ({error.strerror}): a running agent takes the entries"
                " out again when it writes these maps, and nobody is told why they are there",
                err=True,
            )
    return orders


def take_back(where: Place, targets: set[int], now: Now) -> tuple[list[Order], bool]:
    """End the orders of these endpoints, or all; return those that stay, and True if agents will know."""
    from datapath import allowall

    with alone(where.state):
        before = standing(where.state, now)
        orders = [each for each in before if targets and each.endpoint not in targets]
        try:
            allowall.write(where.state, orders)
        except OSError as error:
            ended = [each for each in before if each not in orders]
            return orders, not outlasts(where.state, ended, error, now)
    return orders, True


def outlasts(state_dir: Path, ended: Sequence[Order], error: OSError, now: Now) -> bool:
    """Say which orders an agent still goes by, as their file can not be changed; False if there is none."""
    from datapath import allowall

    path = state_dir / allowall.FILE
    for each in ended:
        left = duration(each.left(now))
        click.echo(
            f"Error: the order to allow all {place(each.endpoint)} is still in {path} ({error.strerror}):"
            f" a running or starting agent puts the entries back until it ends, in {left}",
            err=True,
        )
    unknown = not ended and allowall.is_damaged(state_dir)
    if unknown:
        click.echo(
            f"Error: {path} is damaged and can not be replaced ({error.strerror}):"
            " a running agent may go on by orders that it has read before",
            err=True,
        )
    if ended or unknown:
        click.echo("  make room on the disk, or the directory writable, and run this again", err=True)
        return True
    click.echo(f"Warning: {path} can not be written ({error.strerror}); it holds no such order", err=True)
    return False


@contextlib.contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """Keep other commands from changing the orders, but go on where that is not to be had.

    An emergency waits for nobody.  The file is replaced as a whole: the worst is that one change is lost.
    """
    from datapath import allowall

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(allowall.locked(state_dir))
        except TimeoutError:
            click.echo(
                f"Warning: another command holds {state_dir / allowall.LOCK}: going on without it;"
                " if that one ever goes on, it may undo this",
                err=True,
            )
        except OSError:
            pass  # what keeps it from being made keeps the orders from being written, which is said then
        yield


def written(where: Place, targets: set[int], orders: list[Order], now: Now) -> list[Outcome]:
    """Make the maps of these endpoints, or of all, hold what is ordered."""
    from datapath.allowall import WHOLE_HOST, give

    if not where.pins.is_dir():
        raise CliError(f"there is no {where.pins}", hint="has the agent ever run on this host?")
    if targets and WHOLE_HOST not in targets:
        numbers = sorted(targets)
    else:
        names = (path.name.removeprefix(PREFIX) for path in where.pins.glob(f"{PREFIX}*"))
        numbers = sorted(int(name) for name in names if name.isdecimal())
    return [give(each, orders, now, where.pins) for each in numbers]


def standing(state_dir: Path, now: Now) -> tuple[Order, ...]:
    """Return the orders in force; a file that can not be read keeps nobody from changing them."""
    from datapath import allowall

    try:
        return allowall.in_force(known(state_dir), now)
    except OSError as error:
        click.echo(f"Warning: {state_dir / allowall.FILE} can not be read ({error.strerror})", err=True)
    return ()


def known(state_dir: Path) -> tuple[Order, ...]:
    """Return the orders of the file; one that can not be used is said and taken for empty."""
    from core.files import FileDamaged
    from datapath import allowall

    try:
        return allowall.read(state_dir)
    except FileDamaged as error:
        click.echo(f"Warning: {error}", err=True)
    return ()


def finish(made: Sequence[Outcome], output: str | None, sentence: str, *, done: bool = True) -> None:
    """Say what became of each map; exit 1 where one could not be written, or not all is `done`."""
    failed = [each for each in made if each.error]
    if output:
        print_json([each._asdict() for each in made])
    else:
        click.echo(sentence.format(plural(len(made) - len(failed), "endpoint")))
        for each in made:
            if each.denials:
                what = plural(each.denials, "denial")
                click.echo(f"  {what} by name still in force: holdfast bpf policy get {each.endpoint}")
    for each in failed:
        click.echo(f"Error: endpoint {each.endpoint}: {each.error}", err=True)
    if failed or not done:
        click.get_current_context().exit(1)


def show(orders: Iterable[Order], now: Now, output: str | None) -> None:
    from datapath.allowall import in_force

    found = [(each, each.left(now)) for each in in_force(orders, now)]
    if output:
        print_json(
            [
                {"endpoint": each.endpoint, "seconds": left, "by": each.by, "reason": each.reason}
                for each, left in found
            ]
        )
        return
    if not found:
        click.echo("nothing is allowed by order")
        return
    rows = [(place(each.endpoint), duration(left), each.by, each.reason) for each, left in found]
    print_table(("ALL IS ALLOWED", "FOR", "BY", "REASON"), rows)


def announce() -> None:
    """Say on stderr, whatever the command, that this host is open."""
    from datapath.allowall import Now, in_force

    now = Now.read()
    for each in in_force(known(state_dir()), now):
        left = duration(each.left(now))
        click.echo(
            f"ALL IS ALLOWED {place(each.endpoint)} for {left} more, by {each.by}: {each.reason}", err=True
        )
