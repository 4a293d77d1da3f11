# SPDX-License-Identifier: Apache-2.0
"""The event loop, with an eye on its pauses.

While a callback runs, nobody else does: no answer to the container engine, no keepalive, no event.  So each
round of the loop is timed, from its looking at the sockets to the next look; rounds that last are counted in
`holdfast_loop_pause_seconds`, and the longest one there has been is `holdfast_loop_longest_pause_seconds`.
A round costs two looks at the clock more; nothing wakes up for it.

Called by: agent.main.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections.abc import Callable

from core import metrics

# Shorter rounds are what a loop does all day; counting them would cost more than they take.
NOTICED_S = 0.01
# Objects made before a look at the new ones; such looks before one at what was left, and at everything.
GC_THRESHOLDS = (20_000, 20, 50)


class PauseWatch(selectors.DefaultSelector):
    """A selector that knows how long its loop was away.  Belongs to the loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.longest = 0.0
        self._clock = clock
        self._since = clock()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        asked = self._clock()
        if asked - self._since > NOTICED_S:
            self._noticed(asked - self._since)
        ready = super().select(timeout)
        now = self._clock()
        # What it overslept counts as well: another thread held the interpreter, or nobody had a CPU for us.
        late = 0.0 if timeout is None else now - asked - max(timeout, 0.0)
        self._since = now - max(late, 0.0)
        return ready

    def _noticed(self, seconds: float) -> None:
        metrics.LOOP_PAUSE_SECONDS.observe(seconds)
        self.longest = max(self.longest, seconds)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a loop whose pauses are measured."""
    watch = PauseWatch()
    metrics.LOOP_LONGEST_PAUSE_SECONDS.set_function(lambda: watch.longest)
    return asyncio.SelectorEventLoop(watch)


def spare_the_collector() -> None:
    """Have the garbage collector look less often, and never again at what the imports made.

    A fleet's state is hundreds of thousands of objects that are no garbage and refer to nothing in turn: by
    default a quarter of the time in which they come in goes into looking at them again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
