# SPDX-License-Identifier: Apache-2.0
"""Views on disk: what was known comes back with its place; no file, however broken, stops a start."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import ipcache, remembered, sinks, viewfile
from agent.ipcache import Record
from agent.nodes import NodeTable
from agent.policies import Refusals, new_documents
from agent.policy_sources import PolicyKeys
from agent.remembered import Remembered, View
from agent.viewfile import Part, Shape, ViewFile
from core.table import Table
from identity.cache import IdentityCache
from kvstore import schema
from kvstore.sink import TableSink
from kvstore.watch import Witness
from tests.support.lives import follower
from tests.support.saved import Saved

OWNER, CLUSTER, GRACE_S = "default/host-1", (1 << 64) - 5, 60.0
POLICY = "- endpointSelector: {matchLabels: {app: web}}\n  ingress: [{}]\n"
NODE = schema.encode_node(
    schema.NodeRecord("host-2", "default", (schema.NodeAddress("InternalIP", "10.0.0.2"),))
)


class Life:
    """What one agent knows of etcd, and its file."""

    def __init__(self, directory: Path, owner: str = OWNER) -> None:
        self.path = directory / viewfile.NAME
        nodes: NodeTable = Table("nodes", ("kvstore",))
        self.addresses = sinks.IpSink(ipcache.new_table().source(ipcache.KVSTORE_SOURCE), GRACE_S)
        self.identities = IdentityCache(grace=GRACE_S)
        self.nodes = TableSink(nodes.source("kvstore"), sinks.node_entry, sinks.node_name)
        self.policies = PolicyKeys(new_documents(), Refusals(), GRACE_S)
        self.views: list[View[Any, Any]] = [
            remembered.identity_view(follower(schema.IDENTITY_IDS, self.identities), self.identities),
            remembered.policy_view(follower(schema.POLICIES, self.policies), self.policies),
            remembered.node_view(follower(schema.NODES, self.nodes), self.nodes),
            remembered.AddressView(follower(schema.IPS, self.addresses), self.addresses),
        ]
        self.memory = Remembered(ViewFile(self.path, owner, remembered.SHAPES), grace=GRACE_S)

    async def start(self) -> list[bool]:
        """Restore every view; return which of them are whole."""
        await self.memory.open()
        return [await self.memory.restore(view) for view in self.views]

    def listed(self, revision: int) -> None:
        """Everything etcd has at `revision` has been delivered."""
        for view in self.views:
            view.follower.cursor.listed(revision, CLUSTER, Witness(view.follower.prefix, revision - 1))

    def fill(self) -> None:
        self.identities.put(f"{schema.IDENTITY_IDS}4711", b"container:app=web;container:name=\xc3\xbc;")
        self.policies.put(f"{schema.POLICIES}web", POLICY.encode())
        self.nodes.put(f"{schema.NODES}default/host-2", NODE)
        for address in ("10.1.0.1", "fd00::1"):
            record = schema.ip_record(address, 4711, host_ip="10.0.0.2", metadata="a:b\n")
            self.addresses.put(f"{schema.IPS}default/{address}", schema.encode_ip(record))

    def known(self) -> list[dict[Any, Any]]:
        return [dict(view.source.entries()) for view in self.views]


@contextmanager
def life(directory: Path, owner: str = OWNER) -> Iterator[Life]:
    new = Life(directory, owner)
    try:
        yield new
    finally:
        new.memory.close()


async def first_life(directory: Path, revision: int = 9) -> list[dict[Any, Any]]:
    """Have an agent learn and write everything; return what it knew."""
    with life(directory) as one:
        await one.start()
        one.fill()
        one.listed(revision)
        await one.memory.write()
        assert one.memory.trouble == ""
        return one.known()


async def test_what_was_known_comes_back_with_its_place(tmp_path: Path) -> None:
    known = await first_life(tmp_path)
    assert [len(each) for each in known] == [1, 1, 1, 2]
    with life(tmp_path) as two:
        assert await two.start() == [True] * 4
        assert two.known() == known
        assert {(view.place.revision, view.place.cluster_id) for view in two.views} == {(9, CLUSTER)}
        assert all(view.place.witness == Witness(view.follower.prefix, 8) for view in two.views)
        assert all(view.source.complete and not view.source.in_sync for view in two.views)
        assert not any(view.is_due for view in two.views), "what was restored is not written again"


async def test_a_restored_view_is_as_old_as_when_etcd_last_confirmed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await first_life(tmp_path)
    confirmed = max(row[3] for row in Saved(tmp_path).rows("places"))
    assert 0 <= time.time() - confirmed < 60
    monkeypatch.setattr("agent.remembered.time.time", lambda: confirmed + 7200.0)
    with life(tmp_path) as two:
        await two.start()
        assert all(7200 <= view.follower.age() < 7260 for view in two.views)
        assert not any(view.is_due for view in two.views), "nobody has confirmed anything since"
        two.views[0].follower.fresh_at = time.monotonic()
        await two.memory.write()
    assert {row[0]: row[3] - confirmed > 7000 for row in Saved(tmp_path).rows("places")} == {
        "identities": True,
        "policies": False,
        "nodes": False,
        "addresses": False,
    }


async def test_a_view_whose_list_is_not_whole_is_not_written(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        await one.start()
        one.fill()
        await one.memory.write()
    assert Saved(tmp_path).rows("places") == []
    with life(tmp_path) as two:
        assert await two.start() == [False] * 4
        assert not any(view.source.complete for view in two.views)


async def test_what_is_followed_without_a_history_is_kept_and_no_history_is_resumed_from_it(
    tmp_path: Path,
) -> None:
    """etcd was restored, and this host waits for its slot to list it."""
    await first_life(tmp_path)
    with life(tmp_path) as two:
        await two.start()
        for view in two.views:
            view.follower.cursor.lost()
        two.identities.put(f"{schema.IDENTITY_IDS}4712", b"container:app=db;")
        await two.memory.write()
        assert two.memory.resumable == 9
    with life(tmp_path) as three:
        assert await three.start() == [True] * 4
        assert set(three.views[0].source.entries()) == {4711, 4712}
        cursors = [view.follower.cursor for view in three.views]
        assert [(each.revision, each.witness) for each in cursors] == [(9, None)] * 4
        assert {each.cluster_id for each in cursors} == {viewfile.NO_CLUSTER}
        for view in three.views:
            view.follower.cursor.lost()
            view.follower.cursor.listed(30, CLUSTER)
        await three.memory.write()
    with life(tmp_path) as four:
        await four.start()
        assert {each.follower.cursor.cluster_id for each in four.views} == {CLUSTER}


async def test_a_change_leaves_the_others_of_its_block_as_they_are(tmp_path: Path) -> None:
    numbers = range(1000, 1000 + 3 * viewfile.BLOCKS)
    await first_life(tmp_path)
    with life(tmp_path) as two:
        await two.start()
        for number in numbers:
            two.identities.put(f"{schema.IDENTITY_IDS}{number}", b"container:app=%d;" % number)
        two.views[0].follower.cursor.listed(10, CLUSTER)
        await two.memory.write()
    expected = {number: (f"container:app={number};", False) for number in numbers}
    blocks = dict(viewfile.blocks_of(remembered.IDENTITIES, numbers))
    assert max(map(len, blocks.values())) > 3
    with life(tmp_path) as three:
        await three.start()
        some = max(blocks.values(), key=len)
        three.identities.deleted(f"{schema.IDENTITY_IDS}{some[0]}")
        three.identities.put(f"{schema.IDENTITY_IDS}{some[1]}", b"container:app=other;")
        for number in next(each for each in blocks.values() if len(each) == 1):
            three.identities.deleted(f"{schema.IDENTITY_IDS}{number}")
            del expected[number]
        three.views[0].follower.cursor.listed(11, CLUSTER)
        await three.memory.write()
    del expected[some[0]]
    expected[some[1]] = ("container:app=other;", False)
    found = {
        number: (labels, bool(missing)) for number, labels, missing in Saved(tmp_path).rows("identities")
    }
    assert {number: row for number, row in found.items() if number in numbers} == expected
    with life(tmp_path) as four:
        assert await four.start() == [True] * 4
        assert set(four.views[0].source.entries()) >= expected.keys()


async def test_only_what_changed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await first_life(tmp_path)
    written: list[Any] = []
    merge = ViewFile.merge

    def noted(file: ViewFile, shape: Shape, parts: Sequence[Part]) -> None:
        written.extend((part.keys, part.rows) for part in parts)
        merge(file, shape, parts)

    monkeypatch.setattr(ViewFile, "merge", noted)
    with life(tmp_path) as two:
        await two.start()
        two.identities.put(f"{schema.IDENTITY_IDS}4712", b"container:app=db;")
        two.identities.deleted(f"{schema.IDENTITY_IDS}4711")
        two.views[0].follower.cursor.listed(10, CLUSTER)
        await two.memory.write()
    assert sorted(written) == [([4711], {}), ([4712], {4712: ("container:app=db;", False)})]
    assert Saved(tmp_path).keys("identities") == [4712]
    assert Saved(tmp_path).revision("identities") == 10
    assert Saved(tmp_path).revision("addresses") == 9


async def test_writing_has_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of thousands waits until it is worth its cost; a policy beside it does not."""
    with life(tmp_path) as one:
        await one.start()
        now = one.views[0].written_at
        monkeypatch.setattr("agent.remembered.time.monotonic", lambda: now)
        for number in range(5_000):
            one.identities.put(f"{schema.IDENTITY_IDS}{1000 + number}", b"container:app=%d;" % number)
        one.policies.put(f"{schema.POLICIES}web", POLICY.encode())
        one.listed(3)
        cost = 5_000 * remembered.ROW_S + viewfile.BLOCKS * remembered.BLOCK_S
        now += 0.9 * cost / remembered.SHARE
        await one.memory.write(all_of_it=False)
        assert (Saved(tmp_path).revision("identities"), Saved(tmp_path).revision("policies")) == (0, 3)
        now += 0.2 * cost / remembered.SHARE
        await one.memory.write(all_of_it=False)
        assert Saved(tmp_path).revision("identities") == 3


async def test_what_a_list_lacked_stays_missing_in_the_next_life(tmp_path: Path) -> None:
    """Its grace begins anew: the watch that resumes will not list, and nothing else would end it."""
    await first_life(tmp_path)
    with life(tmp_path) as two:
        await two.start()
        two.addresses.begin_list()
        await two.addresses.listed(11)
        assert len(two.addresses.source.missing) == 2
        two.listed(11)
        await two.memory.write()
    with life(tmp_path) as three:
        await three.start()
        assert set(three.addresses.source.missing) == {"10.1.0.1/32", "fd00::1/128"}
        record = schema.encode_ip(schema.ip_record("10.1.0.1", 4711, host_ip="10.0.0.2", metadata="a:b\n"))
        three.addresses.put(f"{schema.IPS}default/10.1.0.1", record)
        three.listed(12)
        await three.memory.write()
    with life(tmp_path) as four:
        await four.start()
        assert set(four.addresses.source.missing) == {"fd00::1/128"}
        assert four.addresses.source.expire(now=1e12) == ["fd00::1/128"]


STEPS = st.lists(st.tuples(st.sampled_from("pdw"), st.integers(0, 5), st.integers(256, 260)), max_size=30)


@given(STEPS)
def test_any_history_comes_back_as_of_the_last_write(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    async def story() -> None:
        directory, written, at = tmp_path_factory.mktemp("views"), dict[str, Record](), 0
        with life(directory) as one:
            await one.start()
            for revision, (verb, number, identity) in enumerate(steps, 1):
                key = f"{schema.IPS}default/10.0.0.{number}"
                if verb == "p":
                    one.addresses.put(key, schema.encode_ip(schema.ip_record(f"10.0.0.{number}", identity)))
                elif verb == "d":
                    one.addresses.deleted(key)
                one.views[3].follower.cursor.listed(revision, CLUSTER)
                if verb == "w":
                    await one.memory.write()
                    written, at = dict(one.addresses.source.entries()), revision
        with life(directory) as two:
            await two.start()
            assert dict(two.addresses.source.entries()) == written
            assert two.views[3].follower.revision == at

    asyncio.run(story())


async def test_files_are_private(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        await one.start()
        one.fill()
        one.listed(3)
        await one.memory.write()
        one.listed(4)
        await one.memory.write()
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == {"views.db": 0o600, "views.db-wal": 0o600, "views.db-shm": 0o600}


async def test_who_reads_a_file_that_is_being_filled_keeps_no_agent_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    with life(tmp_path) as one:
        await one.start()
        one.fill()
        one.views[0].follower.cursor.listed(3, CLUSTER)
        await one.memory.write()
    with closing(sqlite3.connect(tmp_path / viewfile.NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert len(reader.execute("SELECT * FROM identities").fetchall()) == 1
        with life(tmp_path) as two:
            assert await two.start() == [True, False, False, False]
            assert two.memory.trouble == two.memory.damage == ""
            reader.execute("COMMIT")
            two.fill()
            two.listed(5)
            await two.memory.write()
            assert two.memory.trouble == ""
    assert Saved(tmp_path).revision("addresses") == 5


async def test_changes_are_logged_from_when_the_addresses_are_written(tmp_path: Path) -> None:
    log = tmp_path / "views.db-wal"
    with life(tmp_path) as one:
        await one.start()
        one.fill()
        for revision, view in enumerate(one.views, 3):
            assert not log.exists()
            view.follower.cursor.listed(revision, CLUSTER)
            await one.memory.write()
        with closing(sqlite3.connect(one.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM places").fetchone() == (4,)
            one.listed(9)
            await one.memory.write()
            assert log.stat().st_size > 0, "and who reads keeps nobody from writing"
            assert one.memory.trouble == ""


def sql(*statements: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            for statement in statements:
                database.execute(statement)

    return change


def altered(view: str, column: int, value: str) -> str:
    """Return the statement that gives every record of a view this JSON value in a column behind the key."""
    replaced = f"json(json_replace(value, '$[{column}]', json('{value}')))"
    records = f"SELECT json_group_object(key, {replaced}) FROM json_each(records)"
    return f"UPDATE {view}_blocks SET records = ({records})"


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def torn(path: Path) -> None:
    """The first page is as it was, the others never reached the disk."""
    data = path.read_bytes()
    path.write_bytes(data[: viewfile.PAGE_BYTES] + bytes(len(data) - viewfile.PAGE_BYTES))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a file": (halved, "malformed"),
    "pages of nothing": (torn, "malformed"),
    "no database": (lambda path: path.write_bytes(b"{}" * 5000), "not a database"),
    "another program's": (sql("DROP TABLE places"), "no such table"),
    "a version to come": (sql("PRAGMA user_version = 9"), "version 9 is not 3"),
    "another host's": (sql("UPDATE owner SET name = 'default/host-7'"), "it is of default/host-7"),
    "nobody's": (sql("DELETE FROM owner"), "it is of None"),
    "a number that is a word": (sql(altered("addresses", 0, '"x"')), "Expected `int`"),
    "an identity of the host": (sql(altered("addresses", 0, "1")), "can not have said"),
    "a local identity": (sql(altered("addresses", 0, "16777217")), "can not have said"),
    "no prefix": (sql("UPDATE addresses_blocks SET records = replace(records, '/32', '/x32')"), "/x32"),
    "a NUL in an address": (
        sql("UPDATE addresses_blocks SET records = replace(records, '/32', '\\u0000/32')"),
        "null character",
    ),
    "a cluster of letters": (sql("UPDATE places SET cluster_id = 'xyz'"), "xyz"),
    "labels that are no text": (sql("UPDATE identities_blocks SET records = x'ff'"), "malformed"),
    "a text of no characters": (
        sql("UPDATE identities_blocks SET records = CAST(x'7b22ff7d' AS TEXT)"),
        "Could not decode to UTF-8",
    ),
    "host bits": (sql("UPDATE addresses_blocks SET records = replace(records, '/32', '/31')"), "host bits"),
    "a length with a sign": (
        sql("UPDATE addresses_blocks SET records = replace(records, '/32', '/+32')"),
        "canonical form",
    ),
    "another spelling": (
        sql("UPDATE addresses_blocks SET records = replace(records, 'fd00', 'FD00')"),
        "canonical form",
    ),
    "nothing in it": (lambda path: path.write_bytes(b""), "it is empty"),
    "records of another shape": (sql("UPDATE nodes_blocks SET records = '{\"a\": []}'"), "length"),
    "records that are cut": (sql("UPDATE nodes_blocks SET records = '{\"a\": ['"), "truncated"),
}


@pytest.mark.parametrize(("change", "told"), DAMAGE.values(), ids=DAMAGE.keys())
async def test_a_file_that_can_not_be_used_is_kept_aside_and_begun_anew(
    tmp_path: Path, change: Callable[[Path], object], told: str
) -> None:
    known = await first_life(tmp_path)
    change(tmp_path / viewfile.NAME)
    with life(tmp_path) as two:
        assert not all(await two.start())
        assert told in two.memory.damage
        (kept,) = tmp_path.glob("views.db.damaged-*")
        assert str(kept) in two.memory.damage
        two.fill()
        two.listed(20)
        await two.memory.write()
        assert two.memory.trouble == ""
    with life(tmp_path) as three:
        assert await three.start() == [True] * 4
        assert three.known() == known


@pytest.mark.parametrize(
    ("statement", "view"),
    [
        (altered("identities", 0, '"nonsense"'), 0),
        (altered("policies", 0, '"endpointSelector: 7"'), 1),
        (altered("nodes", 0, '"{}"'), 2),
    ],
)
async def test_a_record_that_is_refused_makes_its_view_be_listed(
    tmp_path: Path, statement: str, view: int
) -> None:
    """A checkpoint of a version that understood it, say: the rest is in force, but not from there on."""
    await first_life(tmp_path)
    sql(statement)(tmp_path / viewfile.NAME)
    with life(tmp_path) as two:
        assert await two.start() == [number != view for number in range(4)]
        assert two.views[view].follower.cursor.must_list
        assert two.memory.damage == ""
        two.listed(20)  # etcd has it no more
        await two.memory.write()
    with life(tmp_path) as three:
        assert await three.start() == [True] * 4


async def test_a_view_from_the_future_is_as_fresh_as_one_of_now(tmp_path: Path) -> None:
    """The clock was set back since it was written; what the view says is as good as ever."""
    known = await first_life(tmp_path)
    sql("UPDATE places SET confirmed = confirmed + 1e6")(tmp_path / viewfile.NAME)
    with life(tmp_path) as two:
        assert await two.start() == [True] * 4
        assert two.known() == known
        assert all(0 <= view.follower.age() < 60 for view in two.views)


async def test_what_etcd_deleted_while_the_file_could_not_be_read_does_not_come_back(tmp_path: Path) -> None:
    await first_life(tmp_path)
    with life(tmp_path) as two:
        with closing(sqlite3.connect(tmp_path / viewfile.NAME, isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            assert await two.start() == [False] * 4
            assert "locked" in two.memory.trouble
        two.listed(20)  # nothing is left
        await two.memory.write()
        assert (two.memory.trouble, two.memory.damage) == ("", "")
    with life(tmp_path) as three:
        assert await three.start() == [True] * 4
        assert three.known() == [{}] * 4


async def test_damage_that_is_found_while_addresses_are_restored_ends_nothing(tmp_path: Path) -> None:
    with life(tmp_path) as one:
        await one.start()
        one.fill()
        addresses = [f"10.2.{number >> 8}.{number & 255}" for number in range(20_000)]
        one.addresses.take(
            [
                (f"{schema.IPS}default/{each}", schema.encode_ip(schema.ip_record(each, 4711)))
                for each in addresses
            ]
        )
        one.listed(9)
        await one.memory.write()
        known = one.known()
    with life(tmp_path) as two:
        await two.memory.open()
        for view in two.views[:3]:
            await two.memory.restore(view)
        sql("UPDATE nodes_blocks SET records = '{'")(tmp_path / viewfile.NAME)
        two.nodes.put(f"{schema.NODES}default/host-2", NODE.replace(b"10.0.0.2", b"10.0.0.3"))
        two.views[2].follower.cursor.listed(10, CLUSTER)
        restored, _ = await asyncio.gather(two.memory.restore(two.views[3]), two.memory.write())
        assert restored
        assert "truncated" in two.memory.damage
        two.listed(11)
        await two.memory.write()
        assert two.memory.trouble == ""
    with life(tmp_path) as three:
        assert await three.start() == [True] * 4
        assert [len(each) for each in three.known()] == [len(each) for each in known]


async def test_a_directory_that_can_not_be_written_is_tried_again(tmp_path: Path) -> None:
    directory = tmp_path / "later"
    with life(directory) as one:
        assert await one.start() == [False] * 4
        assert "can not be opened" in one.memory.trouble
        one.fill()
        one.listed(4)
        await one.memory.write()
        assert str(directory) in one.memory.trouble
        directory.mkdir()
        await one.memory.write()
        assert one.memory.trouble == ""
    with life(directory) as two:
        assert await two.start() == [True] * 4
