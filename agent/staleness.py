# SPDX-License-Identifier: Apache-2.0
"""Says once that this host's view of etcd has become too old, and once that it is current again.

How old it is (kvstore.watcher) stands in status and in a metric all the time; past the option
`kvstore-staleness-threshold` the line of status is a warning, and the gauge `holdfast_kvstore_stale` is 1.
Nothing else follows from it: the last known state stays in force.  Run as a supervised task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from loguru import logger

from core import metrics
from kvstore.watcher import staleness

# Whether an old view is current again is looked at this often, seconds; a young one is when it could be old.
LOOK_S = 5.0


class StalenessAlarm:
    """`threshold` is seconds; `age` returns how old the view is."""

    def __init__(self, threshold: float, age: Callable[[], float] = staleness) -> None:
        self.threshold = threshold
        self._age = age
        self._said = False
        metrics.KVSTORE_STALE.set_function(lambda: float(self.stale))

    @property
    def stale(self) -> bool:
        return self._age() > self.threshold

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(max(self.look(), LOOK_S))

    def look(self) -> float:
        """Say what has changed; return the seconds for which the view can not become too old."""
        age = self._age()
        if self.stale and not self._said:
            logger.warning(
                "etcd has confirmed nothing for {:.0f} s, longer than kvstore-staleness-threshold={:g}s; "
                "the last known state is enforced",
                age,
                self.threshold,
            )
        elif self._said and not self.stale:
            logger.info("etcd confirmed this host's view {:.0f} s ago: it is current again", age)
        self._said = self.stale
        return self.threshold - age
