# SPDX-License-Identifier: Apache-2.0
"""Following a prefix: list, watch, merge, in sync, events; for ever, through every kind of trouble.

    LISTING ──▶ WATCHING ◀──▶ RETRYING      the stream broke, no endpoint answers: resume, no relist
       ▲            │    ◀──▶ DENIED        no right to read: tell, try again slowly
       └─ WAITING ◀─┴── history lost (compacted, wiped, restored, another cluster): list again
    CATCHING_UP ──▶ WATCHING                resumed at a revision known from before

A fleet that loses its history loses it at once, so a full list may have to wait for this host's turn (the
gate).  WAITING is not blind: what changes after the loss was noticed is followed all the while, and only what
happened while nobody looked waits for the list.

A list goes into the sink page by page, a slice at a time, so that the process does everything else
meanwhile.  What is gone from a fresh list is what was in none of its pages, never a deletion: the sink's
table decides how long it keeps what is missing.  Only what etcd's history says was deleted is a deletion.

Called by: agent, identity, policy sources, external_resources; `Sink` is what they hand in
(kvstore.sink has the one that feeds a table).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from loguru import logger

from core import metrics
from kvstore.client import Client
from kvstore.errors import Compacted, KvstoreError, PermissionDenied, RequestRefused
from kvstore.merge import Cursor
from kvstore.patience import Patience
from kvstore.watch import Change, WatchBatch, Witness

Item = tuple[str, bytes]
Preparation = Callable[[Sequence[Item]], Awaitable[None]]
# Returns when this host may list everything; it is told whether there is a view, which then only ages.
Gate = Callable[[bool], Awaitable[None]]

# For so long, in seconds, the sink takes records before anybody else may run.
SLICE_S = 0.004
DELETED_AT_ONCE = 1000
# A wait for the gate that is shorter is not worth a watch of its own, seconds.
SHORT_WAIT_S = 0.05

_followers: weakref.WeakSet[Follower] = weakref.WeakSet()


class State(enum.Enum):
    """What a follower is doing; the gauge `holdfast_kvstore_watch_state` has the same words."""

    LISTING = "listing"  # reads the whole prefix
    WAITING = "waiting"  # for its turn to list; what changes meanwhile is followed
    CATCHING_UP = "catching-up"  # resumed; older events may still be under way
    WATCHING = "watching"  # in sync
    RETRYING = "retrying"  # etcd is away; the last good state stays
    DENIED = "denied"  # etcd refuses this user the prefix


class Sink(Protocol):
    """Where a followed prefix goes.  Bad records are the sink's own business."""

    def begin_list(self) -> None:
        """A list of everything under the prefix begins, perhaps in place of one that broke off."""

    def take(self, items: Sequence[Item]) -> None:
        """Keys with their values: a part of the list, or what has just been written."""

    def deleted(self, key: str) -> None: ...

    async def listed(self, revision: int) -> None:
        """The list is whole as of `revision`; what was in no part of it is missing, not deleted."""

    def in_sync(self) -> None:
        """Everything that etcd held when following began has been delivered."""


class Follower:
    """Follows one prefix.  Owner of every field: the task in `run`; others may read them.

    `resume_revision` (and the cluster it came from) are a checkpoint's: the sink then already holds the
    view of that revision.  `observer` is told of every change that etcd tells of (not of lists), before the
    sink.  `gate` is awaited before every full list, while what changes is followed; `prepare` with each part
    before the sink takes it: what takes long can be done in a thread there.
    """

    def __init__(
        self,
        client: Client,
        prefix: str,
        sink: Sink,
        *,
        resume_revision: int = 0,
        resume_cluster: int = 0,
        gate: Gate | None = None,
        prepare: Preparation | None = None,
        observer: Callable[[Sequence[Change]], None] | None = None,
    ) -> None:
        self.prefix = prefix
        self.state = State.LISTING
        self.error = ""
        self.fresh_at = 0.0
        self.cursor = Cursor(resume_revision, resume_cluster)
        self._client = client
        self._sink = sink
        self._gate = gate
        self._prepare = prepare
        self._observer = observer
        self._told_in_sync = False
        self._has_view = resume_revision > 0
        self._has_turn = False
        self._meanwhile = Cursor()  # in the history that there is now, while the list waits for its turn
        self._pace = _Pace()
        self._patience = Patience(f"view of {prefix}")
        self._created_at = time.monotonic()
        _followers.add(self)
        metrics.KVSTORE_STALENESS_SECONDS.set_function(staleness)

    @property
    def revision(self) -> int:
        """The revision up to which the sink has everything: what a checkpoint resumes from."""
        return self.cursor.revision

    def age(self) -> float:
        """Return the seconds since etcd last proved that this view is current."""
        return time.monotonic() - (self.fresh_at or self._created_at)

    def resume(
        self, revision: int, cluster_id: int, *, age: float = 0.0, witness: Witness | None = None
    ) -> None:
        """Go on from here instead: the sink has been given this view, of `age` seconds.  Before `run`."""
        self.cursor = Cursor(revision, cluster_id, witness)
        self._created_at = time.monotonic() - age
        self._has_view = True

    async def run(self) -> None:
        """Follow until cancelled."""
        with self._patience as patience:
            while True:
                patience.attempt()
                try:
                    await self._list_and_watch()
                except KvstoreError as error:
                    self._failed(error)
                await patience.pause(slow=self.state is State.DENIED)

    async def _list_and_watch(self) -> None:
        """The story: a list unless the past is known, then every event after it."""
        if self.cursor.must_list:
            await self._list()
        else:
            self.cursor.resumed()
            self._enter(State.CATCHING_UP)
        known = self.cursor
        watch = self._client.watch(
            self.prefix, known.revision + 1, cluster_id=known.cluster_id, witness=known.witness
        )
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                await self._take_batch(batch)

    async def _list(self) -> None:
        if self._gate is not None and not self._has_turn:
            await self._wait_for_turn(self._gate)
        self._has_turn = True  # until the list is whole: one that fails is not put off by a window
        self._enter(State.LISTING)
        revision, newest = await self._take_pages()
        cluster_id = self._client.transport.cluster_id
        # Before the cursor: a checkpoint, or the next life of this task, takes that for what the sink has.
        await self._sink.listed(revision)
        self.cursor.listed(revision, cluster_id, newest)
        self._has_turn = False
        self._has_view = True
        self._fresh()

    async def _wait_for_turn(self, gate: Gate) -> None:
        """Return when everything may be listed; raises what the watch raises that is followed meanwhile."""
        turn = asyncio.ensure_future(gate(self._has_view))
        tasks = [turn]
        try:
            if not (await asyncio.wait(tasks, timeout=SHORT_WAIT_S))[0]:
                tasks.append(asyncio.create_task(self._follow_meanwhile()))
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_meanwhile(self) -> None:
        """Hand on what has changed since the loss was noticed, for ever.

        The view is not fresh by that: there is a gap before.  May be broken off anywhere: the list that
        comes has all of it.
        """
        self._enter(State.WAITING)
        known = self._meanwhile
        start = known.revision + 1 if known.revision else 0
        watch = self._client.watch(self.prefix, start, witness=known.witness)
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                self.error = ""
                self._patience.answered()
                self._patience.troubled("what changes is followed; its turn to list everything comes later")
                await self._hand_on(known.changes(batch))
                known.passed(batch)

    async def _take_pages(self) -> tuple[int, Witness | None]:
        """Hand a whole list to the sink; return its revision, and what was written last."""
        revision, newest = 0, None
        async with contextlib.aclosing(self._client.pages(self.prefix)) as pages:
            async for page in pages:
                revision = page.revision
                if page.first:
                    self._sink.begin_list()
                    newest = None
                if page.newest is not None and (newest is None or page.newest.revision > newest.revision):
                    newest = page.newest
                await self.deliver(page.items)
        return revision, newest

    async def deliver(self, items: Sequence[Item]) -> None:
        """Hand records to the sink, as many at a time as leave the loop its turn."""
        at = 0
        while at < len(items):
            part = items[at : at + self._pace.records]
            at += len(part)
            if self._prepare is not None:
                await self._prepare(part)
            began = time.perf_counter()
            self._sink.take(part)
            self._pace.took(len(part), time.perf_counter() - began)
            await asyncio.sleep(0)

    async def _delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), DELETED_AT_ONCE):
            for key in keys[start : start + DELETED_AT_ONCE]:
                self._sink.deleted(key)
            await asyncio.sleep(0)

    async def _take_batch(self, batch: WatchBatch) -> None:
        """Hand on what a batch brought, and note that the sink has it."""
        await self._hand_on(self.cursor.changes(batch))
        self.cursor.passed(batch)  # not before: a checkpoint takes it for what the sink has
        self._fresh()

    async def _hand_on(self, changes: Sequence[Change]) -> None:
        """Tell the observer and the sink.

        Writes go before deletions: of several keys that speak of one thing the last that was written counts,
        and only its deletion.  A deletion that came before that write is then none of it.
        """
        if self._observer is not None:
            self._observer(changes)
        written = [(each.key, each.value) for each in changes if each.value is not None]
        await self.deliver(written)
        if len(written) < len(changes):
            await self._delete([each.key for each in changes if each.value is None])

    def _fresh(self) -> None:
        """etcd has just spoken: the view is current, and in sync if nothing older is under way."""
        self.fresh_at = time.monotonic()
        self._patience.answered()
        if not self.cursor.caught_up:
            return
        self.error = ""
        self._patience.works()
        self._enter(State.WATCHING)
        if not self._told_in_sync:
            self._told_in_sync = True
            self._sink.in_sync()

    def _failed(self, error: KvstoreError) -> None:
        self.error = str(error)
        self._patience.troubled(self.error)
        if isinstance(error, Compacted | RequestRefused):
            logger.warning("{}; listing again", error)
            self.cursor.lost()
            self._meanwhile = Cursor(error.head if isinstance(error, Compacted) else 0)
        denied = isinstance(error, PermissionDenied)
        self._enter(State.DENIED if denied else State.RETRYING)

    def _enter(self, state: State) -> None:
        if state is not self.state or not self.fresh_at:
            metrics.KVSTORE_WATCH_STATE.labels(self.prefix, self.state.value).set(0)
            metrics.KVSTORE_WATCH_STATE.labels(self.prefix, state.value).set(1)
            self.state = state


class _Pace:
    """How many records the sink takes in its time; found out as they come, for an address takes a
    microsecond and a policy a millisecond."""

    def __init__(self) -> None:
        self.records = 16

    def took(self, records: int, seconds: float) -> None:
        """The sink took so many in so long."""
        fitting = int(records * SLICE_S / max(seconds, 1e-6))
        self.records = max(1, min(fitting, 4 * self.records))


def staleness() -> float:
    """Return the age in seconds of the oldest view that this process follows; 0 without any."""
    return max((follower.age() for follower in _followers), default=0.0)


def followers() -> list[Follower]:
    """Return the followers alive in this process, by prefix: for status and checkpoints."""
    return sorted(_followers, key=lambda follower: follower.prefix)


async def follow(client: Client, prefix: str, sink: Sink, *, resume_revision: int = 0) -> None:
    """Follow `prefix` into `sink` until cancelled (see the module's text); never returns."""
    await Follower(client, prefix, sink, resume_revision=resume_revision).run()
