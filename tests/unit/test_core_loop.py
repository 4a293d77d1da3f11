# SPDX-License-Identifier: Apache-2.0
"""The event loop's own look at its pauses."""

from __future__ import annotations

import asyncio
import time

import pytest

from core import metrics
from core.loop import NOTICED_S, PauseWatch, new_event_loop


class Clock:
    """Says one of these times after the other."""

    def __init__(self, *times: float) -> None:
        self._times = list(times)

    def __call__(self) -> float:
        return self._times.pop(0)


@pytest.mark.parametrize(
    ("story", "times", "timeout", "longest"),
    [
        ("a callback takes a second", (0.0, 1.0, 1.0, 1.0, 1.0), 0.0, 1.0),
        ("nothing to do for a millisecond", (0.0, 0.0, 0.001, 0.001, 0.001), 0.001, 0.0),
        ("woken half a second late", (0.0, 0.0, 0.501, 0.501, 0.501), 0.001, 0.5),
        ("late, and then a callback", (0.0, 0.0, 0.501, 0.801, 0.801), 0.001, 0.8),
        ("a short callback is not noticed", (0.0, NOTICED_S, NOTICED_S, NOTICED_S, NOTICED_S), 0.0, 0.0),
    ],
)
def test_what_counts_as_a_pause(story: str, times: tuple[float, ...], timeout: float, longest: float) -> None:
    """Two rounds: the clock is read when the watch is made, and before and after each look at the sockets."""
    with PauseWatch(Clock(*times)) as watch:
        watch.select(timeout)
        watch.select(0)
        assert watch.longest == pytest.approx(longest), story


def value(name: str) -> float:
    found = metrics.REGISTRY.get_sample_value(name)
    assert found is not None
    return found


def test_a_loop_that_is_held_up_says_so_in_the_metrics() -> None:
    before = value("holdfast_loop_pause_seconds_count")

    async def hold_up() -> None:
        for _ in range(3):
            time.sleep(2 * NOTICED_S)  # noqa: ASYNC251 - the very thing that is looked for
            await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(hold_up())
        assert value("holdfast_loop_longest_pause_seconds") >= 2 * NOTICED_S
    assert value("holdfast_loop_pause_seconds_count") >= before + 3
