# SPDX-License-Identifier: Apache-2.0
"""So many at once and so many a second: the count itself, and tasks that wait for it, on a clock by hand."""

from __future__ import annotations

import asyncio

import pytest

from core.allowance import Allowance, Throttle


def test_a_flood_is_held_to_its_rate_and_a_burst_is_not_held() -> None:
    allowance = Allowance(rate=10.0, burst=5.0)
    assert [allowance.spend(100.0) for _ in range(5)] == [0.0] * 5
    now, began = 100.0, 100.0
    for _ in range(100):
        now += allowance.spend(now)
    assert now - began == pytest.approx(10.0)
    assert [allowance.spend(now + 60.0) for _ in range(5)] == [0.0] * 5


def test_what_is_missing_is_said_and_not_taken() -> None:
    allowance = Allowance(rate=10.0, burst=2.0)
    assert [allowance.grants(100.0) for _ in range(3)] == [True, True, False]
    assert allowance.missing(100.0) == pytest.approx(0.1)
    assert allowance.missing(100.05) == pytest.approx(0.05)
    assert not allowance.grants(100.05)
    assert allowance.missing(100.2) == 0.0
    assert allowance.grants(100.2)


class Clock:
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now += seconds


def throttle(clock: Clock, rate: float, burst: float) -> Throttle:
    return Throttle(Allowance(rate, burst), clock=clock, sleep=clock.sleep)


async def test_tasks_pass_in_their_order_a_burst_at_once_and_the_rest_at_the_rate() -> None:
    clock = Clock()
    turns = throttle(clock, rate=10.0, burst=5.0)
    passed: list[tuple[int, float]] = []

    async def task(number: int) -> None:
        await turns.turn()
        passed.append((number, clock.now - 100.0))

    await asyncio.gather(*map(task, range(25)))
    assert [number for number, _ in passed] == list(range(25))
    expected = [0.0] * 5 + [0.1 * (number + 1) for number in range(20)]
    # A hair of rounding costs a sleep of a millisecond.
    assert [at for _, at in passed] == pytest.approx(expected, abs=0.03)
    assert turns.waiting == 0


async def test_who_gives_up_has_taken_nothing_and_keeps_nobody_out() -> None:
    clock = Clock()
    turns = throttle(clock, rate=1.0, burst=1.0)
    await turns.turn()
    waiters = [asyncio.create_task(turns.turn()) for _ in range(3)]
    await asyncio.sleep(0)  # now the first of them is about to sleep
    assert turns.waiting == 3
    for each in waiters:
        each.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert turns.waiting == 0
    assert not turns.at_once()
    clock.now += 1.0
    assert turns.at_once()
    assert not turns.at_once()
