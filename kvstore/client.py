# SPDX-License-Identifier: Apache-2.0
"""The etcd client: get, list, put, delete, transactions, watch, leases, status.

One object per process and etcd cluster.  It neither waits nor repeats for long: each call raises a type
of `kvstore.errors` when no endpoint serves it in time, and the loops above (`watcher`, `session`,
`election`, the allocator) wait with back-off.  Keys are text; values are bytes.

Called by: kvstore.{watcher,session,election}, identity, external_resources, certs, cli, agent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from operator import attrgetter

import grpc.aio
import msgspec

from kvstore import rpc
from kvstore.config import EtcdConfig
from kvstore.errors import Compacted, KvstoreError, LeaseNotFound
from kvstore.etcd_pb2 import (
    DeleteRangeRequest,
    LeaseGrantRequest,
    LeaseKeepAliveRequest,
    LeaseRevokeRequest,
    LeaseTimeToLiveRequest,
    PutRequest,
    RangeRequest,
    StatusRequest,
    WatchResponse,
)
from kvstore.etcd_pb2 import KeyValue as PbKeyValue
from kvstore.listing import PAGE as PAGE
from kvstore.listing import PATIENCE, whole_list
from kvstore.ops import (
    Compare,
    KeyValue,
    Op,
    Put,
    TxnResult,
    Write,
    decode_key,
    encode_key,
    from_wire,
    span,
    touched,
    txn_from_wire,
    txn_to_wire,
    write_batches,
)
from kvstore.pace import Pace
from kvstore.transport import MAX_IN_FLIGHT, TIMEOUT_S, Peer, Transport, translate
from kvstore.watch import CONFIRM_S, HANG_S, IDLE_S, WatchBatch, WatchStream, Witness, changes_after

# A new watch asks for progress after this much quiet, seconds: then it has caught up with the past.
SETTLE_S = 1.0
# Keys of a page that are unpacked before anybody else may run: a millisecond.
UNPACKED_AT_ONCE = 2000
# Transactions of one write_many under way at once: leaves room for everybody else's requests.
WRITES_AT_ONCE = 16


class Listing(msgspec.Struct, frozen=True):
    """All keys of a prefix as they were at `revision`, in key order."""

    revision: int
    items: list[KeyValue]
    cluster_id: int = 0


class Snapshot(msgspec.Struct, frozen=True):
    """Keys and values of a prefix as they were at `revision`: a listing without the rest."""

    revision: int
    items: dict[str, bytes]
    cluster_id: int = 0


class Page(msgspec.Struct, frozen=True):
    """Some keys and values of a prefix as they were at `revision`, in key order; `first`: a list begins.

    `newest` is the one of them that was written last.
    """

    revision: int
    items: list[tuple[str, bytes]]
    first: bool
    cluster_id: int = 0
    newest: Witness | None = None


class MemberStatus(msgspec.Struct, frozen=True):
    """One endpoint for the status line: `error` is empty when it answered; sizes are bytes."""

    endpoint: str
    error: str = ""
    version: str = ""
    leader: bool = False
    revision: int = 0
    db_size: int = 0
    alarms: tuple[str, ...] = ()


class Client:
    """See the module's text.  `idle` and `hang` are the watchdog's times of `kvstore.watch`, seconds.

    `gate` is awaited before every request: until it returns, etcd is not asked for anything.  `qps` limits
    the requests a second (see `kvstore.pace`); 0: no limit.
    """

    def __init__(
        self,
        config: EtcdConfig,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float = TIMEOUT_S,
        idle: float = IDLE_S,
        hang: float = HANG_S,
        gate: Callable[[], Awaitable[None]] | None = None,
        qps: int = 0,
    ) -> None:
        self.config = config
        pace = Pace(qps) if qps else None
        self.transport = Transport(config, max_in_flight=max_in_flight, timeout=timeout, gate=gate, pace=pace)
        self._idle = idle
        self._hang = hang

    async def close(self) -> None:
        await self.transport.close()

    # --- reading

    async def get(self, key: str) -> KeyValue | None:
        """Return one key, or None; the answer is linearizable."""
        answer = await self.transport.call(rpc.RANGE, RangeRequest(key=encode_key(key)), key)
        return from_wire(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str, *, page: int = PAGE, keys_only: bool = False) -> Listing:
        """Return every key that starts with `prefix`, all at one revision, in pages of `page` keys."""
        items: list[KeyValue] = []
        revision = 0
        whole = whole_list(self.transport, prefix, page, keys_only=keys_only)
        async with contextlib.aclosing(whole) as parts:
            async for part in parts:
                if part.first:
                    items, revision = [], part.revision
                items.extend(from_wire(kv) for kv in part.kvs)
        return Listing(revision, items, self.transport.cluster_id)

    async def snapshot(self, prefix: str, *, page: int = PAGE) -> Snapshot:
        """Return what `list` does as a plain dict: a third of the memory, for large prefixes."""
        items: dict[str, bytes] = {}
        revision = 0
        async with contextlib.aclosing(self.pages(prefix, page=page)) as pages:
            async for each in pages:
                if each.first:
                    items, revision = {}, each.revision
                items.update(each.items)
        return Snapshot(revision, items, self.transport.cluster_id)

    async def pages(self, prefix: str, *, page: int = PAGE) -> AsyncGenerator[Page, None]:
        """Yield in parts what `snapshot` returns: a prefix of any size is never held twice.

        A list that has to begin anew does so with another first part.  Close it (`contextlib.aclosing`)
        when leaving early.
        """
        whole = whole_list(self.transport, prefix, page, patience=PATIENCE)
        async with contextlib.aclosing(whole) as parts:
            async for part in parts:
                for start in range(0, max(len(part.kvs), 1), UNPACKED_AT_ONCE):
                    kvs = part.kvs[start : start + UNPACKED_AT_ONCE]
                    # Not by `decode_key`: a call for each of 300 000 keys.
                    items = [(kv.key.decode("utf-8", "surrogateescape"), kv.value) for kv in kvs]
                    first = part.first and not start
                    yield Page(part.revision, items, first, self.transport.cluster_id, _newest(kvs))

    async def count(self, prefix: str) -> int:
        """Return how many keys start with `prefix`."""
        start, end = span(prefix)
        request = RangeRequest(key=start, range_end=end, count_only=True)
        return (await self.transport.call(rpc.RANGE, request, prefix)).count

    async def created_before(self, prefix: str, revision: int) -> KeyValue | None:
        """Return the youngest key under `prefix` that was created before `revision`, or None."""
        start, end = span(prefix)
        request = RangeRequest(
            key=start,
            range_end=end,
            limit=1,
            sort_order=RangeRequest.DESCEND,
            sort_target=RangeRequest.CREATE,
            max_create_revision=revision - 1,
        )
        answer = await self.transport.call(rpc.RANGE, request, prefix)
        return from_wire(answer.kvs[0]) if answer.kvs else None

    async def head(self, prefix: str) -> int:
        """Return etcd's present revision, as a member that is up to date says it.

        Asks in the name of a prefix that this user may read.
        """
        start, end = span(prefix)
        request = RangeRequest(key=start, range_end=end, limit=1, keys_only=True)
        return (await self.transport.call(rpc.RANGE, request, prefix)).header.revision

    # --- writing

    async def put(self, key: str, value: bytes | str, *, lease: int = 0) -> int:
        """Write one key and return the revision; raises LeaseNotFound when the lease is gone."""
        data = value.encode() if isinstance(value, str) else value
        request = PutRequest(key=encode_key(key), value=data, lease=lease)
        return (await self.transport.call(rpc.PUT, request, key, lease=lease)).header.revision

    async def delete(self, key: str) -> bool:
        """Delete one key; returns whether it was there."""
        request = DeleteRangeRequest(key=encode_key(key))
        return (await self.transport.call(rpc.DELETE, request, key)).deleted > 0

    async def delete_prefix(self, prefix: str) -> int:
        """Delete every key that starts with `prefix`, which may not be empty; returns how many."""
        if not prefix:
            raise ValueError("an empty prefix would delete everything in etcd")
        start, end = span(prefix)
        request = DeleteRangeRequest(key=start, range_end=end)
        return (await self.transport.call(rpc.DELETE, request, prefix)).deleted

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Run `success` if all compares hold, else `failure`; atomic either way."""
        request = txn_to_wire(compares, success, failure)
        lease = next((each.lease for each in success if isinstance(each, Put) and each.lease), 0)
        key = touched([*success, *failure], compares)
        return txn_from_wire(await self.transport.call(rpc.TXN, request, key, lease=lease))

    async def write_many(self, ops: Iterable[Write]) -> int:
        """Write any number of keys in transactions of up to 128; returns the last revision (0: nothing).

        Not atomic as a whole.  Of several writes to one key the last counts.  The first error is raised
        after every transaction that was under way has ended.
        """
        slots = asyncio.Semaphore(WRITES_AT_ONCE)

        async def write(batch: Sequence[Op]) -> int:
            async with slots:
                return (await self.txn((), batch)).revision

        revisions = await asyncio.gather(
            *(write(batch) for batch in write_batches(ops)), return_exceptions=True
        )
        errors = [each for each in revisions if isinstance(each, BaseException)]
        if errors:
            raise errors[0]
        return max((each for each in revisions if isinstance(each, int)), default=0)

    # --- watching

    async def watch(
        self,
        prefix: str,
        start_revision: int,
        *,
        single: bool = False,
        cluster_id: int = 0,
        witness: Witness | None = None,
    ) -> AsyncGenerator[WatchBatch, None]:
        """Yield what happens under `prefix` (`single`: to that one key) from `start_revision` on.

        The first batch says `created`; the first one without events after it comes when there has been
        quiet for a second, so that nothing older is likely to be under way.  After a deletion there is one,
        with events or without, soon after CONFIRM_S.

        Never ends by itself; raises Compacted, PermissionDenied or Unavailable (then resume with the last
        batch's revision + 1).  With `cluster_id`, another etcd cluster than that one counts as Compacted, and
        with `witness` a history in which that write is not the key's last before `start_revision`.
        Close it (`contextlib.aclosing`) when leaving early.
        """
        revision = max(start_revision - 1, 0)
        idle: float | None = SETTLE_S
        async with self.watch_stream(prefix) as stream:
            # From the revision before, which exists: else etcd would not answer the watchdog.
            await stream.create(prefix, revision, prefix=not single)
            while True:
                response = await stream.read(idle)
                stream.check(response, prefix, revision + 1)
                if response.created:
                    await self._check_history(prefix, start_revision, response, cluster_id)
                    if witness is not None:
                        await self._check_witness(prefix, start_revision, witness)
                    revision = revision or response.header.revision
                elif not response.events:
                    idle = None
                batch = _batch(response, revision)
                revision = batch.revision
                if any(each.value is None for each in batch.changes):
                    stream.ask_later(CONFIRM_S + SETTLE_S)  # who holds it begins a little later
                yield batch

    def watch_stream(self, subject: str) -> WatchStream:
        """Open a stream for several watches (see `kvstore.watch`)."""
        return WatchStream(self.transport, subject, idle=self._idle, hang=self._hang)

    async def _check_history(
        self, prefix: str, start_revision: int, response: WatchResponse, cluster_id: int
    ) -> None:
        """Raise Compacted when this etcd can not be the one that `start_revision` came from."""
        header = response.header
        if cluster_id and header.cluster_id != cluster_id:
            reason = f"this is another etcd cluster ({header.cluster_id:x})"
            raise Compacted(prefix, start_revision, 0, reason, head=header.revision)
        if header.revision + 1 >= start_revision:
            return
        # A member that lags behind looks the same as a wiped store: let the leader decide.
        head = await self.head(prefix)
        if head + 1 < start_revision:
            reason = f"etcd is at revision {head}: it was wiped or restored"
            raise Compacted(prefix, start_revision, 0, reason, head=head)

    async def _check_witness(self, prefix: str, start_revision: int, witness: Witness) -> None:
        """Raise Compacted when what the view has seen is not in this etcd's history."""
        request = RangeRequest(key=encode_key(witness.key), revision=start_revision - 1, keys_only=True)
        answer = await self.transport.call(rpc.RANGE, request, witness.key, wanted=start_revision - 1)
        found = answer.kvs[0].mod_revision if answer.kvs else 0
        if found != witness.revision:
            reason = (
                f"it has another history: {witness.key} is of revision {found or 'none'}, was of "
                f"{witness.revision}: it was restored"
            )
            raise Compacted(prefix, start_revision, 0, reason, head=answer.header.revision)

    # --- leases

    async def lease_grant(self, ttl: int, lease: int = 0) -> int:
        """Grant a lease of `ttl` seconds and return its number (chosen by etcd unless given)."""
        request = LeaseGrantRequest(TTL=ttl, ID=lease)
        return (await self.transport.call(rpc.LEASE_GRANT, request, "")).ID

    async def lease_revoke(self, lease: int) -> None:
        """Revoke a lease: its keys vanish.  Raises LeaseNotFound when it is gone already."""
        await self.transport.call(rpc.LEASE_REVOKE, LeaseRevokeRequest(ID=lease), "", lease=lease)

    async def lease_keepalive(self, lease: int) -> int:
        """Renew a lease once and return its TTL in seconds; raises LeaseNotFound when it is gone."""
        answer = await self.transport.ask(rpc.KEEP_ALIVE, LeaseKeepAliveRequest(ID=lease), lease=lease)
        if answer.TTL <= 0:
            raise LeaseNotFound(lease, "keepalive")
        return answer.TTL

    async def lease_keys(self, lease: int) -> Sequence[str]:
        """Return the keys that hang on a lease; none for a lease that is gone.

        Raises PermissionDenied when there is one among them that this user may not read.
        """
        request = LeaseTimeToLiveRequest(ID=lease, keys=True)
        answer = await self.transport.call(rpc.LEASE_TTL, request, f"the keys of lease {lease:016x}")
        return [decode_key(key) for key in answer.keys]

    async def lease_remaining(self, lease: int) -> int:
        """Return the seconds that a lease still has, 0 for one that is gone."""
        request = LeaseTimeToLiveRequest(ID=lease)
        answer = await self.transport.call(rpc.LEASE_TTL, request, f"lease {lease:016x}")
        return max(answer.TTL, 0)

    # --- status

    async def status(self) -> Sequence[MemberStatus]:
        """Ask every endpoint for its state; one that does not answer is listed with its error."""
        return await asyncio.gather(*(self._status(peer) for peer in self.transport.peers))

    async def _status(self, peer: Peer) -> MemberStatus:
        try:
            answer = await self.transport.call_peer(peer, rpc.STATUS, StatusRequest(), self.transport.timeout)
        except grpc.aio.AioRpcError as error:
            return MemberStatus(peer.target, error=str(translate(error, "status", "", peer.target)))
        except KvstoreError as error:
            return MemberStatus(peer.target, error=str(error))
        return MemberStatus(
            peer.target,
            version=answer.version,
            leader=answer.leader == answer.header.member_id,
            revision=answer.header.revision,
            db_size=answer.dbSize,
            alarms=tuple(answer.errors),
        )


def _batch(response: WatchResponse, revision: int) -> WatchBatch:
    """Make a batch; `revision` is where the watch stood before.

    With events the last one says where to resume: while a watch catches up, the header is ahead of it.
    Without, the header counts only in a notification of this very watch: the answer to a progress
    request (watch -1) may overtake events in etcd before 3.4.25 and 3.5.8.
    """
    changes = changes_after(response, revision)
    if changes:
        revision = max(revision, changes[-1].revision)
    elif not response.created and response.watch_id >= 0:
        revision = max(revision, response.header.revision)
    return WatchBatch(revision, changes, response.header.revision, response.created)


_mod_revision = attrgetter("mod_revision")


def _newest(kvs: Sequence[PbKeyValue]) -> Witness | None:
    """Return the write among them that was the last."""
    if not kvs:
        return None
    last = max(kvs, key=_mod_revision)
    return Witness(decode_key(last.key), last.mod_revision)
