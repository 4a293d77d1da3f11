# SPDX-License-Identifier: Apache-2.0
"""holdfast/pools/v1/<cluster>/<prefix>: which node a pool of addresses belongs to.

JSON: {"Pool":"10.50.2.0/24","Node":"host-b"}.  Not on a lease: a host that is away keeps its pool until
somebody releases it.  The key that ends at the cluster's name counts claims of other sizes than the
cluster's own (see `kvstore.pools`).
"""

from __future__ import annotations

import ipaddress

import msgspec

from core.errors import shorten
from kvstore.errors import RecordError
from kvstore.schema import codec
from kvstore.schema.keys import POOLS


class PoolRecord(msgspec.Struct, frozen=True):
    """One claim."""

    pool: str = msgspec.field(name="Pool")
    node: str = msgspec.field(name="Node")


_decoder = msgspec.json.Decoder(PoolRecord)


def encode_pool(record: PoolRecord, old: bytes | None = None) -> bytes:
    """Return the record as JSON, with the fields of `old` that this version does not know."""
    return codec.rewrite(record, old)


def parse_pool(key: str, value: bytes) -> PoolRecord:
    """Return the claim; RecordError when it can not be used or is not about the key's pool."""
    cluster, slash, prefix = key[len(POOLS) :].partition("/")
    if not key.startswith(POOLS) or not cluster or not slash or not prefix:
        raise RecordError(key, "is not pools/v1/<cluster>/<prefix>", kind="key")
    record = codec.decode(_decoder, key, value)
    if record.pool != prefix:
        raise RecordError(key, f"it speaks of {shorten(record.pool)!r}", kind="mismatch")
    try:
        ipaddress.IPv4Network(prefix)
    except ValueError as error:
        raise RecordError(key, f"Pool: {shorten(str(error))}") from error
    return record
