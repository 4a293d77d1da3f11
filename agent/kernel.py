# SPDX-License-Identifier: Apache-2.0
"""What the endpoint manager needs of the reconcilers: desired state in, the outcome out.

`agent.derive` implements it; tests hand in a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from agent.endpoint import Endpoint
from core.reconciler import Status
from identity.labels import Labels


class Kernel(Protocol):
    """Desired state of endpoints, and waiting for it."""

    def endpoint_identified(self, endpoint: Endpoint, labels: Labels) -> None:
        """Identity and policy of an endpoint are to be enforced."""
        ...

    def endpoint_removed(self, endpoint: Endpoint) -> None:
        """Nobody has the endpoint's address any more: forget its identity and its policy."""
        ...

    async def address_freed(self, address: str) -> None:
        """Forget the connections of an address that nobody has any more."""
        ...

    async def published(self, endpoints: Iterable[Endpoint]) -> Status:
        """Wait until the ports of these endpoints, and no others, are published; what became of it."""
        ...

    async def interface_settled(self, endpoint_id: int) -> Status:
        """Wait until the interface was made, or taken away, as wanted; what became of it."""
        ...

    async def settled(self, endpoint: Endpoint) -> Status:
        """Wait until everything wanted of an endpoint was tried in the kernel; the worst status of it."""
        ...
