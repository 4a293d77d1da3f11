# SPDX-License-Identifier: Apache-2.0
"""Workloads move to etcd's number of their labels once the other hosts have had time to hear of it.

An agent that had no etcd gives its workloads the numbers that it knows; etcd may have others afterwards, and
those count.  Other hosts may have had no etcd either, and a packet with a number that they do not know yet is
dropped.  So endpoints keep the old number for a while.  Nothing is lost by that: who knows it goes on to
allow it (`agent.derive`), for both numbers stand for the same labels.

Only where the old number has got another meaning in etcd do they move at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from loguru import logger

from core.table import Table
from identity.labels import Labels

# Seconds.  Every host tries etcd again after half a minute at most (kvstore.patience), and connects in a few.
MOVE_AFTER_S = 40.0
LOOK_S = 1.0


@dataclass(frozen=True)
class _Move:
    old: int
    new: int
    due: float  # monotonic


class Renumbering:
    """What waits to be moved.  Owner: the event loop; `pause` are seconds."""

    def __init__(self, identities: Table[int, Labels], *, pause: float = MOVE_AFTER_S) -> None:
        self._identities = identities
        self._pause = pause
        self._moves: dict[Labels, _Move] = {}
        self._wake = asyncio.Event()

    def heard(self, labels: Labels, old: int, new: int) -> None:
        """Take etcd's number of these labels, which are `old` here; of several the last one counts."""
        waiting = self._moves.get(labels)
        if waiting is not None:
            self._moves[labels] = replace(waiting, new=new)
            return
        self._moves[labels] = _Move(old, new, time.monotonic() + self._pause)
        logger.warning("endpoints of identity {} are {} in {:.0f} s, as in etcd", old, new, self._pause)
        self._wake.set()

    async def run(self, move: Callable[[Labels, int], None]) -> None:
        """Call `move` for labels and their number when it is time, until cancelled."""
        while True:
            await self._wake.wait()
            for labels, each in list(self._moves.items()):
                if time.monotonic() >= each.due or self._is_taken(each.old, labels):
                    del self._moves[labels]
                    move(labels, each.new)
            if self._moves:
                await asyncio.sleep(min(LOOK_S, self._pause))
            else:
                self._wake.clear()

    def _is_taken(self, number: int, labels: Labels) -> bool:
        """True when somebody else has a number by now: packets with it would be taken for theirs."""
        meaning = self._identities.get(number)
        return meaning is not None and meaning != labels
