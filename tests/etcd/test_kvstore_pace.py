# SPDX-License-Identifier: Apache-2.0
"""The rate limit of requests against a real etcd, which counts for itself what it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from core import metrics, waiting
from kvstore.client import Client
from kvstore.pace import BURST_S
from kvstore.session import Session
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

QPS = 20
BURST = int(QPS * BURST_S)


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Client]:
    client = Client(etcd.config, qps=QPS)
    yield client
    await client.close()


def asked(etcd: EtcdServer) -> int:
    """Return how many reads etcd has begun to answer, as it says itself."""
    return etcd.counted("grpc_server_started_total", "Range")


def limited() -> tuple[int, float]:
    """Return how many requests were held back, and for how many seconds in all."""
    samples = {
        each.name: each.value for each in next(iter(metrics.KVSTORE_LIMITER_WAIT_SECONDS.collect())).samples
    }
    name = "holdfast_kvstore_limiter_wait_duration_seconds"
    return int(samples[f"{name}_count"]), samples[f"{name}_sum"]


async def test_etcd_gets_a_burst_and_then_no_more_than_the_rate(etcd: EtcdServer, client: Client) -> None:
    before, (held_before, seconds_before) = asked(etcd), limited()
    began = time.monotonic()
    requests = [asyncio.create_task(client.get(f"k/{number}")) for number in range(BURST + 3 * QPS)]
    while not all(each.done() for each in requests):
        seen = await asyncio.to_thread(asked, etcd) - before
        allowed = BURST + QPS * (time.monotonic() - began) + 1
        assert seen <= allowed, f"etcd was asked {seen} times, {allowed:.0f} are allowed by now"
        await asyncio.sleep(0.1)
    assert [each.result() for each in requests] == [None] * len(requests)
    assert asked(etcd) - before == len(requests)
    held, seconds = limited()
    assert 0 < held - held_before <= 3 * QPS
    assert seconds > seconds_before


async def test_leases_watches_and_health_do_not_stand_in_that_queue(etcd: EtcdServer, client: Client) -> None:
    queue = [asyncio.create_task(client.get("k")) for _ in range(BURST + 1000)]
    try:
        await eventually(lambda: sum(each.done() for each in queue) >= BURST, "a burst has passed")
        lease = await client.lease_grant(60)
        assert await client.lease_keepalive(lease) == 60
        assert await client.lease_remaining(lease) > 0
        assert [each.error for each in await client.status()] == [""]
        async with aclosing(client.watch("k", 1)) as batches:
            assert (await anext(batches)).created
        await client.lease_revoke(lease)
        assert not queue[-1].done()
        told = [each.sentence() for each in waiting.current()]
        assert any("etcd.qps=20 requests a second" in each for each in told), told
    finally:
        for each in queue:
            each.cancel()
        await asyncio.gather(*queue, return_exceptions=True)
    assert not any("etcd.qps" in each.purpose for each in waiting.current())


async def test_a_session_keeps_its_lease_while_the_queue_is_full(etcd: EtcdServer, client: Client) -> None:
    ttl = 8
    session = Session(client, ttl=ttl)
    running = asyncio.create_task(session.run())
    lease = await session.ready()
    queue = [asyncio.create_task(client.get("k")) for _ in range(BURST + 1000)]
    try:
        await asyncio.sleep(2 * ttl)  # twice as long as the lease lasts by itself
        assert not queue[-1].done()
        assert session.alive
        other = Client(etcd.config)
        assert await other.lease_remaining(lease) > 0
        await other.close()
        assert session.lease_id == lease
    finally:
        for each in (*queue, running):
            each.cancel()
        await asyncio.gather(*queue, running, return_exceptions=True)
