# SPDX-License-Identifier: Apache-2.0
"""`holdfast bpf ct list | flush`: the conntrack maps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from cli.base import LazyGroup, examples, output_option
from cli.commands.bpf import globals_dir, reading
from cli.commands.kv import ask
from cli.errors import Missing
from cli.output import plural, print_done, print_json
from datapath.reasons import protocol_name

if TYPE_CHECKING:
    from datapath.records import CtEntry, CtKey

_HERE = "cli.commands.bpf_ct"
MAPS = ("cilium_ct4_global", "cilium_ct_any4_global", "cilium_ct6_global", "cilium_ct_any6_global")
# ct_entry's flags, from the lowest bit; the ninth is ours: the forward half came through the stack.
FLAGS = (
    "RxClosing",
    "TxClosing",
    "Nat64",
    "LBLoopback",
    "SeenNonSyn",
    "NodePort",
    "ProxyRedirect",
    "DSR",
    "FromStack",
)


@click.group(
    cls=LazyGroup,
    lazy={
        "list": (f"{_HERE}:list_", "List connections"),
        "flush": (f"{_HERE}:flush", "Forget all connections"),
    },
    epilog=examples("holdfast bpf ct list", "holdfast bpf ct list --alive"),
)
def ct() -> None:
    """The connections that the kernel tracks."""


@click.command(
    "list", epilog=examples("holdfast bpf ct list", "holdfast bpf ct list --alive | grep 10.50.68.48")
)
@click.argument("scope", type=click.Choice(["global"]), default="global")
@click.option("--alive", is_flag=True, help="Only those that have not expired.")
@output_option
def list_(scope: str, alive: bool, output: str | None) -> None:
    """List connections, one a line: those from endpoints (OUT) and to endpoints (IN)."""
    now = time.monotonic()
    found = ((key, entry) for key, entry in connections() if not alive or entry.lifetime > now)
    if output:
        print_json([key._asdict() | entry._asdict() for key, entry in found])
        return
    for key, entry in found:
        click.echo(line(key, entry))


def connections() -> Iterator[tuple[CtKey, CtEntry]]:
    """Yield what all conntrack maps of this host hold; Missing when it has none."""
    from datapath.maps import CtMap

    for name in present():
        with reading(CtMap, name) as opened:
            yield from opened.items()


def present() -> list[str]:
    names = [name for name in MAPS if (globals_dir() / name).exists()]
    if not names:
        raise Missing(
            f"there is no conntrack map in {globals_dir()}", hint="has the agent ever run on this host?"
        )
    return names


def line(key: CtKey, entry: CtEntry) -> str:
    """Return one connection in Cilium's words."""
    names = " ".join(name for bit, name in enumerate(FLAGS) if entry.bits >> bit & 1)
    return (
        f"{protocol_name(key.protocol)} {direction(key.flags)} "
        f"{address(key.source, key.source_port)} -> {address(key.destination, key.destination_port)} "
        f"expires={entry.lifetime} RxPackets={entry.rx_packets} RxBytes={entry.rx_bytes} "
        f"RxFlagsSeen=0x{entry.rx_flags_seen:02x} LastRxReport={entry.last_rx_report} "
        f"TxPackets={entry.tx_packets} TxBytes={entry.tx_bytes} "
        f"TxFlagsSeen=0x{entry.tx_flags_seen:02x} LastTxReport={entry.last_tx_report} "
        f"Flags=0x{entry.bits:04x} [ {names} ] RevNAT={entry.rev_nat_index} "
        f"SourceSecurityID={entry.source_identity} IfIndex={entry.ifindex}"
    )


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def direction(flags: int) -> str:
    """Return IN, OUT or SVC, and what else the tuple's flags say."""
    from datapath.records import CtFlags

    name = "SVC" if flags & CtFlags.SERVICE else "IN" if flags & CtFlags.IN else "OUT"
    return f"{name} related" if flags & CtFlags.RELATED else name


@click.command(epilog=examples("holdfast bpf ct flush", "holdfast bpf ct flush -f"))
@click.argument("scope", type=click.Choice(["global"]), default="global")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@output_option
def flush(scope: str, force: bool, output: str | None) -> None:
    """Forget all connections.  Replies of those that policy would not allow anew are dropped then."""
    names = present()
    if not force:
        ask("Forget all connections? Those whose replies are allowed only by conntrack end.")
    gone = sum(map(empty, names))
    print_done(output, {"deleted": gone}, f"{plural(gone, 'entry')} removed")


def empty(name: str) -> int:
    from datapath.maps import CtMap

    with reading(CtMap, name) as opened:
        keys: list[Any] = [key for key, _ in opened.items()]
        return opened.delete(keys)
