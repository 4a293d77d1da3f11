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

# Should the one that waits visibly go, another one takes its place within this time, seconds.
SILENT_LOOK_S = 5.0


class Gates:
    """Holds tasks back until their instant; `handover` is what the start hook said."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover
        self._opened = asyncio.Event()
        self._told: set[str] = set()  # purposes that somebody waits for visibly

    @property
    def closed_for(self) -> float:
        """Return the seconds in which etcd is not to be asked for anything."""
        return 0.0 if self._opened.is_set() else self.handover.connect_wait()

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
        while (seconds := remaining()) > 0 and not self._opened.is_set():
            if purpose in self._told:  # everything that asks etcd waits here; one of them says so
                await self._opened_within(min(seconds, SILENT_LOOK_S))
                continue
            self._told.add(purpose)
            try:
                with waiting("this host", purpose) as wait:
                    reasons = (
                        f"{seconds:.0f} s in all",
                        self.handover.reason,
                        "`holdfast start-now` ends it",
                    )
                    wait.note = "; ".join(filter(None, reasons))
                    await self._opened_within(seconds)
            finally:
                self._told.discard(purpose)

    async def _opened_within(self, seconds: float) -> None:
        # Not wait_for: Python 3.11's forgets a cancellation that meets the result.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._opened.wait()
