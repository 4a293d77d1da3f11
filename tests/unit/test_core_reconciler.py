# SPDX-License-Identifier: Apache-2.0
"""Reconcilers against a target that is a dict: what ends up in it, and when anything is removed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from core.reconciler import Kind, Reconciler
from core.table import Table


class DictTarget:
    """A target that fails for the keys in `broken`."""

    def __init__(self) -> None:
        self.content: dict[str, int] = {}
        self.broken: set[str] = set()
        self.prunes = 0

    async def update(self, items: Sequence[tuple[str, int]]) -> Mapping[str, Exception]:
        self.content.update({key: value for key, value in items if key not in self.broken})
        return {key: OSError("no room") for key, _ in items if key in self.broken}

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        for key in keys:
            self.content.pop(key, None)
        return {}

    async def prune(self, table: Table[str, int]) -> int:
        self.prunes += 1
        stale = [key for key in self.content if key not in table]
        for key in stale:
            del self.content[key]
        return len(stale)


@contextlib.asynccontextmanager
async def running(reconciler: Reconciler[str, int]) -> AsyncIterator[None]:
    task = asyncio.create_task(reconciler.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def eventually(condition: object, what: str) -> None:
    assert callable(condition)
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never happened: {what}")


async def test_nothing_is_pruned_before_every_source_is_in_sync() -> None:
    """A restarted agent finds two entries; one source speaks early, the other late: neither entry is lost."""
    table: Table[str, int] = Table("t", ("docker", "kvstore"))
    target = DictTarget()
    target.content = {"from-docker": 1, "from-kvstore": 1, "stale": 1}
    reconciler = Reconciler("test", table, target)
    async with running(reconciler):
        table.source("docker").upsert("from-docker", 1)
        table.source("docker").mark_in_sync()
        await asyncio.sleep(0.05)
        assert target.content == {"from-docker": 1, "from-kvstore": 1, "stale": 1}
        assert target.prunes == 0
        table.source("kvstore").upsert("from-kvstore", 1)
        table.source("kvstore").mark_in_sync()
        await eventually(lambda: target.content == {"from-docker": 1, "from-kvstore": 1}, "prune")
    assert reconciler.pruned_total == 1


async def test_one_broken_object_does_not_keep_the_others_back_and_heals() -> None:
    table: Table[str, int] = Table("t", ("only",))
    target = DictTarget()
    target.broken = {"bad"}
    reconciler = Reconciler("test", table, target)
    async with running(reconciler):
        table.source("only").upsert("bad", 1)
        table.source("only").upsert("good", 1)
        assert (await reconciler.settled("good")).kind is Kind.DONE
        status = await reconciler.settled("bad")
        assert (status.kind, status.error) == (Kind.ERROR, "no room")
        target.broken.clear()
        await eventually(lambda: reconciler.status("bad").kind is Kind.DONE, "retry")
        assert target.content == {"good": 1, "bad": 1}


async def test_a_delete_reaches_the_target_and_poke_repairs_what_somebody_else_removed() -> None:
    table: Table[str, int] = Table("t", ("only",))
    target = DictTarget()
    reconciler = Reconciler("test", table, target)
    async with running(reconciler):
        table.source("only").upsert("a", 1)
        table.source("only").upsert("b", 2)
        await reconciler.wait_idle()
        table.source("only").delete("a")
        await reconciler.wait_idle()
        assert target.content == {"b": 2}
        target.content.clear()
        reconciler.poke()
        await eventually(lambda: target.content == {"b": 2}, "refresh")


class Stream(DictTarget):
    """Each write brings the next change, `LENGTH` times: the subscription is never empty until the end."""

    LENGTH = 200

    def __init__(self, table: Table[str, int]) -> None:
        super().__init__()
        self.source = table.source("only")

    async def update(self, items: Sequence[tuple[str, int]]) -> Mapping[str, Exception]:
        await asyncio.sleep(0)
        failed = await super().update(items)
        if len(self.content) < self.LENGTH:
            self.source.upsert(f"later-{len(self.content)}", 1)
        return failed


async def test_a_steady_stream_of_changes_holds_nobody_up_who_waits() -> None:
    """Three batches are due when the wait begins, one object of them fails: the wait ends with them."""
    table: Table[str, int] = Table("t", ("only",))
    target = Stream(table)
    target.broken = {"bad"}
    reconciler = Reconciler("test", table, target, batch=2)
    async with running(reconciler):
        early = ["a", "b", "bad", "c", "d"]
        for key in early:
            table.source("only").upsert(key, 1)
        await reconciler.wait_idle()
        assert {key for key in target.content if key in early} == {"a", "b", "c", "d"}
        assert reconciler.status("bad").kind is Kind.ERROR
        assert len(target.content) < target.LENGTH, "it waited for what came later"


async def test_a_change_during_the_write_of_the_same_object_is_waited_for() -> None:
    table: Table[str, int] = Table("t", ("only",))
    writes = asyncio.Semaphore(0)
    begun = asyncio.Event()

    class Slow(DictTarget):
        async def update(self, items: Sequence[tuple[str, int]]) -> Mapping[str, Exception]:
            begun.set()
            await writes.acquire()
            return await super().update(items)

    target = Slow()
    reconciler = Reconciler("test", table, target)
    async with running(reconciler):
        table.source("only").upsert("a", 1)
        await begun.wait()
        first = asyncio.create_task(reconciler.wait_idle())
        await asyncio.sleep(0)
        table.source("only").upsert("a", 2)
        second = asyncio.create_task(reconciler.wait_idle())
        writes.release()
        await first
        assert (target.content, second.done()) == ({"a": 1}, False)
        writes.release()
        await second
        assert target.content == {"a": 2}


async def test_a_target_that_raises_fails_its_keys_and_not_the_loop() -> None:
    class Raising(DictTarget):
        async def update(self, items: Sequence[tuple[str, int]]) -> Mapping[str, Exception]:
            if self.broken:
                raise OSError("device gone")
            return await super().update(items)

    table: Table[str, int] = Table("t", ("only",))
    target = Raising()
    target.broken = {"x"}
    reconciler = Reconciler("test", table, target)
    async with running(reconciler):
        table.source("only").upsert("a", 1)
        assert (await reconciler.settled("a")).error == "device gone"
        target.broken.clear()
        await eventually(lambda: target.content == {"a": 1}, "retry")


async def test_others_have_their_turn_between_batches_of_a_target_that_never_waits() -> None:
    table: Table[str, int] = Table("t", ("docker",))
    table.source("docker").upsert_many([(f"key-{number}", number) for number in range(100)])
    target = DictTarget()
    seen: list[int] = []

    async def look() -> None:
        while len(target.content) < 100:
            seen.append(len(target.content))
            await asyncio.sleep(0)

    async with running(Reconciler("test", table, target, batch=10)):
        await look()
    assert set(seen) >= {10, 20, 50, 90}
