# SPDX-License-Identifier: Apache-2.0
"""Identity allocation: new label sets through the whole allocator, to etcd's answer.

identity_alloc_seq_per_s
    One at a time.
identity_alloc_32_per_s
    32 in flight.

Session and identity cache run beside it as in an agent: every new identity comes back through the watch,
own keys are adopted, and watched once the burst is over; what that costs then is told beside.  etcd is one
of our own, on the disk of the temporary directory.
The floor beside each figure is the same transaction (three conditions, two puts, as long) through the same
client with nothing else around it; both are taken by turns.

Run: python -m bench.identity_alloc [--profile]
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from loguru import logger

from agent.options import ETCD_QPS
from bench import harness
from identity import transactions
from identity.allocator import Allocator
from identity.cache import IdentityCache
from identity.labels import Labels
from identity.transactions import Slot
from kvstore import schema
from kvstore.client import Client
from kvstore.session import Session
from kvstore.watcher import follow
from tests.support.etcd import EtcdServer

ROUNDS = 5
# A round makes about what a full host has: 500 endpoints.
SEQUENTIAL = 500
CONCURRENT = 1500
IN_FLIGHT = 32

Work = Callable[[Labels], Awaitable[object]]


# Seconds in which the session makes its watches after a burst.
AFTERWARDS_S = 2.0


class Sample(NamedTuple):
    """Label sets a second, and this process's CPU microseconds for each: meanwhile, and afterwards."""

    per_s: float
    cpu_us: float
    afterwards_us: float = 0.0


@contextlib.asynccontextmanager
async def agent(etcd: EtcdServer, address: str) -> AsyncIterator[Allocator]:
    """Yield an allocator with everything that runs beside it in an agent."""
    client = Client(etcd.config, qps=ETCD_QPS)
    session, cache = Session(client, ttl=60, name=address), IdentityCache()
    allocator = Allocator(client, session, cache, owner=address)
    mains = (session.run(), allocator.run(), follow(client, schema.IDENTITY_IDS, cache))
    tasks = [asyncio.create_task(main) for main in mains]
    try:
        await session.ready()
        yield allocator
        await session.revoke()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()


def bare(client: Client) -> Work:
    """Return the floor: the transaction alone."""
    numbers = iter(range(1, 1 << 24))

    async def write(labels: Labels) -> None:
        txn = transactions.create(Slot(labels, "10.255.0.1"), next(numbers), 0)
        await client.txn(*txn)

    return write


def labels_of(tag: str, count: int) -> Iterator[Labels]:
    """Return label sets as a compose application's service has them."""
    for number in range(count):
        yield Labels.of(
            {
                "app": f"{tag}-{number}",
                "com.docker.compose.project": "bench",
                "holdfast.network": "holdfast",
            }
        )


async def rate(work: Work, tag: str, count: int, in_flight: int) -> Sample:
    """Have `work` do `count` label sets, `in_flight` at a time."""
    sets = list(labels_of(tag, count))
    queue = iter(sets)

    async def worker() -> None:
        for labels in queue:
            await work(labels)

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return Sample(count / (time.perf_counter() - started), (time.process_time() - cpu) / count * 1e6)


async def measure(etcd: EtcdServer, samples: dict[str, list[Sample]], number: int) -> None:
    """Take one sample of each figure and of its floor; the store is emptied before."""
    for name, count, in_flight in (
        ("seq", SEQUENTIAL, 1),
        (str(IN_FLIGHT), CONCURRENT, IN_FLIGHT),
    ):
        etcd.ctl("del", "cilium/", "--prefix")
        client = Client(etcd.config)
        await client.status()
        samples[f"floor_{name}"].append(await rate(bare(client), f"f{name}{number}", count, in_flight))
        await client.close()
        etcd.ctl("del", "cilium/", "--prefix")
        async with agent(etcd, f"10.0.{number}.1") as allocator:
            sample = await rate(allocator.allocate, f"a{name}{number}", count, in_flight)
            cpu = time.process_time()
            await asyncio.sleep(AFTERWARDS_S)
            afterwards = (time.process_time() - cpu) / count * 1e6
            samples[name].append(sample._replace(afterwards_us=afterwards))


async def measured(etcd: EtcdServer) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {"seq": [], "floor_seq": [], "32": [], "floor_32": []}
    for number in range(ROUNDS):
        await measure(etcd, samples, number)
    return samples


async def profiled(etcd: EtcdServer) -> None:
    """Print where the time of allocations goes, one by one and with 32 in flight."""
    for count, in_flight in ((SEQUENTIAL, 1), (CONCURRENT, IN_FLIGHT)):
        async with agent(etcd, "10.0.0.1") as allocator:
            profiler = cProfile.Profile()
            profiler.enable()
            await rate(allocator.allocate, f"profile{in_flight}", count, in_flight)
            profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def report(name: str, samples: list[Sample]) -> None:
    harness.emit_median(f"{name}_per_s", [each.per_s for each in samples], "1/s")
    cpu = statistics.median(each.cpu_us for each in samples)
    afterwards = statistics.median(each.afterwards_us for each in samples)
    harness.note(f"{name}: {cpu:.0f} µs of our CPU each, {afterwards:.0f} µs afterwards")


def main() -> None:
    logger.remove()
    harness.load()
    with tempfile.TemporaryDirectory() as directory:
        etcd = EtcdServer(Path(directory)).start()
        try:
            if "--profile" in sys.argv:
                asyncio.run(profiled(etcd))
                return
            samples = asyncio.run(measured(etcd))
        finally:
            etcd.stop()
    for name in ("seq", "32"):
        report(f"identity_alloc_{name}", samples[name])
        report(f"identity_alloc_{name}_floor", samples[f"floor_{name}"])
    harness.load()


if __name__ == "__main__":
    main()
