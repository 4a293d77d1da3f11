# SPDX-License-Identifier: Apache-2.0
"""One counted use of an identity for each endpoint that has labels.

The allocator counts how many on this host use a number.  Whatever becomes of an endpoint (its labels
change, it goes while etcd has not answered, it was restored), exactly one use is counted for it while it
has an identity, and none afterwards.  A number that can not be had at once is asked for in the background
for as long as it takes.

Owner: the endpoint manager.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from loguru import logger

from core.backoff import Backoff
from core.errors import HoldfastError
from identity.labels import Labels

RETRY_BASE_S = 0.5
RETRY_CAP_S = 30.0


class Allocator(Protocol):
    """Gives numbers to label sets (identity.allocator)."""

    async def allocate(self, labels: Labels) -> int: ...

    def restore(self, labels: Labels, number: int) -> bool: ...

    async def release(self, labels: Labels) -> None: ...


class Told(Protocol):
    """Who hears what became of a request."""

    def identity_known(self, endpoint_id: int, labels: Labels, number: int) -> None: ...

    def identity_waits(self, endpoint_id: int, error: HoldfastError) -> None: ...


@dataclass(frozen=True)
class _Request:
    labels: Labels
    task: asyncio.Task[None]


class IdentityUses:
    """Which endpoint uses which labels' identity, and the requests under way."""

    def __init__(self, allocator: Allocator, told: Told) -> None:
        self._allocator = allocator
        self._told = told
        self._held: dict[int, Labels] = {}
        self._requests: dict[int, _Request] = {}

    def restore(self, endpoint_id: int, labels: Labels, number: int) -> None:
        """Go on with the number of a checkpoint; one that this cluster does not hand out is replaced."""
        if self._allocator.restore(labels, number):
            self._held[endpoint_id] = labels
        else:
            self.request(endpoint_id, labels)

    def request(self, endpoint_id: int, labels: Labels) -> asyncio.Task[None]:
        """Ask for the number of `labels`; the endpoint keeps what it had until the answer is there."""
        known = self._requests.get(endpoint_id)
        if known is not None and known.labels == labels:
            return known.task
        self.cancel(endpoint_id)
        task = asyncio.create_task(self._ask(endpoint_id, labels), name=f"identity:{endpoint_id}")
        self._requests[endpoint_id] = _Request(labels, task)
        task.add_done_callback(lambda done: self._ended(endpoint_id, done))
        return task

    def cancel(self, endpoint_id: int) -> None:
        """Ask no longer; a use that was counted stays counted."""
        request = self._requests.pop(endpoint_id, None)
        if request is not None:
            request.task.cancel()

    async def release(self, endpoint_id: int) -> None:
        """End the request and the use of an endpoint that has no identity any more."""
        self.cancel(endpoint_id)
        labels = self._held.pop(endpoint_id, None)
        if labels is not None:
            await self._allocator.release(labels)

    def stop(self) -> None:
        """End every request; what is in use stays in use."""
        for endpoint_id in list(self._requests):
            self.cancel(endpoint_id)

    async def _ask(self, endpoint_id: int, labels: Labels) -> None:
        number = await self._patiently(endpoint_id, labels)
        former = self._held.get(endpoint_id)
        self._held[endpoint_id] = labels
        self._told.identity_known(endpoint_id, labels, number)
        if former is not None:
            await self._allocator.release(former)

    async def _patiently(self, endpoint_id: int, labels: Labels) -> int:
        backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
        while True:
            try:
                return await self._allocator.allocate(labels)
            except HoldfastError as error:
                self._told.identity_waits(endpoint_id, error)
                await asyncio.sleep(backoff.next())

    def _ended(self, endpoint_id: int, task: asyncio.Task[None]) -> None:
        request = self._requests.get(endpoint_id)
        if request is not None and request.task is task:
            del self._requests[endpoint_id]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.opt(exception=error).error("identity of endpoint {} can not be had", endpoint_id)
