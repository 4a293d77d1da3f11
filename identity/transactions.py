# SPDX-License-Identifier: Apache-2.0
"""The transactions of identity allocation, and what their answers mean.  Pure.

    create   no value/<labels>/ key, no lock, id/<N> free       → put id/<N> and our value/ key
    reuse    no value/<labels>/ key, no lock, id/<N> holds them → put our value/ key
    join     id/<N> holds exactly these labels                  → put our value/ key, look at the others'
    restore  id/<N> is gone although value/ keys name it        → put both, look at the others'
    collect  no value/<labels>/ key, id/<N> as it was read      → delete id/<N>

A real cilium-agent takes a lock, lists, creates, writes and unlocks; `create` does nothing while such a
lock is held, and so does `reuse`: of all who reuse or create at the same moment one wins and the others
join it, and garbage collection comes before it, which is GONE, or after it, when there is a value/ key.
The etcd range of ``value/container:app=b;/`` also holds ``value/container:app=b;/x=1;/…``
of other labels, so keys are compared by their whole label part, and a range that is not empty but holds
no exact match is left to the locked way (`identity.locked`).

Called by: identity.allocator, identity.locked, identity.gc, external_resources.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core import metrics
from identity.labels import Labels
from kvstore import schema
from kvstore.errors import RecordError
from kvstore.ops import (
    Compare,
    Get,
    KeyValue,
    Op,
    Put,
    TxnResult,
    absent,
    delete_op,
    get_op,
    list_op,
    mod_is,
    put_op,
    range_absent,
    value_is,
)

# How much of value/<labels>/ a transaction brings along: ten thousand hosts may share one identity, and
# any of their keys says its number.
MATCHES_READ = 16


class Txn(NamedTuple):
    """Arguments of `kvstore.client.Client.txn`."""

    compares: Sequence[Compare]
    success: Sequence[Op]
    failure: Sequence[Op] = ()


@dataclass(frozen=True)
class Slot:
    """One owner's place in one identity: `labels` as `owner` (a node's address) uses them."""

    labels: Labels
    owner: str

    @functools.cached_property
    def text(self) -> str:
        return self.labels.serialized

    @functools.cached_property
    def value_key(self) -> str:
        return schema.identity_value_key(self.text, self.owner)

    @functools.cached_property
    def value_prefix(self) -> str:
        return schema.identity_value_prefix(self.text)

    @functools.cached_property
    def lock_prefix(self) -> str:
        return schema.identity_lock_prefix(self.text)


class Outcome(enum.Enum):
    """What the store said to a transaction."""

    DONE = "done"  # it is written
    UNUSED = "unused"  # id/<N> was seen with these labels and without users: reuse it
    JOIN = "join"  # somebody has an identity of these labels: take its number
    LOCKED = "locked"  # somebody (a real cilium-agent) works on these labels under a lock: wait
    AMBIGUOUS = "ambiguous"  # keys in the range, none of them ours to use: take the locked way
    TAKEN = "taken"  # the number is in use: choose another
    GONE = "gone"  # id/<N> does not exist
    FOREIGN = "foreign"  # id/<N> belongs to other labels


class Answer(NamedTuple):
    """An outcome, the number it is about (0: none), and for DONE the revision of the write."""

    outcome: Outcome
    number: int = 0
    revision: int = 0


# --- create


def create(slot: Slot, number: int, lease: int) -> Txn:
    """Make a new identity if nobody has one of these labels."""
    return Txn(
        (
            range_absent(slot.value_prefix),
            range_absent(slot.lock_prefix),
            absent(schema.identity_id_key(number)),
        ),
        _both_keys(slot, number, lease),
        _users_and_locks(slot),
    )


def created(slot: Slot, result: TxnResult, numbers: range, unusable: Iterable[int] = ()) -> Answer:
    """Read the answer to `create`: `unusable` numbers were tried and belong to others."""
    if result.succeeded:
        return Answer(Outcome.DONE)
    return _in_the_way(slot, result, numbers, unusable) or Answer(Outcome.TAKEN)


def _users(slot: Slot) -> tuple[Get, ...]:
    return get_op(slot.value_key), list_op(slot.value_prefix, limit=MATCHES_READ)


def _users_and_locks(slot: Slot) -> tuple[Get, ...]:
    return *_users(slot), list_op(slot.lock_prefix, limit=1, keys_only=True)


def _in_the_way(slot: Slot, result: TxnResult, numbers: range, unusable: Iterable[int]) -> Answer | None:
    """Read the answers to `_users_and_locks`; None when there are neither."""
    own, found, locks = (response.items for response in result.responses[:3])
    number = first_match(slot, (*own, *found), numbers, unusable)
    if number:
        return Answer(Outcome.JOIN, number)
    if locks:
        return Answer(Outcome.LOCKED)
    return Answer(Outcome.AMBIGUOUS) if found else None


def first_match(slot: Slot, items: Iterable[KeyValue], numbers: range, unusable: Iterable[int] = ()) -> int:
    """Return the number in the first value key whose labels are exactly the slot's, 0 if there is none.

    Records that can not be read, and numbers that this cluster does not hand out, are counted and skipped.
    """
    skipped = set(unusable)
    for item in items:
        try:
            labels, _, number = schema.parse_identity_value(item.key, item.value)
        except RecordError as error:
            metrics.KVSTORE_RECORDS_IGNORED.labels(schema.IDENTITY_VALUES, error.kind).inc()
            continue
        if labels != slot.text or number in skipped:
            continue
        if number in numbers:
            return number
        metrics.KVSTORE_RECORDS_IGNORED.labels(schema.IDENTITY_VALUES, "range").inc()
    return 0


# --- reuse


def reuse(slot: Slot, number: int, lease: int) -> Txn:
    """Use `number`, which has these labels and no users, if still nobody has an identity of them."""
    id_key = schema.identity_id_key(number)
    return Txn(
        (
            range_absent(slot.value_prefix),
            range_absent(slot.lock_prefix),
            value_is(id_key, schema.encode_identity_id(slot.text)),
        ),
        (_value_key(slot, number, lease),),
        (*_users_and_locks(slot), get_op(id_key)),
    )


def reused(slot: Slot, result: TxnResult, numbers: range, unusable: Iterable[int] = ()) -> Answer:
    """Read the answer to `reuse`."""
    if result.succeeded:
        return Answer(Outcome.DONE)
    there = result.responses[3].items
    return _in_the_way(slot, result, numbers, unusable) or Answer(Outcome.FOREIGN if there else Outcome.GONE)


# --- join and restore


def join(slot: Slot, number: int, lease: int) -> Txn:
    """Use the identity `number`, provided that it still is one of these labels."""
    id_key = schema.identity_id_key(number)
    return Txn(
        (value_is(id_key, schema.encode_identity_id(slot.text)),),
        (_value_key(slot, number, lease), *_users(slot)),
        (get_op(id_key),),
    )


def joined(
    slot: Slot, number: int, result: TxnResult, numbers: range, unusable: Iterable[int] = ()
) -> Answer:
    """Read the answer to `join`."""
    if not result.succeeded:
        return Answer(Outcome.FOREIGN if result.responses[0].items else Outcome.GONE, number)
    return eldest(slot, number, result, numbers, unusable)


def eldest(
    slot: Slot, number: int, result: TxnResult, numbers: range, unusable: Iterable[int] = ()
) -> Answer:
    """Read what `join` or `restore` saw when it wrote `number`: JOIN when the eldest user has another one.

    Somebody who had not heard of a number without users may have created a second one in the moment before.
    He found no users then, so his key is older than that of anybody who joined the first number since, and
    all of them see it.
    """
    users = {item.key: item for response in result.responses[-2:] for item in response.items}
    by_age = sorted(users.values(), key=lambda item: item.create_revision)
    found = first_match(slot, by_age, numbers, unusable)
    return Answer(Outcome.DONE if found in (0, number) else Outcome.JOIN, found or number, result.revision)


def restore(slot: Slot, number: int, lease: int) -> Txn:
    """Write id/<N> again, which somebody deleted although it is in use."""
    return Txn((absent(schema.identity_id_key(number)),), (*_both_keys(slot, number, lease), *_users(slot)))


# --- verify and collect


def read(slots: Iterable[tuple[Slot, int]]) -> Txn:
    """Read id/<N> and our own value/ key of each (slot, number); two answers each, in order."""
    return Txn(
        (),
        [get_op(key) for slot, number in slots for key in (schema.identity_id_key(number), slot.value_key)],
    )


def intact(
    slot: Slot, number: int, lease: int, id_item: KeyValue | None, value_item: KeyValue | None
) -> bool:
    """True when both keys are what an identity in use needs, ours on `lease`."""
    return (
        id_item is not None
        and value_item is not None
        and id_item.value == schema.encode_identity_id(slot.text)
        and value_item.value == schema.encode_identity_value(number)
        and value_item.lease == lease
    )


def collect(number: int, text: str, revision: int) -> Txn:
    """Delete an identity that nobody uses and that is what it was at `revision`."""
    id_key = schema.identity_id_key(number)
    return Txn(
        (mod_is(id_key, revision), range_absent(schema.identity_value_prefix(text))),
        (delete_op(id_key),),
    )


def _value_key(slot: Slot, number: int, lease: int) -> Put:
    return put_op(slot.value_key, schema.encode_identity_value(number), lease)


def _both_keys(slot: Slot, number: int, lease: int) -> tuple[Put, Put]:
    return put_op(schema.identity_id_key(number), schema.encode_identity_id(slot.text)), _value_key(
        slot, number, lease
    )
