# SPDX-License-Identifier: Apache-2.0
"""Tables: desired state, fed by sources, read by reconcilers.

    sources ──▶ Table ──▶ subscriptions ──▶ reconcilers ──▶ kernel / kvstore

A `Table` maps keys to frozen records.  It is fed by named `Source`s in a fixed order of precedence:
where two sources speak of one key, the first in the order wins and the other becomes visible when
the first lets go.  Each source keeps its own dict, so a table of 300 000 entries costs one dict entry
an object and nothing per source.

A source lists, then watches, then says it is *in sync*.  One that was restored from a checkpoint is
*complete* before that: what it holds was the whole truth once.  Losing a source never empties a table:

* `Source.delete` (a deletion that a watch delivered) counts at once;
* `Source.hold` is for a deletion that may be a loss: the record stays for a while, in which it may come back;
* `Source.relist` (a fresh full list) keeps what the list lacks as *missing* until a grace period has
  passed and `expire` is called: a wiped or half-restored store looks exactly like that.

Everything here is synchronous and belongs to the event loop's thread; a change costs one dict
operation plus one set insertion per subscription.  A hundred thousand records come in slices
(`upsert_many`, `Listing.add`) between which the loop runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Deadlines(dict[K, float]):
    """Records and when their time ends, monotonic seconds.  While none has ended nobody looks at all."""

    _first = float("inf")  # nothing ends before

    def put(self, keys: Collection[K], until: float) -> None:
        """Have the time of these end then."""
        self.update(dict.fromkeys(keys, until))
        self._first = min(self._first, until)

    def ended(self, now: float) -> list[K]:
        """Return the records whose time has ended."""
        if now < self._first:
            return []
        ended = [key for key, until in self.items() if until <= now]
        if not ended:
            self._first = min(self.values(), default=float("inf"))
        return ended


class Source(Generic[K, V]):
    """One feeder of a table.  Created by `Table.source`; owned by the task that feeds it."""

    def __init__(self, table: Table[K, V], name: str, rank: int) -> None:
        self.name = name
        self.rank = rank
        self.in_sync = False
        self.complete = False
        self.missing: Deadlines[K] = Deadlines()
        self.held: Deadlines[K] = Deadlines()
        self._table = table
        self._entries: dict[K, V] = {}
        self._subscriptions: list[Subscription[K]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Mapping[K, V]:
        """Return this source's own entries (a live view; do not change it)."""
        return self._entries

    def upsert(self, key: K, value: V) -> None:
        """Insert or replace one record; an equal record is not a change."""
        if self.missing or self.held:
            self._found_again((key,))
        old = self._entries.get(key)
        if old is not None and old == value:
            return
        self._entries[key] = value
        self._changed((key,))
        self._table._changed(key, self.rank)

    def upsert_many(self, items: Collection[tuple[K, V]]) -> None:
        """Insert or replace many records, in their order."""
        changed = self._merged(items)
        if self.missing or self.held:
            self._found_again([key for key, _ in items])
        if changed:
            self._changed(changed)
            self._table._changed_many(changed, self.rank)

    def _merged(self, items: Collection[tuple[K, V]]) -> list[K]:
        """Put records in and return the keys of those that are new or different."""
        entries, keys = self._entries, [key for key, _ in items]
        if entries.keys().isdisjoint(keys):  # as in a first list
            entries.update(items)
            return keys
        changed = []
        for key, value in items:
            if entries.get(key) != value:
                entries[key] = value
                changed.append(key)
        return changed

    def delete(self, key: K) -> None:
        """Remove one record because its source said so.  Removing what is not there is no change."""
        self.missing.pop(key, None)
        self.held.pop(key, None)
        if self._entries.pop(key, None) is not None:
            self._changed((key,))
            self._table._changed(key, self.rank)

    def hold(self, key: K, until: float) -> None:
        """Take a deletion that may be a loss: the record is held until then, monotonic seconds."""
        if key in self._entries:
            self.missing.pop(key, None)
            self.held.put([key], until)
            self._doubted([key])

    def relist(self, listed: Mapping[K, V], *, grace: float, now: float | None = None) -> int:
        """Merge a full list that is at hand; see `Listing`, which takes it in parts."""
        listing = self.listing()
        listing.add(listed.items())
        return listing.end(grace=grace, now=now)

    def listing(self) -> Listing[K, V]:
        """Begin to merge a full list that comes in parts."""
        return Listing(self)

    def due(self, now: float, *, heard: float = float("inf"), missing: bool = True) -> list[K]:
        """Return the records that are held (or `missing`) and whose time has ended.

        `heard` is when the source spoke last: what is held ends only once it has spoken after that end.
        """
        ended = self.held.ended(min(now, heard))
        return ended + self.missing.ended(now) if missing else ended

    def doubted_until(self, key: K) -> float:
        """Return when the time of a record ends that is held or missing; infinity for others."""
        return self.held.get(key, self.missing.get(key, float("inf")))

    def keep(self, keys: Collection[K], until: float) -> None:
        """Have records that are held or missing stay until then, as missing."""
        held = self.held.keys() & keys
        for key in held:
            del self.held[key]
        self.missing.put([key for key in keys if key in held or key in self.missing], until)
        self._changed(held)

    def expire(self, now: float | None = None) -> list[K]:
        """Delete the records whose time has ended; return their keys."""
        ended = self.due(time.monotonic() if now is None else now)
        self.remove(ended)
        return ended

    def remove(self, keys: Collection[K]) -> None:
        """Remove many records."""
        for key in keys:
            self.missing.pop(key, None)
            self.held.pop(key, None)
        gone = [key for key in keys if self._entries.pop(key, None) is not None]
        self._changed(gone)
        self._table._changed_many(gone, self.rank)

    def mark_missing(self, keys: Iterable[K], until: float) -> int:
        """Say that the last full list lacked these: they are kept until then (monotonic seconds).

        Returns how many are newly missing: those that were, or are held, have a time already.
        """
        entries, missing, held = self._entries, self.missing, self.held
        fresh = [key for key in keys if key in entries and key not in missing and key not in held]
        missing.put(fresh, until)
        self._doubted(fresh)
        return len(fresh)

    def mark_complete(self) -> None:
        """Say that this source has delivered a whole view, be it an old one: good enough to be enforced."""
        if not self.complete:
            self.complete = True
            self._table._source_advanced()

    def mark_in_sync(self) -> None:
        """Say that everything this source knew at its start has been delivered."""
        if not self.in_sync:
            self.in_sync = self.complete = True
            self._table._source_advanced()

    def subscribe(self) -> Subscription[K]:
        """Return a subscription to what this source says, whether another one hides it or not.

        It starts with nothing as changed.  That a record is missing, or no longer, is a change here.
        """
        subscription: Subscription[K] = Subscription(iter(()))
        self._subscriptions.append(subscription)
        return subscription

    @contextlib.contextmanager
    def unheard(self, subscription: Subscription[K]) -> Iterator[None]:
        """Have a subscription hear nothing in the block: its owner is who speaks."""
        self._subscriptions.remove(subscription)
        try:
            yield
        finally:
            self._subscriptions.append(subscription)

    def _changed(self, keys: Collection[K]) -> None:
        if not keys:
            return
        for subscription in self._subscriptions:
            subscription.mark_many(keys)

    def _found_again(self, keys: Collection[K]) -> None:
        """Records that were missing or held are there."""
        found = [key for key in keys if key in self.missing or key in self.held]
        for key in found:
            self.missing.pop(key, None)
            self.held.pop(key, None)
        self._doubted(found)

    def _doubted(self, keys: list[K]) -> None:
        """Say that records are held or missing, or no longer: who has better ones may take those."""
        if keys:
            self._changed(keys)
            self._table._changed_many(keys, self.rank)


class Listing(Generic[K, V]):
    """A full list on its way into a source: each part is in force at once, the end tells what is missing.

    A list that breaks off is dropped; the next one begins with what the source holds by then.
    """

    def __init__(self, source: Source[K, V]) -> None:
        self._source = source
        self._unseen = set(source._entries)

    def add(self, items: Collection[tuple[K, V]]) -> None:
        """Upsert a part of the list."""
        if self._unseen:
            self._unseen.difference_update([key for key, _ in items])
        self._source.upsert_many(items)

    def keep(self, key: K) -> None:
        """Say that the list holds `key`, with a record that can not be used: the last one stays."""
        self._unseen.discard(key)
        self._source._found_again((key,))

    def lacked(self) -> Iterator[K]:
        """Yield what the list lacked, once it is whole."""
        return (key for key in self._unseen if key in self._source._entries)

    def end(self, *, grace: float, now: float | None = None) -> int:
        """Mark what the list lacked as missing until now + `grace` s; return how many are newly missing.

        With `grace` 0 they are deleted at once (for sources that are the truth themselves, such as the
        local engine).  All at once: a list of hundred thousands is ended in slices (kvstore.sink).
        """
        at, lacked = time.monotonic() if now is None else now, list(self.lacked())
        if grace > 0:
            return self._source.mark_missing(lacked, at + grace)
        self._source.remove(lacked)
        return len(lacked)


class Subscription(Generic[K]):
    """The keys that changed since they were last taken, coalesced, in order of first change."""

    def __init__(self, keys: Iterator[K]) -> None:
        self._dirty: dict[K, None] = dict.fromkeys(keys)
        self._wake = asyncio.Event()
        if self._dirty:
            self._wake.set()

    def __len__(self) -> int:
        return len(self._dirty)

    def __contains__(self, key: K) -> bool:
        return key in self._dirty

    def mark(self, key: K) -> None:
        """Take `key` as changed."""
        self._dirty[key] = None
        self._wake.set()

    def mark_many(self, keys: Iterable[K]) -> None:
        """Take many keys as changed."""
        if self._dirty:
            self._dirty.update(dict.fromkeys(keys))
        else:
            self._dirty = dict.fromkeys(keys)
        self._wake.set()

    async def wait(self) -> None:
        """Return when there is at least one changed key or the subscription was poked."""
        await self._wake.wait()

    def poke(self) -> None:
        """Wake the waiter without a change (a source came in sync, a retry is due)."""
        self._wake.set()

    def take(self, limit: int | None = None) -> list[K]:
        """Return and forget up to `limit` changed keys."""
        if limit is None or limit >= len(self._dirty):
            taken = list(self._dirty)
            self._dirty.clear()
        else:
            taken = list(itertools.islice(self._dirty, limit))
            for key in taken:
                del self._dirty[key]
        if not self._dirty:
            self._wake.clear()
        return taken


class Table(Generic[K, V]):
    """Desired state: `sources` names who may feed it, highest precedence first."""

    def __init__(self, name: str, sources: Sequence[str]) -> None:
        self.name = name
        self.revision = 0
        self._sources: list[Source[K, V]] = [Source(self, each, rank) for rank, each in enumerate(sources)]
        self._by_name = {source.name: source for source in self._sources}
        self._subscriptions: list[Subscription[K]] = []
        self._all_in_sync = asyncio.Event()
        self._size = (-1, 0)  # as of a revision

    def source(self, name: str) -> Source[K, V]:
        """Return the source called `name`; KeyError for one that was not declared."""
        return self._by_name[name]

    @property
    def sources(self) -> Sequence[Source[K, V]]:
        return self._sources

    @property
    def in_sync(self) -> bool:
        """True when every declared source is in sync: only then may anything be pruned."""
        return all(source.in_sync for source in self._sources)

    @property
    def complete(self) -> bool:
        """True when every declared source has delivered a whole view, be it a checkpoint's."""
        return all(source.complete for source in self._sources)

    async def wait_in_sync(self) -> None:
        await self._all_in_sync.wait()

    def __len__(self) -> int:
        revision, size = self._size
        if revision != self.revision:  # what is hidden takes milliseconds to count, and status asks often
            size = sum(len(source) - len(self._hidden(rank)) for rank, source in enumerate(self._sources))
            self._size = (self.revision, size)
        return size

    def __contains__(self, key: K) -> bool:
        for source in self._sources:  # noqa: SIM110 - asked for each of 300 000 entries: half the time of any()
            if key in source._entries:
                return True
        return False

    def get(self, key: K) -> V | None:
        """Return the effective record of `key`: the one of the highest-ranking source that has it."""
        for source in self._sources:
            value = source._entries.get(key)
            if value is not None:
                return value
        return None

    def get_many(self, keys: Sequence[K]) -> list[tuple[K, V]]:
        """Return the effective records of those of `keys` that have one, those of higher sources first."""
        found: list[tuple[K, V]] = []
        for source in self._sources:
            entries = source._entries
            if not entries.keys().isdisjoint(keys):
                own = [(key, value) for key in keys if (value := entries.get(key)) is not None]
                found += own
                if len(own) == len(keys):
                    break
                keys = [key for key in keys if key not in entries]
        return found

    def owner(self, key: K) -> str | None:
        """Return the name of the source whose record of `key` is in effect."""
        for source in self._sources:
            if key in source._entries:
                return source.name
        return None

    def is_doubtful(self, key: K) -> bool:
        """True when the effective record of `key` is held or missing: it may be gone."""
        for source in self._sources:
            if key in source._entries:
                return key in source.held or key in source.missing
        return False

    def keys(self) -> Iterator[K]:
        # Not by a generator over the records: who subscribes, and who has all looked at again, asks for all.
        return iter(dict.fromkeys(chain.from_iterable(source._entries for source in self._sources)))

    def items(self) -> Iterator[tuple[K, V]]:
        for rank, source in enumerate(self._sources):
            hidden = self._hidden(rank)
            if hidden:
                yield from (item for item in source._entries.items() if item[0] not in hidden)
            else:
                yield from source._entries.items()

    def _hidden(self, rank: int) -> set[K]:
        """Return the keys of a source of which a higher one speaks too."""
        own = self._sources[rank]._entries.keys()
        return set().union(*(own & higher._entries.keys() for higher in self._sources[:rank]))

    def subscribe(self) -> Subscription[K]:
        """Return a subscription that starts with every present key as changed."""
        subscription = Subscription(self.keys())
        self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription[K]) -> None:
        self._subscriptions.remove(subscription)

    def _changed(self, key: K, rank: int) -> None:
        for higher in self._sources[:rank]:
            if key in higher._entries:
                return
        self.revision += 1
        for subscription in self._subscriptions:
            subscription.mark(key)

    def _changed_many(self, keys: list[K], rank: int) -> None:
        for higher in self._sources[:rank]:
            if not higher._entries.keys().isdisjoint(keys):
                keys = [key for key in keys if key not in higher._entries]
        if keys:
            self.revision += len(keys)
            for subscription in self._subscriptions:
                subscription.mark_many(keys)

    def _source_advanced(self) -> None:
        if self.in_sync:
            self._all_in_sync.set()
        if self.complete:
            for subscription in self._subscriptions:
                subscription.poke()
