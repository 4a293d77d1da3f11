# SPDX-License-Identifier: Apache-2.0
"""What former lives of this process left in etcd: found, and deleted.

    lease of the checkpoint,  ──▶ the keys on it ──▶ wanted here? about to be? ──▶ no: deleted
    and those that were lost

A process that goes on with its lease has etcd keep everything that hangs on it, also what it does not want
any more: a key disowned while etcd was away, before an end; the records of a name, a pool or an address
space that the configuration had then.  Nobody else would ever delete them.  And a store that is restored from
a snapshot may have again what hung on a lease that it had lost since.

Only what hangs on our leases is looked at, so keys of others are not touched; and it is deleted only as it
was when it was found unwanted, so nothing is lost that this life writes at that moment.

Called by: agent.tasks, once everything that this life wants has been said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from loguru import logger

from core.backoff import Backoff
from kvstore.client import Client
from kvstore.errors import KvstoreError
from kvstore.ops import MAX_TXN_OPS, get_op
from kvstore.session import Session

# Seconds.  There is no hurry: what is left has been there for a while.
RETRY_BASE_S, RETRY_CAP_S = 1.0, 300.0

Claims = Callable[[], Collection[str]]


async def abandon_all(client: Client, session: Session, claims: Claims) -> None:
    """Have the session delete all of it, however long etcd is away or refuses to tell.

    `claims` says which keys others in this process write themselves, on the session's lease, before the
    session owns them.
    """
    backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
    while True:
        try:
            count = await abandon(client, session, claims)
        except KvstoreError as error:
            pause = backoff.next()
            logger.warning(
                "what former lives of this node left in etcd is not known, asked again in {:.0f} s: {}",
                pause,
                error,
            )
            await asyncio.sleep(pause)
            continue
        if count:
            logger.info("{} keys that former lives of this node left in etcd are deleted", count)
        return


async def abandon(client: Client, session: Session, claims: Claims) -> int:
    """Do it once, and return how many keys the session will delete.  Raises KvstoreError."""
    leases = {await session.ready(), *session.lost}
    hanging = {key for lease in leases for key in await client.lease_keys(lease)}
    unwanted = sorted(hanging - session.own_keys.keys())
    count = 0
    for start in range(0, len(unwanted), MAX_TXN_OPS):
        answer = await client.txn((), [get_op(key) for key in unwanted[start : start + MAX_TXN_OPS]])
        # Asked anew, now that they are read: what is claimed later is written later.
        claimed = claims()
        for item in (item for response in answer.responses for item in response.items):
            if item.lease in leases and item.key not in claimed:
                count += await session.abandon(item.key, item.mod_revision)
    return count
