# SPDX-License-Identifier: Apache-2.0
"""The gates before etcd: they hold until their instant, or until an operator opens them."""

from __future__ import annotations

import asyncio
import time

import pytest

from agent.gate import Gates
from core.waiting import current
from prestart.handover import Handover, boot_time

HOUR_S = 3600.0


async def test_an_order_opens_both_gates_for_this_life() -> None:
    now = boot_time()
    gates = Gates(Handover(now + HOUR_S, now + 2 * HOUR_S, reason="full list"))
    waits = [asyncio.create_task(gates.connect()), asyncio.create_task(gates.relist())]
    await asyncio.sleep(0.01)
    assert sorted(wait.purpose for wait in current()) == [
        "its slot in the start window, before it lists etcd",
        "its start slot, before it talks to etcd",
    ]
    assert HOUR_S < gates.open("alice") <= 2 * HOUR_S
    await asyncio.wait_for(asyncio.gather(*waits), 5)
    await asyncio.wait_for(gates.relist(), 5)  # whoever comes later does not wait
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
