# SPDX-License-Identifier: Apache-2.0
"""One allocation against etcd: which transaction follows which answer.

    start: a number to hold on to → JOIN it, else one without users → UNUSED, else → TAKEN (choose and create)

    UNUSED     reuse      done | what create may answer | GONE | FOREIGN
    JOIN       join       done | JOIN another number | GONE | FOREIGN
    GONE       create with the same number; when others name it too: restore
    FOREIGN    create with another number
    TAKEN      create with another number
    LOCKED     wait, then UNUSED or create again
    AMBIGUOUS  the locked way

Called by: identity.allocator; one object an allocation.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from core.backoff import Backoff
from core.errors import shorten
from core.waiting import waiting
from identity import locked, transactions
from identity.errors import AllocationFailed, RangeExhausted
from identity.transactions import Answer, Outcome, Slot, Txn
from kvstore import schema
from kvstore.client import Client
from kvstore.errors import LeaseNotFound, RecordError, Unavailable
from kvstore.ops import Compare, Op, TxnResult

T = TypeVar("T")

# Cilium's bound too.  Waiting for a lock or for etcd does not count: patience has no bound.
MAX_ATTEMPTS = 16
# So many taken numbers in a row mean that the cache does not know the store: read the numbers there.
TAKEN_BEFORE_LISTING = 3
# Random draws before every number of the range is looked at.
DRAWS = 32


Commit = Callable[[Sequence[Compare], Sequence[Op], Sequence[Op]], Awaitable[TxnResult]]


async def no_lease() -> int:
    return 0


def nothing_known(number: int) -> bool:
    return False


class Attempt:
    """The state of one allocation for `slot`, from `numbers`.

    `lease` gives the lease that our value/ key hangs on at the time (0: none), `known` says which numbers
    are surely in use, `commit` runs a transaction (the client's own way unless given).
    """

    def __init__(
        self,
        client: Client,
        slot: Slot,
        numbers: range,
        *,
        lease: Callable[[], Awaitable[int]] = no_lease,
        known: Callable[[int], bool] = nothing_known,
        commit: Commit | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._commit = commit or client.txn
        self._slot = slot
        self._numbers = numbers
        self._lease = lease
        self._known = known
        self._rng = rng or random.Random()
        # Numbers in use by anybody, and of those the ones that do not hold our labels.
        self._taken: set[int] = set()
        self._foreign: set[int] = set()
        self._gone: set[int] = set()
        self._unused = 0
        self._listed = False

    async def run(self, preferred: int = 0, unused: int = 0) -> Answer:
        """Return DONE with the number that the store now holds; `preferred` is taken if it can be.

        `unused` is a number that was seen with these labels: it is taken rather than a new one, but an
        identity of these labels that has users is joined.

        Waits for etcd and for locks of others as long as it takes.  Raises AllocationFailed,
        RangeExhausted, and KvstoreError where waiting can not help.
        """
        self._unused = unused
        answer = Answer(Outcome.JOIN, preferred) if preferred else self._afresh()
        attempts = 0
        while attempts < MAX_ATTEMPTS:
            if answer.outcome is Outcome.LOCKED:
                answer = await self._wait_for_lock()
                continue
            attempts += 1
            answer = await self._step(answer)
            if answer.outcome is Outcome.DONE:
                return answer
        raise AllocationFailed(
            f"no identity for {shorten(self._slot.text)} after {MAX_ATTEMPTS} attempts, the last: {answer}",
            hint="somebody else keeps changing the same keys under cilium/state/identities/v1/",
        )

    async def _step(self, answer: Answer) -> Answer:
        match answer.outcome:
            case Outcome.UNUSED:
                return await self._reuse(answer.number)
            case Outcome.JOIN if answer.number in self._gone:
                return await self._restore(answer.number)
            case Outcome.JOIN:
                return await self._join(answer.number)
            case Outcome.GONE:
                self._gone.add(answer.number)
                self._unused = 0
                return await self._create(answer.number)
            case Outcome.AMBIGUOUS:
                return await self._locked()
            case _:
                self._note_taken(answer)
                return await self._create(await self._choose())

    def _afresh(self) -> Answer:
        return Answer(Outcome.UNUSED, self._unused) if self._unused else Answer(Outcome.TAKEN)

    def _note_taken(self, answer: Answer) -> None:
        if answer.number == self._unused:
            self._unused = 0
        if answer.number:
            self._taken.add(answer.number)
        if answer.outcome is Outcome.FOREIGN:
            self._foreign.add(answer.number)

    async def _reuse(self, number: int) -> Answer:
        result = await self._txn(lambda lease: transactions.reuse(self._slot, number, lease))
        answer = transactions.reused(self._slot, result, self._numbers, self._foreign)
        return answer._replace(number=answer.number or number, revision=result.revision)

    async def _join(self, number: int) -> Answer:
        result = await self._txn(lambda lease: transactions.join(self._slot, number, lease))
        return transactions.joined(self._slot, number, result, self._numbers, self._foreign)

    async def _restore(self, number: int) -> Answer:
        result = await self._txn(lambda lease: transactions.restore(self._slot, number, lease))
        self._gone.discard(number)
        if not result.succeeded:
            return Answer(Outcome.JOIN, number)
        return transactions.eldest(self._slot, number, result, self._numbers, self._foreign)

    async def _create(self, number: int) -> Answer:
        result = await self._txn(lambda lease: transactions.create(self._slot, number, lease))
        answer = transactions.created(self._slot, result, self._numbers, self._foreign)
        return answer._replace(number=answer.number or number, revision=result.revision)

    async def _locked(self) -> Answer:
        # Chosen before the lock is taken: choosing may list, and a lock should be short.
        number = self._unused or await self._choose()
        take = transactions.join if self._unused else transactions.restore

        async def attempt() -> Answer:
            write = take(self._slot, number, await self._lease())
            return await locked.allocate(
                self._client, self._slot, self._numbers, self._foreign, number, write
            )

        return await patiently(f"identity of {shorten(self._slot.text)}", attempt)

    async def _wait_for_lock(self) -> Answer:
        """Return when no lock on these labels is held any more."""
        pause = Backoff(base=0.01, cap=1.0, rng=self._rng)
        subject = f"lock {self._slot.lock_prefix}"
        with waiting(subject, "another agent allocates the same labels"):
            while True:
                await asyncio.sleep(pause.next())
                if not await patiently(subject, lambda: self._client.count(self._slot.lock_prefix)):
                    return self._afresh()

    async def _txn(self, build: Callable[[int], Txn]) -> TxnResult:
        # Built anew for each try: the lease may be another one then.
        async def attempt() -> TxnResult:
            return await self._commit(*build(await self._lease()))

        return await patiently(f"identity of {shorten(self._slot.text)}", attempt)

    async def _choose(self) -> int:
        number = 0
        if len(self._taken) < TAKEN_BEFORE_LISTING:
            number = pick(self._numbers, lambda each: each in self._taken or self._known(each), self._rng)
        if not number:
            await self._read_taken()
            number = pick(self._numbers, self._taken.__contains__, self._rng)
        if not number:
            raise RangeExhausted(
                f"no number is left for {shorten(self._slot.text)}: all of {self._numbers[0]} to "
                f"{self._numbers[-1]} are in use",
                hint="fewer labels should make the identity (option labels); unused numbers are freed "
                "by garbage collection",
            )
        return number

    async def _read_taken(self) -> None:
        if self._listed:
            return
        listing = await patiently(
            "numbers of identities", lambda: self._client.list(schema.IDENTITY_IDS, keys_only=True)
        )
        for item in listing.items:
            try:
                self._taken.add(schema.parse_identity_id_key(item.key))
            except RecordError:
                continue  # not a number, so it takes none
        self._listed = True


def pick(numbers: range, taken: Callable[[int], bool], rng: random.Random) -> int:
    """Return a random number that is not `taken`, 0 when there is none.

    Random, so that agents which choose at the same moment rarely choose the same.
    """
    for _ in range(DRAWS):
        number = rng.choice(numbers)
        if not taken(number):
            return number
    free = [number for number in numbers if not taken(number)]
    return rng.choice(free) if free else 0


async def patiently(purpose: str, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat `call` while etcd is away or our lease is lost; say so while waiting."""
    try:
        return await call()
    except (Unavailable, LeaseNotFound) as error:
        first = error
    backoff = Backoff(base=0.1, cap=15.0)
    with waiting("etcd", purpose) as wait:
        wait.note = first.message
        while True:
            await asyncio.sleep(backoff.next())
            try:
                return await call()
            except (Unavailable, LeaseNotFound) as error:
                wait.note = error.message
