# SPDX-License-Identifier: Apache-2.0
"""The maintenance beside one etcd member: snapshots of it, and its defragmentation when that is worth it.

    every minute   look at all members ──▶ decide (kvstore.upkeep) ──▶ one step, if it is our turn
                   a snapshot is due   ──▶ take it (kvstore.snapshots)
                   tell                ──▶ log, a state file, holdfast/maintenance/v1/<member>

One round after the other, so that a member is never defragmented while its snapshot is taken.  Whoever has
the turn (`kvstore.turn`) defragments its own member, when all serve, and keeps the turn until the member
serves again.  (Another's only in an etcd that is full, where nobody else waits for a turn.)  What takes too
long is given up: etcd can not stop it, so it is watched, told of, and not tried again for a day.

The state file is for the next life (lease, last attempt) and for the health check of the container.

Called by: cli (`holdfast kvstore maintain`).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from loguru import logger

from core.backoff import Backoff, jittered
from core.files import write_atomic
from core.waiting import waiting
from kvstore.client import Client
from kvstore.errors import KvstoreError
from kvstore.members import Cluster, Member, Members
from kvstore.schema import (
    DefragmentationRecord,
    MaintenanceRecord,
    encode_maintenance,
    maintenance_key,
)
from kvstore.snapshots import Snapshots
from kvstore.turn import TTL_S, Turn
from kvstore.upkeep import (
    DISARMED,
    REMEMBERED_S,
    Action,
    Attempt,
    Memory,
    Rules,
    Step,
    decide,
    full_members,
    is_blind,
    size_text,
    with_etcds_quota,
)

ELECTION = "etcd-maintenance"
STATE_FILE = "maintenance.json"
SNAPSHOTS = "snapshots"
# Seconds.  A failed snapshot is tried again after so long.
RETRY_S = 600.0
# Between a compaction and the defragmentation that it is for.
SETTLE_S = 5.0
# What has not changed is told to etcd again after so long.
TELL_S = 600.0
# The health check's patience: a round that does nothing long, and one that does.
IDLE_LIMIT_S, BUSY_LIMIT_S = 300.0, 3600.0


@dataclass(frozen=True)
class Schedule:
    """Seconds; and how many snapshots are kept."""

    look: float = 60.0
    snapshot: float = 6 * 3600.0
    keep: int = 8
    defragmentation: float = 1200.0  # 8 GiB at 7 MiB/s; longer, and it is given up


class Tried(msgspec.Struct, frozen=True):
    """A defragmentation; `at` is its end, unix seconds (see `kvstore.upkeep.Attempt`)."""

    at: float
    blind: bool = False
    failed: bool = False


class State(msgspec.Struct, frozen=True):
    """What survives a restart."""

    record: MaintenanceRecord
    lease: int = 0
    attempts: dict[str, tuple[Tried, ...]] = {}  # of the last day, by member
    busy: bool = False


class Maintainer:
    """See the module's text.  Owner of all state: the task in `run`."""

    def __init__(
        self,
        client: Client,
        member: str,
        directory: Path,
        *,
        rules: Rules | None = None,
        schedule: Schedule | None = None,
        ttl: int = TTL_S,
    ) -> None:
        self.member = member
        self.rules = _from_now(rules or Rules())
        self.schedule = schedule or Schedule()
        self.snapshots = Snapshots(directory / SNAPSHOTS, member, self.schedule.keep)
        self.state = read_state(directory) or State(MaintenanceRecord(member, now()))
        self.turn = Turn(client, ELECTION, member, ttl=ttl, lease=self.state.lease)
        self._client = client
        self._directory = directory
        self._members = Members(client)
        self._compacted, self._compacted_at = 0, 0.0
        self._disarmed = 0  # so often in a row, without a file that was full
        self._quota_told = self.rules.quota
        self._passed = 0
        self._snapshot_error = ""
        self._snapshot_due = self._first_due()
        self._told: tuple[object, ...] = ()
        self._told_at = 0.0

    async def run(self) -> None:
        """Maintain until cancelled; what dies ends this, and the container's restart begins it anew."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        logger.info("maintenance of the etcd member {} in {}", self.member, self._directory)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.turn.run(), name="turn")
            tasks.create_task(self._rounds(), name="rounds")

    async def _rounds(self) -> None:
        while True:
            try:
                again = await self.round()
            except KvstoreError as error:
                await self._tell("the round was broken off", str(error))
                again = False
            if not again:
                await asyncio.sleep(jittered(self.schedule.look))

    async def round(self) -> bool:
        """Look, tell, and do at most one thing; returns whether another round should follow at once."""
        cluster = await self._members.look()
        self._mind_etcds_quota(cluster)
        waiting = await self.turn.waiting() if self.turn.held and not cluster.error else 0
        step = decide(cluster, self.member, self.rules, self._memory(), waiting)
        await self._tell(step.reason, self._troubles(step))
        local = cluster.member(self.member)
        if local is not None and not local.error and time.time() >= self._snapshot_due:
            await self._snapshot(local)
            return True
        if step.action is Action.PASS and self.turn.held:
            self._passed += step.courteous
            if waiting:
                await self.turn.pass_on()
        return step.acts and self.turn.held and await self._act(step, cluster)

    # --- steps

    async def _act(self, step: Step, cluster: Cluster) -> bool:
        """Take a step; returns whether another round should follow at once."""
        logger.warning("{}", step.reason)
        if step.action is Action.COMPACT:
            await self._members.compact(step.revision)
            self._compacted, self._compacted_at = step.revision, time.time()
            # The others free what it took in their own time: a file that is written anew before keeps it.
            await asyncio.sleep(jittered(min(SETTLE_S, self.schedule.look)))
            return True
        if step.action is Action.DISARM:
            for alarm in cluster.alarms:
                await self._members.disarm(alarm)
            self._disarmed += 1
            return False  # if it is not true, it comes again with the next write
        return step.target is not None and await self._defragment(step.target)

    def _mind_etcds_quota(self, cluster: Cluster) -> None:
        """Notice an etcd that calls files full which are not by our rules: its own quota is smaller."""
        if full_members(cluster, self.rules):
            self._disarmed = 0
        elif cluster.alarms and self._disarmed >= DISARMED and not cluster.troubles():
            self.rules, self._disarmed = with_etcds_quota(self.rules, cluster), 0

    async def _defragment(self, target: Member) -> bool:
        """Defragment a member and return whether it was done; what fails is not tried again at once."""
        started, error = time.monotonic(), ""
        await self._tell(f"{target.name} is being defragmented", self.state.record.trouble, busy=True)
        with waiting(target.name, "defragmentation"):
            try:
                await self._members.defragment(target, self.schedule.defragmentation)
            except KvstoreError as failed:
                error = str(failed)
                logger.error("given up, and watched until the member serves again: {}", error)
            seconds = time.monotonic() - started
            after = await self._until_it_serves(target)
        error = error or after.error
        self._defragmented(
            target, DefragmentationRecord(now(), round(seconds, 3), target.size, after.size, error)
        )
        done = f"{target.name}: {size_text(target.size)} before, {size_text(after.size)} after"
        logger.info("{}, {:.1f} s{}", done, seconds, f": {error}" if error else "")
        await self._tell(done, self.state.record.trouble)
        return not error

    def _defragmented(self, member: Member, done: DefragmentationRecord) -> None:
        """Remember an attempt on a member as it was before; the record is of our own member alone."""
        record = self.state.record
        if member.name == self.member:
            record = msgspec.structs.replace(record, defragmentation=done)
            self._passed = 0
            self.rules = _from_now(self.rules)
        tried = Tried(time.time(), blind=is_blind(member, self.rules), failed=bool(done.error))
        kept = [each for each in self.state.attempts.get(member.name, ()) if ago(each.at) < REMEMBERED_S]
        attempts = {**self.state.attempts, member.name: (*kept, tried)}
        self.state = msgspec.structs.replace(self.state, record=record, attempts=attempts)

    async def _until_it_serves(self, member: Member) -> Member:
        """Return how a member is once it serves again, however long that takes, or is none any more."""
        backoff = Backoff(base=0.1, cap=10.0)
        while True:
            cluster = await self._members.look()
            found = cluster.member(member.name)
            if found is not None and not found.error:
                return found
            if found is None and not cluster.error:
                return msgspec.structs.replace(member, error="etcd has it no longer as a member")
            await asyncio.sleep(backoff.next())

    async def _snapshot(self, local: Member) -> None:
        await self._tell("a snapshot is being taken", self.state.record.trouble, busy=True)
        try:
            record = await self.snapshots.take(self._client.config, local)
        except KvstoreError as error:
            self._snapshot_error = str(error)
            self._snapshot_due = time.time() + jittered(RETRY_S)
            logger.error("{}", error)
            return
        self._snapshot_error = ""
        self._snapshot_due = record.taken.timestamp() + jittered(self.schedule.snapshot)
        self.state = msgspec.structs.replace(
            self.state, record=msgspec.structs.replace(self.state.record, snapshot=record)
        )
        size = size_text(record.size)
        logger.info(
            "snapshot {}: {}, {} keys at revision {}", record.name, size, record.keys, record.revision
        )

    # --- what is remembered and told

    def _memory(self) -> Memory:
        last = self.state.record.defragmentation
        since = float("inf") if last is None else ago(last.at.timestamp())
        attempts = {
            name: [Attempt(ago(each.at), each.blind, each.failed) for each in tried]
            for name, tried in self.state.attempts.items()
        }
        return Memory(since, self._passed, attempts, self._compacted, ago(self._compacted_at))

    def _troubles(self, step: Step) -> str:
        last = self.state.record.defragmentation
        failed = f"the last defragmentation failed: {last.error}" if last and last.error else ""
        helpless = f"no turn can be had, etcd grants no lease: {self.turn.error or 'not yet'}"
        stuck = helpless if step.acts and not self.turn.lease else ""
        return "; ".join(filter(None, [step.trouble, stuck, self._quota_error, self._snapshot_error, failed]))

    @property
    def _quota_error(self) -> str:
        if self.rules.quota == self._quota_told:
            return ""
        found, told = size_text(self.rules.quota), size_text(self._quota_told)
        return f"etcd is full at {found}: its --quota-backend-bytes is smaller than --quota here, {told}"

    def _first_due(self) -> float:
        newest = self.snapshots.newest()
        if newest is None or ago(newest.timestamp()) == float("inf"):
            return 0.0
        return newest.timestamp() + jittered(self.schedule.snapshot)

    async def _tell(self, doing: str, trouble: str, *, busy: bool = False) -> None:
        """Say what is new in the log, keep the state, and write the record to etcd if that takes it."""
        logger.debug("{}", doing)
        old, recent = self.state.record, time.monotonic() - self._told_at < TELL_S
        if trouble and not (trouble == old.trouble and recent):
            logger.error("{}", trouble)
        record = msgspec.structs.replace(old, seen=now(), doing=doing, trouble=trouble)
        self.state = msgspec.structs.replace(self.state, record=record, lease=self.turn.lease, busy=busy)
        self._keep()
        news = (trouble, record.snapshot, record.defragmentation)
        if news == self._told and recent:
            return
        try:
            await self._client.put(maintenance_key(self.member), encode_maintenance(record))
        except KvstoreError as error:
            logger.debug("the state stays here for now: {}", error)
            return
        self._told, self._told_at = news, time.monotonic()

    def _keep(self) -> None:
        try:
            write_atomic(self._directory / STATE_FILE, msgspec.json.encode(self.state), durable=False)
        except OSError as error:
            logger.error("{} can not be written: {}", self._directory / STATE_FILE, error.strerror)


def _from_now(rules: Rules) -> Rules:
    """Return rules by which three maintenances that start together do not stay in step."""
    return replace(rules, every=jittered(rules.every))


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def ago(at: float) -> float:
    """Return the seconds since a moment, unix seconds; for one in the future, by a clock that was wrong then,
    it is as if it had never been."""
    past = time.time() - at
    return past if past >= 0 else float("inf")


def read_state(directory: Path) -> State | None:
    """Return what an earlier life left, or None; what can not be read counts as nothing."""
    try:
        return msgspec.json.decode((directory / STATE_FILE).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError):
        return None


def health(directory: Path, at: datetime) -> tuple[bool, str]:
    """Return whether the maintenance that keeps its state in `directory` works, and a sentence."""
    state = read_state(directory)
    if state is None:
        return False, f"{directory / STATE_FILE} is not there: the maintenance has not begun"
    silent = (at - state.record.seen).total_seconds()
    if silent > (BUSY_LIMIT_S if state.busy else IDLE_LIMIT_S):
        return False, f"nothing heard for {silent:.0f} s; last: {state.record.doing}"
    return not state.record.trouble, state.record.trouble or state.record.doing
