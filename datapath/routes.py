# SPDX-License-Identifier: Apache-2.0
"""Routes of the host to its endpoints, marked with a protocol number of their own.

Responsible for: one host route and one permanent neighbour per endpoint (no ARP between host and
container), one unreachable route for the pool (a free address is refused, not sent to the default
gateway), and finding routes that no endpoint owns.  Called by: the agent's reconciler of routes.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from datapath.addresses import host_prefix
from datapath.errors import RouteError
from datapath.netlink import Message, Netlink, errno_of

PROTOCOL = 0x48  # "H"; /etc/iproute2/rt_protos leaves it free
_SCOPE_LINK = 253
# What a deletion must say to match unicast and unreachable routes, of whatever scope.
_ANY = {"type": 0, "scope": 255}  # RTN_UNSPEC, RT_SCOPE_NOWHERE
_ABSENT = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV})


@dataclass(frozen=True)
class EndpointRoute:
    """How the host reaches one endpoint: by `ifindex`, at `mac`; `source` is the host's address then."""

    address: str
    ifindex: int
    mac: str
    source: str = ""


class Routes:
    """Routes of the namespace that `netlink` was opened in; writes are idempotent."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    async def upsert(self, route: EndpointRoute) -> None:
        """Write an endpoint's route and neighbour.  Raises RouteError."""
        source = {"prefsrc": route.source} if route.source else {}
        await self._request(
            f"route to {route.address} by device {route.ifindex}",
            "route",
            "replace",
            dst=host_prefix(route.address),
            oif=route.ifindex,
            proto=PROTOCOL,
            scope=_SCOPE_LINK,
            **source,
        )
        await self._request(
            f"neighbour {route.address} at {route.mac}",
            "neigh",
            "replace",
            dst=route.address,
            lladdr=route.mac,
            ifindex=route.ifindex,
            state="permanent",
        )

    async def upsert_by(self, route: EndpointRoute, sources: Sequence[str]) -> None:
        """Write it with the first of `sources` that the host has.  Raises RouteError."""
        for source in sources[:-1]:
            try:
                return await self.upsert(replace(route, source=source))
            except RouteError as error:
                if errno_of(error) != errno.EINVAL:
                    raise
        return await self.upsert(replace(route, source=sources[-1]))

    async def delete(self, prefix: str) -> bool:
        """Delete a route of ours ("10.0.0.1" or "10.0.0.0/24"); return whether it was there.

        A neighbour goes with its device.
        """
        dst = prefix if "/" in prefix else host_prefix(prefix)
        what = f"delete route to {dst}"
        try:
            await self._request(what, "route", "del", dst=dst, proto=PROTOCOL, **_ANY)
        except RouteError as error:
            if errno_of(error) in _ABSENT:
                return False
            raise
        return True

    async def add_unreachable(self, prefix: str) -> None:
        """Refuse addresses of the pool `prefix` that no endpoint has.  Raises RouteError."""
        what = f"unreachable route for pool {prefix}"
        await self._request(what, "route", "replace", dst=prefix, type="unreachable", proto=PROTOCOL)

    async def ours(self) -> dict[str, int]:
        """Return Holdfast's routes: prefix → device index (0: unreachable)."""
        rows = await asyncio.to_thread(self._netlink.routes.dump)
        return {row.prefix: row.oif for row in rows if row.protocol == PROTOCOL}

    async def prune(self, keep: Iterable[str]) -> list[str]:
        """Delete our routes to prefixes not in `keep` ("10.0.0.1/32"); return what was deleted."""
        wanted = set(keep)
        stale = [prefix for prefix in await self.ours() if prefix not in wanted]
        return [prefix for prefix in stale if await self.delete(prefix)]

    async def _request(self, what: str, kind: str, command: str, **arguments: object) -> list[Message]:
        return await self._netlink.request(what, RouteError, kind, command, **arguments)
