# SPDX-License-Identifier: Apache-2.0
"""The two gates before etcd: the first connection, and a full list (see `prestart`).

The start hook hands over two instants.  Until the first, this agent serves containers and enforces from
its checkpoint and does not talk to etcd at all; a full list waits for the second.  What is waited for
stands in status, in the log and in the metric of waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from core.waiting import waiting
from prestart.handover import Handover


class Gates:
    """Holds tasks back until their instant; `handover` is what the start hook said."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover

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
        if seconds <= 0:
            return
        with waiting("this host", purpose) as wait:
            wait.note = f"{seconds:.0f} s in all; {self.handover.reason}"
            await asyncio.sleep(seconds)
