# SPDX-License-Identifier: Apache-2.0
"""The sink that feeds a table: parses records, keeps the last good one, reports the bad ones.

Used by: whoever follows a prefix into a `core.table.Table` (identities, ip→identity, nodes, policies).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from loguru import logger

from core import metrics
from core.table import Listing, Source
from kvstore.errors import RecordError
from kvstore.schema.keys import scope_of
from kvstore.watch import CONFIRM_S

K = TypeVar("K")
V = TypeVar("V")

# Seconds for which a record that a relist lacks is kept; owners re-create theirs within seconds.
GRACE_S = 600.0
# Seconds for which a deletion is held that may be a loss: the end of a lease, or a stranger's slip.  Owners
# write their keys again at once, those of many within ten seconds (kvstore.session).
HOLD_S = CONFIRM_S
# Marked as missing before anybody else may run: some milliseconds.
MARKED_AT_ONCE = 2000
# So many bad records are remembered (for status) and logged one by one.
REMEMBERED = 100


class TableSink(Generic[K, V]):
    """Turns keys and values into entries of one source of a table.

    `parse` returns the table's key and record, `key_of` only the key (a deletion has no value); both
    raise RecordError.  `ignored` maps a bad key to the reason, for as long as it is bad.  Deletions count
    after `hold` seconds, if the record has not come back and nobody keeps it (`Source.hold`).
    """

    def __init__(
        self,
        source: Source[K, V],
        parse: Callable[[str, bytes], tuple[K, V]],
        key_of: Callable[[str], K],
        *,
        grace: float = GRACE_S,
        hold: float = 0.0,
    ) -> None:
        self.source = source
        self.ignored: dict[str, str] = {}
        self._parse = parse
        self._key_of = key_of
        self._grace = grace
        self._hold = hold
        self._listing: Listing[K, V] | None = None

    def begin_list(self) -> None:
        self.ignored.clear()
        self._listing = self.source.listing()

    def take(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Take records into the table; a bad one keeps what was good of it before."""
        records, errors = self._read(items)
        if self._listing is not None:
            self._listing.add(records)
        else:
            self.source.upsert_many(records)
        if self.ignored:
            bad = {error.key for error in errors}
            for key, _ in items:
                if key not in bad:
                    self.ignored.pop(key, None)
        for error in errors:
            self._ignore(error)
            self._keep_last_good(error.key)

    def _read(self, items: Sequence[tuple[str, bytes]]) -> tuple[list[tuple[K, V]], list[RecordError]]:
        parse, records, errors = self._parse, [], []
        for key, value in items:
            try:
                records.append(parse(key, value))
            except RecordError as error:
                errors.append(error)
        return records, errors

    def put(self, key: str, value: bytes) -> None:
        """Take one record."""
        self.take([(key, value)])

    async def listed(self, revision: int) -> None:
        """The list is whole: what it lacks is missing from now on."""
        listing, self._listing = self._listing, None
        if listing is None:
            return
        until, lacked, missing = time.monotonic() + self._grace, listing.lacked(), 0
        while part := list(islice(lacked, MARKED_AT_ONCE)):
            missing += self.source.mark_missing(part, until)
            await asyncio.sleep(0)
        if missing:
            logger.warning(
                "{}: the list at revision {} lacks {} known records; kept for {:.0f} s",
                self.source.name,
                revision,
                missing,
                self._grace,
            )

    def deleted(self, key: str) -> None:
        self.ignored.pop(key, None)
        try:
            entry = self._key_of(key)
        except RecordError:
            return  # it was never in the table
        if self._hold > 0 and self._may_be_lost(entry):
            self.source.hold(entry, time.monotonic() + self._hold)
        else:
            self.source.delete(entry)

    def _may_be_lost(self, entry: K) -> bool:
        """Return whether an entry may have been deleted by somebody or something else than its owner."""
        return True

    def in_sync(self) -> None:
        self.source.mark_in_sync()

    def _keep_last_good(self, key: str) -> None:
        if self._listing is not None:
            with contextlib.suppress(RecordError):
                self._listing.keep(self._key_of(key))

    def _ignore(self, error: RecordError) -> None:
        metrics.KVSTORE_RECORDS_IGNORED.labels(scope_of(error.key), error.kind).inc()
        known = self.ignored.get(error.key) == error.reason
        if len(self.ignored) < REMEMBERED:
            self.ignored[error.key] = error.reason
            if not known:
                logger.warning("{}", error)
