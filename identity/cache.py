# SPDX-License-Identifier: Apache-2.0
"""What is known about identities on this host: number → labels, and labels → number.

One table with three sources: ``reserved`` (built in), ``local`` (address prefixes, fed by
`identity.local`) and ``kvstore`` (this module, as the sink of ``identities/v1/id/``).  Rights in etcd
are rights on keys, so a record is used only when its number may be in etcd at all: nobody redefines
``world`` or a local number from there.  What can not be used is counted, reported once, and leaves the
last good record in force.

Called by the agent (which follows `schema.IDENTITY_IDS` into it), allocator and the API.  No I/O.
"""

from __future__ import annotations

from collections.abc import Callable

from core import metrics
from core.table import Source, Subscription, Table
from identity.errors import LabelError
from identity.labels import Labels
from identity.numbers import RESERVED, is_global
from kvstore import schema
from kvstore.errors import RecordError
from kvstore.sink import GRACE_S, TableSink

RESERVED_SOURCE = "reserved"
LOCAL_SOURCE = "local"
KVSTORE_SOURCE = "kvstore"


class IdentityCache(TableSink[int, Labels]):
    """The identity table with its reverse lookup.  Is a `kvstore.watcher.Sink`; belongs to the loop."""

    def __init__(self, *, grace: float = GRACE_S, hold: float = 0.0) -> None:
        self.table: Table[int, Labels] = Table("identities", (RESERVED_SOURCE, LOCAL_SOURCE, KVSTORE_SOURCE))
        super().__init__(
            self.table.source(KVSTORE_SOURCE),
            parse_record,
            schema.parse_identity_id_key,
            grace=grace,
            hold=hold,
        )
        # What the table does not tell: a full list (what it lacks is kept, so nothing changes), and a
        # deletion: it may be held, and of a number that was made and deleted before it was seen here.
        self.on_listed: list[Callable[[], None]] = []
        self.on_deleted: list[Callable[[int], None]] = []
        self._index = _ReverseIndex(self.table)
        self._fill_reserved()
        for source in self.table.sources:
            metrics.IDENTITY_COUNT.labels(source.name).set_function(source.__len__)

    @property
    def local(self) -> Source[int, Labels]:
        """The source that `LocalIdentities` feeds."""
        return self.table.source(LOCAL_SOURCE)

    def get(self, number: int) -> Labels | None:
        """Return the labels of a number."""
        return self.table.get(number)

    def number_of(self, labels: Labels, within: range | None = None) -> int | None:
        """Return the lowest known number of exactly these labels, of those in `within` if given.

        One that etcd has no more only where there is no other.
        """
        candidates = self._index.numbers(labels)
        if within is not None:
            candidates = tuple(number for number in candidates if number in within)
        there = [number for number in candidates if not self.table.is_doubtful(number)]
        return min(there or candidates, default=None)

    async def listed(self, revision: int) -> None:
        await super().listed(revision)
        for tell in self.on_listed:
            tell()

    def deleted(self, key: str) -> None:
        super().deleted(key)
        try:
            number = schema.parse_identity_id_key(key)
        except RecordError:
            return  # nobody can be using it
        for tell in self.on_deleted:
            tell(number)

    def _fill_reserved(self) -> None:
        reserved = self.table.source(RESERVED_SOURCE)
        for number, labels in RESERVED.items():
            reserved.upsert(number, labels)
        reserved.mark_in_sync()


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


def parse_record(key: str, value: bytes) -> tuple[int, Labels]:
    """Return (number, labels) of a key under id/; RecordError when it can not be used."""
    number, text = schema.parse_identity_id(key, value)
    if not is_global(number):
        raise RecordError(key, "the number is reserved, nobody may define it", kind="key")
    try:
        labels = Labels.parse(text)
    except LabelError as error:
        raise RecordError(key, error.message) from error
    return number, labels
