# SPDX-License-Identifier: Apache-2.0
"""The gates before etcd: they hold until their instant, or until an operator opens them."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from agent.gate import Gates
from core.waiting import current
from prestart.decision import Kind
from prestart.handover import Handover, boot_time
from prestart.window import window_length

HOUR_S = 3600.0


async def test_an_order_opens_both_gates_for_this_life() -> None:
    now = boot_time()
    gates = Gates(Handover(now + HOUR_S, now + 2 * HOUR_S, reason="full list"))
    waits = [asyncio.create_task(gates.connect()), asyncio.create_task(gates.relist(True))]
    await asyncio.sleep(0.01)
    assert sorted(wait.purpose for wait in current()) == [
        "its slot in the start window, before it lists etcd",
        "its start slot, before it talks to etcd",
    ]
    assert HOUR_S < gates.open("alice") <= 2 * HOUR_S
    await asyncio.wait_for(asyncio.gather(*waits), 5)
    await asyncio.wait_for(gates.relist(True), 5)  # whoever comes later does not wait
    assert current() == []
    assert gates.open("bob") == 0.0


async def test_of_many_that_wait_one_says_so() -> None:
    gates = Gates(Handover(boot_time() + HOUR_S, reason="full list"))
    waits = [asyncio.create_task(gates.connect()) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert len(current()) == 1
    assert HOUR_S - 5 < gates.closed_for <= HOUR_S
    gates.open("alice")
    await asyncio.wait_for(asyncio.gather(*waits), 5)
    assert gates.closed_for == 0.0


async def test_another_one_says_so_when_the_first_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.gate.SILENT_LOOK_S", 0.01)
    gates = Gates(Handover(boot_time() + HOUR_S))
    first, second = (asyncio.create_task(gates.connect()) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.1)
    assert len(current()) == 1
    second.cancel()
    await asyncio.wait([first, second])


async def test_without_an_order_the_instant_opens_them() -> None:
    began = time.monotonic()
    gates = Gates(Handover(boot_time() + 0.2, boot_time() + 0.2))
    await gates.connect()
    assert time.monotonic() - began >= 0.19


async def test_nothing_to_wait_for() -> None:
    gates = Gates(Handover())
    await gates.connect()
    assert gates.open("alice") == 0.0


def late(name: str = "b", names: tuple[str, ...] = ("a", "b", "c"), window: float = HOUR_S) -> Gates:
    """Gates of a host long after its start."""
    gates = Gates(Handover(boot_time() - HOUR_S, boot_time() - HOUR_S, Kind.RESUME, window=window))
    gates.cluster = lambda: (name, names)
    return gates


async def test_a_view_lost_later_waits_for_its_slot_and_one_slot_serves_all_views() -> None:
    gates = late(window=0.9)
    offset = (time.time() - 0.45) % 0.9  # b is in the middle of each window
    waits = [asyncio.create_task(gates.relist(True)) for _ in range(3)]
    began = time.monotonic()
    await asyncio.gather(*waits)
    assert (offset + time.monotonic() - began) % 0.9 < 0.3
    began = time.monotonic()
    await gates.relist(True)  # a moment later than the others
    assert time.monotonic() - began < 0.3


async def test_an_order_opens_one_later_slot() -> None:
    gates = late()
    gates.handover = gates.handover._replace(window=24 * HOUR_S)
    if gates.handover.next_relist(*gates.cluster()) - boot_time() < 60:
        gates.cluster = lambda: ("c", ("a", "b", "c"))  # this is the very minute of b
    wait = asyncio.create_task(gates.relist(True))
    await asyncio.sleep(0.01)
    assert [each.purpose for each in current()] == ["its slot, before it lists etcd again"]
    assert gates.open("alice") == pytest.approx(
        gates.handover.next_relist(*gates.cluster()) - boot_time(), abs=1
    )
    await asyncio.wait_for(wait, 5)
    await asyncio.wait_for(gates.relist(True), 5)  # the other views of this host
    assert (gates.relist_left, current()) == (0, [])
    gates._slot_boot -= 48 * HOUR_S  # days later
    wait = asyncio.create_task(gates.relist(True))
    await asyncio.sleep(0.01)
    assert not wait.done()
    assert gates.relist_left > 0
    wait.cancel()
    await asyncio.wait([wait])


async def test_who_has_no_view_or_no_hook_lists_at_once() -> None:
    """Without a view nothing can be enforced, though the hook, which counted on one, says an hour."""
    now = boot_time()
    for gates in (late(), Gates(Handover(now, now + HOUR_S, Kind.RESUME))):
        await asyncio.wait_for(gates.relist(False), 5)
    gates = Gates(Handover())
    gates.cluster = lambda: ("b", ("a", "b", "c"))
    await asyncio.wait_for(gates.relist(True), 5)


def test_the_lists_of_a_fleet_are_spread_over_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them find out at one moment that etcd was restored."""
    moment = 1_800_000_000.0
    monkeypatch.setattr("prestart.handover.time.time", lambda: moment)
    monkeypatch.setattr("prestart.handover.boot_time", lambda: 0.0)
    names = [f"host-{number:04}" for number in range(1000)]
    handover = Handover(0.0, 0.0, Kind.FRESH)
    at = sorted(handover.next_relist(name, names) for name in names)
    window = window_length(len(names))
    assert window == pytest.approx(20 * 60)
    assert 0 <= at[0] <= at[-1] <= window
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert max(gaps) < 1.1 * window / len(names)
    assert min(gaps) > 0.9 * window / len(names)
