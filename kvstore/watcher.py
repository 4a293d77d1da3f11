# SPDX-License-Identifier: Apache-2.0
"""Following a prefix: list, watch, merge, in sync, events; for ever, through every kind of trouble.

    LISTING ──▶ WATCHING ◀──▶ RETRYING      the stream broke, no endpoint answers: resume, no relist
       ▲            │    ◀──▶ DENIED        no right to read: tell, try again slowly
       └────────────┴── history lost (compacted, wiped, restored, another cluster): list again
    CATCHING_UP ──▶ WATCHING                resumed at a revision known from before

What is gone from a fresh list reaches the sink as a full listing, never as deletions: the sink's table
decides how long it keeps what is missing.  Only what etcd's history says was deleted is a deletion.

Called by: agent, identity, policy sources, external_resources; `Sink` is what they hand in
(kvstore.sink has the one that feeds a table).
"""

from __future__ import annotations

import contextlib
import enum
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Protocol

from loguru import logger

from core import metrics
from kvstore.client import Client, Snapshot
from kvstore.errors import Compacted, KvstoreError, PermissionDenied, RecordError, RequestRefused
from kvstore.merge import Cursor
from kvstore.patience import Patience
from kvstore.schema.keys import scope_of
from kvstore.watch import WatchBatch

_followers: weakref.WeakSet[Follower] = weakref.WeakSet()


class State(enum.Enum):
    """What a follower is doing; the gauge `holdfast_kvstore_watch_state` has the same words."""

    LISTING = "listing"  # reads the whole prefix
    CATCHING_UP = "catching-up"  # resumed; older events may still be under way
    WATCHING = "watching"  # in sync
    RETRYING = "retrying"  # etcd is away; the last good state stays
    DENIED = "denied"  # etcd refuses this user the prefix


class Sink(Protocol):
    """Where a followed prefix goes.  Methods are synchronous and may raise RecordError for one record."""

    def listed(self, items: dict[str, bytes], revision: int) -> None:
        """Everything under the prefix as of `revision`; what is not in it is missing, not deleted."""

    def put(self, key: str, value: bytes) -> None: ...

    def deleted(self, key: str) -> None: ...

    def in_sync(self) -> None:
        """Everything that etcd held when following began has been delivered."""


class Follower:
    """Follows one prefix.  Owner of every field: the task in `run`; others may read them.

    `resume_revision` (and the cluster it came from) are a checkpoint's: the sink then already holds the
    view of that revision.  With `partial` it holds only some of that view: it is listed all the same, and
    the history since then tells what of it was deleted.  `gate` is awaited before every full list.
    """

    def __init__(
        self,
        client: Client,
        prefix: str,
        sink: Sink,
        *,
        resume_revision: int = 0,
        resume_cluster: int = 0,
        partial: bool = False,
        gate: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.prefix = prefix
        self.state = State.LISTING
        self.error = ""
        self.fresh_at = 0.0
        known = Cursor(resume_revision, resume_cluster)
        self.cursor = Cursor() if partial else known
        self._past = known if partial else Cursor()
        self._client = client
        self._sink = sink
        self._gate = gate
        self._told_in_sync = False
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
        watch = self._client.watch(self.prefix, self.cursor.revision + 1, cluster_id=self.cursor.cluster_id)
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                self._take(batch)

    async def _list(self) -> None:
        self._enter(State.LISTING)
        if self._gate is not None:
            await self._gate()
        snapshot = await self._client.snapshot(self.prefix)
        for key in await self._deleted_before(snapshot):
            self._apply(key, None)
        self.cursor.listed(snapshot.revision, snapshot.cluster_id)
        self._sink.listed(snapshot.items, snapshot.revision)
        self._fresh()

    async def _deleted_before(self, snapshot: Snapshot) -> list[str]:
        """Return the keys that were deleted since the partial view and that the list does not hold.

        None when that history is gone: then they stay for their grace like everything that is missing.
        """
        past, self._past, gone = self._past, Cursor(), dict[str, None]()
        if past.must_list:
            return []
        watch = self._client.watch(self.prefix, past.revision + 1, cluster_id=past.cluster_id)
        try:
            async with contextlib.aclosing(watch) as batches:
                async for batch in batches:
                    changes = past.merge(batch)
                    gone |= {each.key: None for each in changes if each.key not in snapshot.items}
                    if past.caught_up:
                        break
        except (Compacted, RequestRefused) as error:
            logger.warning("{}; what the list lacks stays for its grace", error)
            return []
        except KvstoreError:
            self._past = past
            raise
        return list(gone)

    def _take(self, batch: WatchBatch) -> None:
        for change in self.cursor.merge(batch):
            self._apply(change.key, change.value)
        self._fresh()

    def _apply(self, key: str, value: bytes | None) -> None:
        try:
            if value is None:
                self._sink.deleted(key)
            else:
                self._sink.put(key, value)
        except RecordError as error:
            metrics.KVSTORE_RECORDS_IGNORED.labels(scope_of(key), error.kind).inc()
            logger.warning("{}", error)

    def _fresh(self) -> None:
        """etcd has just spoken: the view is current, and in sync if nothing older is under way."""
        self.fresh_at = time.monotonic()
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
        denied = isinstance(error, PermissionDenied)
        self._enter(State.DENIED if denied else State.RETRYING)

    def _enter(self, state: State) -> None:
        if state is not self.state or not self.fresh_at:
            metrics.KVSTORE_WATCH_STATE.labels(self.prefix, self.state.value).set(0)
            metrics.KVSTORE_WATCH_STATE.labels(self.prefix, state.value).set(1)
            self.state = state


def staleness() -> float:
    """Return the age in seconds of the oldest view that this process follows; 0 without any."""
    return max((follower.age() for follower in _followers), default=0.0)


def followers() -> list[Follower]:
    """Return the followers alive in this process, by prefix: for status and checkpoints."""
    return sorted(_followers, key=lambda follower: follower.prefix)


async def follow(client: Client, prefix: str, sink: Sink, *, resume_revision: int = 0) -> None:
    """Follow `prefix` into `sink` until cancelled (see the module's text); never returns."""
    await Follower(client, prefix, sink, resume_revision=resume_revision).run()
