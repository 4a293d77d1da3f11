# SPDX-License-Identifier: Apache-2.0
"""The maintenance beside real etcd members: snapshots, one defragmentation at a time, a full etcd."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.errors import NoSpace
from kvstore.maintenance import ELECTION, STATE_FILE, Maintainer, Schedule, Tried, read_state
from kvstore.members import Cluster, Members
from kvstore.schema import maintenance_key, parse_maintenance
from kvstore.snapshots import SnapshotFailed, Snapshots, has_its_digest
from kvstore.turn import Turn
from kvstore.upkeep import MIB, ROOM, Rules
from tests.support.etcd import EtcdCluster, EtcdServer
from tests.support.eventually import eventually

QUOTA = 32 * MIB
# Eager: always worth it, and again after half a second.
EAGER = Rules(quota=QUOTA, minimum=1, share=0.0, every=0.5)
NEVER = Rules(quota=QUOTA, minimum=1 << 40)
QUICK = Schedule(look=0.1, snapshot=3600.0)
MEGABYTE = os.urandom(1_000_000)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EtcdCluster]:
    """Three members with room for 32 MiB."""
    made = EtcdCluster(tmp_path / "etcd", options=[f"--quota-backend-bytes={QUOTA}"])
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
async def client(cluster: EtcdCluster) -> AsyncIterator[Client]:
    client = Client(cluster.config, timeout=5)
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def maintained(
    config: EtcdConfig, directory: Path, names: Sequence[str], rules: Rules, schedule: Schedule = QUICK
) -> AsyncIterator[list[Maintainer]]:
    """Run a maintenance for each of these members, each with its own connections, as on three machines."""
    clients = [Client(config, timeout=5) for _ in names]
    made = [
        Maintainer(client, name, directory / name, rules=rules, schedule=schedule, ttl=60)
        for client, name in zip(clients, names, strict=True)
    ]
    tasks = [asyncio.create_task(each.run()) for each in made]
    try:
        yield made
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in clients:
            await each.close()


async def fill(client: Client, name: str = "test/big") -> None:
    """Write a key until etcd is full of its history; with {} in the name one key a write."""
    with contextlib.suppress(NoSpace):
        for number in range(200):
            await client.put(name.format(number), MEGABYTE)
        raise AssertionError("etcd took 200 MB")


async def make_garbage(client: Client) -> None:
    """Write and compact, so that there are free pages; etcd counts them at its next write."""
    for _ in range(5):
        revision = await client.put("test/load", os.urandom(200_000))
    await Members(client).compact(revision)
    await client.put("test/load", "")


async def load(client: Client) -> None:
    """Write for ever, and compact all but the youngest history, which elections need for their watches."""
    while True:
        revision = await client.put("test/load", os.urandom(200_000))
        if revision % 10 == 0 and revision > 40:
            await Members(client).compact(revision - 30)


def all_done(members: Sequence[Maintainer]) -> Callable[[], bool]:
    return lambda: all(each.state.record.defragmentation for each in members)


def check_no_overlap(cluster: EtcdCluster) -> int:
    """Fail if a defragmentation began before another ended; return how many there were."""
    found = cluster.defragmentations()
    for (_, end, first), (begin, _, second) in itertools.pairwise(found):
        assert end <= begin, f"{second} began at {begin}, {first} ended at {end}"
    return len(found)


# --- snapshots


async def test_snapshot_can_be_restored(etcd: EtcdServer, tmp_path: Path) -> None:
    for number in range(20):
        etcd.ctl("put", f"test/{number}", "x" * number)
    async with maintained(etcd.config, tmp_path / "kept", ["m0"], NEVER) as (maintainer,):
        await eventually(lambda: maintainer.state.record.snapshot is not None, "a snapshot")
    record = maintainer.state.record.snapshot
    assert record is not None
    (path,) = maintainer.snapshots.all()
    assert (record.name, record.keys >= 20, record.size) == (path.name, True, path.stat().st_size)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    restored = EtcdServer(tmp_path / "restored")
    restored.restore(path)
    try:
        restored.start()
        assert restored.ctl("get", "test/7").split() == ["test/7", "xxxxxxx"]
        assert len(restored.ctl("get", "--prefix", "--keys-only", "test/").split()) == 20
    finally:
        restored.stop()


async def test_newest_are_kept_and_what_is_not_ours(etcd: EtcdServer, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, "m0", keep=2)
    for name in ("m0-20250101T000000Z", "m0-20250102T000000Z", "m0-20250103T000000Z", "mine"):
        (tmp_path / f"{name}.snapshot").touch()
    (tmp_path / ".m0-20250104T000000Z.snapshot.new.part").touch()
    client = Client(etcd.config)
    try:
        (member,) = (await Members(client).look()).members
        record = await kept.take(client.config, member)
        whole = kept.all()[-1]
        assert {path.name for path in tmp_path.glob("*snapshot*")} == {
            "m0-20250103T000000Z.snapshot", "mine.snapshot", record.name,
        }  # fmt: skip
        assert has_its_digest(whole)
        whole.write_bytes(whole.read_bytes()[:-100])
        assert not has_its_digest(whole)
        etcd.stop()
        with pytest.raises(SnapshotFailed, match="etcd sent nothing for"):
            await Snapshots(tmp_path, "m0", keep=2, stall=0.5).take(client.config, member)
        assert len(kept.all()) == 2, "a failure removes nothing"
        assert not list(tmp_path.glob(".*"))
    finally:
        await client.close()


async def test_directory_without_room_is_named(etcd: EtcdServer, tmp_path: Path) -> None:
    client = Client(etcd.config)
    try:
        (member,) = (await Members(client).look()).members
        huge = type(member)(**{**{f: getattr(member, f) for f in member.__struct_fields__}, "size": 1 << 60})
        with pytest.raises(SnapshotFailed, match=f"no room for a snapshot in {tmp_path}"):
            await Snapshots(tmp_path, "m0", 1).take(client.config, huge)
    finally:
        await client.close()


# --- defragmentation


async def test_never_two_members_at_once(cluster: EtcdCluster, client: Client, tmp_path: Path) -> None:
    """Three maintenances that would do it all the time, under load that never fails."""
    under_load = asyncio.create_task(load(client))
    try:
        async with maintained(cluster.config, tmp_path, ["m0", "m1", "m2"], EAGER) as members:
            await eventually(all_done(members), "each was defragmented", deadline=60)
            await eventually(lambda: len(cluster.defragmentations()) > 12, "a dozen of them", deadline=60)
        assert not under_load.done()
    finally:
        under_load.cancel()
        await asyncio.gather(under_load, return_exceptions=True)
    assert check_no_overlap(cluster) > 12
    assert {member for _, _, member in cluster.defragmentations()} == {"m0", "m1", "m2"}


@pytest.mark.parametrize("hangs", [False, True], ids=["down", "hung"])
async def test_no_defragmentation_while_a_member_is_away(
    cluster: EtcdCluster, client: Client, tmp_path: Path, hangs: bool
) -> None:
    await make_garbage(client)
    away = cluster.members[2]
    away.pause() if hangs else away.stop()
    async with maintained(cluster.config, tmp_path, ["m0", "m1"], EAGER) as members:
        await eventually(
            lambda: all("unless all serve: m2: " in each.state.record.doing for each in members), "they wait"
        )
        await eventually(lambda: any(each.turn.held for each in members), "one has the turn")
        seen = members[0].state.record.seen
        await eventually(lambda: members[0].state.record.seen > seen, "further rounds")
        assert cluster.defragmentations() == []
        away.resume() if hangs else away.start()
        await eventually(all_done(members), "both were defragmented", deadline=60)
    assert check_no_overlap(cluster) >= 2


async def test_too_long_is_given_up_and_told(cluster: EtcdCluster, client: Client, tmp_path: Path) -> None:
    rules = Rules(quota=QUOTA, minimum=1, share=0.0, every=3600.0)
    hasty = Schedule(look=0.1, defragmentation=0.0001)
    await make_garbage(client)
    async with maintained(cluster.config, tmp_path, ["m1"], rules, hasty) as (maintainer,):
        await eventually(lambda: maintainer.state.record.trouble != "", "the failure is told", deadline=60)
        record = maintainer.state.record
        assert record.defragmentation is not None
        assert "the last defragmentation failed: defragment m1" in record.trouble

        async def stands_in_etcd() -> bool:
            stored = await client.get(maintenance_key("m1"))
            return (
                stored is not None and parse_maintenance(stored.key, stored.value).trouble == record.trouble
            )

        await eventually(stands_in_etcd, "the failure stands in etcd")
        await eventually(lambda: maintainer.state.record.seen > record.seen, "further rounds")
        assert maintainer.state.record.defragmentation == record.defragmentation, "not tried again today"


# --- a full etcd


async def test_full_etcd_is_compacted_defragmented_and_only_then_disarmed(
    cluster: EtcdCluster, client: Client, tmp_path: Path
) -> None:
    async with maintained(cluster.config, tmp_path, ["m0", "m1", "m2"], NEVER) as members:
        await eventually(lambda: any(each.turn.held for each in members), "one has the turn")
        await eventually(
            lambda: all(kept(each) == each.turn.lease != 0 for each in members), "leases are kept"
        )
        await eventually(lambda: waiting_is(client, 2), "two wait", deadline=60)
    await fill(client)
    assert cluster.defragmentations() == []
    # They come back into an etcd that grants no lease, with the ones that they had.
    async with maintained(cluster.config, tmp_path, ["m0", "m1", "m2"], NEVER) as members:
        await eventually(lambda: "NOSPACE on" in members[0].state.record.trouble, "it is told")
        seen = await until_disarmed(client)
        assert max(each.size for each in seen.members) <= ROOM * QUOTA
        await client.put("test/after", "x")
        await eventually(lambda: not any(each.state.record.trouble for each in members), "all is well")
        await eventually(lambda: any(each.turn.held for each in members), "one has the turn")
    # One that is not enough (what is in use was told late) is followed by a compaction, and another.
    assert 3 <= check_no_overlap(cluster) <= 6
    assert {member for _, _, member in cluster.defragmentations()} == {"m0", "m1", "m2"}


async def test_what_was_too_full_before_a_compaction_is_defragmented_after_it(
    cluster: EtcdCluster, client: Client, tmp_path: Path
) -> None:
    """Nobody writes into an etcd that is full, so its revision is the one of the last attempt for ever."""
    names = ["m0", "m1", "m2"]
    async with maintained(cluster.config, tmp_path, names, NEVER) as members:
        await eventually(
            lambda: all(kept(each) == each.turn.lease != 0 for each in members), "leases are kept"
        )
        await eventually(lambda: waiting_is(client, 2), "two wait", deadline=60)
    await fill(client)
    for name in names:
        state = read_state(tmp_path / name)
        assert state is not None
        attempts = dict.fromkeys(names, (Tried(time.time(), blind=True),))
        tried = msgspec.structs.replace(state, attempts=attempts)
        (tmp_path / name / STATE_FILE).write_bytes(msgspec.json.encode(tried))
    async with maintained(cluster.config, tmp_path, names, NEVER) as members:
        await eventually(lambda: "NOSPACE on" in members[0].state.record.trouble, "it is told")
        await until_disarmed(client)
        await client.put("test/after", "x")
    check_no_overlap(cluster)
    assert {member for _, _, member in cluster.defragmentations()} == set(names)


async def test_an_etcd_whose_quota_is_smaller_than_told_is_noticed_and_served(
    cluster: EtcdCluster, client: Client, tmp_path: Path
) -> None:
    """Its files are small by our rules, so the alarm is disarmed; with the next write it stands again."""
    names, told = ["m0", "m1", "m2"], replace(NEVER, quota=10 * QUOTA)

    async with maintained(cluster.config, tmp_path, names, told) as members:
        await eventually(lambda: waiting_is(client, 2), "two wait", deadline=60)
        await fill(client)
        async with asyncio.timeout(60):
            while not any("smaller than --quota here" in each.state.record.trouble for each in members):
                with contextlib.suppress(NoSpace):
                    await client.put("test/big", MEGABYTE)
                await asyncio.sleep(0.1)

        async def five_more_are_written() -> bool:
            with contextlib.suppress(NoSpace):
                for _ in range(5):
                    await client.put("test/big", MEGABYTE)
                return True
            return False

        await eventually(five_more_are_written, "there is room", deadline=60)
    check_no_overlap(cluster)
    assert cluster.defragmentations() != []


async def test_a_defragmentation_that_fails_is_not_tried_again_at_once(
    cluster: EtcdCluster, client: Client, tmp_path: Path
) -> None:
    names, hasty = ["m0", "m1", "m2"], Schedule(look=0.1, snapshot=3600.0, defragmentation=0.0001)
    async with maintained(cluster.config, tmp_path, names, NEVER) as members:
        await eventually(
            lambda: all(kept(each) == each.turn.lease != 0 for each in members), "leases are kept"
        )
        await eventually(lambda: waiting_is(client, 2), "two wait", deadline=60)
    await fill(client)
    async with maintained(cluster.config, tmp_path, names, NEVER, hasty) as members:
        await eventually(
            lambda: {name for each in members for name in each.state.attempts} == set(names),
            "each has failed",
            deadline=60,
        )
        # Who lags behind when its turn comes is not full yet: the last one tries it instead.
        own = [each for each in members if each.state.record.defragmentation]
        assert own != []
        await eventually(
            lambda: all("defragmentation failed: defragment m" in each.state.record.trouble for each in own),
            "it is told",
        )
        seen = members[0].state.record.seen
        await eventually(lambda: members[0].state.record.seen > seen, "further rounds")
        assert all(len(tried) <= 2 for each in members for tried in each.state.attempts.values())


def kept(maintainer: Maintainer) -> int:
    state = read_state(maintainer._directory)
    return state.lease if state else 0


async def until_disarmed(client: Client) -> Cluster:
    """Return the first look without an alarm; until then there must be one of NOSPACE."""
    async with asyncio.timeout(60):
        while True:
            seen = await Members(client).look()
            if not seen.alarms and not seen.error:
                return seen
            await asyncio.sleep(0.02)


async def test_who_had_no_lease_before_can_do_nothing_and_says_so(
    cluster: EtcdCluster, client: Client, tmp_path: Path
) -> None:
    await fill(client)
    async with maintained(cluster.config, tmp_path, ["m0"], NEVER) as (maintainer,):
        refused = "no turn can be had, etcd grants no lease: grant '': etcd at "
        await eventually(lambda: refused in maintainer.state.record.trouble, "it says so")
        assert "NOSPACE" in maintainer.state.record.trouble
    assert cluster.defragmentations() == []


async def test_full_of_keys_stays_alarmed_until_some_are_deleted(
    cluster: EtcdCluster, client: Client, tmp_path: Path
) -> None:
    # Its keys are 25 MB; with less than 20 there would be room enough.
    rules = replace(NEVER, quota=25 * MIB, again=2.0)
    async with maintained(cluster.config, tmp_path, ["m0", "m1", "m2"], rules) as members:
        await eventually(lambda: any(each.turn.held for each in members), "one has the turn")
        await fill(client, "test/{}")
        await eventually(
            lambda: any("the keys alone fill it" in each.state.record.trouble for each in members),
            "a person is asked for",
            deadline=60,
        )
        assert {alarm.kind for alarm in (await Members(client).look()).alarms} == {"NOSPACE"}
        await client.delete_prefix("test/")
        await until_disarmed(client)
        await client.put("test/after", "x")
    check_no_overlap(cluster)


# --- turns


async def test_turns_go_round_and_survive_a_restart(cluster: EtcdCluster, client: Client) -> None:
    turns = [Turn(client, "test", name, ttl=60) for name in ("a", "b", "c")]
    tasks = [asyncio.create_task(turn.run()) for turn in turns]

    def holders() -> list[str]:
        return [name for name, turn in zip("abc", turns, strict=True) if turn.held]

    try:
        await eventually(lambda: len(holders()) == 1, "one has the turn")
        await eventually(lambda: all(turn.lease for turn in turns), "all have a lease")
        seen: list[str] = []
        for _ in range(4):
            await eventually(lambda: len(holders()) == 1, "one has the turn")
            (holder,) = holders()
            if len(set(seen)) < 3 and len(seen) < 3:
                await eventually(lambda: waiting_is(client, 2, "test"), "two wait")
            seen.append(holder)
            await turns["abc".index(holder)].pass_on()
            assert holder not in holders()
        assert sorted(seen[:3]) == ["a", "b", "c"]
        assert seen[3] == seen[0]
        await eventually(lambda: len(holders()) == 1, "one has the turn")
        (holder,) = holders()
        index = "abc".index(holder)
        tasks[index].cancel()
        await asyncio.gather(tasks[index], return_exceptions=True)
        turns[index] = Turn(client, "test", holder, ttl=60, lease=turns[index].lease)
        tasks[index] = asyncio.create_task(turns[index].run())
        await eventually(lambda: holders() == [holder], "the same has it again, and no other")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def waiting_is(client: Client, number: int, name: str = ELECTION) -> bool:
    return await Turn(client, name, "x").waiting() == number


async def test_member_with_rights_by_certificate(tmp_path: Path) -> None:
    """With users in etcd a member's own user needs the role root."""
    server = EtcdServer(tmp_path / "etcd", tls=True)
    try:
        server.start()
        server.enable_auth("agent", "cilium/")
        async with maintained(server.config, tmp_path / "kept", ["m0"], EAGER) as (maintainer,):
            await eventually(lambda: maintainer.state.record.snapshot is not None, "a snapshot")
            await eventually(all_done([maintainer]), "a defragmentation", deadline=60)
            assert maintainer.state.record.trouble == ""
    finally:
        server.stop()
