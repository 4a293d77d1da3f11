# SPDX-License-Identifier: Apache-2.0
"""Becoming a node of the cluster: a name and a pool that are nobody else's, said under our lease.

    no pool known yet ──▶ first_pool    waits for etcd: without a pool there is no address to hand out
    every start ────────▶ confirm       name and pool are still ours (two keys; a list when they are not)
                             │ conflict: named in status and log, tried again; containers that run go on,
                             │           new ones are refused with the reason
                             ▼
                          own(node record)

A node that comes back at another address with its old lease may be itself, moved, or another machine with
a copy of its disk.  It waits until its other self has not renewed the lease for longer than renewals are
apart; then that lease is revoked, and nothing of the old address is left.

Called by: agent.parts and agent.tasks.
"""

from __future__ import annotations

import asyncio
import time
from ipaddress import IPv4Network

from loguru import logger

from core.backoff import Backoff
from core.errors import HoldfastError
from core.waiting import waiting
from kvstore.client import Client
from kvstore.errors import LeaseNotFound, NodeConflict
from kvstore.pools import Registrar, Wish, other_self
from kvstore.session import keepalive_s

RETRY_BASE_S, RETRY_CAP_S = 1.0, 30.0
# A lease that was not renewed for so many times its usual pause has nobody who renews it.
SILENT_PAUSES = 2.5


class Silence:
    """Whether nobody renews a lease any more, from what it has left at different times.  Pure."""

    def __init__(self, ttl: float) -> None:
        self.needed = SILENT_PAUSES * keepalive_s(ttl)  # seconds
        self._first: tuple[float, int] | None = None

    def lasts(self, remaining: int, now: float) -> bool:
        """Take what is left now; True once nobody has renewed it for `needed` seconds."""
        if self._first is not None:
            since, before = self._first
            renewed = remaining > before - (now - since) + 2
            if not renewed:
                return now - since >= self.needed
        self._first = (now, remaining)
        return remaining == 0


async def first_pool(client: Client, cluster: str, wish: Wish) -> IPv4Network:
    """Claim the first pool of a node.  Raises KvstoreError; the caller tries again."""
    with waiting("etcd", "a pool of addresses for this node") as wait:
        wait.note = f"of {wish.cluster_range}"
        return await Registrar(client, cluster).claim(wish)


class Registration:
    """Owner of this node's standing in the cluster; `refusal` says why it has none, empty otherwise."""

    def __init__(
        self,
        client: Client,
        cluster: str,
        wish: Wish,
        *,
        ttl: float,
        former_lease: int = 0,
    ) -> None:
        self.refusal = ""
        self.former_lease = former_lease
        self._client = client
        self._registrar = Registrar(client, cluster)
        self._wish = wish
        self._silence = Silence(ttl)

    async def confirm(self) -> None:
        """Return once name and pool are ours for certain."""
        backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
        with waiting("the cluster", "this node's name and pool") as wait:
            while True:
                try:
                    await self._once()
                except NodeConflict as error:
                    self._refuse(str(error))
                except HoldfastError as error:  # etcd is away: nothing is known, nobody is refused
                    wait.note = str(error)
                else:
                    self._refuse("")
                    return
                wait.note = self.refusal or wait.note
                await asyncio.sleep(backoff.next())

    async def _once(self) -> None:
        pool = self._wish.fixed
        if pool is not None and not self.former_lease and await self._registrar.stands(self._wish, pool):
            return
        known = await self._registrar.known()
        other = other_self(self._wish, known)
        if other is not None and not await self._is_silent():
            raise NodeConflict(
                f"this node's lease {self._wish.lease:016x} is in use at {other.address}, by the node "
                f"{other.name}",
                hint="if this machine is a copy of that one, remove its checkpoint (state-dir); "
                f"if it is that one with a new address, it goes on within {self._silence.needed:.0f} s",
            )
        await self._end_former()
        await self._registrar.claim(self._wish)

    async def _is_silent(self) -> bool:
        lease = self.former_lease or self._wish.lease
        return self._silence.lasts(await self._client.lease_remaining(lease), time.monotonic())

    async def _end_former(self) -> None:
        """Revoke the lease of this node's former address: its record and its entries go with it."""
        if not self.former_lease:
            return
        try:
            await self._client.lease_revoke(self.former_lease)
            logger.info("what this node had said under its former address is gone from etcd")
        except LeaseNotFound:
            pass
        self.former_lease = 0

    def _refuse(self, reason: str) -> None:
        if reason and reason != self.refusal:
            logger.error("this node is not registered: {}", reason)
        self.refusal = reason
