# SPDX-License-Identifier: Apache-2.0
"""Garbage collection of identities: numbers that no node uses any more are freed.

An identity is deleted when two rounds in a row found no value/ key of its labels, and then only by a
transaction that finds the same: no value/ key, id/<N> unmodified.  A node that joins in between wins.
Only the own cluster's numbers are looked at: other clusters' are copies, and theirs to collect.

An identity whose labels begin like another one's in use (``container:app=b;`` and
``container:app=b;x:y=z;``) is kept while that one is: etcd cannot compare what lies between.

Called by: whoever the election makes the operator of the cluster (`Collector.run`), as a role of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loguru import logger

from core.backoff import Backoff, jittered
from identity import transactions
from identity.cache import parse_record
from identity.numbers import allocation_range
from kvstore import schema
from kvstore.client import Client
from kvstore.election import Election
from kvstore.errors import KvstoreError, RecordError
from kvstore.ops import KeyValue, list_op

# Cilium's identity-gc-interval; two rounds make its identity-heartbeat-timeout of 30 minutes.
INTERVAL_S = 900.0
# Cilium's limit of deletions a minute: a mistake in a store that was restored should not be quick.
DELETIONS_PER_MINUTE = 2500
# Ranges looked at in one transaction; etcd allows 128 operations.
RANGES_AT_ONCE = 100


class Unused(NamedTuple):
    """An identity without users: its labels as in the store, and when id/<N> was last written."""

    text: str
    revision: int


class Collector:
    """Remembers between rounds what was unused; forgets it when it stops being the leader."""

    def __init__(
        self,
        client: Client,
        *,
        cluster_id: int = 0,
        interval: float = INTERVAL_S,
        deletions_per_minute: float = DELETIONS_PER_MINUTE,
    ) -> None:
        self._client = client
        self._numbers = allocation_range(cluster_id)
        self._interval = interval
        self._pause = 60.0 / deletions_per_minute
        self._unused: dict[int, Unused] = {}
        self.last = "garbage collection of identities has not run yet"

    async def run(self, election: Election) -> None:
        """Collect every `interval` seconds while leading.  Never returns."""
        backoff = Backoff(base=5.0, cap=self._interval)
        while True:
            await election.wait_leader()
            try:
                self.last = await self.collect(election)
                logger.info("{}", self.last)
                backoff.reset()
            except KvstoreError as error:
                logger.warning("garbage collection of identities: {}", error)
                await asyncio.sleep(backoff.next())
                continue
            await asyncio.sleep(jittered(self._interval))
            if not election.is_leader:
                self._unused.clear()

    async def collect(self, election: Election | None = None) -> str:
        """Do one round and return the sentence that says what it did.

        Stops early, without harm, when `election` is lost.  Raises KvstoreError.
        """
        known = await self._identities()
        unused = await self._without_users(known)
        again = {number: each for number, each in unused.items() if self._unused.get(number) == each}
        deleted = 0
        for number, each in again.items():
            if election is not None and not election.is_leader:
                break
            result = await self._client.txn(*transactions.collect(number, each.text, each.revision))
            deleted += result.succeeded
            await asyncio.sleep(self._pause)
        self._unused = {number: each for number, each in unused.items() if number not in again}
        return f"{len(known)} identities, {len(unused)} unused, {deleted} of them for two rounds and deleted"

    async def _identities(self) -> dict[int, KeyValue]:
        listing = await self._client.list(schema.IDENTITY_IDS)
        found: dict[int, KeyValue] = {}
        for item in listing.items:
            try:
                number, _ = parse_record(item.key, item.value)
            except RecordError as error:
                # Not ours to judge, so not ours to delete.
                logger.debug("left alone: {}", error)
                continue
            if number in self._numbers:
                found[number] = item
        return found

    async def _without_users(self, known: Mapping[int, KeyValue]) -> dict[int, Unused]:
        unused: dict[int, Unused] = {}
        numbers = list(known)
        for start in range(0, len(numbers), RANGES_AT_ONCE):
            chunk = numbers[start : start + RANGES_AT_ONCE]
            texts = [known[number].value.decode() for number in chunk]
            for number, text, used in zip(chunk, texts, await self._used(texts), strict=True):
                if not used:
                    unused[number] = Unused(text, known[number].mod_revision)
        return unused

    async def _used(self, texts: Sequence[str]) -> list[bool]:
        # One key a range is enough, so a store of 300 000 users costs what one of 3 000 does.
        ranges = [list_op(schema.identity_value_prefix(text), limit=1, keys_only=True) for text in texts]
        result = await self._client.txn((), ranges)
        return [bool(response.items) for response in result.responses]
