# SPDX-License-Identifier: Apache-2.0
"""Routes of this host to the pools of other hosts, marked with a protocol number of their own.

    by the tunnel     10.50.2.0/24 encap ip id 1 dst 10.9.0.2 dev cilium_vxlan src 10.50.1.1 metric …
    directly          10.50.2.0/24 via 10.9.0.2

The first are for the host's own packets: a lightweight tunnel writes the identity `host` and the other
host's address for the device, without any program.  Endpoints' packets have both from their programs.

Called by: the agent's reconciler of node routes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from datapath.errors import RouteError
from datapath.netlink import Message, Netlink, errno_of
from datapath.routemessages import Wanted

PROTOCOL = 0x49  # "I", next to that of endpoints' routes
HOST = 1  # identity; the receiver reads it as remote-node
_ENCAP_IP = 2  # LWTUNNEL_ENCAP_IP of linux/lwtunnel.h
_LWT_ID, _LWT_DST = 1, 2  # LWTUNNEL_IP_ID, LWTUNNEL_IP_DST
_SCOPE_LINK = 253
_ANY = {"type": 0, "scope": 255}  # of a deletion: RTN_UNSPEC, RT_SCOPE_NOWHERE
_ABSENT = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV})


@dataclass(frozen=True)
class NodeRoute:
    """The way to one pool: `host` is the other host's address, `source` this host's when it goes there.

    `mtu` is what the way carries where that is less than the device says, else 0.
    """

    prefix: str
    host: str
    source: str = ""
    mtu: int = 0


class NodeRoutes:
    """Routes of the namespace that `netlink` was opened in; writes are idempotent."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    async def upsert_tunnelled(self, route: NodeRoute, device: int) -> None:
        """Write a route by the tunnel device of that index.  Raises RouteError."""
        for error in (await self.upsert_all_tunnelled([route], device)).values():
            raise error

    async def upsert_all_tunnelled(
        self, routes: Sequence[NodeRoute], device: int
    ) -> Mapping[str, RouteError]:
        """Write many routes by the tunnel device; return the errors by prefix.  Raises RouteError."""
        refused = await asyncio.to_thread(self._write, routes, device)
        hosts = {each.prefix: each.host for each in routes if each.prefix in refused}
        return {
            prefix: RouteError(f"route to pool {prefix} of host {hosts[prefix]}: {os.strerror(code)}")
            for prefix, code in refused.items()
        }

    def _write(self, routes: Sequence[NodeRoute], device: int) -> dict[str, int]:
        return self._netlink.routes.replace([_by(device, each) for each in routes])

    async def upsert_direct(self, route: NodeRoute) -> None:
        """Write a route by the other host, which must be a neighbour.  Raises RouteError."""
        router = await self._router_to(route.host)
        if router:
            raise RouteError(
                f"pool {route.prefix} of host {route.host}: it is behind router {router}, no neighbour",
                hint="set tunnel to vxlan, or leave routes to the network (auto-direct-node-routes=false)",
            )
        await self._replace(route, gateway=route.host)

    async def delete(self, prefix: str) -> bool:
        """Delete a route of ours; return whether it was there."""
        what = f"delete route to pool {prefix}"
        try:
            await self._request(what, "del", dst=prefix, proto=PROTOCOL, **_ANY)
        except RouteError as error:
            if errno_of(error) in _ABSENT:
                return False
            raise
        return True

    async def ours(self) -> set[str]:
        """Return the prefixes of our routes."""
        rows = await asyncio.to_thread(self._netlink.routes.dump)
        return {row.prefix for row in rows if row.protocol == PROTOCOL}

    async def prune(self, keep: Iterable[str]) -> int:
        """Delete our routes to prefixes not in `keep`; return how many."""
        stale = await self.ours() - set(keep)
        return sum([await self.delete(prefix) for prefix in stale])

    async def _replace(self, route: NodeRoute, **way: object) -> None:
        source: dict[str, object] = {"prefsrc": route.source} if route.source else {}
        if route.mtu:
            way["metrics"] = {"mtu": route.mtu}
        what = f"route to pool {route.prefix} of host {route.host}"
        await self._request(what, "replace", dst=route.prefix, proto=PROTOCOL, **way, **source)

    async def _router_to(self, host: str) -> str:
        """Return the router on the way to a host, empty for a neighbour."""
        found = await self._request(f"find the way to host {host}", "get", dst=host)
        return next((str(each.get("gateway")) for each in found if each.get("gateway")), "")

    async def _request(self, what: str, command: str, **arguments: object) -> list[Message]:
        return await self._netlink.request(what, RouteError, "route", command, **arguments)


def _by(device: int, route: NodeRoute) -> Wanted:
    metric, way = metric_of(route.prefix), encapsulation(route.host)
    return Wanted(
        route.prefix, PROTOCOL, _SCOPE_LINK, device, route.source, metric, _ENCAP_IP, way, route.mtu
    )


def metric_of(prefix: str) -> int:
    """Return the metric of the route to a pool: one of 65 535, always the same one.

    There is one route to a pool, so it decides nothing.  But the kernel looks for a way like a new one among
    all of the same device, source and metric: 10 000 routes of one metric take it 12 s, these 0.2.
    """
    return 1 + zlib.crc32(prefix.encode()) % 0xFFFF


def encapsulation(host: str) -> bytes:
    """Return the attributes of a lightweight IP tunnel to a host (linux/lwtunnel.h), which pyroute2 lacks."""
    number = struct.pack("=HH", 12, _LWT_ID) + HOST.to_bytes(8)
    return number + struct.pack("=HH", 8, _LWT_DST) + socket.inet_aton(str(IPv4Address(host)))
