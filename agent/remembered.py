# SPDX-License-Identifier: Apache-2.0
"""What this agent knew of etcd, kept on disk and restored before etcd is asked.

    follower ──▶ source of a table ──▶ View ──▶ views.db
                        ▲                          │
                        └──────── restore ─────────┘

A restarted agent must not take "etcd has no policies" for the truth: a store that was wiped while it was away
looks just like that, and enforcing it would let everything pass.  So the last view is restored and is in
force, and the watch goes on from its place: what was deleted meanwhile is delivered as a deletion and counts
at once.  Where that history is gone (compacted, another cluster), a list is compared with the restored view,
and what it lacks stays for the grace period, as everywhere.

Written is what has changed, every few seconds, in one transaction with the place at which it stands.  Where
the file has no addresses (the first start of a version that keeps them, a damaged file), those of the pinned
map are restored instead; it does not say where in etcd's history it stands, so they are listed.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from itertools import repeat
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Any, Generic, TypeVar

from loguru import logger

from agent.errors import CheckpointDamaged
from agent.ipcache import NOWHERE, Record
from agent.policies import Document
from agent.policy_sources import PolicyKeys
from agent.viewfile import BLOCKS, NO_CLUSTER, Part, Place, Row, Shape, ViewFile, blocks_of
from core.errors import shorten
from core.table import Source
from datapath.addresses import pack_ip
from datapath.errors import DatapathError
from datapath.maps import IpcacheMap
from datapath.records import IpcacheEntry
from identity.labels import Labels
from identity.numbers import HOST, LOCAL_FLAG, is_global
from kvstore import schema
from kvstore.sink import TableSink
from kvstore.watcher import Follower, Item

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

ADDRESSES = Shape(
    # But for the last digit, and the length of the prefix.
    "addresses",
    together=len("0/32"),
    prefix=str,
    identity=int,
    host_ip=str,
    encrypt_key=int,
    metadata=str,
    space=str,
)
IDENTITIES = Shape("identities", number=int, labels=str)
NODES = Shape("nodes", name=str, record=str)
POLICIES = Shape("policies", key=str, text=str)
SHAPES = (ADDRESSES, IDENTITIES, NODES, POLICIES)

# Seconds between two looks at what has changed; policies are looked at more often.
WRITE_S, POLICIES_S = 5.0, 0.2
# That etcd still says the same is written this often, seconds: how stale a restored view is, is told by it.
CONFIRMED_S = 60.0
# Seconds of CPU that a row takes and a block that it is merged into, and the share of a core that writing may
# have: the first list of 300 000 addresses is written after a minute, what a usual day changes after five
# seconds.
ROW_S, BLOCK_S, SHARE = 2.5e-6, 8e-5, 0.02
# Rows taken, or made, before anybody else may run: a few milliseconds.
TAKEN_AT_ONCE, MADE_AT_ONCE = 1000, 2000


class View(ABC, Generic[K, V]):
    """One followed prefix on its way to the disk and back."""

    def __init__(self, shape: Shape, follower: Follower, sink: TableSink[K, V]) -> None:
        self.shape = shape
        self.follower = follower
        self.source = sink.source
        self.changes = sink.source.subscribe()
        self.written = Place()
        self.written_at = time.monotonic()

    @abstractmethod
    def rows(self, keys: Sequence[K]) -> dict[K, Row]:
        """Return the rows of these keys, but for those that have none."""

    @abstractmethod
    def items(self, rows: dict[K, Row]) -> list[Any]:
        """Return rows as `take` wants them.  Raises CheckpointDamaged.  In the file's thread."""

    @abstractmethod
    async def take(self, items: list[Any]) -> bool:
        """Give what rows said to the source; False when some of it could not be used."""

    @property
    def place(self) -> Place:
        """Where the view stands now: at least there, for the source may be ahead by a part of a batch.

        While a view of a lost history waits to be listed, what changes is followed, and kept as well.
        """
        cursor, written = self.follower.cursor, self.written
        if cursor.must_list and written.revision > 0:
            return Place(written.revision, NO_CLUSTER, written.confirmed)
        confirmed = time.time() - self.follower.age()
        return Place(cursor.revision, cursor.cluster_id, confirmed, cursor.witness)

    @property
    def is_due(self) -> bool:
        """True when there is something to write; a view is not whole before its list is."""
        now, written = self.place, self.written
        moved = (now.revision, now.cluster_id) != (written.revision, written.cluster_id)
        unsaid = now.confirmed - written.confirmed > CONFIRMED_S
        return now.revision > 0 and (bool(len(self.changes)) or moved or unsaid)

    @property
    def is_affordable(self) -> bool:
        """True when so much time has passed since the last write that this one is a small part of it."""
        rows = len(self.changes)
        cost = rows * ROW_S + min(rows, BLOCKS) * BLOCK_S
        return time.monotonic() - self.written_at >= cost / SHARE

    def taken(self, place: Place) -> None:
        """All rows were given to the source: the view is whole and stands at `place`."""
        self.changes.take()
        self.written = place
        self.source.mark_complete()
        age = max(0.0, time.time() - place.confirmed)  # the clock may have been set back
        self.follower.resume(place.revision, place.cluster_id, age=age, witness=place.witness)

    def mark_all(self) -> None:
        """Nothing of this view is on disk."""
        self.written = Place()
        self.changes.mark_many(self.source.entries())


class KeyedView(View[K, V]):
    """Records that come back by the way on which they came: as keys and values of etcd.

    `text` says what is written of a record, `item` which key and value of etcd it was.
    """

    def __init__(
        self,
        shape: Shape,
        follower: Follower,
        sink: TableSink[K, V],
        text: Callable[[K, V], str],
        item: Callable[[K, str], Item],
    ) -> None:
        super().__init__(shape, follower, sink)
        self._sink = sink
        self._text = text
        self._item = item

    def rows(self, keys: Sequence[K]) -> dict[K, Row]:
        entries, text = self.source.entries(), self._text
        missing, held = self.source.missing, self.source.held
        return {
            key: (text(key, record), key in missing or key in held)
            for key in keys
            if (record := entries.get(key)) is not None
        }

    def items(self, rows: dict[K, Row]) -> list[Item]:
        return [self._item(key, text) for key, (text, _) in rows.items()]

    async def take(self, items: list[Item]) -> bool:
        await self.follower.deliver(items)
        return not self._sink.ignored


class AddressView(View[str, Record]):
    """Addresses, by the hundred thousand: not as etcd wrote them, but as the table has them."""

    def __init__(self, follower: Follower, sink: TableSink[str, Record]) -> None:
        super().__init__(ADDRESSES, follower, sink)

    def rows(self, keys: Sequence[str]) -> dict[str, Row]:
        entries, missing, held = self.source.entries(), self.source.missing, self.source.held
        # A call for each takes as long again.
        return {
            key: (
                each.identity,
                each.host_ip,
                each.key,
                each.metadata,
                each.space,
                key in missing or key in held,
            )
            for key in keys
            if (each := entries.get(key)) is not None
        }

    def items(self, rows: dict[str, Row]) -> list[tuple[str, Record]]:
        return _records(rows)

    async def take(self, items: list[tuple[str, Record]]) -> bool:
        for start in range(0, len(items), TAKEN_AT_ONCE):
            self.source.upsert_many(items[start : start + TAKEN_AT_ONCE])
            await asyncio.sleep(0)
        return True


def identity_view(follower: Follower, sink: TableSink[int, Labels]) -> View[int, Labels]:
    return KeyedView(
        IDENTITIES,
        follower,
        sink,
        text=lambda _, labels: labels.serialized,
        item=lambda number, labels: (f"{schema.IDENTITY_IDS}{number}", labels.encode()),
    )


def node_view(follower: Follower, sink: TableSink[str, schema.NodeRecord]) -> View[str, schema.NodeRecord]:
    return KeyedView(
        NODES,
        follower,
        sink,
        text=lambda _, record: schema.encode_node(record).decode(),
        item=lambda name, record: (schema.NODES + name, record.encode()),
    )


def policy_view(follower: Follower, keys: PolicyKeys) -> View[str, Document]:
    return KeyedView(
        POLICIES,
        follower,
        keys,
        text=lambda key, _: keys.text(key),
        item=lambda key, text: (key, text.encode()),
    )


class Remembered:
    """All views and their file.  `grace`: seconds for which a record stays that the last list lacked.

    `trouble` says why nothing is written; `damage` what was wrong with the file that this life found.
    """

    def __init__(self, file: ViewFile, *, grace: float) -> None:
        self.trouble = ""
        self.damage = ""
        self.written_at = 0.0
        self.views: list[View[Any, Any]] = []
        self._file = file
        self._grace = grace
        self._found = False  # a file with views
        self._usable = False  # one that can be written
        self._lock = asyncio.Lock()  # a file that is set aside is nobody's in the middle of his work
        # One thread: a transaction that was broken off is undone before the next one begins.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="views")

    async def open(self) -> None:
        """Open the file.  Whatever is wrong with it is told, and the start goes on without it."""
        try:
            self._found = await self._do(self._file.open)
            self._usable = True
        except CheckpointDamaged as error:
            await self._put_aside(error)
        except (OSError, sqlite3.Error) as error:
            self._tell(f"{self._file.path} can not be opened: {error}")
            if isinstance(error, sqlite3.Error):
                await self._open_to_read()

    async def _open_to_read(self) -> None:
        """On a full disk what is known is restored all the same, and written when there is room."""
        try:
            self._found = await self._do(self._file.open_to_read)
        except (CheckpointDamaged, OSError, sqlite3.Error) as error:
            logger.error("checkpoint {} can not be read either: {}", self._file.path, error)

    @property
    def resumable(self) -> int:
        """Return the revision from which the next life can follow everything; 0 where it has to list."""
        stands = [view.written.revision for view in self.views]
        return min(stands) if len(stands) == len(SHAPES) else 0

    @property
    def has_views(self) -> bool:
        """True when the last life left views that can be read."""
        return self._found

    async def restore(self, view: View[Any, Any]) -> bool:
        """Give a view to its source as if etcd had delivered it, and have it followed from where it stands.

        Returns False where there is none, or no whole one.
        """
        if view not in self.views:
            self.views.append(view)
        async with self._lock:
            return self._found and await self._restore(view)

    async def _restore(self, view: View[Any, Any]) -> bool:
        began, whole = time.monotonic(), True
        until = began + self._grace
        try:
            place = await self._do(self._file.place, view.shape)
            chunks = self._chunks(view)
            coming = self._do(next, chunks, None)
            with view.source.unheard(view.changes):  # what comes from the file is no change
                while (found := await coming) is not None:
                    coming = self._do(next, chunks, None)  # read while these are taken
                    items, missing = found
                    whole &= await view.take(items)
                    view.source.mark_missing(missing, until)
        except CheckpointDamaged as error:
            await self._put_aside(error)
            return False
        except (OSError, sqlite3.Error) as error:
            self._tell(f"{view.shape.name} can not be read from {self._file.path}: {error}")
            view.mark_all()
            return False
        if not whole or place.revision <= 0:
            view.mark_all()
            return False
        view.taken(place)
        logger.info(
            "{} {} restored as of revision {} in {:.2f} s",
            len(view.source),
            view.shape.name,
            place.revision,
            time.monotonic() - began,
        )
        return True

    def _chunks(self, view: View[K, Any]) -> Iterator[tuple[list[Any], list[K]]]:
        """Yield what the file has of a view, some at a time, and which keys of it were missing."""
        for rows in self._file.rows(view.shape):
            try:
                items = view.items(rows)
            except ValueError as error:
                raise CheckpointDamaged(f"{view.shape.name}: {error}") from error
            yield items, [key for key, row in rows.items() if row[-1]]

    async def run(self) -> None:
        """Write what changes until cancelled."""
        while True:
            await asyncio.sleep(POLICIES_S)
            # Not wait_for: Python 3.11's forgets a cancellation that meets the result.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_S):
                    await self._policies_change()
            await self.write(all_of_it=False)
            if self._policies_wait:  # the disk is full, say: not five times a second
                await asyncio.sleep(WRITE_S)

    @property
    def _policies_wait(self) -> bool:
        return any(view.shape is POLICIES and len(view.changes) > 0 for view in self.views)

    async def _policies_change(self) -> None:
        """Return when a policy has changed: the next life enforces what the file says before etcd answers."""
        for view in self.views:
            if view.shape is POLICIES:
                await view.changes.wait()
                return
        await asyncio.Event().wait()

    async def write(self, *, all_of_it: bool = True) -> None:
        """Write what has changed since the last time, or what of it is worth its cost by now.

        What can not be written is tried again.
        """
        async with self._lock:
            await self._write(all_of_it=all_of_it)

    async def _write(self, *, all_of_it: bool) -> None:
        due = [(each, each.place) for each in self.views if each.is_due and (all_of_it or each.is_affordable)]
        if not due:
            return
        taken: list[tuple[View[Any, Any], list[Any]]] = []
        try:
            if not self._usable:
                await self._do(self._file.open)
                self._usable = True
                for view in self.views:
                    view.mark_all()
            await self._do(self._file.begin)
            for view, place in due:
                keys = view.changes.take()
                taken.append((view, keys))
                if view.written.revision <= 0:  # nothing of what the file has is known to hold
                    await self._do(self._file.clear, view.shape)
                await self._write_keys(view, keys)
                await self._do(self._file.stand, view.shape, place)
            await self._do(self._file.commit)
        except BaseException as error:
            for view, keys in taken:
                view.changes.mark_many(keys)
            if isinstance(error, CheckpointDamaged) or type(error) is sqlite3.DatabaseError:
                await self._put_aside(error)
            elif isinstance(error, OSError | sqlite3.Error):
                await self._do(self._file.undo)
                self._tell(f"{self._file.path} can not be written: {error}")
            else:
                raise
            return
        for view, place in due:
            view.written, view.written_at = place, time.monotonic()
        self.written_at, self.trouble = time.time(), ""

    def close(self) -> None:
        """Close the file, with what was written."""
        self._thread.submit(self._file.close)
        self._thread.shutdown()

    async def _write_keys(self, view: View[K, V], keys: Sequence[K]) -> None:
        parts: list[Part] = []
        size = 0
        for block, some in await self._do(blocks_of, view.shape, keys):
            parts.append(Part(block, some, view.rows(some)))
            size += len(some)
            if size >= MADE_AT_ONCE:
                await self._do(self._file.merge, view.shape, parts)
                parts, size = [], 0
        await self._do(self._file.merge, view.shape, parts)

    async def _put_aside(self, error: BaseException) -> None:
        """Begin a new file in place of a damaged one; everything known is written anew."""
        self._found = self._usable = False
        for view in self.views:
            view.mark_all()
        try:
            kept = await self._do(self._file.set_aside)
            await self._do(self._file.open)
        except (OSError, sqlite3.Error) as problem:
            self._tell(f"{self._file.path} is damaged ({error}) and can not be replaced: {problem}")
            return
        self._usable = True
        self.damage = f"{self._file.path} was damaged ({error}); kept as {kept}, etcd is listed instead"
        logger.error("checkpoint {}", self.damage)

    def _tell(self, trouble: str) -> None:
        if trouble != self.trouble:
            logger.error("checkpoint {}", trouble)
        self.trouble = trouble

    def _do(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _records(rows: dict[str, Row]) -> list[tuple[str, Record]]:
    """Return rows as the table has them.  Raises CheckpointDamaged for what this agent has not written."""
    identities = [row[0] for row in rows.values()]
    if not identities:
        return []
    if min(identities) <= 0 or max(identities) >= LOCAL_FLAG or HOST in identities:
        raise CheckpointDamaged("addresses: an identity is one that etcd can not have said")
    _check_prefixes(rows)
    intern = sys.intern
    return [
        (prefix, Record(identity, intern(host), key, metadata, intern(space)))
        for prefix, (identity, host, key, metadata, space, _) in rows.items()
    ]


def _check_prefixes(prefixes: Collection[str]) -> None:
    # Single IPv4 addresses, which nearly all are, without a call of ours for each.
    if "".join([prefix[-3:] for prefix in prefixes]) == "/32" * len(prefixes):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in it
            deque(map(inet_pton, repeat(AF_INET), [prefix[:-3] for prefix in prefixes]), maxlen=0)
            return
    for prefix in prefixes:
        _check_prefix(prefix)


def _check_prefix(prefix: str) -> None:
    address, _, length = prefix.partition("/")
    family, most = (AF_INET6, 128) if ":" in address else (AF_INET, 32)
    try:
        # One spelling only, or no deletion would ever find it.
        if inet_ntop(family, inet_pton(family, address)) != address or str(int(length)) != length:
            raise ValueError("not in canonical form")
        if int(length) != most:
            ip_network(prefix)
    except (OSError, ValueError) as error:
        raise CheckpointDamaged(f"addresses: {shorten(prefix)}: {error}") from error


# --- without a file


async def restore_pinned(source: Source[str, Record], ipcache: IpcacheMap, pools: Iterable[str]) -> int:
    """Take the pinned map's entries of other machines as if etcd had delivered them; return how many."""
    chunks, own = ipcache.item_chunks(), [_bounds(pool) for pool in pools]
    restored = 0
    try:
        while (entries := await asyncio.to_thread(next, chunks, None)) is not None:
            records = list(_foreign(entries, own))
            source.upsert_many(records)
            restored += len(records)
    except DatapathError as error:
        logger.warning("addresses can not be restored from the pinned map: {}", error)
    return restored


def _foreign(
    entries: Iterable[tuple[str, IpcacheEntry]], own: Sequence[tuple[bytes, bytes]]
) -> Iterator[tuple[str, Record]]:
    for prefix, entry in entries:
        if is_global(entry.identity) and not _within(prefix, own):
            yield prefix, Record(entry.identity, _behind(entry), entry.key)


def _bounds(pool: str) -> tuple[bytes, bytes]:
    network = ip_network(pool)
    return network.network_address.packed, network.broadcast_address.packed


def _behind(entry: IpcacheEntry) -> str:
    """Return the host that an entry of the map says its address is behind."""
    return "" if entry.tunnel_endpoint == NOWHERE else entry.tunnel_endpoint


def _within(prefix: str, pools: Iterable[tuple[bytes, bytes]]) -> bool:
    address = pack_ip(prefix.partition("/")[0])
    return any(len(first) == len(address) and first <= address <= last for first, last in pools)
