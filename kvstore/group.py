# SPDX-License-Identifier: Apache-2.0
"""Group commit: transactions that wait at the same time travel as one request.

    lone ──▶ etcd                      nothing under way: it goes at once, as itself
    a, b, c wait meanwhile
    [a b c] ──▶ etcd ──▶ answers       one outer transaction without conditions; each member is nested in
    d, e … wait meanwhile              it, with its own conditions and its own success or failure branch

Nobody waits for company: a group is whatever has gathered while the request before it was under way.  A
write costs etcd one entry in its log and one sync of its disk however many keys it has, and each request,
answer and watch message costs both sides more than its content does.

A group means what its members would mean one after the other, in any order.  etcd decides the conditions
of all nested transactions before it runs any of their branches, and refuses two branches that put one
key; so a member that could notice another's write, or writes where another looks, waits for the next group.
A group that is refused as a whole (one member's lease is gone, a right is missing, it is too large) is taken
apart: each member is tried alone and gets its own answer.  Members whose group met an etcd that is away all
get that error; as with any write then, it may have happened.

Older etcd (3.4.23 is one; advisory GHSA-rfx7-8w68-q57q) checks no rights inside nested transactions.  That
door is open to every client; here it means that a missing right may show only in a lone transaction.

Called by: identity.allocator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.client import Client
from kvstore.errors import KvstoreError, NoSpace, Unavailable
from kvstore.ops import Compare, Delete, Get, Nested, Op, Put, TxnResult, txn_op

# etcd counts operations a level: 128 less the members are left for each of them, and an allocation needs
# three.  Larger groups gain little and make every member wait for more work.
MAX_MEMBERS = 16


class Footprint:
    """Which keys a set of transactions writes, and which keys and ranges it looks at."""

    def __init__(self) -> None:
        self._writes: set[str] = set()
        self._keys: set[str] = set()
        self._ranges: tuple[str, ...] = ()

    @classmethod
    def of(cls, txn: Nested) -> Footprint:
        footprint = cls()
        for compare in txn.compares:
            footprint._looks(compare.key, compare.prefix)
        for op in (*txn.success, *txn.failure):
            if isinstance(op, Get):
                footprint._looks(op.key, op.prefix)
            elif isinstance(op, Put) or (isinstance(op, Delete) and not op.prefix):
                footprint._writes.add(op.key)
                footprint._keys.add(op.key)
            else:
                raise TypeError(f"{op!r} can not be part of a group")
        return footprint

    def _looks(self, key: str, prefix: bool) -> None:
        if prefix:
            self._ranges += (key,)
        else:
            self._keys.add(key)

    def add(self, other: Footprint) -> None:
        self._writes |= other._writes
        self._keys |= other._keys
        self._ranges += other._ranges

    def meets(self, other: Footprint) -> bool:
        """True when one of the two could notice what the other writes."""
        return self._writes_into(other) or other._writes_into(self)

    def _writes_into(self, other: Footprint) -> bool:
        if not self._writes.isdisjoint(other._keys):
            return True
        return any(key.startswith(other._ranges) for key in self._writes)


@dataclass(eq=False, slots=True)
class _Member:
    """One transaction that waits for its answer; who waits may have given up (the answer is cancelled)."""

    txn: Nested
    footprint: Footprint
    answer: asyncio.Future[TxnResult]


class GroupCommit:
    """See the module's text.  Belongs to the loop's thread; `txn` is the whole interface."""

    def __init__(self, client: Client, *, max_members: int = MAX_MEMBERS) -> None:
        self._client = client
        self._max_members = max_members
        self._waiting: dict[_Member, None] = {}
        self._busy = False
        self._sending: set[asyncio.Task[None]] = set()

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Do what `Client.txn` does, alone or in a group; raises what it raises.

        Who is cancelled while waiting is not sent; who is cancelled later may have been written.
        TypeError for what can not be part of a group: ranges to delete, and transactions inside.
        """
        txn = txn_op(compares, success, failure)
        footprint = Footprint.of(txn)
        if not self._busy:
            self._busy = True
            try:
                return await self._client.txn(compares, success, failure)
            finally:
                self._next()
        member = _Member(txn, footprint, asyncio.get_running_loop().create_future())
        self._waiting[member] = None
        try:
            return await member.answer
        finally:
            self._waiting.pop(member, None)

    def _next(self) -> None:
        """The request that was under way has ended: send who waits."""
        members = list(self._gather())
        self._busy = bool(members)
        if members:
            task = asyncio.get_running_loop().create_task(self._send(members), name="kvstore:group")
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    def _gather(self) -> Iterator[_Member]:
        """Take the first that wait and do not concern each other."""
        together, taken = Footprint(), 0
        for member in list(self._waiting):
            if taken == self._max_members:
                return
            if not member.answer.done() and not together.meets(member.footprint):
                together.add(member.footprint)
                taken += 1
                del self._waiting[member]
                yield member

    async def _send(self, members: Sequence[_Member]) -> None:
        try:
            await self._commit(members)
        except asyncio.CancelledError:
            # The client was closed: what a caller of it would have met.
            for member in members:
                member.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, every member raises it
            for member in members:
                _fail(member, error)
        finally:
            self._next()

    async def _commit(self, members: Sequence[_Member]) -> None:
        if len(members) == 1:
            await self._alone(members[0])
            return
        try:
            result = await self._client.txn((), [member.txn for member in members])
        except (Unavailable, NoSpace):
            raise
        except KvstoreError:
            for member in members:
                await self._alone(member)
            return
        for member, response in zip(members, result.responses, strict=True):
            assert response.nested is not None, "etcd answers a nested transaction with its result"
            _answer(member, response.nested)

    async def _alone(self, member: _Member) -> None:
        if member.answer.done():
            return
        txn = member.txn
        try:
            _answer(member, await self._client.txn(txn.compares, txn.success, txn.failure))
        except KvstoreError as error:
            _fail(member, error)


def _answer(member: _Member, result: TxnResult) -> None:
    if not member.answer.done():
        member.answer.set_result(result)


def _fail(member: _Member, error: Exception) -> None:
    if not member.answer.done():
        member.answer.set_exception(error)
