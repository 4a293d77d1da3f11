# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a large fleet: 300 000 addresses on their way to the disk and back into the kernel.

checkpoint_write_cpu_s, checkpoint_pause_ms
    CPU of writing all of them from nothing; the loop's longest pause meanwhile.
checkpoint_restore_s, checkpoint_restore_pause_ms
    From the opening of the file until the last entry is in the BPF map; the loop's longest pause.
checkpoint_incremental_cpu_percent
    Share of a core that writing costs while 100 addresses a second change: with it, less without it.
floor_checkpoint_write_cpu_s, floor_checkpoint_restore_s
    The same without a table and a loop: rows that lie ready in their blocks, encoded and written by SQLite;
    blocks read and decoded, and packed entries written by the kernel.

The table, the checkpoint and the reconciler of an agent, on a real file and a real map.

Run: python -m bench.checkpoint [--profile]
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import gc
import pstats
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from agent import ipcache, remembered, sinks, viewfile
from agent.remembered import AddressView, Remembered
from agent.viewfile import Part, ViewFile
from bench.harness import emit_median, load, note
from core.loop import spare_the_collector
from datapath.maps import IpcacheMap
from datapath.mapspec import MapCatalogue, create
from datapath.records import IpcacheEntry
from kvstore import schema
from tests.support.lives import follower

ADDRESSES, IDENTITIES, HOSTS = 300_000, 64_000, 10_000
RUNS = 3
CHANGES_PER_S, CHANGES_S = 100, 20
TICK_S = 0.001


class NoBarrier:
    async def wait_idle(self) -> None: ...


class Life:
    """The addresses of one agent, with their file and, if wanted, their map."""

    def __init__(self, directory: Path) -> None:
        self.table = ipcache.new_table()
        self.sink = sinks.IpSink(self.table.source(ipcache.KVSTORE_SOURCE), 600.0)
        self.view = AddressView(follower(schema.IPS, self.sink), self.sink)
        file = ViewFile(directory / viewfile.NAME, "default/bench", remembered.SHAPES)
        self.memory = Remembered(file, grace=600.0)

    def take(self, first: int, number: int, revision: int) -> None:
        """Have etcd say who some addresses are."""
        self.sink.take([item(index % ADDRESSES, revision) for index in range(first, first + number)])
        self.view.follower.cursor.listed(revision, 1)


def item(index: int, revision: int) -> tuple[str, bytes]:
    address = f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}"
    host = index % HOSTS
    record = schema.ip_record(
        address,
        256 + (index + revision) % IDENTITIES,
        host_ip=f"172.16.{host >> 8}.{host & 255}",
        metadata=f"cilium-global:default:host-{host}:{index}",
    )
    return schema.ip_key(schema.DEFAULT_SPACE, address), schema.encode_ip(record)


@dataclass
class Pause:
    longest: float = 0.0


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Pause]:
    """Measure the longest time in which the loop did not come round."""
    pause = Pause()

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.perf_counter()
            pause.longest = max(pause.longest, now - last - TICK_S)
            last = now

    task = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    try:
        yield pause
        await asyncio.sleep(0.01)
    finally:
        task.cancel()


@contextlib.contextmanager
def profiled() -> Iterator[None]:
    profile = cProfile.Profile()
    if "--profile" in sys.argv:
        profile.enable()
    yield
    if "--profile" in sys.argv:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


async def written(directory: Path) -> tuple[float, float]:
    """Write everything; return seconds of CPU and the longest pause in milliseconds."""
    life = Life(directory)
    await life.memory.open()
    await life.memory.restore(life.view)
    for first in range(0, ADDRESSES, 10_000):
        life.take(first, 10_000, 1)
    gc.collect()
    async with watched() as pause:
        began = time.process_time()
        await life.memory.write()
        used = time.process_time() - began
    if life.memory.trouble:
        raise SystemExit(life.memory.trouble)
    life.memory.close()
    return used, pause.longest * 1e3


async def restored(directory: Path) -> tuple[float, float]:
    """Restore everything into an empty map; return seconds and the longest pause in milliseconds."""
    life, target = Life(directory), IpcacheMap(create(MapCatalogue().ipcache))
    reconciler = ipcache.reconciler(life.table, target, NoBarrier())
    running = asyncio.create_task(reconciler.run())
    gc.collect()
    async with watched() as pause:
        began = time.perf_counter()
        await life.memory.open()
        whole = await life.memory.restore(life.view)
        await reconciler.wait_idle()
        seconds = time.perf_counter() - began
    running.cancel()
    found = target.handle.count()
    if not whole or found != ADDRESSES + 1:
        raise SystemExit(f"{found} entries in the map, whole: {whole}")
    target.close()
    life.memory.close()
    return seconds, pause.longest * 1e3


def floor_written(directory: Path) -> float:
    """Return the CPU of encoding and writing rows that lie ready."""
    life = Life(directory)
    for first in range(0, ADDRESSES, 10_000):
        life.take(first, 10_000, 1)
    blocks = viewfile.blocks_of(remembered.ADDRESSES, life.view.source.entries())
    parts = [Part(block, keys, life.view.rows(keys)) for block, keys in blocks]
    file = ViewFile(directory / "floor.db", "default/bench", remembered.SHAPES)
    file.open()
    began = time.process_time()
    file.begin()
    file.merge(remembered.ADDRESSES, parts)
    file.commit()
    used = time.process_time() - began
    file.close()
    return used


def floor_restored(directory: Path) -> float:
    """Return the seconds of reading blocks, and of writing packed entries into the map."""
    file = ViewFile(directory / "floor.db", "default/bench", remembered.SHAPES)
    file.open()
    began = time.perf_counter()
    found = list(file.rows(remembered.ADDRESSES))
    seconds = time.perf_counter() - began
    file.close()
    target = IpcacheMap(create(MapCatalogue().ipcache))
    for rows in found:
        items = [(prefix, IpcacheEntry(row[0], ipcache.NOWHERE, 0)) for prefix, row in rows.items()]
        keys, values = target._pack(items)
        began = time.perf_counter()
        target.handle.update_many(keys, values)
        seconds += time.perf_counter() - began
    target.close()
    return seconds


async def changing(directory: Path, *, kept: bool) -> float:
    """Return the CPU share in percent while addresses change, with the checkpoint written or not."""
    life = Life(directory)
    await life.memory.open()
    await life.memory.restore(life.view)
    writing = asyncio.create_task(life.memory.run()) if kept else None
    began, used = time.perf_counter(), time.process_time()
    for number in range(CHANGES_S * CHANGES_PER_S):
        life.take(number * 7919, 1, 2 + number)
        await asyncio.sleep(max(0.0, began + number / CHANGES_PER_S - time.perf_counter()))
    share = (time.process_time() - used) / (time.perf_counter() - began) * 100
    if writing is not None:
        writing.cancel()
        if not life.memory.written_at:
            raise SystemExit("nothing was written")
    life.memory.close()
    return share


async def measure() -> None:
    writes, restores, shares, floors = [], [], [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            writes.append(await written(directory))
            note(f"{(directory / viewfile.NAME).stat().st_size / 1e6:.0f} MB on disk")
            with profiled():
                restores.append(await restored(directory))
            with_it = await changing(directory, kept=True)
            shares.append(with_it - await changing(directory, kept=False))
            floors.append((floor_written(directory), floor_restored(directory)))
    emit_median("checkpoint_write_cpu_s", [each[0] for each in writes], "s")
    emit_median("checkpoint_pause_ms", [each[1] for each in writes], "ms")
    emit_median("checkpoint_restore_s", [each[0] for each in restores], "s")
    emit_median("checkpoint_restore_pause_ms", [each[1] for each in restores], "ms")
    emit_median("checkpoint_incremental_cpu_percent", shares, "%")
    emit_median("floor_checkpoint_write_cpu_s", [each[0] for each in floors], "s")
    emit_median("floor_checkpoint_restore_s", [each[1] for each in floors], "s")


def main() -> None:
    """Print the figures."""
    load()
    logger.remove()
    spare_the_collector()  # as an agent does
    asyncio.run(measure())


if __name__ == "__main__":
    main()
