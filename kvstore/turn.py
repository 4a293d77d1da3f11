# SPDX-License-Identifier: Apache-2.0
"""Turns: of several processes one may act at a time, and then the one that has waited longest.

An election (`kvstore.election`) in which everybody stands all the time, and whose leader steps back when it
has nothing to do while another has.  Everybody has its lease and its place in the queue *before* they are
needed, because an etcd that is full grants no lease and takes no key; what a turn needs then, it still
allows: a lease kept alive, a key deleted, a read.  Who steps back is in the queue again once it takes writes.

The lease outlives a restart of its process (`lease`, from the state that it kept), and so does the place.

Called by: kvstore.maintenance.
"""

from __future__ import annotations

import asyncio
import contextlib

from kvstore.client import Client
from kvstore.election import Election
from kvstore.schema.keys import election_candidate_key, election_prefix
from kvstore.session import Session

# Seconds.  Long enough for a container to be replaced; whoever died keeps the others waiting for so long.
TTL_S = 600
# A turn that can not be given back because etcd is away is kept.
PASS_S = 30.0


class Turn:
    """A place in the queue of `name`, as `who`; `run` must be running."""

    def __init__(self, client: Client, name: str, who: str, *, ttl: int = TTL_S, lease: int = 0) -> None:
        self.name = name
        election_candidate_key(name, who)  # raises InvalidKeyPart for what can not be a key
        self._client = client
        self._session = Session(client, ttl=ttl, lease=lease, name=who)
        self._election = Election(client, self._session, name)
        self._standing: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def held(self) -> bool:
        """True while it is this process's turn, and its lease surely lives."""
        return self._election.is_leader

    @property
    def lease(self) -> int:
        """The lease to come back with; 0 while there is none."""
        return self._session.lease_id

    @property
    def error(self) -> str:
        return self._session.error or self._election.error

    async def run(self) -> None:
        """Stand in the queue until cancelled; the place is kept then, and ends with the lease."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            # First, so that it ends first: what the election takes back at its end stays then.
            tasks.create_task(self._session.run(), name=f"session:{self.name}")
            self._stand(tasks)

    async def waiting(self) -> int:
        """Return how many others stand in the queue."""
        return max(await self._client.count(election_prefix(self.name)) - 1, 0)

    async def pass_on(self) -> None:
        """Step back to the end of the queue."""
        if self._standing is None or self._tasks is None:
            return
        self._standing.cancel()
        await asyncio.wait([self._standing])
        # Only a key that is gone comes back behind the others'.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PASS_S):
                await self._session.settled()
        self._stand(self._tasks)

    def _stand(self, tasks: asyncio.TaskGroup) -> None:
        self._election = Election(self._client, self._session, self.name)
        self._standing = tasks.create_task(self._election.run(), name=f"turn:{self.name}")
