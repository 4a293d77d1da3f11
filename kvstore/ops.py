# SPDX-License-Identifier: Apache-2.0
"""Values that requests are made of: key-values, operations, conditions; and their form on the wire.

Pure.  A transaction reads as a sentence::

    await client.txn([absent(key), range_absent(prefix)], [put_op(key, labels)], [list_op(prefix)])

Used by: kvstore.client and everybody who writes transactions (identity.allocator, kvstore.session).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from kvstore.etcd_pb2 import Compare as PbCompare
from kvstore.etcd_pb2 import KeyValue as PbKeyValue
from kvstore.etcd_pb2 import (
    RequestOp,
    ResponseOp,
    TxnRequest,
    TxnResponse,
)

# etcd refuses a transaction of more operations (its --max-txn-ops) or of more bytes (1.5 MiB).
MAX_TXN_OPS = 128
MAX_TXN_BYTES = 1 << 20


class KeyValue(msgspec.Struct, frozen=True, gc=False):
    """One key of etcd.  A key that is not UTF-8 carries its odd bytes as surrogates, both ways."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    lease: int
    version: int


class Op(msgspec.Struct, frozen=True, gc=False):
    """One operation of a transaction; the kinds are Put, Delete, Get and Nested."""

    key: str


class Write(Op, frozen=True, gc=False):
    """An operation that changes something: Put or Delete."""


class Put(Write, frozen=True, gc=False):
    value: bytes
    lease: int = 0


class Delete(Write, frozen=True, gc=False):
    prefix: bool = False


class Get(Op, frozen=True, gc=False):
    """Read one key, or with `prefix` up to `limit` (0: all) keys that start with it."""

    prefix: bool = False
    limit: int = 0
    keys_only: bool = False


class Nested(Op, frozen=True):
    """A transaction as an operation of another: its conditions choose its own branch and no other's.

    `key` stands for it in messages.  etcd decides all conditions before it runs any branch.
    """

    compares: Sequence[Compare]
    success: Sequence[Op]
    failure: Sequence[Op]


class Compare(msgspec.Struct, frozen=True, gc=False):
    """A condition: `target` `result` `operand`, for one key or (`prefix`) for every key of a range."""

    key: str
    target: int
    result: int
    operand: int | bytes
    prefix: bool = False


class OpResult(msgspec.Struct, frozen=True):
    """What one operation of a transaction answered: keys read, number deleted, or the nested one's."""

    items: tuple[KeyValue, ...] = ()
    deleted: int = 0
    nested: TxnResult | None = None


class TxnResult(msgspec.Struct, frozen=True):
    """`succeeded`: all conditions held.  `revision`: etcd's after it.  One response an operation."""

    succeeded: bool
    revision: int
    responses: tuple[OpResult, ...]


# --- conditions


def absent(key: str) -> Compare:
    """`key` does not exist."""
    return Compare(key, PbCompare.CREATE, PbCompare.EQUAL, 0)


def range_absent(prefix: str) -> Compare:
    """No key that starts with `prefix` exists."""
    return Compare(prefix, PbCompare.CREATE, PbCompare.EQUAL, 0, prefix=True)


def exists(key: str) -> Compare:
    """`key` exists."""
    return Compare(key, PbCompare.CREATE, PbCompare.GREATER, 0)


def mod_is(key: str, revision: int) -> Compare:
    """`key` was last modified at `revision`."""
    return Compare(key, PbCompare.MOD, PbCompare.EQUAL, revision)


def range_older_than(prefix: str, revision: int) -> Compare:
    """No key that starts with `prefix` was written after `revision`."""
    return Compare(prefix, PbCompare.MOD, PbCompare.LESS, revision + 1, prefix=True)


def older_than(key: str, revision: int) -> Compare:
    """`key` was not written after `revision`; it need not exist."""
    return Compare(key, PbCompare.MOD, PbCompare.LESS, revision + 1)


def created_is(key: str, revision: int) -> Compare:
    """`key` was created at `revision`."""
    return Compare(key, PbCompare.CREATE, PbCompare.EQUAL, revision)


def value_is(key: str, value: bytes) -> Compare:
    """`key` exists with this value."""
    return Compare(key, PbCompare.VALUE, PbCompare.EQUAL, value)


def lease_is(key: str, lease: int) -> Compare:
    """`key` exists and hangs on `lease`."""
    return Compare(key, PbCompare.LEASE, PbCompare.EQUAL, lease)


# --- operations


def put_op(key: str, value: bytes | str, lease: int = 0) -> Put:
    return Put(key, value.encode() if isinstance(value, str) else value, lease)


def delete_op(key: str) -> Delete:
    return Delete(key)


def delete_prefix_op(prefix: str) -> Delete:
    return Delete(prefix, prefix=True)


def get_op(key: str) -> Get:
    return Get(key)


def list_op(prefix: str, *, limit: int = 0, keys_only: bool = False) -> Get:
    return Get(prefix, True, limit, keys_only)


def txn_op(compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> Nested:
    return Nested(touched([*success, *failure], compares), compares, success, failure)


def write_batches(
    ops: Iterable[Write], *, max_ops: int = MAX_TXN_OPS, max_bytes: int = MAX_TXN_BYTES
) -> Iterator[list[Write]]:
    """Cut writes into transactions.  Of several writes to one key only the last is kept.

    The batches touch different keys, so they may run in any order or at once.
    """
    batch: list[Write] = []
    size = 0
    for op in {op.key: op for op in ops}.values():
        weight = len(op.key) + (len(op.value) if isinstance(op, Put) else 0)
        if batch and (len(batch) == max_ops or size + weight > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(op)
        size += weight
    if batch:
        yield batch


# --- the wire


def encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def range_end(prefix: bytes) -> bytes:
    """Return the first key after all that start with `prefix`; b"\\0" (everything) for an empty one."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\0"


def span(prefix: str) -> tuple[bytes, bytes]:
    """Return (key, range_end) that select all keys starting with `prefix`."""
    key = encode_key(prefix)
    return key or b"\0", range_end(key)


def from_wire(kv: PbKeyValue) -> KeyValue:
    return KeyValue(decode_key(kv.key), kv.value, kv.mod_revision, kv.create_revision, kv.lease, kv.version)


_OPERAND = {
    PbCompare.VERSION: "version",
    PbCompare.CREATE: "create_revision",
    PbCompare.MOD: "mod_revision",
    PbCompare.VALUE: "value",
    PbCompare.LEASE: "lease",
}


def txn_to_wire(compares: Iterable[Compare], success: Iterable[Op], failure: Iterable[Op]) -> TxnRequest:
    wire = TxnRequest()
    _fill_txn(wire, compares, success, failure)
    return wire


# Messages are filled where they lie: one that is put into another afterwards is copied, at each level.


def _fill_txn(
    wire: TxnRequest, compares: Iterable[Compare], success: Iterable[Op], failure: Iterable[Op]
) -> None:
    for compare in compares:
        _fill_compare(wire.compare.add(), compare)
    for op in success:
        _fill_op(wire.success.add(), op)
    for op in failure:
        _fill_op(wire.failure.add(), op)


def _fill_compare(wire: PbCompare, compare: Compare) -> None:
    wire.key, wire.range_end = _span_of(compare.key, compare.prefix)
    wire.result = compare.result  # type: ignore[assignment]
    wire.target = compare.target  # type: ignore[assignment]
    setattr(wire, _OPERAND[compare.target], compare.operand)  # type: ignore[index]


def _fill_op(wire: RequestOp, op: Op) -> None:
    if isinstance(op, Put):
        put = wire.request_put
        put.key, put.value, put.lease = encode_key(op.key), op.value, op.lease
    elif isinstance(op, Get):
        get = wire.request_range
        get.key, get.range_end = _span_of(op.key, op.prefix)
        get.limit, get.keys_only = op.limit, op.keys_only
    elif isinstance(op, Delete):
        delete = wire.request_delete_range
        delete.key, delete.range_end = _span_of(op.key, op.prefix)
    elif isinstance(op, Nested):
        _fill_txn(wire.request_txn, op.compares, op.success, op.failure)
        wire.request_txn.SetInParent()
    else:
        raise TypeError(f"{op!r} is none of Put, Delete, Get, Nested")


def _span_of(key: str, prefix: bool) -> tuple[bytes, bytes]:
    return span(key) if prefix else (encode_key(key), b"")


def txn_from_wire(wire: TxnResponse) -> TxnResult:
    return _txn_result(wire, wire.header.revision)


def _txn_result(wire: TxnResponse, revision: int) -> TxnResult:
    # Only the outermost header tells the revision; everything inside happened at it.
    return TxnResult(wire.succeeded, revision, tuple(_result(each, revision) for each in wire.responses))


def _result(wire: ResponseOp, revision: int) -> OpResult:
    kind = wire.WhichOneof("response")
    if kind == "response_range":
        return OpResult(items=tuple(from_wire(kv) for kv in wire.response_range.kvs))
    if kind == "response_txn":
        return OpResult(nested=_txn_result(wire.response_txn, revision))
    if kind == "response_delete_range":
        return OpResult(deleted=wire.response_delete_range.deleted)
    return OpResult()


def touched(ops: Sequence[Op], compares: Sequence[Compare] = ()) -> str:
    """Return one key that stands for a transaction in messages: the first written, else compared or read."""
    for op in ops:
        if isinstance(op, Write):
            return op.key
    if compares:
        return compares[0].key
    return ops[0].key if ops else ""
