# SPDX-License-Identifier: Apache-2.0
"""Calls to the agent wait for their turn, and are refused when that takes too long.

    async with limits.turn("endpoint-create"):
        ...

A call first waits until its rate allows it, then for a place among those under way.  The limits are those of
the option `api-rate-limit` (agent.limit_settings); metrics have Cilium's names.

Called by: agent.api.handlers and agent.driver; one object for both, so that they share.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping

from loguru import logger

from agent.errors import TooManyCalls
from agent.limit_settings import BUILT_IN, Limit
from core import metrics
from core.allowance import Allowance, Throttle

SUCCESS, FAIL, REFUSED = "success", "fail", "refused"


class Limits:
    """The limits of every call.  Owner: the loop's thread."""

    def __init__(self, limits: Mapping[str, Limit] = BUILT_IN) -> None:
        self._limiters = {call: Limiter(call, limit) for call, limit in limits.items()}

    def turn(self, call: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Hold a turn of `call` in the block; TooManyCalls when there is none in time."""
        return self._limiters[call].turn()


class Limiter:
    """The limit of one call."""

    def __init__(self, call: str, limit: Limit) -> None:
        self.call = call
        self.limit = limit
        self._skipped = 0
        self._throttle = Throttle(Allowance(limit.rate, limit.burst)) if limit.rate else None
        self._places = asyncio.Semaphore(limit.parallel) if limit.parallel else None
        self._under_way = metrics.API_LIMITER_IN_FLIGHT.labels(call, "in-flight")
        metrics.API_LIMITER_IN_FLIGHT.labels(call, "limit").set(limit.parallel)
        metrics.API_LIMITER_RATE.labels(call, "limit").set(limit.rate)
        metrics.API_LIMITER_RATE.labels(call, "burst").set(limit.burst)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """See `Limits.turn`."""
        await self._wait()
        outcome = FAIL
        self._under_way.inc()
        try:
            yield
            outcome = SUCCESS
        finally:
            self._under_way.dec()
            if self._places is not None:
                self._places.release()
            self._done(outcome)

    async def _wait(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.limit.max_wait or None):
                await self._admitted()
        except TimeoutError as error:
            self._done(REFUSED)
            raise TooManyCalls(
                f"{self.call} was refused after {self.limit.max_wait:g} s: {self._stated()}",
                hint=f"call less often, or raise it: api-rate-limit {self.call}=rate-limit:…",
            ) from error
        seconds = time.monotonic() - began
        metrics.API_LIMITER_WAIT_SECONDS.labels(self.call).observe(seconds)
        if self.limit.log:
            logger.info("{} waited {:.3f} s for its turn", self.call, seconds)

    async def _admitted(self) -> None:
        if self._skipped < self.limit.skip_initial:
            self._skipped += 1
        elif self._throttle is not None:
            await self._throttle.turn()
        if self._places is not None:
            await self._places.acquire()

    def _stated(self) -> str:
        """Return the limit as a sentence."""
        rate = f"{self.limit.rate:g} a second in the long run, {self.limit.burst} at once"
        parallel = f"{self.limit.parallel} under way"
        parts = [rate] if self._throttle is not None else []
        return "more than " + ", ".join(parts + [parallel] * bool(self.limit.parallel))

    def _done(self, outcome: str) -> None:
        metrics.API_LIMITER_PROCESSED.labels(self.call, outcome).inc()
