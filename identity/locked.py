# SPDX-License-Identifier: Apache-2.0
"""The locked way of allocation: lock, list, join or create, unlock, as a real cilium-agent does it.

Needed only where one transaction can not decide: the range ``value/<labels>/`` holds keys, but none whose
labels are exactly these.  The lock is the one of etcd's concurrency package, which Cilium uses: a key
under ``locks/<labels>/`` named by a lease; the oldest key in the range holds it.  We never queue for it:
it is taken only while the range is empty, and whoever finds it held waits and begins again, because then
there may be an identity to join.

Called by: identity.allocator.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from loguru import logger

from identity import transactions
from identity.transactions import Answer, Outcome, Slot, Txn
from kvstore import schema
from kvstore.client import Client
from kvstore.errors import KvstoreError
from kvstore.ops import Compare, created_is, put_op, range_absent

# As long as Cilium's lock lease: what a crash in the middle costs the others.
LOCK_TTL_S = 25


async def allocate(
    client: Client, slot: Slot, numbers: range, unusable: set[int], fresh: int, write: Txn
) -> Answer:
    """Take the lock, and `write` (a join or restore) the number `fresh` unless there is one to join.

    LOCKED: somebody else holds the lock.  TAKEN: `fresh` is (its conditions did not hold).  Raises
    KvstoreError; the lock then goes with its lease.
    """
    async with _lock(client, slot) as held:
        if held is None:
            return Answer(Outcome.LOCKED)
        listing = await client.list(slot.value_prefix)
        number = transactions.first_match(slot, listing.items, numbers, unusable)
        if number:
            return Answer(Outcome.JOIN, number)
        # The lock keeps out everybody who might create these labels; only the number can be taken.  Who
        # joins one that had no users asks for no lock.
        result = await client.txn((held, *write.compares), write.success)
        if not result.succeeded:
            return Answer(Outcome.TAKEN, fresh)
        return transactions.eldest(slot, fresh, result, numbers, unusable)


@contextlib.asynccontextmanager
async def _lock(client: Client, slot: Slot) -> AsyncIterator[Compare | None]:
    """Yield the condition that the lock is still ours, or None when it is not to be had now."""
    lease = await client.lease_grant(LOCK_TTL_S)
    try:
        key = schema.identity_lock_key(slot.text, lease)
        take = Txn((range_absent(slot.lock_prefix),), (put_op(key, "", lease),))
        result = await client.txn(*take)
        yield created_is(key, result.revision) if result.succeeded else None
    finally:
        # Revoking deletes the key.  When etcd is away the lease ends by itself.
        try:
            await client.lease_revoke(lease)
        except KvstoreError as error:
            logger.debug("lock of {} is left to its lease: {}", slot.text, error)
