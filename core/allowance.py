# SPDX-License-Identifier: Apache-2.0
"""How much of something may happen: so many at once, and so many a second in the long run.

    Allowance   the count.  Pure: times are handed in
    Throttle    has tasks wait for their turn by such a count, in the order in which they came

Called by: kvstore.pace, agent.listener and the servers on it, agent.api.limits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

# Rounding may leave a hair of a turn missing: it is slept for at least this long, seconds, not looped for.
SHORTEST_S = 0.001


class Allowance:
    """`rate` things a second in the long run, up to `burst` of them at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._left = burst
        self._at = 0.0

    def spend(self, now: float, things: int = 1) -> float:
        """Take some; return the seconds to pause before the next."""
        self._left = self._refilled(now) - things
        return max(0.0, -self._left / self.rate)

    def grants(self, now: float) -> bool:
        """Take one if there is one left; what is not granted costs nothing."""
        self._left = self._refilled(now)
        granted = self._left >= 1.0
        self._left -= granted
        return granted

    def missing(self, now: float) -> float:
        """Return the seconds until one is left; takes nothing."""
        return max(0.0, (1.0 - self._refilled(now)) / self.rate)

    def _refilled(self, now: float) -> float:
        self._left = min(self.burst, self._left + (now - self._at) * self.rate)
        self._at = now
        return self._left


class Throttle:
    """Has tasks wait for an allowance.  One that is cancelled while it waits has taken nothing.

    `waiting` is how many wait.  Owner: the loop's thread.
    """

    def __init__(
        self,
        allowance: Allowance,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.waiting = 0
        self._allowance = allowance
        self._clock = clock
        self._sleep = sleep
        self._first = asyncio.Lock()  # held by who is next; the others stand behind it

    def at_once(self) -> bool:
        """Take a turn if there is one left and nobody waits for it."""
        return not self.waiting and self._allowance.grants(self._clock())

    async def turn(self) -> None:
        """Return when it is the caller's turn."""
        if self.at_once():
            return
        self.waiting += 1
        try:
            async with self._first:
                while not self._allowance.grants(now := self._clock()):
                    await self._sleep(max(self._allowance.missing(now), SHORTEST_S))
        finally:
            self.waiting -= 1
