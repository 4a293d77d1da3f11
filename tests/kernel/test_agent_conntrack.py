# SPDX-License-Identifier: Apache-2.0
"""Expired connections leave the kernel's maps, the sooner the fuller they are; live ones stay."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from agent.configuration import load_config
from agent.conntrack import Conntrack
from agent.options import OPTIONS
from agent.programs import options_of
from core import metrics
from datapath.ctgc import FIRST_INTERVAL_S
from datapath.events import TraceEvent
from datapath.maps import CtMap
from datapath.mapspec import create
from datapath.records import CtEntry, CtKey
from datapath.testrun import ACT_OK
from tests.support import frames
from tests.support.bpflab import CATALOGUE, EGRESS, lab
from tests.support.eventually import eventually
from tests.support.families import NETS, Net
from tests.support.require import require_root

SMALL = 1024


@pytest.fixture(params=NETS, ids=[str(net.family) for net in NETS])
def net(request: pytest.FixtureRequest) -> Net:
    found: Net = request.param
    return found


@pytest.fixture
def connections(net: Net) -> Iterator[CtMap]:
    """A small map for everything but TCP."""
    require_root()
    handle = create(replace(CATALOGUE, ct_any_max=SMALL).ct(tcp=False, family=net.family))
    with contextlib.closing(handle):
        yield CtMap(handle)


def fill(connections: CtMap, net: Net, expired: int, alive: int = 0) -> None:
    """Add entries of UDP flows; the time of the first `expired` is over."""
    now = int(time.monotonic())
    connections.upsert(
        (
            CtKey(net.endpoint(1), net.endpoint(2), 1024 + port, 53, 17, 0),
            CtEntry(1, 60, 0, 0, now - 5 if port < expired else now + 600, 0, 0, 0, 2, 0, 301, 0, 0),
        )
        for port in range(expired + alive)
    )


def left(connections: CtMap) -> int:
    return sum(1 for _ in connections.items())


def test_the_longest_times_that_may_be_configured_work(net: Net) -> None:
    """Answers pass, and a flow is told of once: no time turns over in the programs."""
    names = ("bpf-ct-timeout", "monitor-aggregation-interval")
    durations = [each for each in OPTIONS if each.name.startswith(names)]
    longest = [word for each in durations for word in (f"--{each.name}", str(each.high))]
    assert len(durations) == 5
    with lab(1, options=options_of(load_config(longest, {}))) as host:
        host.allow(1, EGRESS)
        host.monitor.set(1)
        host.send(1, frames.udp(net.a, net.outside, 40_000, 53))
        host.send(1, frames.tcp(net.a, net.outside, 40_000, 80))
        answers = (
            frames.udp(net.outside, net.a, 53, 40_000),
            frames.tcp(net.outside, net.a, 80, 40_000, frames.SYN | frames.ACK),
        )
        assert [host.deliver(1, each).verdict for each in answers] == [ACT_OK, ACT_OK]
        host.events()
        host.send(1, frames.udp(net.a, net.outside, 40_000, 53))
        assert [each for each in host.events() if isinstance(each, TraceEvent)] == []


async def test_a_map_that_is_nearly_full_is_emptied_and_looked_at_again_soon(
    connections: CtMap, net: Net
) -> None:
    # An LRU map of this size may give away some room before it is full.
    fill(connections, net, expired=SMALL, alive=50)
    conntrack = Conntrack((connections,))
    again = await conntrack.collect(connections, FIRST_INTERVAL_S)
    alive = left(connections)
    assert 0 < alive <= 50
    assert again < FIRST_INTERVAL_S
    labels = (f"ipv{net.family}", "non-TCP")
    assert metrics.CONNTRACK_GC_ENTRIES.labels(*labels, "alive")._value.get() == alive
    assert metrics.CONNTRACK_GC_ENTRIES.labels(*labels, "deleted")._value.get() > SMALL / 2
    assert await conntrack.collect(connections, FIRST_INTERVAL_S) > FIRST_INTERVAL_S
    assert left(connections) == alive


async def test_what_expires_goes_again_and_again(connections: CtMap, net: Net) -> None:
    runs = metrics.CONNTRACK_GC_RUNS.labels(f"ipv{net.family}", "non-TCP", "completed")
    before = runs._value.get()
    fill(connections, net, expired=0, alive=10)
    task = asyncio.create_task(Conntrack((connections,), interval=0.02).run())
    try:
        for _ in range(3):
            fill(connections, net, expired=300, alive=10)
            await eventually(lambda: left(connections) == 10, "expired connections gone, live ones there")
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert runs._value.get() > before
