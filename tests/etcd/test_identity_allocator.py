# SPDX-License-Identifier: Apache-2.0
"""Allocation against a real etcd: races, locks of others, ambiguity, lost keys, restarts, garbage."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from core import metrics
from core.waiting import current
from identity import gc as collector_module
from identity import locked, transactions
from identity.allocator import Allocator
from identity.attempt import Attempt
from identity.cache import IdentityCache
from identity.errors import LabelError, RangeExhausted
from identity.gc import Collector
from identity.labels import Labels
from identity.transactions import Slot
from kvstore import schema
from kvstore.client import Client
from kvstore.errors import Unavailable
from kvstore.session import SYNC_S, Session
from kvstore.watcher import follow
from tests.support.etcd import EtcdServer

WEB = Labels.of({"app": "web"})
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("identity"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def etcd(shared_etcd: EtcdServer) -> EtcdServer:
    """One etcd for the module: starting it is most of what these tests would cost; emptied before each."""
    shared_etcd.ctl("del", "", "--prefix")
    return shared_etcd


class Host:
    """One agent's share of identity: session, cache and allocator on a client of its own."""

    def __init__(
        self,
        etcd: EtcdServer,
        address: str,
        *,
        cluster_id: int = 0,
        sync: float = SYNC_S,
        unwatched: tuple[str, ...] = (),
    ) -> None:
        self.client = Client(etcd.config)
        self.session = Session(
            self.client, ttl=60, name=address, elsewhere=unwatched, read_elsewhere=unwatched
        )
        self.cache = IdentityCache()
        self.renumbered: list[tuple[Labels, int, int]] = []
        self.allocator = Allocator(
            self.client,
            self.session,
            self.cache,
            owner=address,
            cluster_id=cluster_id,
            sync=sync,
            on_renumbered=lambda labels, old, new: self.renumbered.append((labels, old, new)),
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> Host:
        mains = (
            self.session.run(),
            self.allocator.run(),
            follow(self.client, schema.IDENTITY_IDS, self.cache),
        )
        self._tasks = [asyncio.create_task(main) for main in mains]
        await self.session.ready()
        return self

    async def stop(self) -> None:
        """Die without a word: keys and lease stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()

    async def value(self, labels: Labels) -> bytes | None:
        item = await self.client.get(Slot(labels, self.session.name).value_key)
        return item.value if item else None


@contextlib.asynccontextmanager
async def host(
    etcd: EtcdServer,
    address: str = "10.0.0.1",
    *,
    cluster_id: int = 0,
    sync: float = SYNC_S,
    unwatched: tuple[str, ...] = (),
) -> AsyncIterator[Host]:
    each = Host(etcd, address, cluster_id=cluster_id, sync=sync, unwatched=unwatched)
    try:
        yield await each.start()
    finally:
        await each.stop()


@contextlib.asynccontextmanager
async def client_of(etcd: EtcdServer) -> AsyncIterator[Client]:
    client = Client(etcd.config)
    try:
        yield client
    finally:
        await client.close()


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for a condition; the test's own limit is the only clock."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            outcome = condition()
            if asyncio.iscoroutine(outcome):
                outcome = await outcome
            if outcome:
                return
            await asyncio.sleep(0.02)


async def numbers_of(client: Client, labels: Labels) -> set[int]:
    """Return every number that etcd holds for these labels."""
    listing = await client.list(schema.IDENTITY_IDS)
    parsed = [schema.parse_identity_id(item.key, item.value) for item in listing.items]
    return {number for number, text in parsed if text == labels.serialized}


def slot(labels: Labels = WEB, owner: str = "192.0.2.9") -> Slot:
    return Slot(labels, owner)


# --- one transaction


async def test_a_new_identity_is_what_cilium_writes(etcd: EtcdServer) -> None:
    labels = Labels.parse("k8s:app=web;reserved:init=;k8s:io.cilium.k8s.policy.cluster=c8;")
    async with host(etcd, "10.99.0.2", cluster_id=8) as one:
        number = await one.allocator.allocate(labels)
        assert number >> 16 == 8
        id_item = await one.client.get(f"cilium/state/identities/v1/id/{number}")
        assert id_item is not None
        assert (id_item.value, id_item.lease) == (labels.serialized.encode(), 0)
        key = f"cilium/state/identities/v1/value/{labels.serialized}/10.99.0.2"
        value_item = await one.client.get(key)
        assert value_item is not None
        assert (value_item.value, value_item.lease) == (str(number).encode(), one.session.lease_id)
        assert value_item.mod_revision == id_item.mod_revision


async def test_fifty_racers_make_one_identity(etcd: EtcdServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(etcd)) for _ in range(5)]
        numbers = range(256, 65_536)
        racers = [Attempt(clients[n % 5], slot(owner=f"10.1.0.{n}"), numbers).run() for n in range(50)]
        answers = await asyncio.gather(*racers)
        assert len({answer.number for answer in answers}) == 1
        assert await numbers_of(clients[0], WEB) == {answers[0].number}
        users = await clients[0].list(slot().value_prefix)
        assert len(users.items) == 50


async def test_two_hosts_share_a_number_and_other_labels_get_another(etcd: EtcdServer) -> None:
    async with host(etcd, "10.0.0.1") as one, host(etcd, "10.0.0.2") as two:
        number = await one.allocator.allocate(WEB)
        assert await two.allocator.allocate(WEB) == number
        assert await two.allocator.allocate(Labels.of({"app": "db"})) != number


async def test_the_same_labels_at_once_on_one_host_are_one_allocation(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        numbers = await asyncio.gather(*(one.allocator.allocate(WEB) for _ in range(20)))
        assert len(set(numbers)) == 1
        assert one.allocator.count(WEB) == 20


async def test_hosts_that_allocate_the_same_at_once_in_groups_agree(etcd: EtcdServer) -> None:
    sets = [Labels.of({"app": f"a{n}"}) for n in range(60)]
    async with host(etcd, "10.0.0.1") as one, host(etcd, "10.0.0.2") as two:
        before = etcd.revision()
        mine, theirs = await asyncio.gather(
            asyncio.gather(*(one.allocator.allocate(each) for each in sets)),
            asyncio.gather(*(two.allocator.allocate(each) for each in reversed(sets))),
        )
        assert mine == theirs[::-1]
        assert len(set(mine)) == len(sets)
        # 60 creations and 60 joins; alone, each would have been a revision.
        assert etcd.revision() - before < 60
        listing = await one.client.list(schema.IDENTITY_IDS)
        assert {item.key: item.value.decode() for item in listing.items} == {
            schema.identity_id_key(number): each.serialized for number, each in zip(mine, sets, strict=True)
        }
        for each, number in zip(sets, mine, strict=True):
            assert await one.value(each) == await two.value(each) == str(number).encode()


async def test_members_of_a_group_take_their_own_ways(etcd: EtcdServer) -> None:
    """In one group: a new one, one to join, an ambiguous one, one under somebody's lock."""
    names = ("first", "new", "joined", "ambiguous", "held")
    first, new, joined, ambiguous, held = (Labels.of({"app": name}) for name in names)
    async with client_of(etcd) as other, host(etcd) as one:
        await other.put(f"{slot(joined).value_prefix}10.9.0.1", b"777")
        await other.put(f"{slot(ambiguous).value_prefix}x:y=1;/10.9.0.1", b"999")
        lock = schema.identity_lock_key(held.serialized, await other.lease_grant(30))
        await other.put(lock, b"")
        tasks = [
            asyncio.create_task(one.allocator.allocate(each))
            for each in (first, new, joined, ambiguous, held)
        ]
        done, (waiting,) = await asyncio.wait(tasks[:4], timeout=DEADLINE_S), tasks[4:]
        assert not done[1]
        assert not waiting.done()
        await other.delete(lock)
        numbers = await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
        assert numbers[2] == 777
        assert numbers[3] != 999
        assert len(set(numbers)) == 5


async def test_an_allocation_that_is_cancelled_disturbs_none_beside_it(etcd: EtcdServer) -> None:
    sets = [Labels.of({"app": f"c{n}"}) for n in range(20)]
    async with host(etcd) as one:
        tasks = [asyncio.create_task(one.allocator.allocate(each)) for each in sets]
        await asyncio.sleep(0)
        for task in tasks[::5]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), DEADLINE_S)
        await eventually(lambda: not one.allocator._unsettled)
        for place, (labels, task) in enumerate(zip(sets, tasks, strict=True)):
            assert task.cancelled() == (place % 5 == 0)
            expected = None if task.cancelled() else str(task.result()).encode()
            assert await one.value(labels) == expected


async def test_reserved_labels_have_their_number_and_no_labels_have_none(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        assert await one.allocator.allocate(Labels.of(["reserved:init"])) == 5
        await one.allocator.release(Labels.of(["reserved:init"]))
        with pytest.raises(LabelError):
            await one.allocator.allocate(Labels())


async def test_a_list_that_comes_during_an_allocation_has_nothing_written_twice(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        allocation = asyncio.create_task(one.allocator.allocate(WEB))
        while not one.allocator.count(WEB):
            await asyncio.sleep(0)
        one.allocator.verify_all()
        await allocation
        await eventually(lambda: not one.allocator._unsettled)
        async with one.allocator._uses[WEB].lock:
            found = await one.client.get(Slot(WEB, "10.0.0.1").value_key)
        assert found is not None
        assert found.version == 1


# --- locks of real agents


async def test_a_held_lock_makes_us_wait_and_then_join(etcd: EtcdServer) -> None:
    async with client_of(etcd) as cilium, host(etcd) as one:
        lease = await cilium.lease_grant(30)
        await cilium.put(schema.identity_lock_key(WEB.serialized, lease), b"", lease=lease)
        allocation = asyncio.create_task(one.allocator.allocate(WEB))
        await asyncio.sleep(0.3)
        assert not allocation.done()
        assert not (await cilium.list(slot().value_prefix)).items
        # In the order in which a real agent writes, under its lock.
        await cilium.put(schema.identity_id_key(4242), WEB.serialized)
        await cilium.put(slot().value_key, b"4242", lease=lease)
        await cilium.delete(schema.identity_lock_key(WEB.serialized, lease))
        assert await allocation == 4242
        assert await numbers_of(cilium, WEB) == {4242}


async def test_a_lock_whose_holder_died_ends_with_its_lease(etcd: EtcdServer) -> None:
    async with client_of(etcd) as cilium, host(etcd) as one:
        lease = await cilium.lease_grant(1)
        await cilium.put(schema.identity_lock_key(WEB.serialized, lease), b"", lease=lease)
        assert await one.allocator.allocate(WEB) in one.allocator.range


async def test_the_locked_way_leaves_no_lock_and_respects_one(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        answer = await locked.allocate(
            client, slot(), range(256, 65_536), set(), 300, transactions.restore(slot(), 300, 0)
        )
        assert (answer.outcome, answer.number) == (transactions.Outcome.DONE, 300)
        assert not (await client.list(schema.IDENTITY_LOCKS)).items
        await client.put(schema.identity_lock_key(WEB.serialized, 77), b"")
        answer = await locked.allocate(
            client, slot(), range(256, 65_536), set(), 301, transactions.restore(slot(), 301, 0)
        )
        assert answer.outcome is transactions.Outcome.LOCKED


# --- labels that begin alike


async def test_labels_that_begin_like_others_get_their_own_number(etcd: EtcdServer) -> None:
    short, long = Labels.of({"app": "b"}), Labels.parse("container:app=b;container:x=1;")
    async with host(etcd, "10.0.0.1") as one, client_of(etcd) as client:
        inside = f"{schema.identity_value_prefix(short.serialized)}x:y=1;/10.0.0.9"
        await client.put(inside, b"999")
        number = await one.allocator.allocate(short)
        assert number != 999
        assert await one.allocator.allocate(long) != number
        assert await one.value(short) == str(number).encode()
        assert not (await client.list(schema.IDENTITY_LOCKS)).items
        left = await client.get(inside)
        assert left is not None
        assert left.value == b"999"


async def test_racers_for_ambiguous_labels_make_one_identity(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        await client.put(f"{slot().value_prefix}x:y=1;/10.0.0.9", b"999")
        racers = [Attempt(client, slot(owner=f"10.1.0.{n}"), range(256, 65_536)).run() for n in range(8)]
        answers = await asyncio.gather(*racers)
        assert len({answer.number for answer in answers}) == 1
        assert await numbers_of(client, WEB) == {answers[0].number}


# --- a number that its last user left behind


async def reuse(client: Client, owner: str = "10.1.0.1", unused: int = 500) -> int:
    """Return the number that one gets who saw that `unused` has these labels and no users."""
    return (await Attempt(client, slot(owner=owner), range(256, 65_536)).run(unused=unused)).number


async def test_a_number_without_users_is_used_again(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        await client.put(schema.identity_id_key(500), WEB.serialized)
        assert await reuse(client) == 500
        found = await client.get(slot(owner="10.1.0.1").value_key)
        assert found is not None
        assert found.value == b"500"
        assert await numbers_of(client, WEB) == {500}


async def test_an_identity_with_users_counts_more_than_a_number_without(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        for number in (500, 700):
            await client.put(schema.identity_id_key(number), WEB.serialized)
        await client.put(slot(owner="10.0.0.9").value_key, b"700")
        assert await reuse(client) == 700


async def test_a_number_that_went_or_moved_on_meanwhile_is_not_taken_from_anybody(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        revision = await client.put(schema.identity_id_key(500), WEB.serialized)
        assert (await client.txn(*transactions.collect(500, WEB.serialized, revision))).succeeded
        await client.put(schema.identity_id_key(501), "container:app=other;")
        other = await reuse(client, unused=501)
        assert other != 501
        assert await numbers_of(client, WEB) == {other}
        await client.delete(slot(owner="10.1.0.1").value_key)
        await client.delete(schema.identity_id_key(other))
        assert await reuse(client, unused=500) == 500  # nobody has it: it is made again
        assert await numbers_of(client, WEB) == {500}


async def test_who_reuses_first_stops_the_collector(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        revision = await client.put(schema.identity_id_key(500), WEB.serialized)
        assert await reuse(client) == 500
        assert not (await client.txn(*transactions.collect(500, WEB.serialized, revision))).succeeded


async def test_a_number_is_not_reused_while_a_real_agent_holds_the_lock(etcd: EtcdServer) -> None:
    async with client_of(etcd) as cilium, client_of(etcd) as client:
        await cilium.put(schema.identity_id_key(500), WEB.serialized)
        await cilium.put(schema.identity_lock_key(WEB.serialized, 77), b"")
        refused = await client.txn(*transactions.reuse(slot(), 500, 0))
        assert not refused.succeeded
        numbers = range(256, 65_536)
        assert transactions.reused(slot(), refused, numbers).outcome is transactions.Outcome.LOCKED
        waiting_for = asyncio.create_task(reuse(client))
        await eventually(lambda: any("lock" in wait.subject for wait in current()))
        assert not (await cilium.list(slot().value_prefix)).items
        await cilium.delete(schema.identity_lock_key(WEB.serialized, 77))
        assert await waiting_for == 500
        assert await numbers_of(cilium, WEB) == {500}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "labels that begin alike are in use"])
async def test_racers_who_reuse_and_who_create_end_with_one_number(etcd: EtcdServer, beside: bool) -> None:
    """Ten rounds of eight: half saw the number that was left behind, half know nothing."""
    async with client_of(etcd) as client:
        for turn in range(10):
            etcd.ctl("del", "", "--prefix")
            if beside:
                await client.put(f"{slot().value_prefix}x:y=1;/10.0.0.9", b"999")
            await client.put(schema.identity_id_key(500), WEB.serialized)
            racers = [reuse(client, f"10.1.{turn}.{n}", 500 * (n % 2)) for n in range(8)]
            numbers = set(await asyncio.gather(*racers))
            assert len(numbers) == 1
            users = (await client.list(slot().value_prefix)).items
            assert {item.value for item in users if "x:y" not in item.key} == {b"%d" % min(numbers)}


# --- a number without users against a second one


async def test_who_joins_a_number_without_users_moves_to_the_one_that_was_created_since(
    etcd: EtcdServer,
) -> None:
    """Host 1 knows 500 from its cache; host 2 has not heard of it, and was quicker."""
    async with client_of(etcd) as two, host(etcd) as one:
        await two.put(schema.identity_id_key(500), WEB.serialized)
        await eventually(lambda: one.cache.number_of(WEB) == 500)
        created = (await Attempt(two, slot(), range(256, 65_536)).run()).number
        assert created != 500
        assert await one.allocator.allocate(WEB) == 500  # at once, without etcd
        await eventually(lambda: one.renumbered)
        assert one.renumbered == [(WEB, 500, created)]
        assert await one.value(WEB) == b"%d" % created


async def test_a_younger_user_of_another_number_moves_nobody(etcd: EtcdServer) -> None:
    numbers = range(256, 65_536)
    async with client_of(etcd) as client:
        assert (await Attempt(client, slot(owner="10.1.0.1"), numbers).run(500)).number == 500
        await client.put(schema.identity_id_key(501), WEB.serialized)
        await client.put(slot(owner="10.0.0.1").value_key, b"501")
        assert (await Attempt(client, slot(owner="10.1.0.1"), numbers).run(500)).number == 500
        assert (await Attempt(client, slot(owner="10.1.0.2"), numbers).run(501)).number == 500


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "labels that begin alike are in use"])
async def test_racers_who_join_reuse_and_create_end_with_one_number(etcd: EtcdServer, beside: bool) -> None:
    """Ten rounds of nine: to join from the cache, to reuse what was seen, to create as nothing is known."""
    numbers = range(256, 65_536)
    async with client_of(etcd) as client:
        for turn in range(10):
            etcd.ctl("del", "", "--prefix")
            if beside:
                await client.put(f"{slot().value_prefix}x:y=1;/10.0.0.9", b"999")
            await client.put(schema.identity_id_key(500), WEB.serialized)
            racers = []
            for n in range(9):
                attempt = Attempt(client, slot(owner=f"10.1.{turn}.{n}"), numbers)
                racers.append(attempt.run(500 * (n % 3 == turn % 3), 500 * (n % 3 == 1)))
            answers = {answer.number for answer in await asyncio.gather(*racers)}
            assert len(answers) == 1
            users = (await client.list(slot().value_prefix)).items
            assert {item.value for item in users if "x:y" not in item.key} == {b"%d" % min(answers)}


# --- joiner against garbage collection


async def test_a_joiner_that_comes_first_stops_the_collector(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        revision = await client.put(schema.identity_id_key(500), WEB.serialized)
        join = await client.txn(*transactions.join(slot(), 500, 0))
        collect = await client.txn(*transactions.collect(500, WEB.serialized, revision))
        assert (join.succeeded, collect.succeeded) == (True, False)


async def test_a_collector_that_comes_first_stops_the_joiner(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        revision = await client.put(schema.identity_id_key(500), WEB.serialized)
        collect = await client.txn(*transactions.collect(500, WEB.serialized, revision))
        join = await client.txn(*transactions.join(slot(), 500, 0))
        assert (collect.succeeded, join.succeeded) == (True, False)
        answer = transactions.joined(slot(), 500, join, range(256, 65_536))
        assert answer.outcome is transactions.Outcome.GONE
        # The whole attempt, which wanted to hold on to 500, creates it again.
        assert (await Attempt(client, slot(), range(256, 65_536)).run(500)).number == 500


async def test_collector_and_joiners_at_once_never_lose_a_used_identity(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        for number in range(400, 440):
            labels = Labels.of({"app": f"race{number}"})
            revision = await client.put(schema.identity_id_key(number), labels.serialized)
            answer, _ = await asyncio.gather(
                Attempt(client, slot(labels), range(256, 65_536)).run(number),
                client.txn(*transactions.collect(number, labels.serialized, revision)),
            )
            item = await client.get(schema.identity_id_key(answer.number))
            assert item is not None
            assert item.value == labels.serialized.encode()


async def test_collection_needs_two_rounds_and_keeps_what_is_used(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        used = await one.allocator.allocate(WEB)
        for number, text in ((300, "container:app=gone;"), (1 << 16 | 300, "container:app=gone;")):
            await one.client.put(schema.identity_id_key(number), text)
        await one.client.put(schema.identity_id_key(301), b"garbage")
        collector = Collector(one.client, deletions_per_minute=60_000)
        assert "0 of them" in await collector.collect()
        # Written again between the rounds: it begins anew.
        await one.client.put(schema.identity_id_key(302), "container:app=later;")
        await collector.collect()
        left = {item.key for item in (await one.client.list(schema.IDENTITY_IDS)).items}
        expected = {used, 301, 302, 1 << 16 | 300}
        assert left == {schema.identity_id_key(number) for number in expected}
        assert "1 of them for two rounds" in await collector.collect()
        assert await one.client.get(schema.identity_id_key(302)) is None


async def test_collection_of_many_ranges_looks_at_all(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        count = collector_module.RANGES_AT_ONCE * 2 + 1
        for number in range(300, 300 + count):
            await client.put(schema.identity_id_key(number), f"container:n={number};")
        collector = Collector(client, deletions_per_minute=600_000)
        await collector.collect()
        await collector.collect()
        assert not (await client.list(schema.IDENTITY_IDS)).items


# --- what is lost comes back


async def test_a_deleted_id_is_written_again_with_its_number(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        number = await one.allocator.allocate(WEB)
        await eventually(lambda: one.cache.get(number) == WEB)
        await one.client.delete(schema.identity_id_key(number))
        await eventually(lambda: numbers_equal(one, {number}))
        assert not one.renumbered


async def numbers_equal(one: Host, expected: set[int]) -> bool:
    return await numbers_of(one.client, WEB) == expected


async def test_a_deleted_value_key_is_written_again(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        number = await one.allocator.allocate(WEB)
        await one.session.settled()
        await one.client.delete(Slot(WEB, "10.0.0.1").value_key)
        await eventually(lambda: value_equals(one, number))


async def value_equals(one: Host, number: int) -> bool:
    return await one.value(WEB) == str(number).encode()


async def test_keys_that_nobody_watches_are_read_back_now_and_then(etcd: EtcdServer) -> None:
    """As in an agent: the session leaves value/ keys to the allocator, which reads id/ keys as well."""
    async with host(etcd, sync=0.3, unwatched=(schema.IDENTITY_VALUES,)) as one:
        number = await one.allocator.allocate(WEB)
        for _ in range(2):
            await one.client.delete(Slot(WEB, "10.0.0.1").value_key)
            await eventually(lambda: value_equals(one, number))


async def test_after_a_wiped_store_everything_in_use_is_there_again(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        labels = [Labels.of({"app": f"app{n}"}) for n in range(5)]
        numbers = [await one.allocator.allocate(each) for each in labels]
        await eventually(lambda: all(one.cache.get(number) for number in numbers))
        await asyncio.to_thread(etcd.wipe)
        for each, number in zip(labels, numbers, strict=True):
            await eventually(functools.partial(holds, one, each, number))
        assert not one.renumbered


async def holds(one: Host, labels: Labels, number: int) -> bool:
    with contextlib.suppress(Unavailable):  # it may just have been away
        return await numbers_of(one.client, labels) == {number} and await one.value(labels) is not None
    return False


async def test_release_deletes_only_the_own_value_key_after_the_last_use(etcd: EtcdServer) -> None:
    async with host(etcd, "10.0.0.1") as one, host(etcd, "10.0.0.2") as two:
        number = await one.allocator.allocate(WEB)
        await one.allocator.allocate(WEB)
        await two.allocator.allocate(WEB)
        await one.allocator.release(WEB)
        assert one.allocator.in_use() == {WEB: number}
        await one.allocator.release(WEB)
        await eventually(lambda: is_gone(one))
        assert not one.allocator.in_use()
        assert await two.value(WEB) == str(number).encode()
        assert await numbers_of(one.client, WEB) == {number}
        # And back again.
        assert await one.allocator.allocate(WEB) == number
        await eventually(lambda: value_equals(one, number))


async def test_a_lost_lease_brings_everything_back_under_a_new_one(etcd: EtcdServer) -> None:
    async with host(etcd) as one, client_of(etcd) as operator:
        number = await one.allocator.allocate(WEB)
        old = one.session.lease_id
        await operator.lease_revoke(old)
        # The collector was quick, too: nobody seemed to use it.
        await operator.delete(schema.identity_id_key(number))
        await eventually(lambda: numbers_equal(one, {number}))
        assert not one.renumbered


async def test_a_new_identity_waits_for_etcd_as_long_as_it_takes(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        await asyncio.to_thread(etcd.stop)
        allocation = asyncio.create_task(one.allocator.allocate(WEB))
        await eventually(lambda: [wait for wait in current() if "container:app=web" in wait.purpose])
        assert not allocation.done()
        await asyncio.to_thread(etcd.start)
        number = await allocation
        await eventually(lambda: holds(one, WEB, number))


async def is_gone(one: Host) -> bool:
    return await one.value(WEB) is None


async def test_a_cancelled_allocation_leaves_nothing(etcd: EtcdServer) -> None:
    async with client_of(etcd) as cilium, host(etcd) as one:
        await cilium.put(schema.identity_lock_key(WEB.serialized, 1), b"")
        allocation = asyncio.create_task(one.allocator.allocate(WEB))
        await asyncio.sleep(0.1)
        allocation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await allocation
        await eventually(lambda: one.allocator.count(WEB) == 0 and not one.allocator.in_use())
        assert await one.value(WEB) is None


# --- restart, cache, and the store's word


async def test_a_restart_finds_its_number_again_without_a_checkpoint(etcd: EtcdServer) -> None:
    async with host(etcd) as before:
        number = await before.allocator.allocate(WEB)
        await before.session.settled()
    async with host(etcd) as after:
        assert await after.allocator.allocate(WEB) == number


async def test_a_restart_with_a_checkpoint_answers_without_etcd(etcd: EtcdServer) -> None:
    async with host(etcd) as before:
        number = await before.allocator.allocate(WEB)
    etcd.pause()
    after = Host(etcd, "10.0.0.1")
    try:
        assert after.allocator.restore(WEB, number)
        assert await after.allocator.allocate(WEB) == number
        etcd.resume()
        await after.start()
        await eventually(lambda: leased_to(after))
        assert not after.renumbered
    finally:
        etcd.resume()
        await after.stop()


async def leased_to(one: Host) -> bool:
    item = await one.client.get(Slot(WEB, one.session.name).value_key)
    return item is not None and item.lease == one.session.lease_id


async def test_known_labels_are_answered_while_etcd_hangs(etcd: EtcdServer) -> None:
    async with host(etcd, "10.0.0.2") as two, host(etcd, "10.0.0.1") as one:
        number = await two.allocator.allocate(WEB)
        await eventually(lambda: one.cache.number_of(WEB))
        etcd.pause()
        try:
            assert await one.allocator.allocate(WEB) == number
        finally:
            etcd.resume()
        await eventually(lambda: value_equals(one, number))


async def test_an_identity_that_is_gone_keeps_its_checkpointed_number_if_it_is_free(etcd: EtcdServer) -> None:
    async with host(etcd) as one:
        assert one.allocator.restore(WEB, 777)
        await eventually(lambda: numbers_equal(one, {777}))
        assert not one.renumbered


async def test_the_number_of_the_store_wins_over_the_one_of_a_checkpoint(etcd: EtcdServer) -> None:
    async with client_of(etcd) as other, host(etcd) as one:
        # 777 went to others meanwhile, and these labels have 888.
        await other.put(schema.identity_id_key(777), "container:app=other;")
        await other.put(schema.identity_id_key(888), WEB.serialized)
        await other.put(slot().value_key, b"888")
        assert one.allocator.restore(WEB, 777)
        await eventually(lambda: one.renumbered)
        assert one.renumbered == [(WEB, 777, 888)]
        assert one.allocator.in_use() == {WEB: 888}
        assert await other.get(schema.identity_id_key(777)) is not None


async def test_a_number_of_another_cluster_is_not_restored(etcd: EtcdServer) -> None:
    async with host(etcd, cluster_id=1) as one:
        assert not one.allocator.restore(WEB, 777)
        assert one.allocator.count(WEB) == 0


# --- numbers run out, and garbage


async def test_an_exhausted_range_says_which(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        for number in range(256, 260):
            await client.put(schema.identity_id_key(number), f"container:n={number};")
        with pytest.raises(RangeExhausted, match=r"container:app=web.*256 to 259"):
            await Attempt(client, slot(), range(256, 260)).run()
        await client.delete(schema.identity_id_key(258))
        assert (await Attempt(client, slot(), range(256, 260)).run()).number == 258


async def test_the_last_free_numbers_are_found_without_a_cache(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client:
        for number in range(256, 300):
            await client.put(schema.identity_id_key(number), f"container:n={number};")
        racers = [Attempt(client, slot(Labels.of({"app": f"a{n}"})), range(256, 304)).run() for n in range(4)]
        assert {answer.number for answer in await asyncio.gather(*racers)} == {300, 301, 302, 303}


async def test_garbage_value_records_are_skipped_and_counted(etcd: EtcdServer) -> None:
    prefix = slot().value_prefix
    async with client_of(etcd) as client:
        for node, value in (
            ("10.9.0.1", b"\xff\xfe"),
            ("10.9.0.2", b"-7"),
            ("10.9.0.3", b"1"),
            ("x;/y", b"3"),
        ):
            await client.put(prefix + node, value)
        # A record that points to an identity of other labels.
        await client.put(schema.identity_id_key(600), "container:app=other;")
        await client.put(f"{prefix}10.9.0.4", b"600")
        before = ignored()
        number = (await Attempt(client, slot(), range(256, 65_536)).run()).number
        assert number not in (1, 3, 7, 600)
        assert ignored() > before
        assert await numbers_of(client, WEB) == {number}


def ignored() -> float:
    return sum(
        sample.value
        for metric in metrics.KVSTORE_RECORDS_IGNORED.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


async def test_garbage_identities_do_not_reach_the_cache(etcd: EtcdServer) -> None:
    async with client_of(etcd) as client, host(etcd) as one:
        records = {
            f"{schema.IDENTITY_IDS}abc": b"container:a=1;",
            schema.identity_id_key(2): b"container:app=world;",
            schema.identity_id_key(400): b"container:a=1",
            schema.identity_id_key(401): b"\xff\xff",
            schema.identity_id_key(402): b"container:a=" + b"x" * 1_000_000 + b";",
            schema.identity_id_key(403): b"{}",
        }
        before = ignored()
        for key, value in records.items():
            await client.put(key, value)
        await client.put(schema.identity_id_key(404), b"container:good=1;")
        await eventually(lambda: one.cache.get(404))
        assert {number for number, _ in one.cache.source.entries().items()} == {404}
        assert set(one.cache.ignored) == set(records)
        assert ignored() >= before + len(records)
        # The last good record stays in force.
        await client.put(schema.identity_id_key(404), b"broken")
        await eventually(lambda: schema.identity_id_key(404) in one.cache.ignored)
        assert one.cache.get(404) == Labels.of({"good": "1"})
