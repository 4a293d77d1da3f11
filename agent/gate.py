# SPDX-License-Identifier: Apache-2.0
"""The two gates before etcd: the first connection, and a full list (see `prestart`).

The start hook hands over two instants.  Until the first, this agent serves containers and enforces from
its checkpoint and does not talk to etcd at all; a full list waits for the second.  What is waited for
stands in status, in the log and in the metric of waits.  An operator may open both, for this start.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from loguru import logger

from core.waiting import waiting
from prestart.handover import Handover


class Gates:
    """Holds tasks back until their instant; `handover` is what the start hook said."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover
        self._opened = asyncio.Event()

    def open(self, who: str) -> float:
        """Let everybody through, now, by order of `who`; return the seconds that were left of the waits."""
        left = max(self.handover.connect_wait(), self.handover.relist_wait())
        if left > 0 and not self._opened.is_set():
            logger.warning("etcd is asked now, by order of {}: {:.0f} s before this host's slot", who, left)
            self._opened.set()
            return left
        return 0.0

    async def connect(self) -> None:
        """Return when etcd may be asked."""
        await self._hold(self.handover.connect_wait, "its start slot, before it talks to etcd")

    async def relist(self) -> None:
        """Return when everything may be listed."""
        await self._hold(self.handover.relist_wait, "its slot in the start window, before it lists etcd")

    def behind_connect(self, main: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """Return `main` held back by the first gate."""

        async def held() -> None:
            await self.connect()
            await main()

        return held

    async def _hold(self, remaining: Callable[[], float], purpose: str) -> None:
        seconds = remaining()
        if seconds <= 0 or self._opened.is_set():
            return
        with waiting("this host", purpose) as wait:
            wait.note = f"{seconds:.0f} s in all; {self.handover.reason}; `holdfast start-now` ends it"
            # Not wait_for: Python 3.11's forgets a cancellation that meets the result.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._opened.wait()
