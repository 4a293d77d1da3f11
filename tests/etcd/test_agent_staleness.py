# SPDX-License-Identifier: Apache-2.0
"""How old a host's view of a real etcd may be: said once, shown while it lasts, and taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from loguru import logger

from agent.staleness import StalenessAlarm
from core import metrics
from identity.cache import IdentityCache
from kvstore import schema
from kvstore.client import Client
from kvstore.watcher import Follower, State
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

THRESHOLD_S = 2.0


@pytest.fixture
def said() -> Iterator[list[tuple[str, str]]]:
    """What the log says of the view's age: (level, text)."""
    lines: list[tuple[str, str]] = []
    sink = logger.add(
        lambda message: lines.append((message.record["level"].name, message.record["message"])),
        filter="agent.staleness",
    )
    yield lines
    logger.remove(sink)


def gauge() -> float | None:
    return metrics.REGISTRY.get_sample_value("holdfast_kvstore_stale")


async def test_a_hanging_etcd_is_told_once_and_so_is_its_return(
    etcd: EtcdServer, said: list[tuple[str, str]]
) -> None:
    client = Client(etcd.config, idle=0.3, hang=0.3, timeout=1)
    cache = IdentityCache()
    follower = Follower(client, schema.IDENTITY_IDS, cache)
    following = asyncio.create_task(follower.run())
    alarm = StalenessAlarm(THRESHOLD_S, follower.age)
    try:
        await eventually(lambda: follower.state is State.WATCHING, "in sync")
        await client.put(schema.identity_id_key(300), "container:app=web;")
        await eventually(lambda: 300 in cache.table, "the event")
        assert 0 < alarm.look() <= THRESHOLD_S
        assert (gauge(), said) == (0.0, [])
        etcd.pause()
        await eventually(lambda: alarm.look() < 0, "the view is too old")
        for _ in range(5):
            alarm.look()
        assert gauge() == 1.0
        assert [level for level, _ in said] == ["WARNING"]
        assert "kvstore-staleness-threshold=2s" in said[0][1]
        assert 300 in cache.table
        etcd.resume()
        await eventually(lambda: alarm.look() > 0, "etcd confirms the view again")
        assert gauge() == 0.0
        assert [level for level, _ in said] == ["WARNING", "INFO"]
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await client.close()


async def test_it_looks_by_itself_and_never_ends(said: list[tuple[str, str]]) -> None:
    """As the agent's task: past the threshold it warns, and waits for the view to be current."""
    task = asyncio.create_task(StalenessAlarm(60.0, lambda: 61.0).run())
    await eventually(lambda: bool(said), "the warning")
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
