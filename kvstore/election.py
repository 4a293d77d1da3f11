# SPDX-License-Identifier: Apache-2.0
"""Election: one leader among the processes that stand for a role, in the order in which they came.

Each candidate owns a key under `holdfast/election/v1/<name>/` by its session.  The oldest key leads; every
other candidate watches only the one before it, so that a change of leader wakes one process and not ten
thousand.  A lost key comes back at the end of the queue.

Give it a session with a short time to live (30 to 60 s): a leader that died leads until its lease ends.

Called by: identity.gc and identity.heartbeat through the agent; external_resources.
"""

from __future__ import annotations

import asyncio
import contextlib

from loguru import logger

from kvstore.client import Client
from kvstore.errors import KvstoreError
from kvstore.ops import KeyValue, created_is
from kvstore.patience import Patience
from kvstore.schema.keys import election_candidate_key, election_prefix
from kvstore.session import Session


class Election:
    """Stands for the role `name` as `session.name`.  Owner of the state: the task in `run`."""

    def __init__(self, client: Client, session: Session, name: str) -> None:
        self.name = name
        self.key = election_candidate_key(name, session.name)
        self.error = ""
        self._client = client
        self._session = session
        self._leads = False
        self._changed = asyncio.Condition()

    @property
    def is_leader(self) -> bool:
        """True while this process leads and its lease surely lives."""
        return self._leads and self._session.alive

    async def wait_leader(self) -> None:
        """Wait until this process leads."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_leader)

    async def wait_lost(self) -> None:
        """Wait until this process does not lead."""
        while self.is_leader:
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._changed.wait()

    async def run(self) -> None:
        """Stand for the role until cancelled; then withdraw."""
        await self._session.own(self.key, self._session.name)
        try:
            with Patience(f"election of {self.name}") as patience:
                while True:
                    patience.attempt(self.error)
                    try:
                        await self._round(patience)
                    except KvstoreError as error:
                        self.error = str(error)
                    await patience.pause()
        finally:
            self._leads = False
            await self._session.disown(self.key)

    async def _round(self, patience: Patience) -> None:
        """Queue until the one before us is gone; returns when our own place in the queue is lost."""
        await self._session.written(self.key)
        mine = await self._client.get(self.key)
        if mine is None or mine.lease != self._session.lease_id:
            return
        patience.works()
        self.error = ""
        while (earlier := await self._earlier(mine)) is not None:
            if revision := await self._present(earlier):
                await self._until_gone(earlier, revision)
        await self._lead(mine)

    async def _earlier(self, mine: KeyValue) -> KeyValue | None:
        return await self._client.created_before(election_prefix(self.name), mine.create_revision)

    async def _lead(self, mine: KeyValue) -> None:
        revision = await self._present(mine)
        if not revision:
            return  # our key was lost while we queued: others may stand before the new one
        logger.info("{} leads {}", self._session.name, self.name)
        await self._set(True)
        try:
            await self._until_gone(mine, revision)
        finally:
            await self._set(False)
            logger.info("{} no longer leads {}", self._session.name, self.name)

    async def _present(self, candidate: KeyValue) -> int:
        """Return etcd's revision if the candidate's key is still the one that was read, else 0."""
        answer = await self._client.txn([created_is(candidate.key, candidate.create_revision)], [])
        return answer.revision if answer.succeeded else 0

    async def _until_gone(self, candidate: KeyValue, revision: int) -> None:
        """Watch one candidate's key, there at `revision`, until it is deleted or replaced."""
        watch = self._client.watch(candidate.key, revision + 1, single=True)
        async with contextlib.aclosing(watch) as batches:
            async for batch in batches:
                if any(change.value is None for change in batch.changes):
                    return

    async def _set(self, leads: bool) -> None:
        self._leads = leads
        async with self._changed:
            self._changed.notify_all()
