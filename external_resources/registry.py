# SPDX-License-Identifier: Apache-2.0
"""External resources in etcd: register, unregister, list.

    read record and addresses ─▶ conflict? ─▶ record (and what left) ─▶ identity ─▶ addresses
          ▲                                        │                                  │
          └────────────── somebody changed one of these keys meanwhile ◀──────────────┘

The record is written first and deleted together with everything that follows from it.  A crash in the
middle so leaves a record whose keys are not complete, and the next registration completes them: nothing
is orphaned, and a registration that changes nothing writes nothing.  No key has a lease, because nobody
is there to keep one alive for a VM.

Every function takes a connected client and raises KvstoreError when etcd refuses; while etcd is away
they wait, so a caller in a hurry sets a timeout (`asyncio.timeout`).

Called by: cli, the API server, inventory sources.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from core.backoff import Backoff
from core.errors import shorten
from external_resources.errors import (
    AddressConflict,
    Contended,
    ExternalResourceError,
    HostUnknown,
    InvalidResource,
)
from external_resources.resource import Resource, describe_owner, owned_by
from identity import transactions
from identity.attempt import Attempt, patiently
from identity.numbers import allocation_range
from identity.transactions import Slot
from kvstore import schema
from kvstore.client import Client
from kvstore.errors import RecordError
from kvstore.ops import Compare, KeyValue, Op, absent, delete_op, get_op, list_op, mod_is, put_op

# Others change the same keys only by accident; eight times in a row is a fight.
MAX_ATTEMPTS = 8
# Seconds between them.
RETRY_BASE_S, RETRY_CAP_S = 0.02, 1.0
# Address records read in one transaction of `list_all`; etcd allows 128 operations.
READ_AT_ONCE = 100


class Registration(NamedTuple):
    """What `register` did: the identity's number, and whether anything had to be written."""

    resource: Resource
    number: int
    changed: bool


class Listed(NamedTuple):
    """One entry of `list_all`: `number` is 0 and `problem` says why when its keys are not complete."""

    name: str
    resource: Resource | None
    number: int
    problem: str = ""


class _State(NamedTuple):
    """What etcd has about a resource: key → key-value or None."""

    record: KeyValue | None
    old: Resource | None
    addresses: Mapping[str, KeyValue | None]


async def register(
    client: Client, resource: Resource, *, cluster_id: int = 0, space: str = schema.DEFAULT_SPACE
) -> Registration:
    """Make etcd hold the resource; the same again changes nothing, another set replaces the old one.

    Raises AddressConflict (an address is somebody else's), HostUnknown, Contended, and what identity
    allocation raises.
    """
    if resource.host_ip:
        await _check_host(client, resource)
    backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
    for _ in range(MAX_ATTEMPTS):
        state = await _read(client, resource, space)
        _check_conflicts(resource, state, space)
        result = await _write(client, resource, state, cluster_id, space)
        if result is not None:
            return result
        await asyncio.sleep(backoff.next())
    raise Contended(f"the keys of external resource {resource.name} keep changing while it is registered")


async def unregister(client: Client, name: str, *, space: str = schema.DEFAULT_SPACE) -> bool:
    """Delete a resource's record, addresses and use of its identity at once; False if there was none.

    Its identity's number is left to garbage collection.  Addresses that somebody else has taken over stay.
    Raises InvalidResource when the record can not be read: what follows from it is not known then.
    """
    backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
    for _ in range(MAX_ATTEMPTS):
        item = await patiently(f"record of {name}", lambda: client.get(schema.external_key(name)))
        if item is None:
            return False
        state = await _read(client, _parse(item), space)
        if state.record is not None and state.old is not None:
            leaving = _own_keys(state.old, state, space)
            gone = [state.record.key, state.old.slot.value_key, *leaving]
            compares = [_as_read(state.record.key, state.record), *_unchanged(leaving, state)]
            if await _commit(client, compares, [delete_op(key) for key in gone]):
                return True
        await asyncio.sleep(backoff.next())
    raise Contended(f"the record of external resource {name} keeps changing while it is unregistered")


async def list_all(client: Client, *, space: str = schema.DEFAULT_SPACE) -> list[Listed]:
    """Return every external resource by name, those that can not be read included."""
    listing = await client.list(schema.EXTERNAL)
    entries = [_listed(item) for item in listing.items]
    wanted = [key for entry in entries if entry.resource for key in entry.resource.ip_keys(space)]
    found = await _read_keys(client, wanted)
    return [_with_number(entry, found, space) for entry in entries]


# --- registering


async def _write(
    client: Client, resource: Resource, state: _State, cluster_id: int, space: str
) -> Registration | None:
    """Bring etcd from `state` to `resource`; None when somebody was faster."""
    written = await _write_record(client, resource, state, space)
    if written is None:
        return None
    revision, changed = written
    number, allocated = await _identity(client, resource, state, cluster_id)
    records = resource.ip_records(number, space)
    stale = {key: value for key, value in records.items() if _value(state.addresses[key]) != value}
    if stale:
        compares = [mod_is(schema.external_key(resource.name), revision)]
        compares += _unchanged(stale, state)
        if not await _commit(client, compares, [put_op(key, value) for key, value in stale.items()]):
            return None
    return Registration(resource, number, changed or allocated or bool(stale))


async def _write_record(
    client: Client, resource: Resource, state: _State, space: str
) -> tuple[int, bool] | None:
    """Write the record and delete what the resource no longer has: (its revision, whether it changed)."""
    key = schema.external_key(resource.name)
    value = schema.encode_external(resource.record(), state.record.value if state.record else None)
    kept = resource.ip_keys(space)
    leaving = [each for each in _own_keys(state.old, state, space) if each not in kept]
    gone = list(leaving)
    if state.old is not None and state.old.slot != resource.slot:
        gone.append(state.old.slot.value_key)
    if state.record is not None and state.record.value == value and not gone:
        return state.record.mod_revision, False
    compares = [_as_read(key, state.record), *_unchanged(leaving, state)]
    revision = await _commit(client, compares, [put_op(key, value), *map(delete_op, gone)])
    return (revision, True) if revision else None


async def _identity(client: Client, resource: Resource, state: _State, cluster_id: int) -> tuple[int, bool]:
    """Return the number of the resource's labels, its value/ key written: (number, whether it had to be)."""
    slot = resource.slot
    known = _number_in(state.addresses.values(), resource.name)
    same_labels = state.old is not None and state.old.labels == resource.labels
    if known and same_labels:
        items = await _read_keys(client, [schema.identity_id_key(known), slot.value_key])
        id_item, value_item = items.get(schema.identity_id_key(known)), items.get(slot.value_key)
        if transactions.intact(slot, known, 0, id_item, value_item):
            return known, False
    numbers = allocation_range(cluster_id)
    preferred = known if same_labels and known in numbers else 0
    unused = 0 if preferred else await _unused(client, slot, numbers)
    answer = await Attempt(client, slot, numbers).run(preferred, unused)
    return answer.number, True


async def _unused(client: Client, slot: Slot, numbers: range) -> int:
    """Return the number that the last user of these labels left behind, 0 if there is a user or no number.

    etcd does not find numbers by their labels, so all are read (0.3 s for 65 000), but only when there is
    nobody to join.
    """
    subject = f"identity of {slot.text}"
    some = [list_op(slot.value_prefix, limit=transactions.MATCHES_READ)]
    users = await patiently(subject, lambda: client.txn((), some))
    if transactions.first_match(slot, users.responses[0].items, numbers):
        return 0
    listing = await patiently(subject, lambda: client.snapshot(schema.IDENTITY_IDS))
    text, found = schema.encode_identity_id(slot.text), []
    for key, value in listing.items.items():
        with contextlib.suppress(RecordError):  # not a number: nobody's
            if value == text and (number := schema.parse_identity_id_key(key)) in numbers:
                found.append(number)
    return min(found, default=0)


def _number_in(items: Iterable[KeyValue | None], name: str) -> int:
    for item in items:
        record = _ip_record(item)
        if record is not None and owned_by(name, record):
            return record.identity
    return 0


def _check_conflicts(resource: Resource, state: _State, space: str) -> None:
    for key, address in resource.ip_keys(space).items():
        record = _ip_record(state.addresses[key])
        if record is not None and not owned_by(resource.name, record):
            raise AddressConflict(resource.name, address, describe_owner(record))


async def _check_host(client: Client, resource: Resource) -> None:
    listing = await client.list(schema.NODES)
    for item in listing.items:
        try:
            node = schema.parse_node(item.key, item.value)
        except RecordError:
            continue
        if any(address.ip == resource.host_ip for address in node.addresses or ()):
            return
    raise HostUnknown(
        f"external resource {resource.name}: no node with the address {resource.host_ip} is registered",
        hint="leave the host address empty: traffic then takes the network's own way",
    )


# --- reading


async def _read(client: Client, resource: Resource, space: str) -> _State:
    """Read the record and every address key of the present and of the wanted resource, at one revision."""
    key = schema.external_key(resource.name)
    item = await patiently(f"record of {resource.name}", lambda: client.get(key))
    old = _parse_leniently(item)
    wanted = dict.fromkeys([*resource.ip_keys(space), *(old.ip_keys(space) if old else ())])
    found = await _read_keys(client, [key, *wanted])
    record = found.get(key)
    return _State(record, _parse_leniently(record), {each: found.get(each) for each in wanted})


async def _read_keys(client: Client, keys: Sequence[str]) -> dict[str, KeyValue]:
    found: dict[str, KeyValue] = {}
    for start in range(0, len(keys), READ_AT_ONCE):
        reads = [get_op(key) for key in keys[start : start + READ_AT_ONCE]]
        result = await patiently("external resources", functools.partial(client.txn, (), reads))
        found.update({item.key: item for response in result.responses for item in response.items})
    return found


def _parse(item: KeyValue) -> Resource:
    try:
        return Resource.from_record(schema.parse_external(item.key, item.value))
    except RecordError as error:
        raise InvalidResource(error.message, hint="register it again, then unregister it") from error


def _parse_leniently(item: KeyValue | None) -> Resource | None:
    """A record that can not be read has no old keys that we know of; registering replaces it."""
    try:
        return _parse(item) if item is not None else None
    except ExternalResourceError:
        return None


def _ip_record(item: KeyValue | None) -> schema.IpRecord | None:
    """Return an address record, None for garbage: nobody uses such a record, so it may be replaced."""
    if item is None:
        return None
    try:
        return schema.parse_ip(item.key, item.value)
    except RecordError:
        return None


def _own_keys(resource: Resource | None, state: _State, space: str) -> list[str]:
    """Return the address keys of a resource that are in etcd and still its own."""
    if resource is None:
        return []
    return [
        key
        for key in resource.ip_keys(space)
        if (record := _ip_record(state.addresses.get(key))) is not None and owned_by(resource.name, record)
    ]


# --- listing


def _listed(item: KeyValue) -> Listed:
    try:
        resource = _parse(item)
    except ExternalResourceError as error:
        return Listed(shorten(item.key.removeprefix(schema.EXTERNAL)), None, 0, error.message)
    return Listed(resource.name, resource, 0)


def _with_number(entry: Listed, found: Mapping[str, KeyValue], space: str) -> Listed:
    if entry.resource is None:
        return entry
    numbers = set()
    for key, address in entry.resource.ip_keys(space).items():
        record = _ip_record(found.get(key))
        if record is None:
            return entry._replace(problem=f"no record of {address}; register it again")
        if not owned_by(entry.name, record):
            return entry._replace(problem=f"{address} belongs to {describe_owner(record)}")
        numbers.add(record.identity)
    if len(numbers) != 1:
        return entry._replace(problem="its addresses have different identities; register it again")
    return entry._replace(number=numbers.pop())


# --- writing


async def _commit(client: Client, compares: Sequence[Compare], ops: Sequence[Op]) -> int:
    """Run one transaction and return its revision, 0 when a condition did not hold."""
    result = await patiently("external resources", lambda: client.txn(compares, ops))
    return result.revision if result.succeeded else 0


def _value(item: KeyValue | None) -> bytes | None:
    return item.value if item is not None else None


def _unchanged(keys: Iterable[str], state: _State) -> list[Compare]:
    return [_as_read(key, state.addresses[key]) for key in keys]


def _as_read(key: str, item: KeyValue | None) -> Compare:
    return absent(key) if item is None else mod_is(key, item.mod_revision)
