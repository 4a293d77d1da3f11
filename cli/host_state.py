# SPDX-License-Identifier: Apache-2.0
"""What the agent leaves on a host, found in the kernel itself, and how each thing is removed.

Called by `holdfast cleanup` with the agent stopped.  Only things that bear our mark are found: filters by
handle and name, devices by alias, routes by protocol number, our own table and chain, maps by name, the
host's address inside the pool.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

from datapath import command
from datapath.attach import Attacher
from datapath.devices import Devices
from datapath.errors import DatapathError
from datapath.firewall import IPV4, IPV6, TABLE, Firewall
from datapath.forward import ForwardChain, parse_filter
from datapath.mapspec import MapCatalogue, unpin
from datapath.netlink import Netlink
from datapath.nftlist import parse_listing
from datapath.noderoutes import NodeRoutes
from datapath.routes import Routes
from datapath.tunnel import DEVICE as TUNNEL_DEVICE
from datapath.tunnel import Shape, Tunnel

POLICY_MAP = re.compile(r"cilium_policy_\d{5}")
# What is ours in the state directory: others may keep theirs beside it.
STATE_FOLDERS = ("endpoints", "networks")
STATE_FILES = re.compile(r".*\.(json|db(-wal|-shm)?|lock|damaged-\d+)|start-now")


@dataclass(frozen=True)
class Item:
    """One thing on this host; `remove` may be called once."""

    kind: str
    name: str
    remove: Callable[[], Awaitable[object]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Scope:
    """What is looked for, and where."""

    pins: Path  # directory of the pinned maps
    state: Path
    network: bool  # devices, routes, firewall
    checkpoint: bool  # the state directory


@dataclass
class Survey:
    """What was found, in the order in which it is to be removed, and what could not be looked at."""

    items: list[Item] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def collect(self, found: AsyncIterator[Item]) -> None:
        """Take items until there are no more; an error ends only this part."""
        try:
            async for item in found:
                self.items.append(item)
        except DatapathError as error:
            self.errors.append(str(error))


async def survey(netlink: Netlink, scope: Scope) -> Survey:
    """Return everything of ours within `scope`."""
    found = Survey()
    if scope.network:
        for part in (chains(), tables(), addresses(netlink), routes(netlink)):
            await found.collect(part)
    await found.collect(programs(netlink))
    if scope.network:
        await found.collect(devices(netlink))
    found.items.extend(pins(scope.pins))
    if scope.checkpoint:
        found.items.extend(state(scope.state))
    return found


async def programs(netlink: Netlink) -> AsyncIterator[Item]:
    """Yield the devices that have filters of ours."""
    attacher = Attacher(netlink)
    for device in await Devices(netlink).all():
        ours = [each.name for each in await attacher.filters(device.index) if each.ours]
        if ours:
            yield Item("program", f"{', '.join(ours)} on {device.name}", _releaser(attacher, device.index))


def _releaser(attacher: Attacher, index: int) -> Callable[[], Awaitable[None]]:
    return lambda: attacher.release(index)


async def devices(netlink: Netlink) -> AsyncIterator[Item]:
    """Yield the host's sides of endpoints; the container loses its interface with it."""
    own = Devices(netlink)
    for name, device in sorted((await own.ours()).items()):
        yield Item("device", f"{name} (endpoint {device.endpoint_id})", _deleter(own.delete, name))
    tunnel = Tunnel(netlink, Shape())
    if await tunnel.is_ours():
        yield Item("device", f"{TUNNEL_DEVICE} (to other hosts)", tunnel.remove)


async def addresses(netlink: Netlink) -> AsyncIterator[Item]:
    """Yield the host's own address among its endpoints: on lo, inside a pool that we made unreachable."""
    own = Devices(netlink)
    found = await Routes(netlink).ours()
    lo = await own.get("lo")
    # Unreachable routes have no device in IPv4, and lo in IPv6.
    pools = [ip_network(prefix) for prefix, index in found.items() if index in (0, lo.index)]
    for message in await netlink.request("list addresses", DatapathError, "addr", "dump"):
        address = message.get("address") or ""
        if message["index"] == lo.index and any(ip_address(address) in pool for pool in pools):
            yield Item("address", f"{address} on lo", _deleter(own.remove_address, address))


async def routes(netlink: Netlink) -> AsyncIterator[Item]:
    """Yield the routes to endpoints, the unreachable one of the pool, and those to other hosts' pools."""
    own = Routes(netlink)
    for prefix in sorted(await own.ours()):
        yield Item("route", prefix, _deleter(own.delete, prefix))
    others = NodeRoutes(netlink)
    for prefix in sorted(await others.ours()):
        yield Item("route", f"{prefix} of another host", _deleter(others.delete, prefix))


def _deleter(delete: Callable[[str], Awaitable[bool]], name: str) -> Callable[[], Awaitable[bool]]:
    return lambda: delete(name)


async def tables() -> AsyncIterator[Item]:
    """Yield our nft tables."""
    for family in (IPV4, IPV6):
        listing = parse_listing(await command.run(["nft", "-j", "list", "tables", family.name]))
        if TABLE in listing.tables:
            yield Item("firewall", f"nft table {family.name} {TABLE}", Firewall(family).remove)


async def chains() -> AsyncIterator[Item]:
    """Yield our chain of accept rules."""
    for tool in ("iptables", "ip6tables"):
        if parse_filter(await command.run([f"{tool}-save", "-t", "filter"])).exists:
            yield Item(
                "firewall", f"{tool} chain HOLDFAST-FORWARD and the jump to it", ForwardChain(tool).remove
            )


def pins(directory: Path) -> Iterator[Item]:
    """Yield our pinned maps; a map is freed when the last program that uses it is gone."""
    shared = {spec.name for spec in MapCatalogue(enable_ipv6=True).shared()}
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if path.name in shared or POLICY_MAP.fullmatch(path.name):
            yield Item("map", str(path), _unpinner(path))


def _unpinner(path: Path) -> Callable[[], Awaitable[bool]]:
    async def remove() -> bool:
        return unpin(path.name, path.parent)

    return remove


def state(directory: Path) -> Iterator[Item]:
    """Yield the checkpoint: addresses, endpoints, networks."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        folder = path.is_dir() and path.name in STATE_FOLDERS
        if folder or (path.is_file() and STATE_FILES.fullmatch(path.name)):
            yield Item("state", str(path), _remover(path))


def _remover(path: Path) -> Callable[[], Awaitable[None]]:
    async def remove() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return remove


def is_served(path: Path) -> bool:
    """True when somebody accepts connections on a unix socket: an agent is alive, if only just."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
