# SPDX-License-Identifier: Apache-2.0
"""The agent's process as its API sees it, before anything was built."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.api.monitor import MonitorHub
from agent.configuration import load_config
from agent.process import AgentProcess
from core import metrics
from core.supervisor import Supervisor


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
    process = AgentProcess(load_config([], {}), Supervisor(), MonitorHub(16))
    assert b"test_of_the_loop 42.0" in await process.metrics()
