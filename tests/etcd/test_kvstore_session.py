# SPDX-License-Identifier: Apache-2.0
"""Session and election on a real etcd: own keys come back, keys of others are never touched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from core import metrics
from core.table import Table
from kvstore import schema
from kvstore.client import Client
from kvstore.election import Election
from kvstore.ops import Compare, Get, Op, TxnResult
from kvstore.session import Session
from kvstore.sink import TableSink
from kvstore.watch import WatchStream
from kvstore.watcher import Follower, State
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Client]:
    client = Client(etcd.config, timeout=2, idle=0.5, hang=1)
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def running(*parts: Session | Election | Follower) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def pair(key: str, value: bytes) -> tuple[str, bytes]:
    return key, value


def same(key: str) -> str:
    return key


def holds(client: Client, session: Session, key: str, value: bytes) -> Callable[[], Awaitable[bool]]:
    """Return a condition: `key` is in etcd with this value, on the session's present lease."""

    async def condition() -> bool:
        found = await client.get(key)
        return found is not None and (found.value, found.lease) == (value, session.lease_id)

    return condition


async def test_own_keys_are_written_under_a_lease_of_the_given_time(client: Client) -> None:
    session = Session(client, ttl=3600)
    await session.own("k/a", "1")
    async with running(session):
        await asyncio.wait_for(session.written("k/a"), 20)
        assert session.alive
        await eventually(holds(client, session, "k/a", b"1"), "written")
        assert await client.lease_keepalive(session.lease_id) == 3600
        await session.own("k/a", "2")
        await session.own("k/b", "3")
        await asyncio.wait_for(session.settled(), 20)
        assert session.own_keys == {"k/a": b"2", "k/b": b"3"}
        await eventually(holds(client, session, "k/a", b"2"), "changed")


async def test_a_thousand_keys_take_few_transactions(etcd: EtcdServer, client: Client) -> None:
    session = Session(client)
    for index in range(1000):
        await session.own(f"k/{index}", "x")
    before = etcd.revision()
    async with running(session):
        await asyncio.wait_for(session.settled(), 30)
        assert await client.count("k/") == 1000
        assert etcd.revision() <= before + 9


async def test_deleted_and_overwritten_keys_come_back(client: Client) -> None:
    session = Session(client)
    async with running(session):
        for key in ("k/a", "k/b", "k/c"):
            await session.own(key, "mine")
        await asyncio.wait_for(session.settled(), 20)
        restored = metrics.KVSTORE_OWN_KEYS_RESTORED._value.get()
        await client.put("k/other", "theirs")
        await client.delete("k/a")
        await client.put("k/b", "stolen")
        await client.put("k/c", "mine")  # the same value, but no lease of ours
        for key in ("k/a", "k/b", "k/c"):
            await eventually(holds(client, session, key, b"mine"), f"{key} is back")
        assert metrics.KVSTORE_OWN_KEYS_RESTORED._value.get() - restored == 3
        assert await client.delete_prefix("k/") == 4
        await eventually(holds(client, session, "k/a", b"mine"), "k/a is back again")
        await asyncio.wait_for(session.settled(), 60)
        assert await client.count("k/") == 3
        assert await client.get("k/other") is None


async def test_disowned_key_is_deleted_unless_somebody_else_has_it(client: Client) -> None:
    session = Session(client)
    other = await client.lease_grant(60)
    async with running(session):
        await session.own("k/mine", "1")
        await session.own("k/moved", "1")
        await asyncio.wait_for(session.settled(), 20)
        await session.disown("k/mine")
        await asyncio.wait_for(session.settled(), 20)
        assert await client.get("k/mine") is None
    # The address moved to another host while nobody looked: that host's key stays.
    await client.put("k/moved", "1", lease=other)
    again = Session(client, lease=session.lease_id)
    again._keys.adopt("k/moved", b"1", 1)
    await again.disown("k/moved")
    async with running(again):
        await asyncio.wait_for(again.settled(), 20)
        found = await client.get("k/moved")
        assert found is not None
        assert found.lease == other


async def test_keys_looked_after_elsewhere_have_no_watch_and_come_back_all_the_same(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prefix is followed and told to the session; the other is read now and then."""
    session = Session(client, elsewhere=("followed/", "read/"), sync=1.0)
    watched: list[str] = []
    create = WatchStream.create

    async def noted(stream: WatchStream, key: str, revision: int, **how: Any) -> None:
        watched.append(key)
        await create(stream, key, revision, **how)

    monkeypatch.setattr(WatchStream, "create", noted)
    sink = TableSink(Table[str, bytes]("t", ("s",)).source("s"), pair, same)
    follower = Follower(client, "followed/", sink, observer=session.seen)
    for key in ("followed/a", "followed/b", "read/a", "own/a"):
        await session.own(key, "mine")
    async with running(session, follower):
        await asyncio.wait_for(session.settled(), 20)
        await eventually(lambda: follower.state is State.WATCHING, "followed")
        await client.delete("followed/a")
        await client.put("followed/b", "theirs")
        await client.put("read/a", "theirs")
        for key in ("followed/a", "followed/b", "read/a"):
            await eventually(holds(client, session, key, b"mine"), f"{key} is back")
        assert session.errors == {}
    assert set(watched) == {"followed/", "own/a"}


async def test_what_somebody_else_reads_back_is_not_read_twice(client: Client) -> None:
    session = Session(client, elsewhere=("read/", "theirs/"), read_elsewhere=("theirs/",), sync=0.3)
    for key in ("read/a", "theirs/a"):
        await session.own(key, "mine")
    async with running(session):
        await asyncio.wait_for(session.settled(), 20)
        for _ in range(3):  # rounds that are over, by what they have brought back
            await client.delete("theirs/a")
            await client.delete("read/a")
            await eventually(holds(client, session, "read/a", b"mine"), "what it reads is back")
            assert await client.get("theirs/a") is None


async def test_keys_are_read_back_less_often_in_a_large_cluster(client: Client) -> None:
    rounds = {1: 0, 10_000: 0}

    class Counted(Client):
        async def txn(
            self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
        ) -> TxnResult:
            rounds[nodes_of[id(self)]] += all(isinstance(each, Get) for each in success)
            return await super().txn(compares, success, failure)

    clients = {nodes: Counted(client.config) for nodes in rounds}
    nodes_of = {id(each): nodes for nodes, each in clients.items()}
    sessions = [
        Session(each, elsewhere=(f"k{nodes}/",), sync=0.1, nodes=lambda nodes=nodes: nodes)  # type: ignore[misc]
        for nodes, each in clients.items()
    ]
    for nodes, session in zip(rounds, sessions, strict=True):
        await session.own(f"k{nodes}/a", "mine")
    async with running(*sessions):
        await eventually(lambda: rounds[1] >= 30, "30 rounds in a cluster of one")
        # ln(1 + 10 000) = 9.2 times as long; half of that for what the scheduler does to either.
        assert rounds[10_000] * 4 <= rounds[1], rounds
    for each in clients.values():
        await each.close()


async def test_a_short_lease_grows_with_the_cluster_up_to_its_end(client: Client) -> None:
    for nodes, expected in ((0, 30), (1, 30), (10, 71), (10_000, 100)):
        session = Session(client, ttl=30, longest_ttl=100, nodes=lambda nodes=nodes: nodes)  # type: ignore[misc]
        async with running(session):
            lease = await asyncio.wait_for(session.ready(), 20)
            assert (await client.lease_keepalive(lease), session.ttl) == (expected, expected)
            await session.revoke()


async def test_many_keys_are_deleted_at_once_and_those_of_others_stay(client: Client) -> None:
    session, number = Session(client, elsewhere=("k/",)), 300
    for each in range(number):
        await session.own(f"k/{each}", "mine")
    async with running(session):
        await asyncio.wait_for(session.settled(), 20)
        other = await client.put("k/7", "theirs")
        requests: list[int] = []
        txn = client.txn

        async def counted(
            compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
        ) -> TxnResult:
            requests.append(len(success))
            return await txn(compares, success, failure)

        client.txn = counted  # type: ignore[method-assign]
        for each in range(number):
            await session.disown(f"k/{each}")
        await asyncio.wait_for(session.settled(), 20)
        found = await client.list("k/")
        assert [(item.key, item.value, item.mod_revision) for item in found.items] == [
            ("k/7", b"theirs", other)
        ]
        assert max(requests) > 100


async def test_lost_lease_is_replaced_and_all_keys_come_back(client: Client) -> None:
    session = Session(client)
    async with running(session):
        for index in range(5):
            await session.own(f"k/{index}", "mine")
        await asyncio.wait_for(session.settled(), 20)
        first = session.lease_id
        await client.lease_revoke(first)
        for index in range(5):
            await eventually(holds(client, session, f"k/{index}", b"mine"), f"k/{index} is back")
        assert session.lease_id not in (0, first)


async def test_wiped_etcd_gets_lease_and_keys_again(etcd: EtcdServer, client: Client) -> None:
    session = Session(client)
    async with running(session):
        await session.own("k/a", "mine")
        await asyncio.wait_for(session.settled(), 20)
        etcd.wipe()
        await eventually(holds(client, session, "k/a", b"mine"), "k/a is back")


async def test_owning_while_etcd_is_away_is_done_later(etcd: EtcdServer, client: Client) -> None:
    session = Session(client)
    async with running(session):
        await session.own("k/a", "1")
        await session.own("k/b", "1")
        await asyncio.wait_for(session.settled(), 20)
        etcd.stop()
        await asyncio.wait_for(session.own("k/c", "1"), 1)
        await asyncio.wait_for(session.disown("k/b"), 1)
        etcd.start()
        await asyncio.wait_for(session.settled(), 40)
        assert sorted((await client.snapshot("k/")).items) == ["k/a", "k/c"]


async def test_restart_of_etcd_rewrites_nothing(etcd: EtcdServer, client: Client) -> None:
    session = Session(client)
    async with running(session):
        await session.own("k/a", "1")
        await asyncio.wait_for(session.settled(), 20)
        before = await client.get("k/a")
        etcd.restart()
        await eventually(lambda: session.error != "", "the session noticed")
        await eventually(lambda: session.error == "", "the session holds again")
        await client.put("k/a", "stolen")
        await eventually(holds(client, session, "k/a", b"1"), "still watched")
        after = await client.get("k/a")
        assert before is not None
        assert after is not None
        assert after.version == before.version + 2


async def test_lease_of_before_is_taken_up_without_a_write(etcd: EtcdServer, client: Client) -> None:
    first = Session(client)
    async with running(first):
        await first.own("k/a", "1")
        await asyncio.wait_for(first.settled(), 20)
    revision = etcd.revision()
    second = Session(client, lease=first.lease_id)
    await second.own("k/a", "1")
    async with running(second):
        await asyncio.wait_for(second.written("k/a"), 20)
        assert second.lease_id == first.lease_id
        assert etcd.revision() == revision
        await client.delete("k/a")
        await eventually(holds(client, second, "k/a", b"1"), "it is watched all the same")


async def test_adopted_key_is_watched_but_not_written(etcd: EtcdServer, client: Client) -> None:
    session = Session(client)
    async with running(session):
        lease = await asyncio.wait_for(session.ready(), 20)
        revision = await client.put("k/a", "1", lease=lease)
        await session.adopt("k/a", "1", revision)
        await asyncio.wait_for(session.written("k/a"), 5)
        assert etcd.revision() == revision
        await client.delete("k/a")
        await eventually(holds(client, session, "k/a", b"1"), "it comes back")


async def test_denied_own_key_stops_no_other(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd", tls=True)
    try:
        server.start().enable_auth("agent", "mine/")
        client = Client(server.config_for("agent"), timeout=2)
        session = Session(client)
        await session.own("mine/a", "1")
        await session.own("yours/a", "1")
        async with running(session):
            await asyncio.wait_for(session.written("mine/a"), 20)
            await eventually(lambda: "yours/a" in session.errors, "the refusal is told")
            assert "yours/a" in session.errors["yours/a"]
            await session.own("mine/b", "1")
            await asyncio.wait_for(session.written("mine/b"), 20)
        await client.close()
    finally:
        server.stop()


async def test_a_key_that_changed_its_mind_while_etcd_was_away_is_deleted(
    etcd: EtcdServer, client: Client
) -> None:
    """etcd has the first value, the second was never written, and the key is disowned."""
    session = Session(client)
    async with running(session):
        await session.own("k/a", "1")
        await asyncio.wait_for(session.settled(), 20)
        etcd.stop()
        await session.own("k/a", "2")
        await session.disown("k/a")
        etcd.start()
        await asyncio.wait_for(session.settled(), 40)
        assert await client.get("k/a") is None


async def test_a_key_of_an_older_lease_that_was_never_verified_is_known_by_its_value(client: Client) -> None:
    older = await client.lease_grant(60)
    await client.put("k/a", "mine", lease=older)
    await client.put("k/b", "theirs", lease=older)
    session = Session(client)
    for key in ("k/a", "k/b"):
        await session.own(key, "mine")
        await session.disown(key)
    async with running(session):
        await asyncio.wait_for(session.settled(), 20)
        assert (await client.snapshot("k/")).items == {"k/b": b"theirs"}


async def test_a_deletion_that_etcd_denies_is_told_and_done_when_it_may_be(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd", tls=True)
    try:
        server.start().enable_auth("agent", "mine/", "yours/")
        client = Client(server.config_for("agent"), timeout=2)
        session = Session(client)
        await session.own("yours/a", "1")
        await session.own("mine/a", "1")
        async with running(session):
            await asyncio.wait_for(session.settled(), 20)
            server.ctl("role", "revoke-permission", "agent", "yours/", "--prefix=true")
            await session.disown("yours/a")
            await eventually(lambda: "yours/a" in session.errors, "the refusal is told")
            await session.disown("mine/a")
            await eventually(lambda: absent(client, "mine/a"), "others are deleted meanwhile")
            server.ctl("role", "grant-permission", "agent", "readwrite", "yours/", "--prefix=true")
            await asyncio.wait_for(session.settled(), 60)
            assert session.errors == {}
            assert await client.get("yours/a") is None
        await client.close()
    finally:
        server.stop()


async def absent(client: Client, key: str) -> bool:
    return await client.get(key) is None


async def test_written_of_an_unwanted_key_is_an_error(client: Client) -> None:
    with pytest.raises(KeyError):
        await Session(client).written("never")


# --- election


class Candidate:
    """A process that stands for a role, with a session of its own."""

    def __init__(self, client: Client, name: str) -> None:
        self.session = Session(client, ttl=10, name=name)
        self.election = Election(client, self.session, "role")
        self.tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.tasks = [asyncio.create_task(part.run()) for part in (self.session, self.election)]

    async def die(self) -> None:
        """End without a word: no key is deleted, the lease runs out."""
        for task in reversed(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_leader_is_followed_by_the_next_in_the_queue(client: Client) -> None:
    candidates = [Candidate(client, name) for name in ("c", "a", "b")]
    for candidate in candidates:
        candidate.start()
        await asyncio.wait_for(candidate.session.written(candidate.election.key), 20)
    try:
        for position, candidate in enumerate(candidates):
            await asyncio.wait_for(candidate.election.wait_leader(), 60)
            leading = [each for each in candidates[position:] if each.election.is_leader]
            assert leading == [candidate]
            await candidate.die()
            assert not candidate.election.is_leader
    finally:
        for candidate in candidates:
            await candidate.die()


async def test_lost_key_of_the_leader_goes_to_the_end_of_the_queue(client: Client) -> None:
    first, second = Candidate(client, "first"), Candidate(client, "second")
    try:
        first.start()
        await asyncio.wait_for(first.election.wait_leader(), 20)
        second.start()
        await asyncio.wait_for(second.session.written(second.election.key), 20)
        await client.delete(first.election.key)
        await asyncio.wait_for(second.election.wait_leader(), 20)
        await asyncio.wait_for(first.election.wait_lost(), 20)
        await eventually(lambda: first.session._keys.settled, "first stands again")
        assert not first.election.is_leader
        assert second.election.is_leader
        found = await client.list(schema.election_prefix("role"))
        assert len(found.items) == 2
    finally:
        await first.die()
        await second.die()


async def test_lost_key_of_one_who_waits_goes_to_the_end_of_the_queue(client: Client) -> None:
    first, second, third = (Candidate(client, name) for name in ("first", "second", "third"))
    try:
        for candidate in (first, second, third):
            candidate.start()
            await asyncio.wait_for(candidate.session.written(candidate.election.key), 20)
        await asyncio.wait_for(first.election.wait_leader(), 20)
        before = await client.get(second.election.key)
        await client.delete(second.election.key)

        async def stands_again() -> bool:
            now = await client.get(second.election.key)
            return now is not None and before is not None and now.create_revision > before.create_revision

        await eventually(stands_again, "second stands again")
        lead: list[str] = []
        for each in (second, third):
            each.election._set = _noting(each.election, lead)  # type: ignore[method-assign, assignment]
        first.tasks[1].cancel()
        await asyncio.wait_for(third.election.wait_leader(), 20)
        await asyncio.sleep(0.5)  # long enough for a second leader to show itself
        assert lead == ["third"]
        third.tasks[1].cancel()
        await asyncio.wait_for(second.election.wait_leader(), 20)
        assert lead == ["third", "second"]
    finally:
        for candidate in (first, second, third):
            await candidate.die()


def _noting(election: Election, lead: list[str]) -> Callable[[bool], Awaitable[None]]:
    """Return the election's `_set` that also notes who began to lead."""
    plain = election._set

    async def noting(leads: bool) -> None:
        if leads:
            lead.append(election._session.name)
        await plain(leads)

    return noting


async def test_withdrawing_hands_over_at_once(client: Client) -> None:
    first, second = Candidate(client, "first"), Candidate(client, "second")
    try:
        first.start()
        await asyncio.wait_for(first.election.wait_leader(), 20)
        second.start()
        await asyncio.wait_for(second.session.written(second.election.key), 20)
        first.tasks[1].cancel()  # the election only; the session goes on
        await asyncio.wait_for(second.election.wait_leader(), 20)
        assert not first.election.is_leader
    finally:
        await first.die()
        await second.die()


async def test_leader_without_etcd_does_not_lead_for_longer_than_its_lease(
    etcd: EtcdServer, client: Client
) -> None:
    candidate = Candidate(client, "only")
    try:
        candidate.start()
        await asyncio.wait_for(candidate.election.wait_leader(), 20)
        etcd.pause()
        await asyncio.wait_for(candidate.election.wait_lost(), 30)
        etcd.resume()
        await asyncio.wait_for(candidate.election.wait_leader(), 60)
    finally:
        etcd.resume()
        await candidate.die()
