# SPDX-License-Identifier: Apache-2.0
"""`holdfast bpf …`: the pinned maps, read from the kernel itself.

Nothing here needs the agent: what the kernel enforces can be read with the agent dead.  Labels are shown
where an agent answers, else numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.base import LazyGroup, Settings, examples, headers_option, output_option
from cli.errors import CliError, Missing, Unreachable
from cli.output import print_json, print_table

if TYPE_CHECKING:
    from datapath.maps import TypedMap

    M = TypeVar("M", bound=TypedMap[Any, Any])

Json = dict[str, Any]
_HERE = "cli.commands.bpf"
_POLICY = "cli.commands.bpf_policy"
_CT = "cli.commands.bpf_ct"


@click.group(
    cls=LazyGroup,
    lazy={
        "ct": (f"{_CT}:ct", "Connection tracking"),
        "endpoint": (f"{_HERE}:endpoint", "Local endpoints by address"),
        "ipcache": (f"{_HERE}:ipcache", "Address → identity"),
        "metrics": (f"{_HERE}:metrics", "Forwarded and dropped packets"),
        "policy": (f"{_POLICY}:policy", "What endpoints may receive and send"),
        "tunnel": (f"{_HERE}:tunnel", "Pool → host it is tunnelled to"),
    },
    epilog=examples(
        "holdfast bpf policy get 373", "holdfast bpf ipcache get 10.50.68.48", "holdfast bpf metrics list"
    ),
)
@click.option(
    "--bpf-root",
    type=click.Path(path_type=Path),
    default=Path("/sys/fs/bpf"),
    show_default=True,
    help="Where the BPF file system is mounted.",
)
@click.pass_context
def bpf(ctx: click.Context, bpf_root: Path) -> None:
    """Read the pinned BPF maps: what the kernel enforces, also with the agent dead."""
    ctx.meta[__name__] = bpf_root / "tc" / "globals"


def globals_dir() -> Path:
    """Return the directory of the pins that this command was told."""
    root: Path = click.get_current_context().meta[__name__]
    return root


@contextmanager
def reading(kind: type[M], name: str) -> Iterator[M]:
    """Open a pinned map; Missing when there is none, CliError when this user may not."""
    from datapath.errors import SyscallError

    root = globals_dir()
    try:
        opened = kind.reader(name, root)
    except SyscallError as error:
        if not (root / name).exists():
            hint = "has the agent ever run on this host, and is this its mount namespace?"
            raise Missing(f"there is no map {root / name}", hint=hint) from error
        raise CliError(error.message, hint=error.hint or "reading maps needs root") from error
    try:
        yield opened
    finally:
        opened.close()


def labels_of_identities(settings: Settings) -> dict[int, str]:
    """Return number → labels as far as an agent answers; nothing is wrong when none does."""
    try:
        found = settings.agent(timeout=5).get("identity")
    except Unreachable:
        return {}
    return {each["id"]: "\n".join(each["labels"]) for each in found}


# --- ipcache


@click.group(
    cls=LazyGroup,
    lazy={
        "list": (f"{_HERE}:ipcache_list", "List all prefixes"),
        "get": (f"{_HERE}:ipcache_get", "Look one address up"),
    },
    epilog=examples("holdfast bpf ipcache list", "holdfast bpf ipcache get 10.50.68.48"),
)
def ipcache() -> None:
    """Which identity the kernel takes an address for."""


@click.command("list", epilog=examples("holdfast bpf ipcache list", "holdfast bpf ipcache list -o json"))
@output_option
@headers_option
def ipcache_list(output: str | None, no_headers: bool) -> None:
    """List every prefix with its identity."""
    from datapath.maps import IpcacheMap

    with reading(IpcacheMap, "cilium_ipcache") as opened:
        found = sorted(opened.items())
    if output:
        print_json({prefix: entry._asdict() for prefix, entry in found})
        return
    rows = (
        (prefix, f"identity={entry.identity} encryptkey={entry.key} tunnelendpoint={entry.tunnel_endpoint}")
        for prefix, entry in found
    )
    print_table(("IP PREFIX/ADDRESS", "IDENTITY"), rows, no_headers=no_headers)


@click.command("get", epilog=examples("holdfast bpf ipcache get 10.50.68.48"))
@click.argument("address")
@output_option
def ipcache_get(address: str, output: str | None) -> None:
    """Look ADDRESS up as the kernel does: the longest prefix counts."""
    from datapath.maps import IpcacheMap

    with reading(IpcacheMap, "cilium_ipcache") as opened:
        try:
            found = opened.get(address)
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{address!r} is not an address", param_hint="ADDRESS") from error
    if found is None:
        raise Missing(f"{address} maps to no identity", hint="the kernel takes it for reserved:world (2)")
    if output:
        print_json({"address": address} | found._asdict())
        return
    click.echo(f"{address} maps to identity {found.identity}")


# --- local endpoints


@click.group(
    cls=LazyGroup,
    lazy={"list": (f"{_HERE}:endpoint_list", "List local endpoints")},
    epilog=examples("holdfast bpf endpoint list"),
)
def endpoint() -> None:
    """The endpoints of this host, by address."""


@click.command("list", epilog=examples("holdfast bpf endpoint list", "holdfast bpf endpoint list -o json"))
@output_option
@headers_option
def endpoint_list(output: str | None, no_headers: bool) -> None:
    """List the addresses that are delivered on this host."""
    from datapath.maps import LxcMap

    with reading(LxcMap, "cilium_lxc") as opened:
        found = sorted(opened.items())
    if output:
        print_json({address: entry._asdict() for address, entry in found})
        return
    rows = (
        (f"[{address}]:0" if ":" in address else f"{address}:0", endpoint_info(entry))
        for address, entry in found
    )
    print_table(("IP ADDRESS", "LOCAL ENDPOINT INFO"), rows, no_headers=no_headers)


def endpoint_info(entry: Any) -> str:
    from datapath.records import ENDPOINT_IS_HOST

    if entry.flags & ENDPOINT_IS_HOST:
        return "(localhost)"
    return (
        f"id={entry.endpoint_id:<5} flags=0x{entry.flags:04X} ifindex={entry.ifindex:<3} "
        f"mac={entry.mac.upper()} nodemac={entry.node_mac.upper()}"
    )


# --- metrics


@click.group(
    cls=LazyGroup,
    lazy={"list": (f"{_HERE}:metrics_list", "List the counters")},
    epilog=examples("holdfast bpf metrics list"),
)
def metrics() -> None:
    """Packets and bytes by what happened to them."""


@click.command("list", epilog=examples("holdfast bpf metrics list", "holdfast bpf metrics list -o json"))
@output_option
@headers_option
def metrics_list(output: str | None, no_headers: bool) -> None:
    """List how many packets were forwarded, and dropped for which reason."""
    from datapath.maps import MetricsMap

    with reading(MetricsMap, "cilium_metrics") as opened:
        found = [metrics_row(key, value) for key, value in sorted(opened.items())]
    if output:
        print_json(
            [dict(zip(("reason", "direction", "packets", "bytes"), row, strict=True)) for row in found]
        )
        return
    print_table(("REASON", "DIRECTION", "PACKETS", "BYTES"), found, no_headers=no_headers)


def metrics_row(key: Any, value: Any) -> tuple[str, str, int, int]:
    from datapath.reasons import direction_name, reason_name

    return reason_name(key.reason), direction_name(key.direction), value.packets, value.bytes


# --- tunnel


@click.group(
    cls=LazyGroup,
    lazy={"list": (f"{_HERE}:tunnel_list", "List tunnel endpoints")},
    epilog=examples("holdfast bpf tunnel list"),
)
def tunnel() -> None:
    """Which host a pool of addresses is tunnelled to."""


@click.command("list", epilog=examples("holdfast bpf tunnel list", "holdfast bpf tunnel list -o json"))
@output_option
@headers_option
def tunnel_list(output: str | None, no_headers: bool) -> None:
    """List the first address of each pool and its host's address."""
    from datapath.maps import TunnelMap

    with reading(TunnelMap, "cilium_tunnel_map") as opened:
        found = sorted(opened.items())
    if output:
        print_json(dict(found))
        return
    print_table(
        ("TUNNEL", "VALUE"), ((f"{pool}:0", f"{host}:0") for pool, host in found), no_headers=no_headers
    )
