# SPDX-License-Identifier: Apache-2.0
"""From etcd keys to tables: what the watches of `ip/v1/` and `nodes/v1/` deliver.

A record that can not be used (garbage, wrong types, an address that differs from its key) is counted,
reported once, and leaves the last good record of that key in force.  What a relist lacks stays for the
grace period.  Sinks are synchronous and belong to the loop; `kvstore.watcher.follow` calls them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from loguru import logger

from agent.ipcache import Record
from core import metrics
from core.errors import HoldfastError, shorten
from core.table import Source
from identity.numbers import HOST, REMOTE_NODE
from kvstore import schema

K = TypeVar("K")
V = TypeVar("V")

# How many unusable records are remembered by key for `status`; the metric counts all.
IGNORED_SHOWN = 100


class TableSink(Generic[K, V]):
    """Feeds one source of one table from one prefix.

    `parse(key, value)` returns the record, `table_key(key)` its key in the table; both raise HoldfastError
    for what can not be used.  Two etcd keys may mean one table key (an address in two address spaces): the
    last writer counts, and only the deletion of the last writer's key is a deletion.
    """

    def __init__(
        self,
        prefix: str,
        source: Source[K, V],
        table_key: Callable[[str], K],
        parse: Callable[[str, bytes], V],
        grace: float,
    ) -> None:
        self.prefix = prefix
        self.ignored: dict[str, str] = {}
        self._source = source
        self._table_key = table_key
        self._parse = parse
        self._grace = grace
        self._home = ""  # the first address space seen; last writers elsewhere are remembered by key
        self._last_writer: dict[K, str] = {}

    def listed(self, items: Mapping[str, bytes], revision: int) -> None:
        """Merge a full list: what it lacks is missing for the grace, not deleted."""
        found: dict[K, V] = {}
        for key, value in items.items():
            table_key = self._key(key)
            if table_key is None:
                continue
            record = self._record(key, value)
            if record is None:
                record = self._source.entries().get(table_key)
            if record is not None:
                found[table_key] = record
                self._note_writer(table_key, key)
        missing = self._source.relist(found, grace=self._grace)
        if missing:
            logger.warning(
                "{}: the list lacks {} known records; kept for {:g} s", self.prefix, missing, self._grace
            )
        self._count()

    def put(self, key: str, value: bytes) -> None:
        table_key = self._key(key)
        record = None if table_key is None else self._record(key, value)
        if table_key is not None and record is not None:
            self._note_writer(table_key, key)
            self._source.upsert(table_key, record)

    def deleted(self, key: str) -> None:
        self.ignored.pop(key, None)
        table_key = self._key(key)
        if table_key is None or self._writer(table_key) != _space(key):
            return
        self._last_writer.pop(table_key, None)
        self._source.delete(table_key)

    def in_sync(self) -> None:
        self._source.mark_in_sync()

    def expire(self) -> int:
        """Delete what stayed missing for the whole grace; return how many."""
        ended = self._source.expire(time.monotonic())
        self._count()
        return len(ended)

    def _key(self, key: str) -> K | None:
        try:
            return self._table_key(key)
        except HoldfastError as error:
            self._ignore(key, error)
            return None

    def _record(self, key: str, value: bytes) -> V | None:
        try:
            record = self._parse(key, value)
        except HoldfastError as error:
            self._ignore(key, error)
            return None
        self.ignored.pop(key, None)
        return record

    def _note_writer(self, table_key: K, key: str) -> None:
        space = _space(key)
        self._home = self._home or space
        if space != self._home:
            self._last_writer[table_key] = space
        elif self._last_writer:
            self._last_writer.pop(table_key, None)

    def _writer(self, table_key: K) -> str:
        return self._last_writer.get(table_key, self._home)

    def _ignore(self, key: str, error: HoldfastError) -> None:
        metrics.KVSTORE_RECORDS_IGNORED.labels(self.prefix, type(error).__name__).inc()
        if key not in self.ignored and len(self.ignored) < IGNORED_SHOWN:
            self.ignored[key] = error.message
            logger.warning("record {} is ignored: {}", shorten(key), error)

    def _count(self) -> None:
        metrics.KVSTORE_MISSING.labels(self.prefix).set(len(self._source.missing))


def ip_prefix(key: str) -> str:
    """Return the prefix of an ip/v1 key as the ip→identity table writes it."""
    return schema.ip_prefix_of_key(key)


def ip_record(key: str, value: bytes) -> Record:
    """Return the record of an ip/v1 entry; an identity `host` of another node is a remote node."""
    found = schema.parse_ip(key, value)
    identity = REMOTE_NODE if found.identity == HOST else found.identity
    return Record(identity, found.host_ip, found.key, found.metadata)


def _space(key: str) -> str:
    """Return what the same table key may differ in: the first part behind the version."""
    return key.partition("/v1/")[2].partition("/")[0]
