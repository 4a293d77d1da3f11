# SPDX-License-Identifier: Apache-2.0
"""Following a prefix whose etcd is a script: what sink and checkpoint see between two parts of a list."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from types import SimpleNamespace
from typing import cast

from core.table import Source, Table
from kvstore.client import Client, Page
from kvstore.errors import KvstoreError, Unavailable
from kvstore.sink import TableSink
from kvstore.watch import Change, WatchBatch
from kvstore.watcher import Follower
from tests.support.eventually import eventually

CLUSTER = 7
Step = Page | WatchBatch | KvstoreError


class Script:
    """Answers lists and watches with what is written down, then is silent."""

    def __init__(self, *lists: Sequence[Step], events: Sequence[Step] = ()) -> None:
        self.transport = SimpleNamespace(cluster_id=CLUSTER)
        self._lists = list(lists)
        self._events = events

    async def pages(self, prefix: str) -> AsyncGenerator[Page, None]:
        for step in self._lists.pop(0):
            if isinstance(step, KvstoreError):
                raise step
            assert isinstance(step, Page)
            yield step

    async def watch(
        self, prefix: str, start_revision: int, *, cluster_id: int, witness: object
    ) -> AsyncGenerator[WatchBatch, None]:
        for step in self._events:
            if isinstance(step, KvstoreError):
                raise step
            assert isinstance(step, WatchBatch)
            if step.created or step.revision >= start_revision:
                yield step
        await asyncio.Event().wait()


def page(revision: int, *keys: str, first: bool = False) -> Page:
    return Page(revision, [(f"k/{key}", b"%d" % revision) for key in keys], first, CLUSTER)


def put(revision: int, *keys: str) -> list[Change]:
    return [Change(f"k/{key}", b"%d" % revision, revision) for key in keys]


def batch(revision: int, changes: list[Change], *, head: int = 0, created: bool = False) -> WatchBatch:
    return WatchBatch(revision, changes, head or revision, created)


def table_sink() -> tuple[Source[str, bytes], TableSink[str, bytes]]:
    source = Table[str, bytes]("test", ("kvstore",)).source("kvstore")
    return source, TableSink(source, lambda key, value: (key, value), lambda key: key, grace=60)


def follower_of(script: Script, sink: TableSink[str, bytes]) -> Follower:
    return Follower(cast(Client, script), "k/", sink)


@contextlib.asynccontextmanager
async def following(follower: Follower, *, until: Callable[[], bool]) -> AsyncGenerator[None, None]:
    task = asyncio.create_task(follower.run())
    try:
        await eventually(until, "what is waited for")
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_list_that_begins_anew_replaces_the_one_that_broke_off() -> None:
    """Its revision is compacted after the first page: c was in that one and in no later list."""
    source, sink = table_sink()
    whole = [page(5, "a", "c", first=True), page(9, "a", first=True), page(9, "b")]
    follower = follower_of(Script(whole), sink)
    async with following(follower, until=lambda: source.in_sync):
        assert dict(source.entries()) == {"k/a": b"9", "k/b": b"9", "k/c": b"5"}
        assert list(source.missing) == ["k/c"]
        assert (follower.revision, follower.cursor.cluster_id) == (9, CLUSTER)


async def test_a_list_that_breaks_off_with_the_connection_makes_nothing_missing() -> None:
    source, sink = table_sink()
    broken: list[Step] = [page(5, "a", first=True), Unavailable("range", "m0", "gone")]
    script = Script(broken, [page(6, "b", first=True)])
    async with following(follower_of(script, sink), until=lambda: source.in_sync):
        assert dict(source.entries()) == {"k/a": b"5", "k/b": b"6"}
        assert list(source.missing) == ["k/a"]


class Witness(TableSink[str, bytes]):
    """Notes how much there is, and what a checkpoint would say, at each part that is taken."""

    follower: Follower
    seen: list[tuple[int, int]]

    def take(self, items: Sequence[tuple[str, bytes]]) -> None:
        super().take(items)
        self.seen.append((len(self.source), self.follower.revision))


async def test_the_revision_moves_when_the_sink_has_everything() -> None:
    """A checkpoint that is taken in the middle of a batch must not resume behind it."""
    source, _ = table_sink()
    sink = Witness(source, lambda key, value: (key, value), lambda key: key)
    names = [str(number) for number in range(500)]
    script = Script([page(5, first=True)], events=[batch(5, [], created=True), batch(8, put(8, *names))])
    sink.follower, sink.seen = follower_of(script, sink), []
    async with following(sink.follower, until=lambda: sink.follower.revision == 8):
        assert len(source) == len(names)
    assert len(sink.seen) > 1, "it came at once"
    assert {revision for _, revision in sink.seen[1:]} == {5}
