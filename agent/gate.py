# SPDX-License-Identifier: Apache-2.0
"""The two gates before etcd: the first connection, and a full list (see `prestart`).

The start hook hands over two instants.  Until the first, this agent serves containers and enforces from
its checkpoint and does not talk to etcd at all; a full list waits for the second.  Later in its life a host
lists again only when etcd's history is not the one it knows (compacted, wiped, restored), and then all of
them do: each waits for its slot in the window, as at a start, while it follows what changes.

What is waited for stands in status, in the log and in the metric of waits.  An operator may open both gates,
for this start, and a later slot, for this list.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from loguru import logger

from core.waiting import waiting
from prestart.handover import Handover, boot_time

# Should the one that waits visibly go, another one takes its place within this time, seconds.
SILENT_LOOK_S = 5.0
# Views find out one after another that they have to be listed: a slot is theirs for so long after it, s.
SLOT_S = 60.0


class Gates:
    """Holds tasks back until their instant; `handover` is what the start hook said."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover
        self.cluster: Callable[[], tuple[str, Sequence[str]]] = lambda: ("", ())  # this host, and all of them
        self._opened = asyncio.Event()  # the gates of this start
        self._slot_boot = handover.relist_boot
        self._slot_opened = asyncio.Event()
        self._told: set[str] = set()  # purposes that somebody waits for visibly

    @property
    def closed_for(self) -> float:
        """Return the seconds in which etcd is not to be asked for anything."""
        return 0.0 if self._opened.is_set() else self.handover.connect_wait()

    def open(self, who: str) -> float:
        """Let everybody through, now, by order of `who`; return the seconds that were left of the waits."""
        at_start = max(self.handover.connect_wait(), self.handover.relist_wait())
        left = max(0.0 if self._opened.is_set() else at_start, self.relist_left)
        if left > 0:
            logger.warning("etcd is asked now, by order of {}: {:.0f} s before this host's slot", who, left)
            self._opened.set()
            self._slot_opened.set()
        return left

    async def connect(self) -> None:
        """Return when etcd may be asked."""
        purpose = "its start slot, before it talks to etcd"
        await self._hold(self.handover.connect_wait, purpose, self._opened, self.handover.reason)

    async def relist(self, has_view: bool) -> None:
        """Return when everything may be listed.

        A host that `has_view` can wait for its slot, in the start window or a later one.  Without a view, be
        it that the hook counted on a checkpoint that was damaged, this is a first start: there is nothing
        to enforce until it has listed.
        """
        if not has_view:
            return
        purpose = "its slot in the start window, before it lists etcd"
        await self._hold(self.handover.relist_wait, purpose, self._opened, self.handover.reason)
        if boot_time() > self._slot_boot + SLOT_S:
            self._slot_boot = self.handover.next_relist(*self.cluster())
            self._slot_opened.clear()
        await self._hold(self._slot_wait, "its slot, before it lists etcd again", self._slot_opened)

    @property
    def relist_left(self) -> float:
        """Return the seconds until this host's slot for a list, where one is waited for."""
        return 0.0 if self._slot_opened.is_set() else self._slot_wait()

    def _slot_wait(self) -> float:
        return max(0.0, self._slot_boot - boot_time())

    def behind_connect(self, main: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """Return `main` held back by the first gate."""

        async def held() -> None:
            await self.connect()
            await main()

        return held

    async def _hold(
        self, remaining: Callable[[], float], purpose: str, opened: asyncio.Event, reason: str = ""
    ) -> None:
        while (seconds := remaining()) > 0 and not opened.is_set():
            if purpose in self._told:  # everything that asks etcd waits here; one of them says so
                await _set_within(opened, min(seconds, SILENT_LOOK_S))
                continue
            self._told.add(purpose)
            try:
                with waiting("this host", purpose) as wait:
                    reasons = (
                        f"{seconds:.0f} s in all",
                        reason,
                        "`holdfast start-now` ends it",
                    )
                    wait.note = "; ".join(filter(None, reasons))
                    await _set_within(opened, seconds)
            finally:
                self._told.discard(purpose)


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    # Not wait_for: Python 3.11's forgets a cancellation that meets the result.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
