# SPDX-License-Identifier: Apache-2.0
"""The heartbeat key: a real cilium-agent reports failure when it is older than three minutes.

Called by: whoever the election makes the operator of the cluster (`run`).
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from loguru import logger

from core.backoff import Backoff, jittered
from kvstore import schema
from kvstore.client import Client
from kvstore.election import Election
from kvstore.errors import KvstoreError

INTERVAL_S = 60.0


async def run(client: Client, election: Election, *, interval: float = INTERVAL_S) -> None:
    """Write the heartbeat every `interval` seconds while leading.  Never returns."""
    backoff = Backoff(base=0.5, cap=interval / 2)
    while True:
        await election.wait_leader()
        try:
            await beat(client)
            backoff.reset()
        except KvstoreError as error:
            logger.warning("heartbeat: {}", error)
            await asyncio.sleep(backoff.next())
            continue
        await asyncio.sleep(jittered(interval))


async def beat(client: Client, now: datetime | None = None) -> None:
    """Write the present time, without a lease, as Cilium's operator does.  Raises KvstoreError."""
    await client.put(schema.heartbeat_key(), schema.encode_heartbeat(now or datetime.now(UTC)))
