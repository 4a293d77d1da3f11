# SPDX-License-Identifier: Apache-2.0
"""Group commit against a real etcd: who travels together, and that nobody can tell from the answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from kvstore.client import Client
from kvstore.errors import LeaseNotFound, RequestRefused, Unavailable
from kvstore.group import MAX_MEMBERS, GroupCommit
from kvstore.ops import (
    Compare,
    Op,
    TxnResult,
    absent,
    delete_op,
    delete_prefix_op,
    get_op,
    list_op,
    mod_is,
    put_op,
    range_absent,
    txn_op,
)
from tests.support.etcd import EtcdServer

Txn = tuple[Sequence[Compare], Sequence[Op], Sequence[Op]]
NO_LEASE = 0x1234567
MANY = 40


class GatedClient(Client):
    """The client with a gate before its transactions, so that tests decide what waits meanwhile."""

    def __init__(self, etcd: EtcdServer) -> None:
        super().__init__(etcd.config, timeout=5)
        self.requests = 0
        self._gate = asyncio.Semaphore(0)

    def let(self, transactions: int = 1000) -> None:
        """Let so many more pass."""
        for _ in range(transactions):
            self._gate.release()

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        self.requests += 1
        await self._gate.acquire()
        return await super().txn(compares, success, failure)


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[GatedClient]:
    client = GatedClient(etcd)
    yield client
    await client.close()


async def started(group: GroupCommit, txns: Sequence[Txn]) -> list[asyncio.Task[TxnResult]]:
    """Start all behind one that is under way; return their tasks."""
    lone = asyncio.create_task(group.txn((), [put_op("lone", "1")]))
    await asyncio.sleep(0)
    tasks = [asyncio.create_task(group.txn(*txn)) for txn in txns]
    await asyncio.sleep(0)
    return [lone, *tasks]


async def together(client: GatedClient, txns: Sequence[Txn]) -> list[TxnResult | BaseException]:
    """Run all as what waits while one is under way; return their outcomes."""
    _, *tasks = await started(GroupCommit(client), txns)
    client.let()
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)


def results(outcomes: Sequence[TxnResult | BaseException]) -> list[TxnResult]:
    return [outcome for outcome in outcomes if isinstance(outcome, TxnResult)]


def plain_put(key: str, value: str = "1", lease: int = 0) -> Txn:
    return (), [put_op(key, value, lease)], ()


def create(key: str, value: str = "new") -> Txn:
    return [absent(key)], [put_op(key, value)], [get_op(key)]


# --- who travels together


async def test_one_alone_goes_at_once_and_as_itself(client: GatedClient) -> None:
    client.let()
    group = GroupCommit(client)
    first = await group.txn(*create("k/a"))
    second = await group.txn(*create("k/a"))
    assert (first.succeeded, second.succeeded) == (True, False)
    assert second.responses[0].items[0].value == b"new"
    assert client.requests == 2


async def test_what_waits_travels_together_up_to_the_limit(client: GatedClient) -> None:
    outcomes = results(await together(client, [create(f"k/{n}", str(n)) for n in range(MANY)]))
    assert len(outcomes) == MANY
    assert all(each.succeeded for each in outcomes)
    groups = -(-MANY // MAX_MEMBERS)
    assert client.requests == 1 + groups
    items = {item.key: item for item in (await client.list("k/")).items}
    assert {key: item.value for key, item in items.items()} == {f"k/{n}": b"%d" % n for n in range(MANY)}
    # Each is told the revision at which its key was written.
    assert [each.revision for each in outcomes] == [items[f"k/{n}"].mod_revision for n in range(MANY)]
    assert len({each.revision for each in outcomes}) == groups


async def test_a_failing_branch_disturbs_no_other(client: GatedClient) -> None:
    for taken in (1, 4):
        await client.put(f"k/{taken}", "old")
    outcomes = results(await together(client, [create(f"k/{n}") for n in range(6)]))
    assert [each.succeeded for each in outcomes] == [True, False, True, True, False, True]
    assert [item.value for each in outcomes for item in each.responses[0].items] == [b"old", b"old"]
    assert client.requests == 2
    assert len((await client.list("k/")).items) == 6


async def test_nested_answers_have_the_form_of_lone_ones(client: GatedClient) -> None:
    await client.put("old/a", "1")
    await client.put("old/b", "2")
    reads: Txn = ([absent("old/a")], [], [get_op("old/a"), list_op("old/", limit=1, keys_only=True)])
    deletes: Txn = ((), [delete_op("gone"), put_op("k/x", "1")], ())
    one, two = results(await together(client, [reads, deletes]))
    assert one.responses == (await client.txn(*reads)).responses
    assert [(each.deleted, each.items) for each in two.responses] == [(0, ()), (0, ())]


# --- members that concern each other


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (create("k/a"), create("k/a")),
        (create("k/a/1"), ([range_absent("k/a/")], [put_op("k/b", "1")], ())),
        (([range_absent("k/a/")], [put_op("k/b", "1")], ()), create("k/a/1")),
        (plain_put("k/a"), ([absent("k/a")], [put_op("k/b", "1")], ())),
        (([mod_is("k/a", 0)], [put_op("k/a", "1")], ()), ([absent("k/a")], (), [delete_op("k/a")])),
    ],
)
async def test_members_that_concern_each_other_go_one_after_the_other(
    client: GatedClient, first: Txn, second: Txn
) -> None:
    one, two, *others = results(await together(client, [first, second, create("k/y"), create("k/z")]))
    assert one.succeeded
    assert two.revision > one.revision or not two.succeeded
    # The others do not wait for them.
    assert {each.revision for each in others} == {one.revision}
    assert client.requests == 3


async def test_a_winner_among_many_that_want_one_key(client: GatedClient) -> None:
    outcomes = results(await together(client, [create("k/a", str(n)) for n in range(MANY)]))
    assert [each.succeeded for each in outcomes].count(True) == 1
    found = await client.get("k/a")
    assert found is not None
    assert {item.value for each in outcomes for item in each.responses[0].items} == {found.value}


@pytest.mark.parametrize("op", [delete_prefix_op("k/"), txn_op((), [put_op("k/a", "1")])])
async def test_what_can_not_be_compared_is_no_member(client: GatedClient, op: Op) -> None:
    with pytest.raises(TypeError, match="part of a group"):
        await GroupCommit(client).txn((), [op])


# --- refusals


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (plain_put("k/bad", lease=NO_LEASE), LeaseNotFound),
        (plain_put("k/bad", "x" * (2 << 20)), RequestRefused),
        (((), [put_op("k/bad", str(n)) for n in range(2)], ()), RequestRefused),
        (((), [get_op(f"k/bad{n}") for n in range(127)], ()), None),
    ],
)
async def test_a_group_that_is_refused_is_taken_apart(
    client: GatedClient, bad: Txn, error: type[Exception] | None
) -> None:
    outcomes = await together(client, [create("k/a"), bad, create("k/b")])
    assert [each.succeeded for each in results((outcomes[0], outcomes[2]))] == [True, True]
    assert isinstance(outcomes[1], error or TxnResult)
    assert client.requests == 2 + 3
    assert [item.key for item in (await client.list("k/")).items] == ["k/a", "k/b"]


async def test_all_members_hear_that_etcd_is_away(etcd: EtcdServer, client: GatedClient) -> None:
    tasks = await started(GroupCommit(client), [create(f"k/{n}") for n in range(3)])
    etcd.stop()
    client.let()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert all(isinstance(each, Unavailable) for each in outcomes)


# --- members that leave


async def test_a_member_that_leaves_while_it_waits_is_not_sent(client: GatedClient) -> None:
    tasks = await started(GroupCommit(client), [create(f"k/{n}") for n in range(4)])
    tasks[2].cancel()
    client.let()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    assert isinstance(outcomes[2], asyncio.CancelledError)
    assert len(results(outcomes)) == 4
    assert [item.key for item in (await client.list("k/")).items] == ["k/0", "k/2", "k/3"]


@pytest.mark.parametrize("leaver", [0, 1, 3])
async def test_a_member_that_leaves_under_way_disturbs_no_other(client: GatedClient, leaver: int) -> None:
    """The first goes alone, so its request ends with it; the others are sent by nobody's task."""
    group = GroupCommit(client)
    tasks = await started(group, [create(f"k/{n}") for n in range(3)])
    if leaver:
        client.let(1)
        await tasks[0]
        await until(lambda: client.requests == 2)
    tasks[leaver].cancel()
    await asyncio.sleep(0)
    client.let()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    assert isinstance(outcomes[leaver], asyncio.CancelledError)
    assert [each.succeeded for each in results(outcomes)] == [True] * 3
    assert (await group.txn(*create("k/after"))).succeeded


async def test_a_client_that_is_closed_leaves_nobody_waiting(etcd: EtcdServer, client: GatedClient) -> None:
    tasks = await started(GroupCommit(client), [create(f"k/{n}") for n in range(3)])
    client.let(1)
    await tasks[0]
    etcd.pause()
    try:
        client.let()
        await asyncio.sleep(0.2)  # long enough for the group's request to be under way
        await client.close()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    finally:
        etcd.resume()
    assert [type(each) for each in outcomes[1:]] == [asyncio.CancelledError] * 3


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)
