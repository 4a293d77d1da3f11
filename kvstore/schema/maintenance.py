# SPDX-License-Identifier: Apache-2.0
"""What the maintenance of each etcd member tells of itself: holdfast/maintenance/v1/<member>, JSON.

Written by `kvstore.maintenance` beside the member, read by `holdfast kvstore status` anywhere.  Without a
lease: of a machine that is gone it stays known when its last snapshot was.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from core.errors import shorten
from kvstore.errors import RecordError
from kvstore.schema import codec
from kvstore.schema.keys import MAINTENANCE, name_of


class SnapshotRecord(msgspec.Struct, frozen=True):
    """A snapshot that was verified: its file, bytes, and what of etcd is in it."""

    name: str
    taken: datetime
    size: int
    revision: int
    keys: int


class DefragmentationRecord(msgspec.Struct, frozen=True):
    """An attempt: bytes of the database before and after, or the `error` by which it ended."""

    at: datetime
    seconds: float
    before: int
    after: int
    error: str = ""


class MaintenanceRecord(msgspec.Struct, frozen=True):
    """`doing` is the last round's sentence, `trouble` what a person has to look after (empty: nothing)."""

    member: str
    seen: datetime
    doing: str = ""
    trouble: str = ""
    snapshot: SnapshotRecord | None = None
    defragmentation: DefragmentationRecord | None = None


_decoder = msgspec.json.Decoder(MaintenanceRecord)


def encode_maintenance(record: MaintenanceRecord) -> bytes:
    return codec.encode(record)


def parse_maintenance(key: str, value: bytes) -> MaintenanceRecord:
    """Return the record; RecordError when it can not be used or is not about the key's member."""
    name = name_of(key, MAINTENANCE)
    record = codec.decode(_decoder, key, value)
    if record.member != name:
        raise RecordError(key, f"it speaks of {shorten(record.member)!r}", kind="mismatch")
    return record
