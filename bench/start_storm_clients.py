# SPDX-License-Identifier: Apache-2.0
"""Some of the clients of a start storm: each lists all addresses of etcd at its own moment, then ends.

The kvstore client and its listing, each client with a connection of its own as an agent has it, many in a
process.  A list that fails is tried again with the agents' back-off, for five minutes (an agent goes on for
ever).  What came is counted and not looked at: an agent unpacks it on a machine of its own.  At the end the
process says how it went, as a line of JSON.

Run by: bench.start_storm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Sequence

from loguru import logger

from core.backoff import Backoff
from core.loop import spare_the_collector
from kvstore import schema
from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.errors import KvstoreError
from kvstore.listing import PAGE, PATIENCE, whole_list
from kvstore.patience import RETRY_BASE_S, RETRY_CAP_S

LIMIT_S = 300.0


class Lister:
    """A host that starts.  `began` is when it was to ask, `ended` when it had all or gave up; unix times."""

    def __init__(self, endpoint: str, began: float) -> None:
        self.began = began
        self.ended = 0.0
        self.gave_up = False
        self.failures = 0
        self.entries = 0
        self._endpoint = endpoint

    async def run(self) -> None:
        await asyncio.sleep(self.began - time.time())
        client, backoff = Client(EtcdConfig((self._endpoint,))), Backoff(RETRY_BASE_S, RETRY_CAP_S)
        try:
            while not self.entries and not self.gave_up:
                try:
                    self.entries = await self._count(client)
                except KvstoreError:
                    self.failures += 1
                    self.gave_up = time.time() - self.began > LIMIT_S
                    await asyncio.sleep(backoff.next())
            self.ended = time.time()
        finally:
            await client.close()

    async def _count(self, client: Client) -> int:
        entries = 0
        whole = whole_list(client.transport, schema.IPS, PAGE, patience=PATIENCE)
        async with contextlib.aclosing(whole) as parts:
            async for part in parts:
                entries = (0 if part.first else entries) + len(part.kvs)
        return entries


async def storm(endpoint: str, moments: Sequence[float]) -> dict[str, object]:
    listers = [Lister(endpoint, moment) for moment in moments]
    await asyncio.gather(*(each.run() for each in listers))
    return {
        "entries": sum(each.entries for each in listers),
        "failures": sum(each.failures for each in listers),
        "gave_up": sum(each.gave_up for each in listers),
        "seconds": [each.ended - each.began for each in listers],
        "ended": max(each.ended for each in listers),
        "cpu": time.process_time(),
    }


def main(endpoint: str, *moments: str) -> None:
    """Arguments: etcd's URL, and the unix time at which each client begins."""
    os.nice(19)  # in a fleet each has a machine of its own; here etcd and the prober are not to wait for them
    logger.remove()
    spare_the_collector()
    print(json.dumps(asyncio.run(storm(endpoint, [float(each) for each in moments]))), flush=True)
