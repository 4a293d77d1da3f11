# SPDX-License-Identifier: Apache-2.0
"""The targets of what is known of other nodes: cilium_tunnel_map, holdfast_path_mtu, and routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from agent.nodes import NodePool, PoolTable
from agent.path_mtu import PathMtus, carried_inside
from core.errors import HoldfastError
from core.reconciler import Reconciler
from datapath.maps import PathMtuMap, TunnelMap
from datapath.noderoutes import NodeRoute, NodeRoutes

# Pools written before anybody else may run: some milliseconds.
POOLS_AT_ONCE = 512


class Way(Protocol):
    """How this host's own packets get to a pool."""

    def route(self, prefix: str, pool: NodePool) -> NodeRoute | None:
        """Return the route, None when there is none to write."""

    async def write(self, routes: NodeRoutes, wanted: Sequence[NodeRoute]) -> Mapping[str, Exception]:
        """Write routes; return the errors by prefix."""
        ...


class Tunnelled:
    """By the VXLAN device; `index` asks for it when it is needed: it may have been made anew."""

    def __init__(self, index: Callable[[], int], routers: Mapping[int, str], mtus: PathMtus) -> None:
        self._index = index
        self._routers = routers
        self._mtus = mtus

    def route(self, prefix: str, pool: NodePool) -> NodeRoute | None:
        router = self._routers.get(_version(prefix))
        if not pool.host or not router:
            return None
        mtu = self._mtus.get(pool.host)
        return NodeRoute(prefix, pool.host, router, carried_inside(mtu, _version(prefix)) if mtu else 0)

    async def write(self, routes: NodeRoutes, wanted: Sequence[NodeRoute]) -> Mapping[str, Exception]:
        return await routes.upsert_all_tunnelled(wanted, self._index())


class Direct:
    """By the other host itself, a neighbour of this one."""

    def __init__(self, families: Sequence[int], mtus: PathMtus) -> None:
        self._families = families
        self._mtus = mtus

    def route(self, prefix: str, pool: NodePool) -> NodeRoute | None:
        version = _version(prefix)
        host = pool.host if version == 4 else pool.host6
        usable = host and version in self._families
        return NodeRoute(prefix, host, mtu=self._mtus.get(host) or 0) if usable else None

    async def write(self, routes: NodeRoutes, wanted: Sequence[NodeRoute]) -> Mapping[str, Exception]:
        return await _each([(route.prefix, route) for route in wanted], partial(self._write, routes))

    @staticmethod
    async def _write(routes: NodeRoutes, _: str, route: NodeRoute) -> None:
        await routes.upsert_direct(route)


class NodeRouteTarget:
    """Operations over the pools: routes.  Without a way there are none, and a former life's go."""

    def __init__(self, routes: NodeRoutes, way: Way | None) -> None:
        self._routes = routes
        self._way = way

    async def update(self, items: Sequence[tuple[str, NodePool]]) -> Mapping[str, Exception]:
        routes = {prefix: self._route(prefix, pool) for prefix, pool in items}
        failed = dict(await self.delete([prefix for prefix, route in routes.items() if route is None]))
        wanted = [route for route in routes.values() if route is not None]
        if self._way is not None and wanted:
            failed |= await self._way.write(self._routes, wanted)
        return failed

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        return await _each([(key, key) for key in keys], self._delete)

    async def prune(self, table: PoolTable) -> int:
        return await self._routes.prune(prefix for prefix, pool in table.items() if self._route(prefix, pool))

    async def _delete(self, prefix: str, _: str) -> None:
        await self._routes.delete(prefix)

    def _route(self, prefix: str, pool: NodePool) -> NodeRoute | None:
        return self._way.route(prefix, pool) if self._way is not None else None


class TunnelMapTarget:
    """Operations over the pools: cilium_tunnel_map, which says the same to whoever reads maps.

    The programs have it from cilium_ipcache, where a pool is a prefix like any other.
    """

    def __init__(self, tunnel: TunnelMap, *, enabled: bool) -> None:
        self._map = tunnel
        self._enabled = enabled

    async def update(self, items: Sequence[tuple[str, NodePool]]) -> Mapping[str, Exception]:
        if not self._enabled:
            return {}
        failed = self._map.upsert((_first(prefix), pool.host) for prefix, pool in items if pool.host)
        return {prefix: failed[_first(prefix)] for prefix, _ in items if _first(prefix) in failed}

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        self._map.delete(_first(prefix) for prefix in keys)
        return {}

    async def prune(self, table: PoolTable) -> int:
        keep = {_first(prefix) for prefix, _ in table.items()} if self._enabled else set()
        return self._map.delete({*self._map.keys()} - keep)


class PathMtuTarget:
    """Operations over path MTUs: holdfast_path_mtu, which the programs and the agent's next life read."""

    def __init__(self, written: PathMtuMap) -> None:
        self._map = written

    async def update(self, items: Sequence[tuple[str, int]]) -> Mapping[str, Exception]:
        return self._map.upsert(items)

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        self._map.delete(keys)
        return {}

    async def prune(self, table: PathMtus) -> int:
        return self._map.delete({*self._map.keys()} - set(table.keys()))


@dataclass(frozen=True)
class NodeReconcilers:
    """What is written of other hosts; `follow_mtus` runs beside them."""

    routes: Reconciler[str, NodePool]
    tunnel: Reconciler[str, NodePool]
    mtus: Reconciler[str, int]

    def __iter__(self) -> Iterator[Reconciler[str, Any]]:
        yield from (self.routes, self.tunnel, self.mtus)

    async def follow_mtus(self) -> None:
        """Have the routes to a host written again when what arrives there has changed."""
        changes = self.mtus.table.subscribe()
        try:
            while True:
                await changes.wait()
                hosts = set(changes.take())
                concerned = [
                    prefix for prefix, pool in self.routes.table.items() if hosts & {pool.host, pool.host6}
                ]
                self.routes.touch(concerned)
        finally:
            self.mtus.table.unsubscribe(changes)


def reconcilers(
    pools: PoolTable,
    mtus: PathMtus,
    routes: NodeRouteTarget,
    tunnel: TunnelMapTarget,
    path_mtus: PathMtuTarget,
) -> NodeReconcilers:
    return NodeReconcilers(
        Reconciler("node-routes", pools, routes, batch=POOLS_AT_ONCE),
        Reconciler("tunnel-map", pools, tunnel, batch=POOLS_AT_ONCE),
        Reconciler("path-mtu", mtus, path_mtus),
    )


async def _each(
    items: Sequence[tuple[str, object]], act: Callable[..., Awaitable[None]]
) -> Mapping[str, Exception]:
    """Do one thing after the other, with a turn for everybody else; return what failed."""
    failed: dict[str, Exception] = {}
    for key, value in items:
        try:
            await act(key, value)
        except (HoldfastError, OSError) as error:
            failed[key] = error
        await asyncio.sleep(0)
    return failed


def _first(prefix: str) -> str:
    return prefix.partition("/")[0]


def _version(prefix: str) -> int:
    return 6 if ":" in prefix else 4
