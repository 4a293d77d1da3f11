# SPDX-License-Identifier: Apache-2.0
"""The sink that feeds a table: parses records, keeps the last good one, reports the bad ones.

Used by: whoever follows a prefix into a `core.table.Table` (identities, ip→identity, nodes, policies).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from loguru import logger

from core import metrics
from core.table import Source
from kvstore.errors import RecordError
from kvstore.schema.keys import scope_of

K = TypeVar("K")
V = TypeVar("V")

# Seconds for which a record that a relist lacks is kept; owners re-create theirs within seconds.
GRACE_S = 600.0
# So many bad records are remembered (for status) and logged one by one.
REMEMBERED = 100


class TableSink(Generic[K, V]):
    """Turns keys and values into entries of one source of a table.

    `parse` returns the table's key and record, `key_of` only the key (a deletion has no value); both
    raise RecordError.  `ignored` maps a bad key to the reason, for as long as it is bad.
    """

    def __init__(
        self,
        source: Source[K, V],
        parse: Callable[[str, bytes], tuple[K, V]],
        key_of: Callable[[str], K],
        *,
        grace: float = GRACE_S,
    ) -> None:
        self.source = source
        self.ignored: dict[str, str] = {}
        self._parse = parse
        self._key_of = key_of
        self._grace = grace

    def listed(self, items: dict[str, bytes], revision: int) -> None:
        """Merge a full list; a bad record keeps what was good of it before."""
        self.ignored.clear()
        records: dict[K, V] = {}
        for key, value in items.items():
            try:
                name, record = self._parse(key, value)
                records[name] = record
            except RecordError as error:
                self._ignore(error)
                self._keep_last_good(key, records)
        missing = self.source.relist(records, grace=self._grace)
        if missing:
            logger.warning(
                "{}: the list at revision {} lacks {} known records; kept for {:.0f} s",
                self.source.name,
                revision,
                missing,
                self._grace,
            )

    def put(self, key: str, value: bytes) -> None:
        try:
            name, record = self._parse(key, value)
        except RecordError as error:
            self._ignore(error)
            return
        self.ignored.pop(key, None)
        self.source.upsert(name, record)

    def deleted(self, key: str) -> None:
        self.ignored.pop(key, None)
        try:
            self.source.delete(self._key_of(key))
        except RecordError:
            return  # it was never in the table

    def in_sync(self) -> None:
        self.source.mark_in_sync()

    def _keep_last_good(self, key: str, records: dict[K, V]) -> None:
        try:
            name = self._key_of(key)
        except RecordError:
            return
        old = self.source.entries().get(name)
        if old is not None:
            records.setdefault(name, old)

    def _ignore(self, error: RecordError) -> None:
        metrics.KVSTORE_RECORDS_IGNORED.labels(scope_of(error.key), error.kind).inc()
        known = self.ignored.get(error.key) == error.reason
        if len(self.ignored) < REMEMBERED:
            self.ignored[error.key] = error.reason
            if not known:
                logger.warning("{}", error)
