# SPDX-License-Identifier: Apache-2.0
"""What is done for an etcd member, decided from what was seen and remembered."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.maintenance import STATE_FILE, Maintainer, State, Tried, health
from kvstore.members import Alarm, Cluster, Member
from kvstore.schema import DefragmentationRecord, MaintenanceRecord
from kvstore.snapshots import Snapshots, environment, has_its_digest, taken_at
from kvstore.upkeep import (
    MIB,
    Action,
    Attempt,
    Memory,
    Rules,
    Step,
    decide,
    is_worth,
    size_text,
    with_etcds_quota,
)

QUOTA = 1000 * MIB
RULES = Rules(quota=QUOTA, minimum=100 * MIB, share=0.5, every=86400)
FULL = (Alarm("NOSPACE", "b", 2),)
AT = datetime.datetime(2026, 11, 20, 12, tzinfo=datetime.UTC)


def cluster(*changed: Member, alarms: tuple[Alarm, ...] = (), error: str = "") -> Cluster:
    """Return members a (which leads), b and c, small and full of what is used, with these changes."""
    members = {
        name: Member(name, number, leader=name == "a", revision=50, size=20 * MIB, used=20 * MIB)
        for number, name in enumerate("abc", 1)
    }
    return Cluster(tuple({**members, **{each.name: each for each in changed}}.values()), alarms, error)


def member(name: str, size: int, used: int, *, error: str = "", revision: int = 50) -> Member:
    return Member(
        name,
        "abc".index(name) + 1,
        error=error,
        leader=name == "a",
        revision=revision,
        size=size * MIB,
        used=used * MIB,
    )


def step(seen: Cluster, own: str = "b", memory: Memory | None = None, *, waiting: int = 2) -> Step:
    return decide(seen, own, RULES, memory or Memory(), waiting)


def test_nothing_to_do() -> None:
    assert step(cluster()).action is Action.NOTHING
    assert step(cluster()).trouble == ""


@pytest.mark.parametrize(
    ("size", "used", "worth"),
    [
        (400, 150, True),  # more than half is free
        (400, 250, False),  # less
        (150, 60, False),  # too little to be worth seconds of silence
        (760, 650, True),  # near the quota each bit counts
        (760, 670, False),
    ],
)
def test_when_it_is_worth_it(size: int, used: int, worth: bool) -> None:
    assert is_worth(member("b", size, used), RULES) is worth
    expected = Action.DEFRAGMENT if worth else Action.NOTHING
    assert step(cluster(member("b", size, used))).action is expected


def test_once_a_day() -> None:
    seen = cluster(member("b", 400, 100))
    assert step(seen, memory=Memory(since=86399)).action is Action.NOTHING
    assert step(seen, memory=Memory(since=86401)).action is Action.DEFRAGMENT


def test_not_while_a_member_is_away() -> None:
    waits = step(cluster(member("b", 400, 100), member("c", 0, 0, error="gone")))
    assert waits.action is Action.WAIT
    assert "c: gone" in waits.reason
    assert waits.trouble == "", "that c is away is not b's trouble"


def test_who_leads_comes_last_and_does_not_wait_for_ever() -> None:
    seen = cluster(member("a", 400, 100), member("b", 400, 100))
    assert step(seen, "b").action is Action.DEFRAGMENT
    assert (step(seen, "a").action, step(seen, "a").courteous) == (Action.PASS, True)
    assert step(seen, "a", Memory(passed=2)).action is Action.PASS
    assert step(seen, "a", Memory(passed=3)).action is Action.DEFRAGMENT
    assert step(cluster(member("a", 400, 100)), "a").action is Action.DEFRAGMENT


def test_who_is_alone_has_nobody_to_wait_for() -> None:
    alone = Cluster((member("a", 400, 100),))
    assert step(alone, "a", waiting=0).action is Action.DEFRAGMENT


def test_turn_is_passed_to_who_needs_it() -> None:
    passed = step(cluster(member("c", 400, 100)))
    assert (passed.action, passed.courteous) == (Action.PASS, False)


def test_stranger_and_silence_are_troubles() -> None:
    assert "no member 'x', its members are a, b, c" in step(cluster(), "x").trouble
    assert step(cluster(error="nobody answers")).trouble == "nobody answers"
    assert step(cluster(error="nobody answers")).action is Action.WAIT


def test_corrupt_data_is_for_a_person() -> None:
    seen = cluster(member("b", 400, 100), alarms=(Alarm("CORRUPT", "c", 3), *FULL))
    assert step(seen).action is Action.WAIT
    assert "CORRUPT on c" in step(seen).trouble


# --- etcd is full


def test_full_of_free_pages_is_defragmented_whatever_was_done_today() -> None:
    seen = cluster(*(member(name, 1000, 500) for name in "abc"), alarms=FULL)
    for own in "abc":
        now = step(seen, own, Memory(since=1))
        assert now.action is Action.DEFRAGMENT
        assert now.target is seen.member(own)
        assert "NOSPACE on b" in now.trouble


def test_full_of_history_is_compacted_first_and_once() -> None:
    seen = cluster(*(member(name, 1000, 900) for name in "abc"), alarms=FULL)
    first = step(seen)
    assert (first.action, first.revision) == (Action.COMPACT, 50)
    assert step(seen, memory=Memory(compacted=50, compaction=60)).action is Action.DEFRAGMENT


def tried(*attempts: Attempt, compaction: float = float("inf"), compacted: int = 50) -> Memory:
    """Return what is remembered of b, and of a compaction of the revision that there is."""
    known = compacted if compaction < float("inf") else 0
    return Memory(attempts={"b": attempts}, compacted=known, compaction=compaction)


@pytest.mark.parametrize(
    ("used", "memory", "expected"),
    [
        # All in use: it may be history, and what is in use may be told late.
        (830, tried(), Action.COMPACT),
        (830, tried(compaction=60), Action.DEFRAGMENT),
        (830, tried(Attempt(30, blind=True), compaction=60), Action.WAIT),
        (830, tried(Attempt(90, blind=True), compaction=60), Action.DEFRAGMENT),
        (830, tried(Attempt(90, blind=True), Attempt(30, blind=True), compaction=60), Action.WAIT),
        (830, tried(Attempt(90, blind=True), Attempt(70, blind=True), compaction=60), Action.WAIT),
        # Free pages promise room.
        (700, tried(), Action.DEFRAGMENT),
        (700, tried(Attempt(30, blind=True), compaction=60), Action.DEFRAGMENT),
        (700, tried(Attempt(30), compaction=60), Action.WAIT),
        (700, tried(Attempt(90), compaction=60), Action.DEFRAGMENT),
        (700, tried(Attempt(301), compaction=900), Action.DEFRAGMENT),
        (700, tried(Attempt(30)), Action.COMPACT),
        # It failed: no room on the disk for the copy, say.
        (700, tried(Attempt(3500, failed=True), compaction=60), Action.WAIT),
        (700, tried(Attempt(3700, failed=True), compaction=60), Action.DEFRAGMENT),
        # Next to nothing would be gained.
        (790, tried(Attempt(30, blind=True)), Action.COMPACT),
        (790, tried(Attempt(30, blind=True), compaction=20), Action.DEFRAGMENT),
        (790, tried(Attempt(30, blind=True), Attempt(10, blind=True), compaction=20), Action.WAIT),
    ],
)
def test_full_file_is_written_anew_where_that_may_help(used: int, memory: Memory, expected: Action) -> None:
    assert step(cluster(member("b", 830, used), alarms=FULL), memory=memory).action is expected


def test_full_of_keys_needs_a_person_until_some_are_deleted() -> None:
    seen = cluster(*(member(name, 1000, 990) for name in "abc"), alarms=FULL)
    stuck = step(seen, memory=tried(Attempt(60, blind=True), compaction=120))
    assert stuck.action is Action.WAIT
    assert "the keys alone fill it" in stuck.trouble
    deleted = cluster(*(member(name, 1000, 990, revision=51) for name in "abc"), alarms=FULL)
    waits = step(deleted, memory=tried(Attempt(60, blind=True), compaction=120))
    assert waits.action is Action.WAIT
    assert "what was deleted is freed in 180 s" in waits.trouble
    again = step(deleted, memory=tried(Attempt(60, blind=True), compaction=301))
    assert (again.action, again.revision) == (Action.COMPACT, 51)


@pytest.mark.parametrize("every", [60, 600, 3600])
def test_deletions_that_do_not_suffice_silence_no_member_again_and_again(every: int) -> None:
    """A day in which a key is deleted every few minutes, and the others still fill etcd."""
    done: list[Action] = []
    attempts: list[float] = []
    compacted, compacted_at = 0, -1e9
    for now in range(0, 86_400, 60):
        seen = cluster(*(member(name, 950, 900, revision=50 + now // every) for name in "abc"), alarms=FULL)
        memory = Memory(
            attempts={"b": [Attempt(now - at, blind=True) for at in attempts]},
            compacted=compacted,
            compaction=now - compacted_at,
        )
        taken = step(seen, memory=memory)
        done.append(taken.action)
        if taken.action is Action.COMPACT:
            compacted, compacted_at = taken.revision, now
        elif taken.action is Action.DEFRAGMENT:
            attempts.append(now)
        else:
            assert "the keys alone fill it" in taken.trouble
    assert done.count(Action.DEFRAGMENT) == 2
    assert done.count(Action.COMPACT) == 86_400 // max(every, 300)


def test_restored_store_is_not_taken_for_the_one_that_was_compacted() -> None:
    seen = cluster(*(member(name, 1000, 950, revision=20) for name in "abc"), alarms=FULL)
    assert step(seen, memory=tried(Attempt(9000), compaction=9000)).action is Action.COMPACT


def test_who_is_stuck_lets_those_go_that_can_be_helped() -> None:
    seen = cluster(member("b", 900, 100), member("c", 900, 100), alarms=FULL)
    failed = tried(Attempt(60, failed=True), compaction=120)
    passed = step(seen, memory=failed)
    assert passed.action is Action.PASS
    assert "waits for c" in passed.trouble
    alone = step(seen, memory=failed, waiting=0)
    assert alone.action is Action.DEFRAGMENT
    assert alone.target is seen.member("c")
    stuck = step(cluster(member("b", 900, 100), alarms=FULL), memory=failed)
    assert stuck.action is Action.WAIT
    assert "the defragmentation of b failed" in stuck.trouble


def test_an_attempt_that_failed_has_not_shown_that_the_keys_fill_etcd() -> None:
    """What is in use is told late: by it nobody has a promise of room, and the others were not tried."""
    seen = cluster(*(member(name, 950, 900) for name in "abc"), alarms=FULL)
    passed = step(seen, memory=tried(Attempt(60, blind=True, failed=True), compaction=120))
    assert passed.action is Action.PASS
    assert "waits for a, c" in passed.trouble
    shown = step(seen, memory=tried(Attempt(60, blind=True), compaction=120))
    assert shown.action is Action.WAIT
    assert "the keys alone fill it" in shown.trouble


def test_etcd_that_calls_small_files_full_has_a_smaller_quota() -> None:
    seen = cluster(member("b", 250, 100), alarms=FULL)
    assert step(seen).action is Action.DISARM
    rules = with_etcds_quota(RULES, seen)
    assert rules.quota == 250 * MIB
    assert decide(seen, "b", rules, Memory(), 2).action is Action.DEFRAGMENT


def test_alarm_is_disarmed_only_when_all_have_room() -> None:
    one_left = cluster(member("c", 900, 100), alarms=FULL)
    assert step(one_left).action is Action.PASS
    assert "waits for c" in step(one_left).trouble
    helps = step(one_left, memory=tried(Attempt(60)), waiting=0)
    assert helps.action is Action.DEFRAGMENT
    assert helps.target is one_left.member("c"), "whose maintenance does not wait for a turn"
    assert step(cluster(alarms=FULL)).action is Action.DISARM
    away = cluster(member("c", 0, 0, error="gone"), alarms=FULL)
    assert step(away).action is Action.WAIT
    assert "c: gone" in step(away).trouble


def test_sizes_for_people() -> None:
    assert [size_text(each) for each in (0, 512, 20 * 1024, 1010 * MIB, 3 << 29)] == [
        "0 B", "512 B", "20 KiB", "1010 MiB", "1.5 GiB",
    ]  # fmt: skip


# --- snapshots and health


def test_only_own_snapshots_count(tmp_path: Path) -> None:
    names = ["b-20261120T102154Z", "b-20261121T102154Z", "b-2-20261122T102154Z", "b-yesterday", "c-x"]
    for name in names:
        (tmp_path / f"{name}.snapshot").touch()
    found = Snapshots(tmp_path, "b", 3)
    assert [path.stem for path in found.all()] == names[:2]
    assert found.newest() == taken_at(tmp_path / f"{names[1]}.snapshot")
    assert Snapshots(tmp_path / "none", "b", 3).newest() is None


@pytest.mark.parametrize("size", [0, 1, 512, (1 << 20) + 1])
def test_cut_off_or_changed_file_is_found(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "s", bytes(size)
    whole = content + hashlib.sha256(content).digest()
    path.write_bytes(whole)
    assert has_its_digest(path)
    for damaged in (whole[:-1], whole + b"\0", b"\1" + whole[1:], b"", whole[:20]):
        path.write_bytes(damaged)
        assert not has_its_digest(path)


def test_etcdctl_gets_our_settings_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCDCTL_ENDPOINTS", "elsewhere")
    config = EtcdConfig(("https://10.0.0.1:2379",), Path("/ca"), Path("/crt"), Path("/key"))
    settings = environment(config, "10.0.0.1:2379")
    assert settings.pop("PATH")
    assert settings == {
        "ETCDCTL_API": "3",
        "ETCDCTL_ENDPOINTS": "https://10.0.0.1:2379",
        "ETCDCTL_CACERT": "/ca",
        "ETCDCTL_CERT": "/crt",
        "ETCDCTL_KEY": "/key",
    }


def test_health_is_the_last_round_and_its_age(tmp_path: Path) -> None:
    def keep(state: State) -> None:
        (tmp_path / "maintenance.json").write_bytes(msgspec.json.encode(state))

    def at(seconds: float) -> tuple[bool, str]:
        return health(tmp_path, AT + datetime.timedelta(seconds=seconds))

    assert at(0)[0] is False
    (tmp_path / "maintenance.json").write_text("garbage")
    assert at(0)[0] is False
    fine = State(MaintenanceRecord("b", AT, doing="nothing is due"))
    keep(fine)
    assert at(60) == (True, "nothing is due")
    assert at(301) == (False, "nothing heard for 301 s; last: nothing is due")
    keep(msgspec.structs.replace(fine, busy=True))
    assert at(301)[0] is True
    keep(State(MaintenanceRecord("b", AT, trouble="NOSPACE")))
    assert at(0) == (False, "NOSPACE")


# --- clocks that were wrong, members that are gone


@pytest.fixture
async def maintainer(tmp_path: Path) -> AsyncIterator[Maintainer]:
    """One that a clock from 2036 has left its traces with; it asks nobody here."""
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "m0-20360101T000000Z.snapshot").touch()
    done = DefragmentationRecord(datetime.datetime(2036, 1, 1, tzinfo=datetime.UTC), 1.0, 2, 1)
    state = State(MaintenanceRecord("m0", AT, defragmentation=done), attempts={"m0": (Tried(2.1e9),)})
    (tmp_path / STATE_FILE).write_bytes(msgspec.json.encode(state))
    client = Client(EtcdConfig(("http://127.0.0.1:1",)))
    yield Maintainer(client, "m0", tmp_path)
    await client.close()


async def test_a_clock_that_was_ahead_puts_off_nothing(maintainer: Maintainer) -> None:
    assert maintainer._snapshot_due == 0.0
    memory = maintainer._memory()
    assert memory.since == float("inf")
    assert [attempt.ago for attempt in memory.attempts["m0"]] == [float("inf")]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_snapshot_just_taken_is_kept_whatever_its_name(tmp_path: Path, keep: int) -> None:
    names = [f"m0-{year}0101T000000Z.snapshot" for year in (2036, 2035, 2026, 2025)]
    for name in names:
        (tmp_path / name).touch()
    Snapshots(tmp_path, "m0", keep)._remove_beyond(tmp_path / names[2])
    assert {path.name for path in tmp_path.iterdir()} == {names[2], *names[: keep - 1]}


async def test_a_member_that_was_removed_while_it_was_defragmented_is_not_waited_for(
    maintainer: Maintainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([cluster(error="nobody answers"), cluster(member("b", 0, 0, error="gone")), cluster()])

    async def look() -> Cluster:
        return next(looks)

    monkeypatch.setattr(maintainer._members, "look", look)
    gone = msgspec.structs.replace(member("b", 400, 100), name="removed")
    found = await maintainer._until_it_serves(gone)
    assert (found.name, found.error) == ("removed", "etcd has it no longer as a member")
    assert len(list(looks)) == 1, "a look that says who the members are is enough, and no other"
