# SPDX-License-Identifier: Apache-2.0
"""kvstore without etcd: configuration, wire, merging, own keys, table sink, generated code."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st

from core.table import Table
from kvstore import errors, etcd_pb2, ops, schema
from kvstore.config import EtcdConfig
from kvstore.merge import Cursor
from kvstore.ops import KeyValue, delete_op, put_op, range_end, span, write_batches
from kvstore.ownkeys import OwnKeys
from kvstore.session import LONGEST_SPREAD_S, MANY_KEYS, spread_s
from kvstore.sink import MARKED_AT_ONCE, TableSink
from kvstore.transport import translate
from kvstore.watch import Change, WatchBatch, Witness
from tests.support.lists import deliver_list
from tests.support.require import require

REPOSITORY = Path(__file__).parents[2]


# --- etcd.config


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "etcd.config"
    path.write_text(text)
    return path


def test_config_of_cilium_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "endpoints:\n- https://10.0.0.1:2379\n- https://[fd00::1]:2379\n"
        "trusted-ca-file: /c/ca.crt\ncert-file: /c/a.crt\nkey-file: /c/a.key\n",
    )
    config = EtcdConfig.load(path)
    assert config.targets() == ["10.0.0.1:2379", "[fd00::1]:2379"]
    assert config.secure
    assert (config.ca, config.cert, config.key) == (Path("/c/ca.crt"), Path("/c/a.crt"), Path("/c/a.key"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("endpoints: []", "no endpoints"),
        ("endpoints: 5", "endpoints is 5"),
        ("{", "not YAML"),
        ("- a", "not a mapping"),
        ("endpoints: ['http://a:1', 'https://b:2']", "mix"),
        ("endpoints: ['http://a']", "http://a"),
        ("endpoints: ['http://a:99999']", "99999"),
        ("endpoints: ['ftp://a:1']", "ftp"),
        ("endpoints: ['https://a:1']\ncert-file: /x", "together"),
        ("endpoints: ['http://a:1']\nca-file: /x", "not https"),
        ("endpoints: ['http://a:1']\nca-file: [1]", "ca-file"),
        ("endpoints: ['http://a:1']\nendpoint: x", "endpoint"),
        ("\xff", "etcd.config"),
    ],
)
def test_bad_config_names_file_and_reason(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, "")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.ConfigError, match=named):
        EtcdConfig.load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="nowhere"):
        EtcdConfig.load(tmp_path / "nowhere")
    config = EtcdConfig(("https://a:1",), ca=tmp_path / "gone.crt")
    with pytest.raises(errors.ConfigError, match=r"gone\.crt"):
        config.read_tls()


# --- operations


@given(prefix=st.binary(min_size=1, max_size=6), rest=st.binary(max_size=4), other=st.binary(max_size=8))
def test_range_end_selects_exactly_the_prefix(prefix: bytes, rest: bytes, other: bytes) -> None:
    end = range_end(prefix)
    assert prefix <= prefix + rest
    assert end == b"\0" or prefix + rest < end
    inside = prefix <= other and (end == b"\0" or other < end)
    assert inside == other.startswith(prefix) or end == b"\0"


def test_empty_prefix_is_everything() -> None:
    assert span("") == (b"\0", b"\0")


@given(key=st.binary(max_size=12))
def test_any_key_survives_as_text(key: bytes) -> None:
    assert ops.encode_key(ops.decode_key(key)) == key


@given(
    keys=st.lists(st.integers(0, 40), max_size=120),
    max_ops=st.integers(1, 9),
    max_bytes=st.integers(1, 60),
)
def test_write_batches_keep_the_last_write_of_each_key(keys: list[int], max_ops: int, max_bytes: int) -> None:
    writes = [put_op(f"k{key}", f"{index}") for index, key in enumerate(keys)]
    batches = list(write_batches(writes, max_ops=max_ops, max_bytes=max_bytes))
    flat = [op for batch in batches for op in batch]
    assert {op.key: op for op in writes} == {op.key: op for op in flat}
    assert len(flat) == len(set(keys))
    assert all(len(batch) <= max_ops for batch in batches)


def test_compare_over_a_range_says_so_on_the_wire() -> None:
    wire = ops.txn_to_wire([ops.range_absent("a/")], (), ()).compare[0]
    assert (wire.key, wire.range_end, wire.WhichOneof("target_union")) == (b"a/", b"a0", "create_revision")


def test_operations_on_the_wire_are_what_they_were_also_inside() -> None:
    success = [ops.put_op("p", b"", lease=7), ops.delete_prefix_op("d/"), ops.get_op("g")]
    failure = [ops.list_op("", limit=3, keys_only=True), ops.delete_op("d")]
    plain = ops.txn_to_wire([ops.value_is("v", b"x"), ops.absent("a")], success, failure)
    nested = ops.txn_to_wire(
        (), [ops.txn_op([ops.value_is("v", b"x"), ops.absent("a")], success, failure)], ()
    )
    assert nested.success[0].request_txn == plain
    kinds = [each.WhichOneof("request") for each in (*plain.success, *plain.failure)]
    assert kinds == [
        "request_put",
        "request_delete_range",
        "request_range",
        "request_range",
        "request_delete_range",
    ]
    assert (plain.success[0].request_put.key, plain.success[0].request_put.lease) == (b"p", 7)
    assert plain.success[1].request_delete_range.range_end == b"d0"
    everything = plain.failure[0].request_range
    assert (everything.key, everything.range_end, everything.limit) == (b"\0", b"\0", 3)
    assert everything.keys_only
    empty = ops.txn_to_wire((), [ops.txn_op((), ())], ())
    assert empty.success[0].WhichOneof("request") == "request_txn"


# --- errors of the wire


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader", errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", errors.Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests", errors.Unavailable),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "etcdserver: mvcc: database space exceeded",
            errors.NoSpace,
        ),
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: request is too large", errors.RequestRefused),
        (grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty", errors.PermissionDenied),
        (grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", errors.PermissionDenied),
        (grpc.StatusCode.OUT_OF_RANGE, "required revision has been compacted", errors.Compacted),
        (grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found", errors.LeaseNotFound),
    ],
)
def test_wire_errors_become_typed_and_name_key_and_peer(
    code: grpc.StatusCode, text: str, kind: type[errors.KvstoreError]
) -> None:
    wire = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), text, "")
    error = translate(wire, "range", "some/key", "10.0.0.1:2379", lease=7, wanted=3)
    assert type(error) is kind
    assert "some/key" in str(error)
    if kind not in (errors.Compacted, errors.LeaseNotFound):
        assert "10.0.0.1:2379" in str(error)


# --- merging


def event(key: str, revision: int, value: str | None = "v") -> Change:
    return Change(key, None if value is None else value.encode(), revision)


def batch(*events: Change, head: int = 0, created: bool = False, revision: int = 0) -> WatchBatch:
    last = events[-1].revision if events else revision
    return WatchBatch(last, list(events), head, created)


def merged(cursor: Cursor, taken: WatchBatch) -> list[Change]:
    """Take a batch as a follower does; return what it changes."""
    changes = cursor.changes(taken)
    cursor.passed(taken)
    return changes


def test_last_event_of_a_key_wins_and_repeated_ones_are_dropped() -> None:
    cursor = Cursor()
    cursor.listed(10)
    changes = merged(cursor, batch(event("a", 9), event("a", 11, "x"), event("b", 12), event("a", 13, None)))
    assert changes == [Change("b", b"v", 12), Change("a", None, 13)], "in the order of each key's last event"
    assert cursor.revision == 13
    assert merged(cursor, batch(event("a", 13), event("b", 12))) == []


def test_the_witness_is_the_last_write_that_was_passed_and_still_stands() -> None:
    cursor = Cursor()
    cursor.listed(10, witness=Witness("a", 7))
    assert cursor.witness == Witness("a", 7)
    merged(cursor, batch(event("b", 11), event("c", 12), event("b", 13, None)))
    assert cursor.witness == Witness("c", 12)
    merged(cursor, batch(event("a", 9), event("c", 12)))  # repeated
    assert cursor.witness == Witness("c", 12)
    merged(cursor, batch(event("c", 14, None)))
    assert cursor.witness is None
    cursor.listed(20, witness=Witness("d", 20))
    cursor.lost()
    assert cursor.witness is None


def test_history_lost_means_list_again() -> None:
    cursor = Cursor(5, 77)
    assert not cursor.must_list
    cursor.lost()
    assert (cursor.must_list, cursor.cluster_id, cursor.caught_up) == (True, 0, False)


def test_resumed_view_is_caught_up_when_the_revision_at_the_start_is_passed() -> None:
    cursor = Cursor(5)
    merged(cursor, batch(head=9, created=True, revision=5))
    assert not cursor.caught_up
    merged(cursor, batch(event("a", 7), head=9))
    assert not cursor.caught_up
    merged(cursor, batch(event("a", 9), head=9))
    assert cursor.caught_up


def test_resumed_view_is_caught_up_after_quiet_or_when_nothing_happened() -> None:
    cursor = Cursor(5)
    merged(cursor, batch(head=9, created=True, revision=5))
    merged(cursor, batch(head=9, revision=5))
    assert cursor.caught_up
    assert cursor.revision == 5
    same = Cursor(9)
    merged(same, batch(head=9, created=True, revision=9))
    assert same.caught_up


@given(data=st.data())
def test_merge_equals_applying_every_event_once(data: st.DataObject) -> None:
    """The obvious reference: a history of writes; a stream that is cut, and repeats some of the past."""
    history = data.draw(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.sampled_from(["1", "2", None])), min_size=1, max_size=30
        )
    )
    events = [event(key, revision, value) for revision, (key, value) in enumerate(history, 2)]
    truth: dict[str, bytes] = {}
    for each in events:
        _apply(truth, each.key, each.value)
    cursor, view = Cursor(1), dict[str, bytes]()
    position = 0
    while position < len(events):
        begin = data.draw(st.integers(0, position))
        position = data.draw(st.integers(position + 1, len(events)))
        for change in merged(cursor, batch(*events[begin:position])):
            _apply(view, change.key, change.value)
    assert view == truth
    assert cursor.revision == len(events) + 1


def _apply(view: dict[str, bytes], key: str, value: bytes | None) -> None:
    if value is None:
        view.pop(key, None)
    else:
        view[key] = value


# --- own keys


def kv(key: str, value: bytes, revision: int, lease: int = 7) -> KeyValue:
    return KeyValue(key, value, revision, 1, lease, 1)


def written(**values: bytes) -> OwnKeys:
    keys = OwnKeys()
    for key, value in values.items():
        keys.want(key, value)
    keys.wrote(values, 10)
    return keys


def test_own_key_is_due_once() -> None:
    keys = OwnKeys()
    assert keys.want("a", b"1")
    assert keys.due(10, now=0) == {"a": b"1"}
    keys.wrote({"a": b"1"}, 5)
    assert keys.due(10, now=0) == {}
    assert not keys.want("a", b"1")
    assert keys.is_clean("a")


def test_value_that_changed_while_it_was_written_stays_dirty() -> None:
    keys = OwnKeys()
    keys.want("a", b"1")
    keys.want("a", b"2")
    keys.wrote({"a": b"1"}, 5)
    assert keys.due(10, now=0) == {"a": b"2"}


def test_deleted_overwritten_and_stolen_keys_are_restored() -> None:
    for found, deleted in (
        (kv("a", b"", 11), True),
        (kv("a", b"other", 11), False),
        (kv("a", b"1", 11, lease=8), False),
    ):
        keys = written(a=b"1")
        assert keys.observed(found, deleted=deleted, lease=7, now=1000.0)
        assert keys.due(10, now=1000.0) == {"a": b"1"}


def test_what_a_follower_sees_of_own_keys_restores_them() -> None:
    keys = written(a=b"1", b=b"2", c=b"3")
    deletion, theft = Change("a", None, 11), Change("b", b"x", 12)
    changes = [deletion, theft, Change("c", b"3", 13), Change("c", b"x", 10), Change("z", None, 14)]
    assert keys.seen(changes, now=1000.0) == [deletion, theft]
    assert keys.due(10, now=1000.0) == {"a": b"1", "b": b"2"}
    assert keys.seen([deletion], now=1000.0) == [], "it is on its way already"


def test_own_writes_old_events_and_foreign_keys_are_no_news() -> None:
    keys = written(a=b"1")
    assert not keys.observed(kv("a", b"1", 11), deleted=False, lease=7)
    assert not keys.observed(kv("a", b"x", 10), deleted=False, lease=7)
    assert not keys.observed(kv("z", b"x", 99), deleted=False, lease=7)
    assert keys.settled


def test_a_fight_over_a_key_slows_down_and_calm_forgives() -> None:
    keys = written(a=b"1")
    keys._own["a"].fight.rng = random.Random(3)
    now, pauses = 1000.0, []
    for turn in range(8):
        assert keys.observed(kv("a", b"x", 100 + 10 * turn), deleted=False, lease=7, now=now)
        due = keys.next_due()
        assert due is not None
        pauses.append(due - now)
        now = due
        keys.wrote({"a": b"1"}, 105 + 10 * turn)
    assert pauses[0] == 0
    assert max(pauses) > 5
    now += 1000
    keys.observed(kv("a", b"x", 999), deleted=False, lease=7, now=now)
    assert keys.next_due() == now


def test_verify_rewrites_only_what_differs() -> None:
    keys = written(a=b"1", b=b"2", c=b"3")
    found = {"a": kv("a", b"1", 3), "b": kv("b", b"2", 3, lease=6)}
    assert keys.verify(["a", "b", "c"], found, 7, revision=50) == ["b", "c"]
    assert keys.watchable() == {"a": 50}


def test_disowned_key_says_how_it_may_be_recognised() -> None:
    keys = written(a=b"1")
    keys.want("b", b"2")
    keys.unwant("a")
    keys.unwant("b")
    keys.unwant("never")
    assert {key: leaving.value for key, leaving in keys.leaving().items()} == {"a": None, "b": b"2"}
    keys.want("a", b"3")
    assert keys.leaving().keys() == {"b"}


def test_a_deletion_that_is_refused_waits_tells_why_and_is_tried_again() -> None:
    keys = written(a=b"1")
    keys.unwant("a")
    leaving = keys.leaving(now=100.0)["a"]
    keys.not_left(leaving, "denied", now=100.0)
    assert keys.errors() == {"a": "denied"}
    assert keys.leaving(now=100.0) == {}
    assert not keys.settled
    assert keys.next_due() == leaving.not_before > 100.0
    assert keys.leaving(now=leaving.not_before) == {"a": leaving}
    keys.left("a", leaving)
    assert keys.settled
    assert keys.errors() == {}


def test_a_deletion_says_nothing_about_what_was_unwanted_since() -> None:
    """Wanted and unwanted again while the deletion was under way: there is another one to do."""
    keys = written(a=b"1")
    keys.unwant("a")
    before = keys.leaving()["a"]
    keys.want("a", b"2")
    keys.unwant("a")
    keys.left("a", before)
    assert [leaving.value for leaving in keys.leaving().values()] == [b"2"]


def test_only_what_nobody_wants_is_abandoned() -> None:
    keys = written(a=b"1", b=b"2")
    keys.unwant("b")
    assert not keys.abandon("a", 5)
    assert not keys.abandon("b", 5)
    assert keys.abandon("c", 5)
    assert {key: leaving.revision for key, leaving in keys.leaving().items()} == {"b": 0, "c": 5}


def test_refused_key_waits_and_tells_why() -> None:
    keys = OwnKeys()
    keys.want("a", b"1")
    keys.failed("a", "denied", now=100.0)
    assert keys.errors() == {"a": "denied"}
    assert keys.due(10, now=100.0) == {}
    assert keys.due(10, now=200.0) == {"a": b"1"}


# --- the sink that feeds a table


def identity_sink(grace: float = 60.0) -> tuple[Table[int, str], TableSink[int, str]]:
    table: Table[int, str] = Table("identities", ["kvstore"])
    source = table.source("kvstore")
    return table, TableSink(source, schema.parse_identity_id, schema.parse_identity_id_key, grace=grace)


def id_key(number: int) -> str:
    return schema.identity_id_key(number)


def test_sink_feeds_the_table_and_keeps_what_a_relist_lacks() -> None:
    table, sink = identity_sink()
    deliver_list(sink, {id_key(300): b"a:b=1;", id_key(301): b"a:b=2;"}, 5)
    sink.in_sync()
    assert table.in_sync
    deliver_list(sink, {id_key(301): b"a:b=2;"}, 9)
    assert table.get(300) == "a:b=1;"
    assert list(table.source("kvstore").missing) == [300]
    sink.deleted(id_key(301))
    assert table.get(301) is None


async def test_others_run_while_much_is_found_missing() -> None:
    """A wiped store lacks everything at once; 300 000 addresses would stop the agent for half a second."""
    table, sink = identity_sink()
    sink.begin_list()
    sink.take([(id_key(300 + number), b"a:b=1;") for number in range(10 * MARKED_AT_ONCE)])
    await sink.listed(5)
    changes, marked, ended = table.subscribe(), [], asyncio.Event()
    changes.take()

    async def look() -> None:
        while not ended.is_set():
            marked.append(len(changes.take()))
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    await asyncio.sleep(0)
    sink.begin_list()
    await sink.listed(9)
    ended.set()
    await looking
    assert len(table.source("kvstore").missing) == sum(marked) == 10 * MARKED_AT_ONCE
    assert max(marked) == MARKED_AT_ONCE


def test_sink_that_holds_deletions_takes_them_back_when_a_record_is_written_again() -> None:
    table: Table[int, str] = Table("identities", ["kvstore"])
    source = table.source("kvstore")
    sink = TableSink(source, schema.parse_identity_id, schema.parse_identity_id_key, hold=60.0)
    deliver_list(sink, {id_key(300): b"a:b=1;", id_key(301): b"a:b=2;"}, 5)
    before = time.monotonic()
    for number in (300, 301, 302):
        sink.deleted(id_key(number))
    assert set(source.held) == {300, 301}
    assert all(before + 60 <= until <= time.monotonic() + 60 for until in source.held.values())
    sink.put(id_key(300), b"a:b=1;")
    assert source.expire(before + 120) == [301]
    assert dict(table.items()) == {300: "a:b=1;"}


def test_bad_record_leaves_the_last_good_one_in_force() -> None:
    table, sink = identity_sink(grace=0)
    deliver_list(sink, {id_key(300): b"a:b=1;"}, 5)
    sink.put(id_key(300), b"garbage")
    assert table.get(300) == "a:b=1;"
    assert list(sink.ignored) == [id_key(300)]
    deliver_list(sink, {id_key(300): b"garbage", "foreign": b"x"}, 6)
    assert table.get(300) == "a:b=1;"
    assert set(sink.ignored) == {id_key(300), "foreign"}
    sink.put(id_key(300), b"a:b=3;")
    assert table.get(300) == "a:b=3;"
    sink.deleted("foreign")
    assert sink.ignored == {}


# --- generated code


def test_generated_module_is_what_the_proto_file_gives(tmp_path: Path) -> None:
    require(importlib.util.find_spec("grpc_tools"), "needs grpcio-tools")
    out = tmp_path / "descriptor"
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I.",
        f"--descriptor_set_out={out}",
        "kvstore/etcd.proto",
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, env={**os.environ, "PYTHONPATH": ""})
    made = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    here = descriptor_pb2.FileDescriptorProto()
    etcd_pb2.DESCRIPTOR.CopyToProto(here)
    for each in (made, here):
        for message in each.message_type:
            for field in message.field:
                field.ClearField("json_name")  # protoc writes it, the runtime does not
    assert made == here


# --- batches of writes of both kinds


def test_delete_after_put_of_the_same_key_is_a_delete() -> None:
    assert list(write_batches([put_op("a", "1"), delete_op("a")])) == [[delete_op("a")]]


# --- many hosts at once


def test_hosts_that_rewrite_much_at_once_take_turns_and_one_key_never_waits() -> None:
    assert spread_s(1, 10_000) == spread_s(MANY_KEYS - 1, 10_000) == 0
    assert spread_s(100, 3) < 0.01, "a small cluster has no storm"
    assert spread_s(100, 200) == 8.0
    assert spread_s(128, 10_000) == LONGEST_SPREAD_S
