# SPDX-License-Identifier: Apache-2.0
"""Following a prefix on a real etcd: what reaches the sink through restarts, compaction, wipes and hangs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from core.table import Table
from core.waiting import current
from kvstore import patience, schema
from kvstore.client import Client
from kvstore.ops import put_op
from kvstore.sink import TableSink
from kvstore.watch import Change
from kvstore.watcher import Follower, State, staleness
from tests.support.etcd import EtcdCluster, EtcdServer
from tests.support.eventually import eventually

WINDOW_S = 3


class Recorder:
    """A sink that holds the view and counts full lists; a list replaces nothing, as a table would."""

    def __init__(self) -> None:
        self.view: dict[str, bytes] = {}
        self.lists: list[dict[str, bytes]] = []
        self._list: dict[str, bytes] | None = None
        self.deletions: list[str] = []
        self.synced = 0

    def begin_list(self) -> None:
        self._list = {}

    def take(self, items: Sequence[tuple[str, bytes]]) -> None:
        self.view.update(items)
        if self._list is not None:
            self._list.update(items)

    async def listed(self, revision: int) -> None:
        assert revision > 0
        assert self._list is not None
        self.lists.append(self._list)
        self._list = None

    def deleted(self, key: str) -> None:
        self.deletions.append(key)
        self.view.pop(key, None)

    def in_sync(self) -> None:
        self.synced += 1


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Client]:
    client = Client(etcd.config, timeout=2, idle=0.5, hang=1)
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def following(follower: Follower) -> AsyncIterator[Follower]:
    task = asyncio.create_task(follower.run())
    try:
        yield follower
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def is_compacted(etcd: EtcdServer, revision: int) -> bool:
    with contextlib.suppress(AssertionError):
        etcd.ctl("get", "k/0", f"--rev={revision}")
        return False
    with pytest.raises(AssertionError, match="has been compacted"):
        etcd.ctl("get", "k/0", f"--rev={revision}")
    return True


def is_watching(follower: Follower) -> Callable[[], bool]:
    return lambda: follower.state is State.WATCHING


async def test_list_then_events(client: Client) -> None:
    await client.write_many(put_op(f"k/{index}", b"1") for index in range(30))
    sink = Recorder()
    async with following(Follower(client, "k/", sink)) as follower:
        await eventually(lambda: sink.synced == 1, "in sync")
        assert len(sink.lists[0]) == 30
        await client.put("k/0", "2")
        await client.delete("k/1")
        revision = await client.put("k/last", "x")
        await client.put("other", "x")
        await eventually(lambda: "k/last" in sink.view, "the last event")
        assert sink.view["k/0"] == b"2"
        # Of what comes together the writes go first.
        await eventually(lambda: "k/1" not in sink.view, "the deletion")
        await eventually(lambda: follower.revision >= revision, "the sink has everything")
        assert follower.age() < 30
        # The process's figure is that of its oldest view; other tests may have left some behind.
        assert staleness() >= follower.age() - 1
        assert current() == []
    assert (len(sink.lists), sink.synced) == (1, 1)


async def test_events_are_signs_of_life_and_only_silence_is_asked_about(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by etcd: a busy watch sends nothing but its creation, an idle one asks."""
    idle = 2.0
    monkeypatch.setattr("kvstore.client.SETTLE_S", idle)
    watching, writing = Client(etcd.config, idle=idle, hang=20), Client(etcd.config)
    sink = Recorder()

    def questions() -> int:
        return etcd.counted("grpc_server_msg_received_total", "Watch") - 1

    async with following(Follower(watching, "k/", sink)) as follower:
        await eventually(lambda: sink.synced == 1 or follower.state is State.WATCHING, "the watch")
        for _ in range(5):
            before, began, number, longest = questions(), time.monotonic(), 0, 0.0
            while time.monotonic() - began < 3 * 1.1 * idle:  # long enough for three questions
                number += 1
                await writing.put("k/a", f"{number}")
                await asyncio.sleep(0.05)
                longest = max(longest, follower.age())
            if longest < 0.8 * idle:  # else the machine stood still, and so did the events
                break
        assert number > 3
        assert questions() == before
        await eventually(lambda: questions() >= 2, "silence is asked about, again and again")
        assert follower.state is State.WATCHING
    await watching.close()
    await writing.close()


async def test_a_list_whose_end_is_broken_off_is_listed_again(client: Client) -> None:
    """What it lacked is marked in slices: a view that stood there before would keep some for ever."""
    revision = await client.put("k/a", "1")
    entered, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Recorder):
        async def listed(self, revision: int) -> None:
            entered.set()
            await go_on.wait()
            await super().listed(revision)

    sink = Slow()
    follower = Follower(client, "k/", sink)
    for _ in range(2):
        async with following(follower):
            await asyncio.wait_for(entered.wait(), 30)
            assert follower.revision == 0
        entered.clear()
    go_on.set()
    async with following(follower):
        await eventually(is_watching(follower), "the list")
    assert len(sink.lists) == 1
    assert follower.revision >= revision


async def test_after_a_deletion_etcd_is_heard_again_soon(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was deleted is held until then; a watch that is quiet would speak after half a minute only."""
    confirm = 2.0
    monkeypatch.setattr("kvstore.client.CONFIRM_S", confirm)
    client = Client(etcd.config, idle=600, hang=600)
    await client.put("k/a", "1")
    sink = Recorder()
    async with following(Follower(client, "k/", sink)) as follower:
        await eventually(is_watching(follower), "the watch")
        await client.delete("k/a")
        await eventually(lambda: sink.deletions == ["k/a"], "the deletion")
        held = time.monotonic() + confirm
        await eventually(lambda: follower.fresh_at > held, "word from etcd after what was held")
        etcd.pause()
        try:
            heard = follower.fresh_at
            await asyncio.sleep(2 * confirm)
            assert follower.fresh_at == heard, "an etcd that hangs is not heard"
        finally:
            etcd.resume()
    await client.close()


async def test_restart_of_etcd_is_resumed_without_a_list(etcd: EtcdServer, client: Client) -> None:
    await client.put("k/a", "1")
    sink = Recorder()
    async with following(Follower(client, "k/", sink)) as follower:
        await eventually(lambda: sink.synced == 1, "in sync")
        etcd.stop()
        await eventually(lambda: follower.state is State.RETRYING, "trouble is noticed")
        assert sink.view == {"k/a": b"1"}
        assert [wait.purpose for wait in current()] == ["view of k/"]
        etcd.start()
        etcd.ctl("put", "k/b", "2")
        etcd.ctl("del", "k/a")
        await eventually(lambda: sink.view == {"k/b": b"2"}, "what happened meanwhile")
        await eventually(is_watching(follower), "watching again")
        assert current() == []
    assert (len(sink.lists), sink.synced) == (1, 1)


async def test_compaction_while_away_gives_a_full_list_and_no_deletions(
    etcd: EtcdServer, client: Client
) -> None:
    await client.put("k/a", "1")
    await client.put("k/b", "1")
    sink = Recorder()
    follower = Follower(client, "k/", sink)
    async with following(follower):
        await eventually(lambda: sink.synced == 1, "in sync")
    etcd.ctl("del", "k/a")
    etcd.ctl("put", "k/c", "1")
    etcd.compact()
    async with following(follower):
        await eventually(lambda: len(sink.lists) == 2, "a full list")
        assert sink.lists[1] == {"k/b": b"1", "k/c": b"1"}
    assert sink.deletions == []


async def test_a_window_of_absence_needs_no_list_where_history_is_kept_for_two(tmp_path: Path) -> None:
    """The proportion of the compose files (tests/unit/test_compose_files.py), with seconds for minutes."""
    options = ("--auto-compaction-mode=periodic", f"--auto-compaction-retention={2 * WINDOW_S}s")
    etcd = EtcdServer(tmp_path / "etcd", options=options)
    client = Client(etcd.start().config)
    sink = Recorder()
    follower = Follower(client, "k/", sink)

    async def absence(is_over: Callable[[], bool]) -> str:
        """Have others write until it is over; return what was written last."""
        number = 0
        while not is_over():
            number += 1
            await client.put(f"k/{number % 10}", f"{number}")
            await asyncio.sleep(0.02)
        return f"{number}"

    try:
        async with following(follower):
            await eventually(lambda: sink.synced == 1, "in sync")
        end = time.monotonic() + WINDOW_S
        last = await absence(lambda: time.monotonic() > end)
        async with following(follower):
            await eventually(lambda: last.encode() in sink.view.values(), "what was missed")
        assert len(sink.lists) == 1
        seen = follower.revision
        last = await absence(lambda: is_compacted(etcd, seen))
        async with following(follower):
            await eventually(lambda: last.encode() in sink.view.values(), "what was missed for longer")
        assert len(sink.lists) == 2
    finally:
        await client.close()
        etcd.stop()


async def test_wiped_etcd_gives_a_full_list_and_the_table_keeps_what_is_missing(
    etcd: EtcdServer, client: Client
) -> None:
    table: Table[int, str] = Table("identities", ["kvstore"])
    source = table.source("kvstore")
    sink = TableSink(source, schema.parse_identity_id, schema.parse_identity_id_key, grace=600)
    for number in (300, 301):
        await client.put(schema.identity_id_key(number), "a:b=c;")
    for _ in range(20):
        await client.put("noise", "x")
    async with following(Follower(client, schema.IDENTITY_IDS, sink)):
        await asyncio.wait_for(table.wait_in_sync(), 20)
        etcd.wipe()
        await eventually(lambda: len(source.missing) == 2, "both are missing")
        assert (table.get(300), table.get(301)) == ("a:b=c;", "a:b=c;")
        await client.put(schema.identity_id_key(300), "a:b=c;")
        await eventually(lambda: list(source.missing) == [301], "its owner wrote it again")
        await client.put(schema.identity_id_key(302), "garbage")
        await client.put("cilium/state/identities/v1/id/x", b"\xff" * 100_000)
        await client.delete(schema.identity_id_key(300))
        await eventually(lambda: table.get(300) is None, "a delivered deletion counts at once")
        assert len(sink.ignored) == 2


@pytest.mark.parametrize("since", ["listed", "watched", "checkpointed"])
async def test_a_restored_store_is_known_by_what_it_lacks_though_its_revision_is_not_behind(
    etcd: EtcdServer, client: Client, tmp_path: Path, since: str
) -> None:
    """Others have written more since the snapshot was restored than it lacks: the number says nothing."""
    await client.put("k/a", "1")
    await client.put("k/b", "1")
    etcd.snapshot(tmp_path / "snapshot")

    async def change() -> None:
        await client.delete("k/a")
        await client.put("k/c", "1")

    if since == "listed":
        await change()
    sink = Recorder()
    follower = Follower(client, "k/", sink)
    async with following(follower):
        await eventually(lambda: sink.synced == 1, "in sync")
        if since != "listed":
            await change()
        head = await client.head("k/")
        # The sink has a write a moment before the cursor stands behind it.
        await eventually(lambda: "k/c" in sink.view and follower.revision >= head, "the last write before")
    before = follower.cursor
    if since == "checkpointed":
        follower = Follower(client, "k/", sink)
        follower.resume(before.revision, before.cluster_id, witness=before.witness)
    etcd.restore(tmp_path / "snapshot")
    etcd.start()
    for _ in range(20):
        await client.put("elsewhere", "x")
    assert await client.head("k/") > before.revision
    lists = len(sink.lists)
    async with following(follower):
        await eventually(lambda: len(sink.lists) > lists, "a full list")
        assert sink.lists[-1] == {"k/a": b"1", "k/b": b"1"}


async def test_a_store_restored_from_after_the_view_is_resumed(
    etcd: EtcdServer, client: Client, tmp_path: Path
) -> None:
    """The view is older than the snapshot: its past is the store's, and nothing has to be listed."""
    await client.put("k/a", "1")
    sink = Recorder()
    follower = Follower(client, "k/", sink)
    async with following(follower):
        await eventually(lambda: sink.synced == 1, "in sync")
    await client.delete("k/a")
    await client.put("k/b", "1")
    etcd.snapshot(tmp_path / "snapshot")
    etcd.restore(tmp_path / "snapshot")
    etcd.start()
    async with following(follower):
        await eventually(lambda: sink.view == {"k/b": b"1"}, "what happened meanwhile")
    assert len(sink.lists) == 1
    assert sink.deletions == ["k/a"]


async def test_who_waits_for_its_turn_to_list_follows_what_changes(
    etcd: EtcdServer, client: Client, tmp_path: Path
) -> None:
    turn = asyncio.Event()
    asked: list[bool] = []

    async def gate(has_view: bool) -> None:
        asked.append(has_view)
        if has_view:
            await turn.wait()

    await client.put("k/a", "1")
    await client.put("k/b", "1")
    etcd.snapshot(tmp_path / "snapshot")
    sink = Recorder()
    seen: list[Change] = []
    follower = Follower(client, "k/", sink, gate=gate, observer=seen.extend)

    def waits() -> bool:
        return follower.state is State.WAITING and not follower.error

    async with following(follower):
        await eventually(lambda: sink.synced == 1, "in sync")
        await client.put("k/lost", "1")
        await eventually(lambda: "k/lost" in sink.view, "what the snapshot will not have")
        etcd.restore(tmp_path / "snapshot")
        etcd.start()
        etcd.ctl("put", "k/gap", "1")  # perhaps before anybody looks
        await eventually(lambda: follower.cursor.must_list, "the loss")
        await client.put("k/pause", "1")  # before the follower tries again
        await eventually(waits, "its wait")
        await eventually(lambda: "k/pause" in sink.view, "what changed before the wait")
        seen.clear()
        fresh_at = follower.fresh_at
        await client.put("k/a", "2")
        await client.delete("k/b")
        await client.put("k/new", "1")
        await eventually(lambda: "k/new" in sink.view, "what changes meanwhile")
        assert (sink.view["k/a"], "k/b" in sink.view) == (b"2", False)
        assert [each.key for each in seen][-3:] == ["k/a", "k/b", "k/new"]
        assert (len(sink.lists), follower.revision, follower.fresh_at) == (1, 0, fresh_at)
        await asyncio.to_thread(etcd.restart)
        etcd.ctl("put", "k/trouble", "1")
        await eventually(lambda: len(asked) > 2 and waits(), "its wait for the same turn, after trouble")
        await eventually(lambda: "k/trouble" in sink.view, "what changed in the trouble")
        await client.put("k/a", "3")
        await eventually(lambda: sink.view["k/a"] == b"3", "what changes after the trouble")
        assert len(sink.lists) == 1
        turn.set()
        await eventually(is_watching(follower), "the list")
        assert sink.lists[1] == {
            "k/a": b"3",
            "k/new": b"1",
            "k/gap": b"1",
            "k/pause": b"1",
            "k/trouble": b"1",
        }
        await client.put("k/after", "1")
        await eventually(lambda: "k/after" in sink.view, "what changes after the list")
        assert (len(sink.lists), sink.synced, asked[:2]) == (2, 1, [False, True])


async def test_a_list_that_fails_in_its_turn_waits_for_no_other(etcd: EtcdServer, client: Client) -> None:
    """The next turn is a window away."""
    turns = 0

    async def gate(has_view: bool) -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            await asyncio.to_thread(etcd.stop)

    await client.put("k/a", "1")
    sink = Recorder()
    follower = Follower(client, "k/", sink, gate=gate)
    async with following(follower):
        await eventually(lambda: follower.state is State.RETRYING, "a list that failed")
        etcd.start()
        await eventually(is_watching(follower), "the list")
        assert (sink.view, turns) == ({"k/a": b"1"}, 1)


async def test_resume_from_a_checkpoint_delivers_what_was_missed(client: Client) -> None:
    revision = await client.put("k/a", "1")
    await client.put("k/b", "2")
    await client.delete("k/a")
    sink = Recorder()
    sink.view["k/a"] = b"1"
    async with following(Follower(client, "k/", sink, resume_revision=revision)):
        await eventually(lambda: sink.synced == 1, "in sync")
        assert sink.view == {"k/b": b"2"}
    assert sink.lists == []


async def test_resume_when_nothing_happened_is_in_sync_too(client: Client) -> None:
    revision = await client.put("k/a", "1")
    await client.put("other", "1")
    sink = Recorder()
    async with following(Follower(client, "k/", sink, resume_revision=revision)):
        await eventually(lambda: sink.synced == 1, "in sync")
    assert sink.lists == []


@pytest.mark.parametrize(("megabytes", "lists"), [(30, 0), (80, 1)])
async def test_backlog_over_the_receive_limit_is_listed_instead(
    client: Client, megabytes: int, lists: int
) -> None:
    """etcd sends the whole backlog in one message: up to 64 MiB it is taken, beyond that a list helps."""
    revision = await client.put("k/a", "1")
    for index in range(megabytes):
        await client.put(f"k/{index % 20:02}", b"%07d" % index + b"x" * 1_000_000)
    sink = Recorder()
    sink.view["k/a"] = b"1"
    async with following(Follower(client, "k/", sink, resume_revision=revision)):
        await eventually(lambda: sink.synced == 1, "in sync")
        last = f"k/{(megabytes - 1) % 20:02}"
        await eventually(lambda: sink.view.get(last, b"").startswith(b"%07d" % (megabytes - 1)), "all of it")
        assert len(sink.view) == 21
    assert len(sink.lists) == lists


async def test_another_cluster_is_listed_again(client: Client) -> None:
    revision = await client.put("k/a", "1")
    sink = Recorder()
    follower = Follower(client, "k/", sink, resume_revision=revision, resume_cluster=12345)
    async with following(follower):
        await eventually(lambda: len(sink.lists) == 1, "a full list")


async def test_hung_server_is_left_for_another(tmp_path: Path) -> None:
    cluster = EtcdCluster(tmp_path / "cluster")
    try:
        cluster.start()
        client = Client(cluster.config, timeout=1, idle=0.5, hang=1)
        other = Client(cluster.config, timeout=1)
        await client.put("k/a", "1")
        sink = Recorder()
        async with following(Follower(client, "k/", sink)):
            await eventually(lambda: sink.synced == 1, "in sync")
            hung = cluster.member_at(client.transport.current.target)
            hung.pause()

            async def write() -> bool:
                with contextlib.suppress(Exception):
                    await other.put("k/b", "2")
                    return True
                return False

            await eventually(write, "the others elect a leader")
            await eventually(lambda: "k/b" in sink.view, "the event comes from another member")
        assert len(sink.lists) == 1
        await client.close()
        await other.close()
    finally:
        cluster.stop()


async def test_a_hung_etcd_is_asked_less_and_less(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt lasts longer than what counts as healthy: it ends because its time is up."""
    monkeypatch.setattr(patience, "HEALTHY_AFTER_S", 0.1)
    client, patient = Client(etcd.config, timeout=0.3, idle=0.2, hang=0.3), Client(etcd.config, timeout=30)
    await patient.put("k/a", "1")
    sink = Recorder()
    async with following(Follower(client, "k/", sink)) as follower:
        waits = follower._patience
        await eventually(lambda: sink.synced == 1, "in sync")
        etcd.pause()
        try:
            await eventually(lambda: waits.backoff.attempts >= 4, "four failures in a row", deadline=30)
        finally:
            etcd.resume()
        await patient.put("k/b", "2")
        await eventually(lambda: "k/b" in sink.view, "it is followed again", deadline=60)
    await client.close()
    await patient.close()


async def test_denied_prefix_is_told_and_followed_once_it_is_allowed(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd", tls=True)
    try:
        server.start().enable_auth("agent", "mine/")
        server.ctl("put", "yours/a", "1")
        client = Client(server.config_for("agent"), timeout=2)
        sink = Recorder()
        async with following(Follower(client, "yours/", sink)) as follower:
            await eventually(lambda: follower.state is State.DENIED, "denied")
            assert "yours/" in follower.error
            assert sink.synced == 0
            server.ctl("role", "grant-permission", "agent", "read", "yours/", "--prefix=true")
            await eventually(lambda: sink.view == {"yours/a": b"1"}, "allowed now", deadline=60)
        await client.close()
    finally:
        server.stop()
