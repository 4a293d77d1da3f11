# SPDX-License-Identifier: Apache-2.0
"""The agent's process as its API sees it, before anything was built."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.api.monitor import MonitorHub
from agent.configuration import load_config
from agent.gate import Gates
from agent.parts import Parts
from agent.process import AgentProcess
from agent.report import _incomplete
from core import metrics
from core.supervisor import Supervisor
from prestart.handover import Handover


class NeedsTheLoop(Collector):
    """Stands for a map that takes long to read: its value is what the loop does meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        async def answer() -> float:
            return 42.0

        value = asyncio.run_coroutine_threadsafe(answer(), self._loop).result(timeout=30)
        yield GaugeMetricFamily("test_of_the_loop", "Not of the project", value=value)


@pytest.fixture
async def collector() -> AsyncIterator[None]:
    made = NeedsTheLoop(asyncio.get_running_loop())
    metrics.REGISTRY.register(made)
    yield
    metrics.REGISTRY.unregister(made)


async def test_the_loop_goes_on_while_maps_are_read_for_a_scrape(collector: None) -> None:
    process = AgentProcess(load_config([], {}), Supervisor(), MonitorHub(16), Gates(Handover()))
    assert b"test_of_the_loop 42.0" in await process.metrics()


@pytest.mark.parametrize(("waited", "state"), [(10_000.0, "Warning"), (10_900.0, "Failure")])
def test_a_first_list_that_takes_too_long_is_called_a_failure_and_goes_on(waited: float, state: str) -> None:
    """allocator-list-timeout is 3 h; at its end nothing else changes."""
    maps = SimpleNamespace(waiting_since=time.monotonic() - waited)
    parts = cast("Parts", SimpleNamespace(config=load_config([], {}), policy_maps=maps))
    found = _incomplete(parts)
    assert found.state == state
    assert "are not listed after" in found.msg
    assert "the last known state is enforced" in found.msg
