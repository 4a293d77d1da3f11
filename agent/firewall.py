# SPDX-License-Identifier: Apache-2.0
"""The target of the host's firewall rules: masquerading, published ports, the accept chain in FORWARD.

One object (`RULES`) in one table, derived from the endpoints' ports.  docker, ufw and firewalld rewrite
the host's rules whenever they restart, so the reconciler looks every few seconds and repairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loguru import logger

from agent.endpoint import Endpoint, Port
from core.errors import HoldfastError
from core.reconciler import Reconciler, Status
from core.table import Table
from datapath.firewall import Firewall, FirewallState, PublishedPort
from datapath.forward import ForwardChain
from datapath.hostflows import HostFlows
from datapath.rulewatch import RuleWatch

RULES = "rules"
# One look costs three processes, 15 ms.  Changes through nftables are noticed at once (RuleWatch).
LOOK_S = 30.0

FirewallTable = Table[str, FirewallState]


class FirewallTarget:
    """Operations over the one firewall state; `forward` is None where the operator keeps FORWARD himself."""

    def __init__(self, firewall: Firewall, forward: ForwardChain | None) -> None:
        self._firewall = firewall
        self._forward = forward
        self._published: frozenset[PublishedPort] = frozenset()

    async def update(self, items: Sequence[tuple[str, FirewallState]]) -> Mapping[str, Exception]:
        try:
            for _, state in items:
                amiss = await self._firewall.ensure(state)
                await self._forget_diverted(state)
                if self._forward is not None:
                    amiss += await self._forward.ensure()
                if amiss:
                    logger.info("firewall rules written: {}", ", ".join(amiss[:5]))
        except HoldfastError as error:
            return {key: error for key, _ in items}
        return {}

    async def _forget_diverted(self, state: FirewallState) -> None:
        """A UDP client that never pauses would go on past a port that was published meanwhile."""
        fresh = state.ports - self._published
        if fresh:
            async with HostFlows() as flows:
                await flows.forget_diverted(fresh)
        self._published = state.ports

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        return {}

    async def prune(self, table: FirewallTable) -> int:
        return 0


class FirewallRules:
    """Derives the rules from the endpoints; owner of the table and its reconciler."""

    def __init__(self, base: FirewallState, target: FirewallTarget) -> None:
        self.table: FirewallTable = Table("firewall", ("endpoints",))
        self.reconciler: Reconciler[str, FirewallState] = Reconciler(
            "firewall", self.table, target, refresh_s=LOOK_S
        )
        self._base = base
        self._source = self.table.source("endpoints")

    def derive(self, endpoints: Iterable[Endpoint]) -> None:
        """Want the rules for these endpoints."""
        ports = frozenset(
            _published(port, endpoint.ipv4) for endpoint in endpoints for port in endpoint.ports
        )
        self._source.upsert(RULES, replace(self._base, ports=ports))
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
        return await self.reconciler.settled(RULES)

    async def follow(self, endpoints: Table[int, Endpoint]) -> None:
        """Keep the rules equal to the endpoints until cancelled."""
        changes = endpoints.subscribe()
        while True:
            self.derive(endpoint for _, endpoint in endpoints.items())
            await changes.wait()
            changes.take()


def _published(port: Port, address: str) -> PublishedPort:
    spread = port.host_port_end - port.host_port
    return PublishedPort(
        port.protocol,
        port.host_ip,
        port.host_port,
        port.host_port_end,
        address,
        port.container_port,
        port.container_port + spread,
    )
