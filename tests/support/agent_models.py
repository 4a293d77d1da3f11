# SPDX-License-Identifier: Apache-2.0
"""Executable models of what the agent stands between: allocator, kernel, container engine.

They are handed in where the agent takes the real ones.  A test steers them (etcd is away, the kernel
refuses) and asks them what is true now, never which function was called.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from agent.endpoint import Endpoint, Port
from core.reconciler import Kind, Status
from identity.errors import AllocationFailed
from identity.labels import Labels


class ModelAllocator:
    """Numbers from 256 on; `available` cleared means that etcd does not answer."""

    def __init__(self) -> None:
        self.numbers: dict[Labels, int] = {}
        self.uses: Counter[Labels] = Counter()
        self.available = asyncio.Event()
        self.available.set()
        self.failures = 0  # so many calls fail before the next one answers
        self.handed_out = range(256, 65536)

    async def allocate(self, labels: Labels) -> int:
        self.uses[labels] += 1
        try:
            await self.available.wait()
            if self.failures:
                self.failures -= 1
                raise AllocationFailed("the model was told to fail")
        except BaseException:
            self.uses[labels] -= 1
            raise
        return self.numbers.setdefault(labels, 256 + len(self.numbers))

    def restore(self, labels: Labels, number: int) -> bool:
        if number not in self.handed_out or self.numbers.get(labels, number) != number:
            return False
        self.numbers[labels] = number
        self.uses[labels] += 1
        return True

    async def release(self, labels: Labels) -> None:
        assert self.uses[labels] > 0, f"{labels.serialized} is released but not in use"
        self.uses[labels] -= 1

    def in_use(self) -> dict[Labels, int]:
        """Return the labels in use with their counts."""
        return {labels: count for labels, count in self.uses.items() if count}


class ModelKernel:
    """Interfaces, addresses, policies and connections as the kernel would have them.

    `wire` is called with each endpoint that is wanted; `trouble` maps endpoint id → the error that every
    write to it gives.  `settling` cleared means that writes take their time.
    """

    def __init__(self) -> None:
        self.interfaces: dict[int, str] = {}  # endpoint → address
        self.identities: dict[str, int] = {}  # address → identity
        self.policies: dict[int, Labels] = {}
        self.connections: set[str] = set()
        self.ports: dict[int, tuple[Port, ...]] = {}
        self.trouble: dict[int, str] = {}
        self.port_trouble = ""
        self.settling = asyncio.Event()
        self.settling.set()
        self.wanted: dict[int, Endpoint] = {}

    # --- agent.kernel.Kernel

    def endpoint_identified(self, endpoint: Endpoint, labels: Labels) -> None:
        self.policies[endpoint.id] = labels
        self.identities[endpoint.ipv4] = endpoint.identity

    def endpoint_removed(self, endpoint: Endpoint) -> None:
        assert endpoint.id not in self.interfaces, "packets still flow from an address that is nobody's"
        self.policies.pop(endpoint.id, None)
        self.identities.pop(endpoint.ipv4, None)

    async def address_freed(self, address: str) -> None:
        assert address not in self.interfaces.values(), "connections are forgotten while packets flow"
        self.connections.discard(address)

    async def published(self, endpoints: Iterable[Endpoint]) -> Status:
        ports = {each.id: each.ports for each in endpoints if each.ports}
        await self.settling.wait()
        if self.port_trouble:
            return Status(Kind.ERROR, self.port_trouble)
        self.ports = ports
        return Status(Kind.DONE)

    async def interface_settled(self, endpoint_id: int) -> Status:
        await self.settling.wait()
        return self._write(endpoint_id)

    async def settled(self, endpoint: Endpoint) -> Status:
        return await self.interface_settled(endpoint.id)

    # --- what a reconciler does

    def catch_up(self) -> None:
        """Write what is wanted and nobody has waited for yet."""
        for endpoint_id in list(self.wanted):
            self._write(endpoint_id)

    def _write(self, endpoint_id: int) -> Status:
        if endpoint_id in self.trouble:
            return Status(Kind.ERROR, self.trouble[endpoint_id])
        endpoint = self.wanted.get(endpoint_id)
        if endpoint is None or not endpoint.connected:
            self.interfaces.pop(endpoint_id, None)
            return Status(Kind.DONE)
        taken = [number for number, address in self.interfaces.items() if address == endpoint.ipv4]
        assert taken in ([], [endpoint_id]), f"{endpoint.ipv4} is endpoint {taken}'s already"
        if endpoint_id not in self.interfaces:
            assert endpoint.ipv4 not in self.connections, "a new endpoint inherits connections"
        self.interfaces[endpoint_id] = endpoint.ipv4
        self.connections.add(endpoint.ipv4)
        return Status(Kind.DONE)
