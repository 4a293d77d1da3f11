# SPDX-License-Identifier: Apache-2.0
"""Reconcilers: make a target (BPF maps, routes, etcd keys) equal to a table, and keep it so.

The target is an `Operations` object with three idempotent operations: update, delete, prune.  The
reconciler takes changed keys in batches, retries the failed ones with jittered back-off, knows the
status of every object that is not done, and re-asserts everything periodically.

**Prune never runs before every source of the table is in sync.**  That rule lives here and nowhere
else: what the target holds beyond the table is only known to be stale once everybody has spoken.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from loguru import logger

from core import metrics
from core.backoff import Backoff, jittered
from core.table import Table

K = TypeVar("K")
V = TypeVar("V")

# name            seconds  why
REFRESH_S = 1800.0  # everything is written again: heals what somebody else changed in the target
PRUNE_S = 1800.0  # what the target holds beyond the table is removed (and once when all are in sync)
RETRY_BASE_S = 0.2
RETRY_CAP_S = 60.0
BATCH = 4096  # the chunk that bpf(2) batch writes and etcd transactions are cut from


class Kind(enum.Enum):
    PENDING = "pending"  # changed, not yet written
    DONE = "done"  # the target has it
    ERROR = "error"  # the last attempt failed; a retry is due


@dataclass(frozen=True)
class Status:
    """What the reconciler knows of one object: `error` is empty unless `kind` is ERROR."""

    kind: Kind
    error: str = ""
    since: float = 0.0


class Operations(Protocol[K, V]):
    """What a target can do.  Each returns the keys that failed with their error; raising fails all."""

    async def update(self, items: Sequence[tuple[K, V]]) -> Mapping[K, Exception]: ...

    async def delete(self, keys: Sequence[K]) -> Mapping[K, Exception]: ...

    async def prune(self, table: Table[K, V]) -> int:
        """Remove what the target holds and `table` does not; return how many were removed."""
        ...


@dataclass
class _Failure:
    error: str
    since: float
    due: float
    backoff: Backoff = field(default_factory=lambda: Backoff(RETRY_BASE_S, RETRY_CAP_S))


class Reconciler(Generic[K, V]):
    """Runs one target after one table; `run` is the only task that touches the target."""

    def __init__(
        self,
        name: str,
        table: Table[K, V],
        operations: Operations[K, V],
        *,
        batch: int = BATCH,
        refresh_s: float = REFRESH_S,
        prune_s: float = PRUNE_S,
    ) -> None:
        self.name = name
        self.table = table
        self.operations = operations
        self.batch = batch
        self.refresh_s = refresh_s
        self.prune_s = prune_s
        self.pruned_total = 0
        self.has_pruned = False  # once in this life: the target holds nothing of a former one
        self.sentence = "nothing to write yet"
        self._subscription = table.subscribe()
        self._in_work: set[K] = set()
        # Objects taken into batches so far, and those whose batch has ended; see `wait_idle`.
        self._taken = self._ended = 0
        self._failures: dict[K, _Failure] = {}
        self._pulse = asyncio.Event()
        self._prune_due = 0.0
        self._refresh_due = time.monotonic() + jittered(refresh_s)

    def status(self, key: K) -> Status:
        """Return the status of one key; a key nobody wants and nothing holds counts as done."""
        if key in self._subscription or key in self._in_work:
            # Also after a failure: whoever changed the key waits for the outcome of that change.
            return Status(Kind.PENDING)
        failure = self._failures.get(key)
        if failure is not None:
            return Status(Kind.ERROR, failure.error, failure.since)
        return Status(Kind.DONE)

    @property
    def errors(self) -> Mapping[K, str]:
        return {key: failure.error for key, failure in self._failures.items()}

    async def wait_idle(self) -> None:
        """Return when everything changed so far was written (failed objects count as written).

        What changes after the call is not waited for, so a steady stream of changes holds nobody up.
        Changed keys are taken in order of first change and retries only when there are none, so counting
        is enough: everything of now has been written once that many objects have been.
        """
        target = self._taken + len(self._subscription)
        while self._ended < target:
            await self._pulse.wait()

    async def settled(self, key: K) -> Status:
        """Wait until `key` is no longer pending; return what became of it (never raises for a failure)."""
        while (status := self.status(key)).kind is Kind.PENDING:
            await self._pulse.wait()
        return status

    def touch(self, keys: Iterable[K]) -> None:
        """Write these again: something beside the table that their writing depends on has changed."""
        for key in keys:
            self._subscription.mark(key)

    def poke(self) -> None:
        """Re-assert everything soon: somebody is known to have changed the target."""
        self._refresh_due = 0.0
        self._prune_due = 0.0
        self._subscription.poke()

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            await self._wait_for_work()
            now = time.monotonic()
            if now >= self._refresh_due:
                self._refresh(now)
            await self._work(self._subscription.take(self.batch) or self._due_retries(now))
            # Or a target that never waits would write a whole table before anybody else may run.
            await asyncio.sleep(0)
            if not len(self._subscription) and self.table.in_sync and time.monotonic() >= self._prune_due:
                await self._prune()

    async def _wait_for_work(self) -> None:
        if len(self._subscription):
            return
        self._subscription.take(0)
        due = [failure.due for failure in self._failures.values()]
        due.append(self._refresh_due)
        if self.table.in_sync:
            due.append(self._prune_due)
        pause = min(due) - time.monotonic()
        if pause > 0:
            # Not wait_for: Python 3.11's forgets a cancellation that meets the result.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._subscription.wait()

    def _refresh(self, now: float) -> None:
        self._subscription.mark_many(self.table.keys())
        self._refresh_due = now + jittered(self.refresh_s)

    def _due_retries(self, now: float) -> list[K]:
        return [key for key, failure in self._failures.items() if failure.due <= now][: self.batch]

    async def _work(self, keys: list[K]) -> None:
        if not keys:
            return
        self._in_work = set(keys)
        self._taken += len(keys)
        try:
            updates = self.table.get_many(keys)
            deletes = [] if len(updates) == len(keys) else [key for key in keys if key not in self.table]
            failed = {
                **await self._attempt("update", updates, [key for key, _ in updates]),
                **await self._attempt("delete", deletes, deletes),
            }
            self._record(keys, failed)
            self.sentence = f"{len(updates)} updated, {len(deletes)} deleted, {len(failed)} failed"
        finally:
            self._in_work = set()
            self._ended += len(keys)
            # Wake everybody who waits, then make the next ones wait for the next batch.
            self._pulse.set()
            self._pulse = asyncio.Event()

    async def _attempt(self, verb: str, argument: Sequence[object], keys: Sequence[K]) -> dict[K, Exception]:
        if not argument:
            return {}
        try:
            failed = dict(await getattr(self.operations, verb)(argument))
        except Exception as error:  # noqa: BLE001 - a target may fail in any way; none may end the loop
            failed = dict.fromkeys(keys, error)
        outcome = metrics.RECONCILER_OBJECTS.labels(self.name, verb, "success")
        outcome.inc(len(keys) - len(failed))
        if failed:
            metrics.RECONCILER_OBJECTS.labels(self.name, verb, "failure").inc(len(failed))
        return failed

    def _record(self, keys: Sequence[K], failed: Mapping[K, Exception]) -> None:
        if failed or self._failures:
            self._note_outcomes(keys, failed)
        metrics.RECONCILER_ERRORS.labels(self.name).set(len(self._failures))

    def _note_outcomes(self, keys: Sequence[K], failed: Mapping[K, Exception]) -> None:
        now = time.monotonic()
        for key in keys:
            error = failed.get(key)
            if error is None:
                if self._failures.pop(key, None) is not None:
                    logger.info("{}: {} is in place again", self.name, key)
                continue
            failure = self._failures.get(key)
            if failure is None:
                failure = self._failures[key] = _Failure(str(error), time.time(), now)
                logger.error("{}: {} failed: {}", self.name, key, error)
            failure.error = str(error)
            failure.due = now + failure.backoff.next()

    async def _prune(self) -> None:
        try:
            removed = await self.operations.prune(self.table)
        except Exception as error:  # noqa: BLE001 - as above
            logger.error("{}: prune failed: {}", self.name, error)
            self._prune_due = time.monotonic() + jittered(RETRY_CAP_S)
            return
        self._prune_due = time.monotonic() + jittered(self.prune_s)
        self.has_pruned = True
        self.pruned_total += removed
        if removed:
            metrics.RECONCILER_OBJECTS.labels(self.name, "prune", "success").inc(removed)
            logger.info("{}: {} objects that no source wants were removed", self.name, removed)
