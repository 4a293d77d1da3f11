# SPDX-License-Identifier: Apache-2.0
"""What is known about identities on this host: number → labels, and labels → number.

One table with three sources: ``reserved`` (built in), ``local`` (address prefixes, fed by
`identity.local`) and ``kvstore`` (this module, as the sink of ``identities/v1/id/``).  Rights in etcd
are rights on keys, so a record is used only when its number may be in etcd at all: nobody redefines
``world`` or a local number from there.  What can not be used is counted, reported once, and leaves the
last good record in force.

Called by the agent (which follows the prefix into it), allocator and the API.  No I/O.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from loguru import logger

from core import metrics
from core.errors import HoldfastError, shorten
from core.table import Source, Subscription, Table
from identity.errors import NumberError
from identity.labels import Labels
from identity.numbers import RESERVED, is_global
from kvstore import schema
from kvstore.errors import RecordError

RESERVED_SOURCE = "reserved"
LOCAL_SOURCE = "local"
KVSTORE_SOURCE = "kvstore"

# What a relist lacks stays this long: as long as a restored agent needs to write its own keys again.
GRACE_S = 600.0
# How many unusable records are remembered by key for `status`; the metric counts all.
IGNORED_SHOWN = 100


class IdentityCache:
    """The identity table with its reverse lookup.  Is a `kvstore.watcher.Sink`; belongs to the loop."""

    def __init__(self, *, grace: float = GRACE_S) -> None:
        self.table: Table[int, Labels] = Table("identities", (RESERVED_SOURCE, LOCAL_SOURCE, KVSTORE_SOURCE))
        self.ignored: dict[str, str] = {}
        self.revision = 0
        self._grace = grace
        self._index = _ReverseIndex(self.table)
        self._kvstore = self.table.source(KVSTORE_SOURCE)
        self._fill_reserved()

    @property
    def local(self) -> Source[int, Labels]:
        """The source that `LocalIdentities` feeds."""
        return self.table.source(LOCAL_SOURCE)

    def get(self, number: int) -> Labels | None:
        """Return the labels of a number."""
        return self.table.get(number)

    def number_of(self, labels: Labels, within: range | None = None) -> int | None:
        """Return the lowest known number of exactly these labels, of those in `within` if given."""
        candidates = self._index.numbers(labels)
        if within is not None:
            candidates = tuple(number for number in candidates if number in within)
        return min(candidates, default=None)

    def restore(self, identities: Mapping[int, Labels]) -> None:
        """Take identities of a checkpoint as if the kvstore had delivered them; the source stays unsynced."""
        for number, labels in identities.items():
            if is_global(number):
                self._kvstore.upsert(number, labels)

    # --- kvstore.watcher.Sink of identities/v1/id/

    def listed(self, items: dict[str, bytes], revision: int) -> None:
        """Merge a full list: what it lacks is missing for the grace, not deleted."""
        found: dict[int, Labels] = {}
        for key, value in items.items():
            record = self._parse(key, value)
            if record is not None:
                found[record[0]] = record[1]
            else:
                found.update(self._last_good(key))
        missing = self._kvstore.relist(found, grace=self._grace)
        self.revision = revision
        if missing:
            logger.warning("a list of {} identities lacks {} known ones; kept", len(found), missing)
        self._count()

    def put(self, key: str, value: bytes) -> None:
        record = self._parse(key, value)
        if record is not None:
            self.ignored.pop(key, None)
            self._kvstore.upsert(*record)
            self._count()

    def deleted(self, key: str) -> None:
        self.ignored.pop(key, None)
        for number in self._last_good(key):
            self._kvstore.delete(number)
        self._count()

    def in_sync(self) -> None:
        self._kvstore.mark_in_sync()

    def expire(self, now: float | None = None) -> list[int]:
        """Delete the identities that stayed missing for the whole grace; return their numbers."""
        ended = self._kvstore.expire(time.monotonic() if now is None else now)
        self._count()
        return ended

    def _fill_reserved(self) -> None:
        reserved = self.table.source(RESERVED_SOURCE)
        for number, labels in RESERVED.items():
            reserved.upsert(number, labels)
        reserved.mark_in_sync()
        metrics.IDENTITY_COUNT.labels(RESERVED_SOURCE).set(len(RESERVED))

    def _parse(self, key: str, value: bytes) -> tuple[int, Labels] | None:
        try:
            return _parse_record(key, value)
        except HoldfastError as error:
            self._ignore(key, error)
            return None

    def _ignore(self, key: str, error: HoldfastError) -> None:
        count_ignored(schema.IDENTITY_IDS, error)
        if key not in self.ignored and len(self.ignored) < IGNORED_SHOWN:
            self.ignored[key] = error.message
            logger.warning("record {} is ignored: {}", shorten(key), error)

    def _last_good(self, key: str) -> dict[int, Labels]:
        # A key without a number never had a record.
        try:
            number = schema.parse_identity_id_key(key)
        except HoldfastError:
            return {}
        labels = self._kvstore.entries().get(number)
        return {} if labels is None else {number: labels}

    def _count(self) -> None:
        metrics.IDENTITY_COUNT.labels(KVSTORE_SOURCE).set(len(self._kvstore))


class _ReverseIndex:
    """Labels → numbers, derived from the table: brought up to date by the table's changes when asked."""

    def __init__(self, table: Table[int, Labels]) -> None:
        self._table = table
        self._changes: Subscription[int] = table.subscribe()
        self._numbers: dict[str, tuple[int, ...]] = {}
        self._labels: dict[int, str] = {}

    def numbers(self, labels: Labels) -> tuple[int, ...]:
        for number in self._changes.take():
            self._update(number)
        return self._numbers.get(labels.serialized, ())

    def _update(self, number: int) -> None:
        old = self._labels.pop(number, None)
        if old is not None:
            rest = tuple(each for each in self._numbers[old] if each != number)
            if rest:
                self._numbers[old] = rest
            else:
                del self._numbers[old]
        labels = self._table.get(number)
        if labels is not None:
            text = self._labels[number] = labels.serialized
            self._numbers[text] = (*self._numbers.get(text, ()), number)


def count_ignored(prefix: str, error: HoldfastError) -> None:
    """Count a record of the kvstore that is not used; the reasons are a small fixed set."""
    reason = error.kind if isinstance(error, RecordError) else type(error).__name__
    metrics.KVSTORE_RECORDS_IGNORED.labels(prefix, reason).inc()


def _parse_record(key: str, value: bytes) -> tuple[int, Labels]:
    number, text = schema.parse_identity_id(key, value)
    if not is_global(number):
        raise NumberError(f"identity {number} in {shorten(key)} is not a number that etcd may define")
    labels = Labels.parse(text)
    if not len(labels):
        raise NumberError(f"identity {number} in {shorten(key)} has no labels")
    return number, labels
