# SPDX-License-Identifier: Apache-2.0
"""The session: one lease, and the keys that hang on it, kept alive as long as this process wants them.

    lease (grant, or the one from before) ──▶ verify own keys ──▶ watch them, write, keep alive
        ▲                                                              │
        ├── lease lost: a new one, every own key is written again ◀────┤
        └── etcd away: wait with back-off, then verify (no blind rewriting) ◀─┘

`own` and `disown` return at once, also when etcd is away; `written` waits.  A key that somebody deletes or
overwrites comes back; a key of somebody else is never touched, not even when we disowned it before.

An own key has an exact watch of its own, all on one stream: etcd then sends this host nothing but what
happens to its own keys.  But not those under prefixes that are looked after `elsewhere`, of which a fleet has
millions: what is followed anyway comes by `seen`, and all of them are read now and then, but for those that
somebody else in this process reads (`read_elsewhere`).

An agent's lease lasts a day, so that its keys survive its restarts and long outages; a role that must
change hands quickly (kvstore.election) uses a session of its own with a short one.

Called by: agent (one), identity.allocator, external_resources, kvstore.election.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from loguru import logger

from core import metrics
from core.backoff import cluster_interval, jittered
from kvstore.client import Client
from kvstore.errors import (
    KvstoreError,
    LeaseNotFound,
    NoSpace,
    PermissionDenied,
    RequestRefused,
)
from kvstore.keywatches import KeyWatches
from kvstore.ops import (
    MAX_TXN_OPS,
    KeyValue,
    Nested,
    delete_op,
    get_op,
    lease_is,
    mod_is,
    put_op,
    txn_op,
    value_is,
    write_batches,
)
from kvstore.ownkeys import Leaving, OwnKeys
from kvstore.patience import Patience
from kvstore.watch import Change, Event, Kind, event_from_wire

# Seconds.  A day: keys outlive an agent's upgrade and a long outage of etcd.
DEFAULT_TTL_S = 24 * 3600
# A lease is renewed at a third of its time, and at least this often: renewal is also how the loss of a
# long lease is noticed.
LONGEST_KEEPALIVE_S = 60.0
# Own keys without a watch are read so often; Cilium's kvstore-periodic-sync.
SYNC_S = 300.0
# Who has so many keys to write at once is hardly alone with it: a rollout, or etcd has lost all leases.
MANY_KEYS = 32
# Events that one etcd hands out a second, and the longest time over which hosts spread their writes.
DELIVERIES, LONGEST_SPREAD_S = 500_000, 10.0


def keepalive_s(ttl: float) -> float:
    """Return the mean seconds between two renewals of a lease of `ttl` seconds."""
    return min(ttl / 3, LONGEST_KEEPALIVE_S)


def spread_s(keys: int, nodes: int) -> float:
    """Return the seconds over which `nodes` hosts that write `keys` each, which all follow, spread that.

    At once they would wait for each other in etcd's queue, and the last ones for longer than a call may take.
    """
    return min(keys * nodes * nodes / DELIVERIES, LONGEST_SPREAD_S) if keys >= MANY_KEYS else 0.0


# Adopted keys are watched when no further one has come for so long, at the latest after so long.  Nothing
# is lost meanwhile, as a watch begins at the revision of its key; but each costs as much as a transaction
# does, and many workloads that start at once wait for their transactions and not for the watches.
ADOPT_CALM_S, ADOPT_LATEST_S = 0.5, 2.0


# Of a role that is lost in every outage, say, only these are remembered.
LOST_KEPT = 8


class Session:
    """See the module's text.  `lease` is the number of a lease from before (a checkpoint's), or 0; `lost` are
    those before it that etcd did not know any more, the last of them last: a restored one may.

    `elsewhere` are prefixes whose own keys are not watched but read every `sync` seconds, unless they are
    `read_elsewhere` too.  `nodes` says how many hosts have such a session: the period grows with them, and so
    does the time of a lease up to `longest_ttl`, when it is granted.
    Owner of all state: the event loop; `run` must be running for anything to reach etcd.
    """

    def __init__(
        self,
        client: Client,
        *,
        ttl: int = DEFAULT_TTL_S,
        lease: int = 0,
        lost: Sequence[int] = (),
        name: str = "agent",
        elsewhere: tuple[str, ...] = (),
        read_elsewhere: tuple[str, ...] = (),
        sync: float = SYNC_S,
        longest_ttl: int = 0,
        nodes: Callable[[], int] = lambda: 1,
    ) -> None:
        self.ttl = ttl
        self.lease_id = lease
        self.lost = tuple(lost)
        self.name = name
        self.error = ""
        self._client = client
        self._elsewhere = elsewhere
        self._read_elsewhere = read_elsewhere
        self._sync = sync
        self._ttls = ttl, max(longest_ttl, ttl)
        self.nodes = nodes
        self._keys = OwnKeys()
        self._proven_at = 0.0
        self._changed = asyncio.Event()
        self._adopted_at = 0.0
        self._adopting_since = 0.0
        self._progress = asyncio.Condition()

    # --- for everybody

    @property
    def own_keys(self) -> Mapping[str, bytes]:
        """What this process wants in etcd."""
        return self._keys.values()

    @property
    def errors(self) -> Mapping[str, str]:
        """Own keys that etcd refuses, with the reason."""
        return self._keys.errors()

    @property
    def alive(self) -> bool:
        """True while etcd surely still holds our lease: it said so less than its time ago."""
        return self.lease_id != 0 and time.monotonic() - self._proven_at < self.ttl

    async def own(self, key: str, value: bytes | str) -> None:
        """Want `key` in etcd with this value, under our lease.  Returns at once; see `written`."""
        if self._keys.want(key, value.encode() if isinstance(value, str) else value):
            self._changed.set()

    async def adopt(self, key: str, value: bytes | str, revision: int) -> None:
        """Own a key that the caller has just written itself, with `lease_id`, at `revision`."""
        self._keys.adopt(key, value.encode() if isinstance(value, str) else value, revision)
        self._adopted_at = time.monotonic()
        if not self._adopting_since:
            self._adopting_since = self._adopted_at
            asyncio.get_running_loop().call_later(ADOPT_CALM_S, self._watch_adopted)

    def _watch_adopted(self) -> None:
        now = time.monotonic()
        wait = min(self._adopted_at + ADOPT_CALM_S, self._adopting_since + ADOPT_LATEST_S) - now
        if wait > 0:
            asyncio.get_running_loop().call_later(wait, self._watch_adopted)
            return
        self._adopting_since = 0.0
        self._changed.set()

    def seen(self, changes: Sequence[Change]) -> None:
        """Take what somebody else follows of the keys that are looked after elsewhere."""
        for change in self._keys.seen(changes):
            self._lost(change.key, deleted=change.value is None)

    async def disown(self, key: str) -> None:
        """No longer want `key`: it is deleted if it is still ours.  Returns at once; see `settled`."""
        self._keys.unwant(key)
        self._changed.set()

    async def abandon(self, key: str, revision: int) -> bool:
        """Delete `key`, which a former life left on our lease, unless it is wanted or written meanwhile.

        `revision` is when it was last written.  Returns at once (see `settled`), and whether it will be
        deleted; see `kvstore.former`.
        """
        self._changed.set()
        return self._keys.abandon(key, revision)

    async def written(self, key: str) -> None:
        """Wait until `key` is in etcd as wanted; KeyError when it is not (or no longer) wanted."""
        async with self._progress:
            await self._progress.wait_for(lambda: self._keys.is_clean(key))

    async def settled(self) -> None:
        """Wait until every own key is written and every disowned one deleted."""
        async with self._progress:
            await self._progress.wait_for(lambda: self._keys.settled)

    async def ready(self) -> int:
        """Wait for a lease and return its number."""
        async with self._progress:
            await self._progress.wait_for(lambda: self.alive)
        return self.lease_id

    async def revoke(self) -> None:
        """Give up the lease and with it every own key (uninstalling; never for a restart)."""
        lease, self.lease_id = self.lease_id, 0
        if lease:
            await self._client.lease_revoke(lease)

    # --- the loop

    async def run(self) -> None:
        """Hold the lease and the keys until cancelled."""
        with Patience(f"session of {self.name}") as patience:
            while True:
                patience.attempt(self.error)
                try:
                    await self._open()
                    patience.works()
                    await self._hold()
                except LeaseNotFound as error:
                    self._lease_lost(error)
                except KvstoreError as error:
                    self.error = str(error)
                await patience.pause()

    async def _open(self) -> None:
        """Have a lease that lives, and know which own keys are in etcd."""
        if self.lease_id:
            await self._keep_alive_once()
        else:
            shortest, longest = self._ttls
            self.ttl = int(min(cluster_interval(shortest, self.nodes()), longest))
            self.lease_id = await self._client.lease_grant(self.ttl)
            self._proven_at = time.monotonic()
            logger.info("{}: lease {:016x} for {} s", self.name, self.lease_id, self.ttl)
        wrong = await self._verify(list(self._keys.values()))
        if wrong:
            logger.info("{}: {} own keys to write", self.name, len(wrong))
        self.error = ""
        await self._notify()

    async def _verify(self, keys: Sequence[str]) -> list[str]:
        """Read own keys; those that are not in etcd as wanted become dirty, and only they."""
        wrong: list[str] = []
        for start in range(0, len(keys), MAX_TXN_OPS):
            chunk = keys[start : start + MAX_TXN_OPS]
            found, revision = await self._read(chunk)
            wrong += self._keys.verify(chunk, found, self.lease_id, revision)
        return wrong

    async def _read(self, keys: Sequence[str]) -> tuple[dict[str, KeyValue], int]:
        try:
            answer = await self._client.txn((), [get_op(key) for key in keys])
        except (PermissionDenied, RequestRefused) as error:
            logger.warning("own keys can not be verified and are written again: {}", error)
            return {}, 0
        return {item.key: item for response in answer.responses for item in response.items}, answer.revision

    async def _hold(self) -> None:
        """Keep alive, write and watch; raises the first trouble of any of the three."""
        async with self._client.watch_stream(f"own keys of {self.name}") as stream:
            watches = KeyWatches(stream)
            await _first_failure(
                self._keep_alive(), self._write(watches), self._watch(watches), self._look_elsewhere()
            )

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(jittered(keepalive_s(self.ttl)))
            await self._keep_alive_once()

    async def _look_elsewhere(self) -> None:
        """Read the keys that nobody watches for us, now and then."""
        while True:
            await asyncio.sleep(jittered(cluster_interval(self._sync, self.nodes())))
            keys = [
                key
                for key in self._keys.watchable()
                if key.startswith(self._elsewhere) and not key.startswith(self._read_elsewhere)
            ]
            for key in await self._verify(keys):
                logger.warning("own key {} was not in etcd as it should be", key)
                self._changed.set()

    async def _keep_alive_once(self) -> None:
        asked = time.monotonic()
        await self._client.lease_keepalive(self.lease_id)
        self._proven_at = asked

    def _lease_lost(self, error: LeaseNotFound) -> None:
        metrics.KVSTORE_LEASE_LOST.inc()
        logger.warning("{}: {}; a new lease, and {} own keys again", self.name, error, len(self._keys))
        self.error = str(error)
        self.lost = (*self.lost, self.lease_id)[-LOST_KEPT:]
        self.lease_id = 0
        self._keys.all_lost()

    # --- writing

    async def _write(self, watches: KeyWatches) -> None:
        await watches.follow(self._own_watches(self._keys.watchable()))
        while True:
            self._changed.clear()
            await watches.follow(self._own_watches(self._keys.take_turned()))
            await self._write_due()
            await self._delete_leaving()
            await watches.follow(self._own_watches(self._keys.take_turned()))
            await self._notify()
            await self._pause()

    def _own_watches(self, keys: Mapping[str, int]) -> dict[str, int]:
        return {key: at for key, at in keys.items() if not key.startswith(self._elsewhere)}

    async def _write_due(self) -> None:
        # One of many hosts takes its turn; what comes meanwhile goes along.
        await asyncio.sleep(random.uniform(0, spread_s(self._keys.dirty, self.nodes())))
        while due := self._keys.due(MAX_TXN_OPS):
            for batch in write_batches(put_op(key, value, self.lease_id) for key, value in due.items()):
                await self._write_batch({op.key: due[op.key] for op in batch})

    async def _write_batch(self, values: Mapping[str, bytes]) -> None:
        """Write a batch; one that etcd refuses is tried key by key, so that one bad key stops no other."""
        try:
            ops = [put_op(key, value, self.lease_id) for key, value in values.items()]
            answer = await self._client.txn((), ops)
        except (PermissionDenied, RequestRefused) as error:
            await self._refused(values, error)
            return
        self._keys.wrote(values, answer.revision)

    async def _refused(self, values: Mapping[str, bytes], error: KvstoreError) -> None:
        if len(values) > 1 and not isinstance(error, NoSpace):
            for key, value in values.items():
                await self._write_batch({key: value})
            return
        for key in values:
            self._keys.failed(key, str(error))
        logger.error("{} own keys are not written: {}", len(values), error)

    async def _delete_leaving(self) -> None:
        """Delete what was disowned or abandoned if it is still ours; what etcd refuses is tried again."""
        while due := list(self._keys.leaving().items()):
            for start in range(0, len(due), MAX_TXN_OPS):
                # Wanted again while others were deleted: then there is nothing to delete any more.
                chunk = [each for each in due[start : start + MAX_TXN_OPS] if each[0] not in self._keys]
                if chunk:
                    await self._delete(chunk)

    async def _delete(self, leaving: Sequence[tuple[str, Leaving]]) -> None:
        """Delete keys in one transaction, each on its own condition; what is refused is tried key by key."""
        txns = [_deletion(key, each, self.lease_id) for key, each in leaving]
        try:
            if len(txns) == 1:
                await self._client.txn(txns[0].compares, txns[0].success, txns[0].failure)
            else:
                await self._client.txn((), txns)
        except (PermissionDenied, RequestRefused) as error:
            if len(leaving) == 1:
                self._stays(*leaving[0], error)
                return
            for one in leaving:
                await self._delete([one])
            return
        for key, each in leaving:
            self._keys.left(key, each)

    def _stays(self, key: str, leaving: Leaving, error: KvstoreError) -> None:
        self._keys.not_left(leaving, str(error))
        pause = leaving.not_before - time.monotonic()
        logger.error("key {} stays although unwanted, tried again in {:.0f} s: {}", key, pause, error)

    async def _pause(self) -> None:
        """Wait for a change, or until a delayed write is due."""
        due = self._keys.next_due()
        timeout = None if due is None else max(due - time.monotonic(), 0.01)
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _notify(self) -> None:
        async with self._progress:
            self._progress.notify_all()

    # --- watching

    async def _watch(self, watches: KeyWatches) -> None:
        while True:
            await watches.wait_any()
            response = await watches.stream.read()
            if not watches.over(response):
                for event in map(event_from_wire, response.events):
                    self._observe(event)

    def _observe(self, event: Event) -> None:
        deleted = event.kind is Kind.DELETE
        if self._keys.observed(event.kv, deleted=deleted, lease=self.lease_id):
            self._lost(event.kv.key, deleted=deleted)

    def _lost(self, key: str, *, deleted: bool) -> None:
        metrics.KVSTORE_OWN_KEYS_RESTORED.inc()
        logger.warning("own key {} was {} by somebody", key, "deleted" if deleted else "changed")
        self._changed.set()


def _deletion(key: str, leaving: Leaving, lease: int) -> Nested:
    """Return the transaction that deletes a key if it is ours."""
    if leaving.revision:
        return txn_op([mod_is(key, leaving.revision)], [delete_op(key)])
    otherwise = [] if leaving.value is None else [txn_op([value_is(key, leaving.value)], [delete_op(key)])]
    return txn_op([lease_is(key, lease)], [delete_op(key)], otherwise)


async def _first_failure(*mains: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends, cancel the others, raise what the one raised."""
    tasks = [asyncio.create_task(main) for main in mains]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
