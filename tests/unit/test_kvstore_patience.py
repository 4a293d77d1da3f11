# SPDX-License-Identifier: Apache-2.0
"""Which attempts count as successes, so that the next trouble starts with short pauses again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kvstore import patience
from kvstore.patience import HEALTHY_AFTER_S, Patience

ATTEMPTS = 5


class Clock:
    """A time of its own, in which no pause takes any."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(patience, "asyncio", SimpleNamespace(sleep=clock.sleep))
    return clock


async def failures_counted(
    clock: Clock, before: float, happens: Callable[[Patience], None], after: float
) -> int:
    """Return how many failures count after some attempts in which something happens in the middle."""
    with Patience("a test") as waits:
        for _ in range(ATTEMPTS):
            waits.attempt()
            clock.now += before
            happens(waits)
            clock.now += after
            await waits.pause()
        return waits.backoff.attempts


@pytest.mark.parametrize("happens", [Patience.works, Patience.answered])
async def test_what_worked_for_long_was_a_success(clock: Clock, happens: Callable[[Patience], None]) -> None:
    assert await failures_counted(clock, 0.0, happens, HEALTHY_AFTER_S + 1) == 1


async def test_what_ended_because_its_time_was_up_was_none(clock: Clock) -> None:
    """Or nobody would ever back off from an etcd that hangs: each attempt lasts as long there."""
    hangs = lambda waits: waits.troubled("it hangs")  # noqa: E731
    assert await failures_counted(clock, 6 * HEALTHY_AFTER_S, hangs, 6 * HEALTHY_AFTER_S) == ATTEMPTS


@pytest.mark.parametrize("happens", [Patience.works, Patience.answered])
async def test_what_broke_off_soon_after_it_worked_was_none(
    clock: Clock, happens: Callable[[Patience], None]
) -> None:
    assert await failures_counted(clock, 6 * HEALTHY_AFTER_S, happens, 0.1) == ATTEMPTS


async def test_what_worked_in_an_attempt_before_counts_for_that_one_alone(clock: Clock) -> None:
    def once(waits: Patience) -> None:
        if not waits.backoff.attempts:
            waits.works()

    assert await failures_counted(clock, 0.0, once, HEALTHY_AFTER_S + 1) == ATTEMPTS
