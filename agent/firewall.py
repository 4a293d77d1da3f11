# SPDX-License-Identifier: Apache-2.0
"""The target of the host's firewall rules: masquerading, published ports, the accept chain in FORWARD.

One object an address family in one table, derived from the endpoints' ports.  docker, ufw and firewalld
rewrite the host's rules whenever they restart, so the reconciler looks every few seconds and repairs.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from loguru import logger

from agent.endpoint import Endpoint, Port
from agent.nodes import PoolTable
from core.reconciler import Kind, Reconciler, Status
from core.table import Table
from datapath.firewall import IPV4, IPV6, Firewall, FirewallState, PublishedPort
from datapath.forward import ForwardChain
from datapath.hostflows import HostFlows
from datapath.rulewatch import RuleWatch

# One look costs three processes, 15 ms.  Changes through nftables are noticed at once (RuleWatch).
LOOK_S = 30.0

FAMILIES = {4: IPV4, 6: IPV6}
_SOCKET_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_IPTABLES = {4: "iptables", 6: "ip6tables"}
# Bindings that mean every address of a family; empty means those of both.
_EVERY = {4: "0.0.0.0", 6: "::"}

FirewallTable = Table[int, FirewallState]


class FamilyRules:
    """The rules of one address family; `accept` keeps the accept chain in FORWARD."""

    def __init__(self, family: int, *, accept: bool) -> None:
        self._family = family
        self._firewall = Firewall(FAMILIES[family])
        self._forward = ForwardChain(_IPTABLES[family]) if accept else None
        self._published: frozenset[PublishedPort] = frozenset()

    async def ensure(self, state: FirewallState) -> None:
        """Repair what is amiss.  Raises FirewallError."""
        amiss = await self._firewall.ensure(state)
        await self._forget_diverted(state)
        if self._forward is not None:
            amiss += await self._forward.ensure()
        if amiss:
            logger.info("firewall rules for IPv{} written: {}", self._family, ", ".join(amiss[:5]))

    async def _forget_diverted(self, state: FirewallState) -> None:
        """A UDP client that never pauses would go on past a port that was published meanwhile."""
        fresh = state.ports - self._published
        if fresh:
            async with HostFlows(_SOCKET_FAMILY[self._family]) as flows:
                await flows.forget_diverted(fresh)
        self._published = state.ports


class FirewallTarget:
    """Operations over the firewall states, by address family."""

    def __init__(self, rules: Mapping[int, FamilyRules]) -> None:
        self._rules = rules

    async def update(self, items: Sequence[tuple[int, FirewallState]]) -> Mapping[int, Exception]:
        outcomes = await asyncio.gather(
            *(self._rules[family].ensure(state) for family, state in items), return_exceptions=True
        )
        failed: dict[int, Exception] = {}
        for (family, _), outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Exception):
                failed[family] = outcome
        return failed

    async def delete(self, keys: Sequence[int]) -> Mapping[int, Exception]:
        return {}

    async def prune(self, table: FirewallTable) -> int:
        return 0


class FirewallRules:
    """Derives the rules from the endpoints; owner of the table and its reconciler."""

    def __init__(self, base: Mapping[int, FirewallState], target: FirewallTarget) -> None:
        self.table: FirewallTable = Table("firewall", ("endpoints",))
        self.reconciler: Reconciler[int, FirewallState] = Reconciler(
            "firewall", self.table, target, refresh_s=LOOK_S
        )
        self._base = base
        self._others: frozenset[str] = frozenset()
        self._source = self.table.source("endpoints")

    def derive(self, endpoints: Iterable[Endpoint]) -> None:
        """Want the rules for these endpoints."""
        publishing = [endpoint for endpoint in endpoints if endpoint.ports]
        for family, base in self._base.items():
            ports = frozenset(_published(publishing, family))
            others = {pool for pool in self._others if (":" in pool) == (family == 6)}
            self._source.upsert(family, replace(base, ports=ports, direct=base.direct | others))
        self._source.mark_in_sync()

    async def watch(self) -> None:
        """Look at once when somebody changed the host's rules (docker or ufw restarted)."""
        async with RuleWatch() as rules:
            while True:
                await rules.changed()
                self.reconciler.poke()

    async def settled(self, endpoints: Iterable[Endpoint]) -> Status:
        """Write the rules for these endpoints now; return what became of it."""
        self.derive(endpoints)
        outcomes = [await self.reconciler.settled(family) for family in self._base]
        return next((each for each in outcomes if each.kind is Kind.ERROR), outcomes[0])

    async def follow(self, endpoints: Table[int, Endpoint]) -> None:
        """Keep the rules equal to the endpoints until cancelled."""
        changes = endpoints.subscribe()
        while True:
            self.derive(endpoint for _, endpoint in endpoints.items())
            await changes.wait()
            changes.take()

    async def follow_pools(self, pools: PoolTable, endpoints: Table[int, Endpoint]) -> None:
        """Have nothing masqueraded that goes to other hosts' pools, until cancelled."""
        changes = pools.subscribe()
        try:
            while True:
                await changes.wait()
                changes.take()
                self._others = frozenset(pools.keys())
                self.derive(endpoint for _, endpoint in endpoints.items())
        finally:
            pools.unsubscribe(changes)


def _published(endpoints: Iterable[Endpoint], family: int) -> Iterator[PublishedPort]:
    """Yield what leads to the endpoints' addresses of one family.  Pure."""
    for endpoint in endpoints:
        address = endpoint.addresses.get(family)
        for port in endpoint.ports if address else ():
            every = port.host_ip in ("", _EVERY[family])
            if every or port.family == family:
                yield _published_port(port, "" if every else port.host_ip, address or "")


def _published_port(port: Port, host_address: str, address: str) -> PublishedPort:
    spread = port.host_port_end - port.host_port
    return PublishedPort(
        port.protocol,
        host_address,
        port.host_port,
        port.host_port_end,
        address,
        port.container_port,
        port.container_port + spread,
    )
