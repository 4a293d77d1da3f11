# SPDX-License-Identifier: Apache-2.0
"""The allocator: from labels to the number that the whole cluster uses for them.

    allocate(labels) ─▶ used here already? ─▶ known from the cache? ─▶ one transaction ─▶ number
                              │                     │
                              └── counted           └── settled in the background

Each set of labels in use on this host is one `_Use` with a count.  *Settling* makes etcd agree with it:
id/<N> and our own value/ key exist while the count is positive, the value/ key is gone when it is not.
Everything that goes wrong (a lost lease, a deleted key, a restart, an etcd that was away) ends in
settling again; now and then all of them are read back.  If the store has another number than this
host took from its cache or checkpoint, the store's wins and `on_renumbered` is told.

Called by the agent; it runs `Allocator.run` as a task.  Belongs to the loop's thread.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from loguru import logger

from core import metrics
from core.backoff import Backoff, cluster_interval, jittered
from core.errors import shorten
from core.waiting import waiting
from identity import transactions
from identity.attempt import Attempt
from identity.cache import IdentityCache
from identity.errors import AllocationFailed, LabelError, RangeExhausted
from identity.labels import Labels
from identity.numbers import RESERVED, allocation_range
from identity.transactions import Slot
from kvstore import schema
from kvstore.client import Client
from kvstore.errors import KvstoreError
from kvstore.group import GroupCommit
from kvstore.ops import KeyValue, delete_op, lease_is
from kvstore.session import SYNC_S, Session

T = TypeVar("T")

# Identities read back in one transaction: two reads each, etcd allows 128 operations.
VERIFIED_AT_ONCE = 32

Renumbered = Callable[[Labels, int, int], None]


@dataclass(eq=False)
class _Use:
    """One set of labels in use here.  `lock` orders what is done about it in etcd; `adopted`: the session
    has our value/ key."""

    slot: Slot
    number: int = 0
    count: int = 0
    adopted: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Allocator:
    """See the module's text.  `owner` is this node's address, as it stands in value/ keys.

    Everything is read back every `sync` seconds, a period that grows with the `nodes` of the cluster.
    """

    def __init__(
        self,
        client: Client,
        session: Session,
        cache: IdentityCache,
        *,
        owner: str,
        cluster_id: int = 0,
        on_renumbered: Renumbered | None = None,
        sync: float = SYNC_S,
        nodes: Callable[[], int] = lambda: 1,
        rng: random.Random | None = None,
    ) -> None:
        self.range = allocation_range(cluster_id)
        self._client = client
        self._group = GroupCommit(client)
        self._session = session
        self._cache = cache
        self._owner = owner
        self._on_renumbered = on_renumbered
        self._sync = sync
        self._nodes = nodes
        self._rng = rng or random.Random()
        self._uses: dict[Labels, _Use] = {}
        self._by_number: dict[int, _Use] = {}
        self._unsettled: dict[_Use, None] = {}
        self._wake = asyncio.Event()
        cache.on_listed.append(self.verify_all)
        cache.on_deleted.append(self._deleted)

    # --- what callers do

    async def allocate(self, labels: Labels) -> int:
        """Return the number of `labels` and count one use of it; the same number for the same labels.

        Known labels are answered at once, without etcd.  For new ones this waits for etcd as long as it
        takes.  Raises LabelError for no labels, RangeExhausted, AllocationFailed, and KvstoreError when
        etcd refuses (no permission).
        """
        reserved = _RESERVED_NUMBERS.get(labels)
        if reserved is not None:
            return reserved
        use = self._use(labels)
        use.count += 1
        try:
            if not use.number:
                await self._number(use)
        except BaseException:
            # Cancelled or failed: the transaction may have happened, so settle what is left of it.
            self._drop(use)
            raise
        return use.number

    def restore(self, labels: Labels, number: int) -> bool:
        """Count one use of an identity that a checkpoint knows; etcd is asked in the background.

        Returns False, and counts nothing, for a number that this cluster does not hand out or when the
        labels have another number already: `allocate` them.
        """
        if number not in self.range or not len(labels):
            return False
        use = self._use(labels)
        if use.number not in (0, number):
            return False
        self._renumber(use, number)
        use.count += 1
        self._settle_later(use)
        return True

    async def release(self, labels: Labels) -> None:
        """Count one use less; after the last one our value/ key is deleted in the background.

        id/<N> stays: garbage collection takes it.  Releasing what is not in use is logged and ignored.
        """
        if labels in _RESERVED_NUMBERS:
            return
        use = self._uses.get(labels)
        if use is None or use.count <= 0:
            logger.error("identity of {} is released but not in use", shorten(labels.serialized))
            return
        self._drop(use)

    def in_use(self) -> Mapping[Labels, int]:
        """Return the labels in use on this host with their numbers."""
        return {labels: use.number for labels, use in self._uses.items() if use.count > 0 and use.number}

    def count(self, labels: Labels) -> int:
        """Return how many uses are counted."""
        use = self._uses.get(labels)
        return use.count if use else 0

    def value_keys(self) -> set[str]:
        """Return our value/ keys that are, will be or may be in etcd: of what is used, asked for or ends."""
        return {use.slot.value_key for use in self._uses.values()}

    def verify_all(self) -> None:
        """Have every identity in use read back from etcd now."""
        for use in self._uses.values():
            if use.number:  # else it is being asked for at this moment
                self._settle_later(use)

    # --- the background

    async def run(self) -> None:
        """Settle what needs it, at once, and everything now and then.  Never returns."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_cache(), name="identity:follow-cache")
            tasks.create_task(self._verify_periodically(), name="identity:verify")
            await self._settle_forever()

    async def settle(self) -> None:
        """Do everything that is outstanding once; raises the first error, the rest stays outstanding."""
        while self._unsettled:
            batch = list(itertools.islice(self._unsettled, VERIFIED_AT_ONCE))
            for use in batch:
                del self._unsettled[use]
            try:
                whole = await self._read_back([use for use in batch if use.count and use.number])
            except BaseException:
                self._unsettled.update(dict.fromkeys(batch))
                raise
            await _all(self._settle_one(use) for use in batch if use not in whole)

    async def _settle_forever(self) -> None:
        backoff = Backoff(base=0.1, cap=60.0)
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.settle()
                backoff.reset()
            except (KvstoreError, AllocationFailed, RangeExhausted) as error:
                logger.warning("{} identities are not settled in etcd: {}", len(self._unsettled), error)
                await asyncio.sleep(backoff.next())
                self._wake.set()

    async def _verify_periodically(self) -> None:
        while True:
            await asyncio.sleep(jittered(cluster_interval(self._sync, self._nodes())))
            self.verify_all()

    async def _follow_cache(self) -> None:
        """Notice at once when the store says something else about an identity that is in use here."""
        changes = self._cache.table.subscribe()
        try:
            while True:
                await changes.wait()
                for number in changes.take():
                    self._verify(number)
        finally:
            self._cache.table.unsubscribe(changes)

    def _verify(self, number: int) -> None:
        use = self._by_number.get(number)
        if use is not None and self._cache.get(number) != use.slot.labels:
            self._settle_later(use)

    def _deleted(self, number: int) -> None:
        """etcd has lost a number, whatever the cache still says of it."""
        use = self._by_number.get(number)
        if use is not None:
            self._settle_later(use)

    def _settle_later(self, use: _Use) -> None:
        self._unsettled[use] = None
        self._wake.set()

    async def _read_back(self, uses: list[_Use]) -> set[_Use]:
        """Return those whose keys in etcd are all right, and have the session look after them."""
        if not uses:
            return set()
        lease = self._session.lease_id
        pairs = [(use.slot, use.number) for use in uses]
        result = await self._client.txn(*transactions.read(pairs))
        whole: set[_Use] = set()
        for use, (slot, number), answers in zip(uses, pairs, _chunks(result.responses, 2), strict=True):
            id_item, value_item = (_first(answer.items) for answer in answers)
            good = transactions.intact(slot, number, lease, id_item, value_item) and use.number == number
            if good and value_item is not None:
                await self._adopt(use, value_item.mod_revision)
                whole.add(use)
        return whole

    async def _settle_one(self, use: _Use) -> None:
        async with use.lock:
            try:
                if use.count > 0:
                    await self._obtain(use)
                else:
                    await self._give_back(use)
            except BaseException:
                self._unsettled[use] = None
                raise

    async def _give_back(self, use: _Use) -> None:
        if use.adopted:
            use.adopted = False
            await self._session.disown(use.slot.value_key)
        else:
            # An allocation that was cancelled: its transaction may have been the last word.
            key = use.slot.value_key
            await self._client.txn([lease_is(key, self._session.lease_id)], [delete_op(key)])
        if use.count > 0:
            # Allocated again while the deletion was under way.
            self._settle_later(use)
        elif self._uses.get(use.slot.labels) is use:
            del self._uses[use.slot.labels]
            self._by_number.pop(use.number, None)

    # --- one identity

    def _use(self, labels: Labels) -> _Use:
        if not len(labels):
            raise LabelError("an identity needs at least one label")
        use = self._uses.get(labels)
        if use is None:
            use = self._uses[labels] = _Use(Slot(labels, self._owner))
        return use

    def _drop(self, use: _Use) -> None:
        use.count -= 1
        if use.count == 0:
            self._settle_later(use)

    def _renumber(self, use: _Use, number: int) -> int:
        """Give a use its number and return the one it had."""
        old, use.number = use.number, number
        self._by_number.pop(old, None)
        self._by_number[number] = use
        return old

    async def _number(self, use: _Use) -> None:
        known = self._cache.number_of(use.slot.labels, self.range)
        if known is not None:
            self._renumber(use, known)
            metrics.IDENTITY_ALLOCATIONS.labels("cached").inc()
            self._settle_later(use)
            return
        async with use.lock:
            if not use.number:
                await self._obtain(use)

    async def _obtain(self, use: _Use) -> None:
        """Make the store hold this identity for us.  With `use.lock` held."""
        try:
            attempt = Attempt(
                self._client,
                use.slot,
                self.range,
                lease=self._lease,
                known=self._cache.table.__contains__,
                commit=self._group.txn,
                rng=self._rng,
            )
            answer = await attempt.run(use.number)
        except Exception:
            metrics.IDENTITY_ALLOCATIONS.labels("error").inc()
            raise
        metrics.IDENTITY_ALLOCATIONS.labels("stored").inc()
        old = self._renumber(use, answer.number)
        await self._adopt(use, answer.revision)
        if old and old != use.number:
            logger.warning("identity {} of {} is {} in etcd, which counts", old, use.slot.text, use.number)
            if self._on_renumbered is not None:
                self._on_renumbered(use.slot.labels, old, use.number)

    async def _adopt(self, use: _Use, revision: int) -> None:
        """Have the session keep our value/ key, written at `revision`, alive and in place."""
        use.adopted = True
        value = schema.encode_identity_value(use.number)
        await self._session.adopt(use.slot.value_key, value, revision)

    async def _lease(self) -> int:
        """Return the session's lease; wait for the first one, and for a new one when it is lost."""
        if self._session.lease_id:
            return self._session.lease_id
        with waiting("etcd", "a lease"):
            return await self._session.ready()


_RESERVED_NUMBERS = {labels: number for number, labels in RESERVED.items()}


def _first(items: Sequence[KeyValue]) -> KeyValue | None:
    return items[0] if items else None


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Do all of it, then raise the first error."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
