# SPDX-License-Identifier: Apache-2.0
"""What is to be done for an etcd member now.  Pure: what a look saw and what is remembered in, one step out.

    in order       an alarm CORRUPT                          WAIT, for a person
                   NOSPACE, a member does not serve          WAIT
                   NOSPACE, all files have room              DISARM
                   NOSPACE, keys and history fill etcd       COMPACT, and again after deletions
                   NOSPACE, this file is full                DEFRAGMENT, where that may help
                   NOSPACE, another file is full             PASS the turn; DEFRAGMENT it where nobody waits
                   NOSPACE, nothing of that has helped       WAIT, for a person
    otherwise      enough free pages here, a day since       DEFRAGMENT; who leads lets others go first
                   enough free pages elsewhere               PASS
                   nothing of that                           NOTHING

A defragmentation may help a full file when its free pages make room.  What is in use is told late, though
(an etcd that takes no writes may not tell of a compaction at all), so it is tried without that promise as
well: once, and once more after a compaction; who is full of keys is not silenced for nothing again and again.

A step is taken only by who has the turn (`kvstore.turn`), and a member is defragmented only while all serve:
one that is being defragmented does not, so that even two that believe to have the turn do it to one at most.
The lead stays where it is: why, docs/decisions/etcd-maintenance.md has measured.

Called by: kvstore.maintenance, cli.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvstore.members import Alarm, Cluster, Member

NOSPACE, CORRUPT = "NOSPACE", "CORRUPT"
MIB = 1 << 20
DEFAULT_QUOTA = 8 << 30
# Parts of the quota.  Above the first, free pages are given back although they are few; below the second
# there is room again after NOSPACE.
NEAR, ROOM = 0.75, 0.8
# So much must be free for a full file to be surely worth writing anew.
GAIN = 0.05
# Seconds until a defragmentation that failed is tried again in a full etcd, and for which attempts count.
FAILED_S, REMEMBERED_S = 3600.0, 24 * 3600.0
# So often in a row NOSPACE may be disarmed where no file is full: a member that lags behind still has it.
DISARMED = 3
# So often who leads lets the others go first; of those that need it one may have no maintenance.
COURTESY = 3


class Action(enum.Enum):
    """What a step does."""

    NOTHING = "nothing"  # nothing is due
    PASS = "pass"  # nothing is due here, something is elsewhere
    WAIT = "wait"  # something is due and can not be done now
    COMPACT = "compact"  # forget history up to `revision`
    DEFRAGMENT = "defragment"  # the member `target`
    DISARM = "disarm"  # NOSPACE, everywhere


@dataclass(frozen=True)
class Rules:
    """When a defragmentation is worth the seconds in which its member serves nobody; bytes and seconds."""

    quota: int = DEFAULT_QUOTA
    minimum: int = 256 * MIB  # free pages, at least
    share: float = 0.5  # of the file, at least, while it is not near the quota
    every: float = 24 * 3600.0  # at most one attempt in so long
    again: float = 300.0  # in a full etcd: between compactions, and between attempts that promise the same


@dataclass(frozen=True)
class Attempt:
    """A defragmentation, `ago` seconds ago; a `blind` one had no promise of room when it began."""

    ago: float
    blind: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Memory:
    """What was done before: seconds since the last attempt here, the attempts of the last day by member.

    `passed` counts how often the turn was passed on although a defragmentation was due here, `compacted` is
    the revision of the last compaction, `compaction` seconds ago.
    """

    since: float = float("inf")
    passed: int = 0
    attempts: Mapping[str, Sequence[Attempt]] = field(default_factory=dict)
    compacted: int = 0
    compaction: float = float("inf")


@dataclass(frozen=True)
class Step:
    """`reason` is a sentence; `trouble` is for a person, empty when none is needed.

    `courteous`: the turn is passed although a defragmentation is due here.
    """

    action: Action
    reason: str
    trouble: str = ""
    target: Member | None = None
    revision: int = 0
    courteous: bool = False

    @property
    def acts(self) -> bool:
        return self.action not in (Action.NOTHING, Action.PASS, Action.WAIT)


def decide(cluster: Cluster, own: str, rules: Rules, memory: Memory, waiting: int = 0) -> Step:
    """Return the next step of the maintenance beside the member `own`; `waiting` others stand for a turn."""
    local = cluster.member(own)
    if cluster.error:
        return _wait(cluster.error)
    if local is None:
        names = ", ".join(each.name for each in cluster.members)
        return _wait(f"etcd has no member {own!r}, its members are {names}")
    corrupt = [alarm.member for alarm in cluster.alarms if alarm.kind == CORRUPT]
    if corrupt:
        return _wait(f"alarm CORRUPT on {', '.join(corrupt)}: its data differs from the others'; replace it")
    alarms = [alarm for alarm in cluster.alarms if alarm.kind == NOSPACE]
    if alarms:
        return _make_room(cluster, local, rules, memory, alarms, waiting)
    return _tidy(cluster, local, rules, memory)


def is_worth(member: Member, rules: Rules) -> bool:
    """True when defragmenting a member gives enough back."""
    if member.free < rules.minimum:
        return False
    return member.free >= rules.share * member.size or member.size >= NEAR * rules.quota


def size_text(size: int) -> str:
    """Return bytes for people: 512 B, 20 KiB, 1.5 GiB."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def _tidy(cluster: Cluster, local: Member, rules: Rules, memory: Memory) -> Step:
    if not is_worth(local, rules):
        return _nothing_here(cluster, local, rules, f"{_fill(local)}: not worth a defragmentation")
    if memory.since < rules.every:
        return _nothing_here(cluster, local, rules, f"{_fill(local)}; the last defragmentation is too recent")
    absent = cluster.troubles()
    if absent:
        return Step(Action.WAIT, f"{_fill(local)}; no defragmentation unless all serve: {absent[0]}")
    if local.leader and memory.passed < COURTESY and _elsewhere(cluster, local, rules):
        return Step(Action.PASS, f"{_fill(local)}; it leads: the others go first", courteous=True)
    return _defragment(local)


def _nothing_here(cluster: Cluster, local: Member, rules: Rules, reason: str) -> Step:
    return Step(Action.PASS if _elsewhere(cluster, local, rules) else Action.NOTHING, reason)


def _elsewhere(cluster: Cluster, local: Member, rules: Rules) -> bool:
    return any(is_worth(each, rules) for each in cluster.members if each is not local)


def _make_room(
    cluster: Cluster,
    local: Member,
    rules: Rules,
    memory: Memory,
    alarms: Sequence[Alarm],
    waiting: int,
) -> Step:
    where = ", ".join(sorted({alarm.member for alarm in alarms}))
    prefix = f"alarm NOSPACE on {where}: etcd takes no writes"
    absent = cluster.troubles()
    if absent:
        return _wait(f"{prefix}; room can be made once all members serve: {absent[0]}")
    full = full_members(cluster, rules)
    if not full:
        return Step(Action.DISARM, f"{prefix}; there is room again: it is disarmed", prefix)
    # Not only a later one: etcd may have been restored from a snapshot.
    news = memory.compacted != local.revision
    may_compact = news and memory.compaction >= rules.again
    most = max(each.used for each in cluster.members)
    if may_compact and most > ROOM * rules.quota:
        return _compact(prefix, f"{size_text(most)} of {size_text(rules.quota)} in use", local)
    worth = [each for each in full if _may_help(each, rules, memory)]
    if local in worth:
        return _make_room_in(prefix, local)
    # Where writing it anew made no room the keys fill it, and all have the same ones: the turn goes on only
    # to who can surely be helped.  An attempt that failed has shown nothing.
    shown = local in full and not _last(local, memory).failed
    others = [each for each in full if each is not local and (_makes_room(each, rules) or not shown)]
    names = ", ".join(each.name for each in others)
    if waiting and names:
        return Step(Action.PASS, f"{prefix}; {names} to be defragmented", f"{prefix}; waits for {names}")
    if worth and not waiting:
        # Whoever passed the turn is in the queue again when etcd takes keys: nobody is left to pass it to.
        return _make_room_in(prefix, worth[0])
    stuck = f"{full[0].name}: {size_text(full[0].size)} after a defragmentation"
    if may_compact:
        return _compact(prefix, stuck, local)
    failed = [each.name for each in full if _last(each, memory).failed]
    if failed:
        return _wait(f"{prefix}; the defragmentation of {', '.join(failed)} failed, the next try comes later")
    advice = "the keys alone fill it: delete some, or give etcd a larger quota"
    later = f" (what was deleted is freed in {rules.again - memory.compaction:.0f} s)" if news else ""
    return _wait(f"{prefix}; {stuck}: {advice}{later}")


def full_members(cluster: Cluster, rules: Rules) -> list[Member]:
    """Return the members in whose files there is no room for writes."""
    return [each for each in cluster.members if each.size > ROOM * rules.quota]


def with_etcds_quota(rules: Rules, cluster: Cluster) -> Rules:
    """Return rules with the quota that etcd must have: it raises NOSPACE with files of this size."""
    return replace(rules, quota=min(rules.quota, max(each.size for each in cluster.members)))


def is_blind(member: Member, rules: Rules) -> bool:
    """True where a defragmentation of a full file has no promise of room."""
    return member.size > ROOM * rules.quota and not _makes_room(member, rules)


def _makes_room(member: Member, rules: Rules) -> bool:
    """True when free pages promise that a full file has room once it is written anew.

    They may have become free only since the last time: a compaction is carried out by each member in its own
    time, minutes where much is forgotten.
    """
    return member.free >= GAIN * rules.quota and member.used <= ROOM * rules.quota


def _may_help(member: Member, rules: Rules, memory: Memory) -> bool:
    attempts, last = memory.attempts.get(member.name, ()), _last(member, memory)
    if last.failed and last.ago < FAILED_S:
        return False
    if _makes_room(member, rules):
        return last.blind or last.ago >= min(rules.again, memory.compaction)
    blind = [each for each in attempts if each.blind]
    return not blind or (len(blind) == 1 and blind[0].ago > memory.compaction)


def _last(member: Member, memory: Memory) -> Attempt:
    return [Attempt(float("inf")), *memory.attempts.get(member.name, ())][-1]


def _make_room_in(prefix: str, target: Member) -> Step:
    return Step(Action.DEFRAGMENT, f"{prefix}; {_defragment(target).reason}", prefix, target)


def _compact(prefix: str, why: str, local: Member) -> Step:
    return Step(Action.COMPACT, f"{prefix}; {why}: history is compacted", prefix, revision=local.revision)


def _defragment(target: Member) -> Step:
    return Step(Action.DEFRAGMENT, f"{_fill(target)}: it is defragmented", target=target)


def _fill(member: Member) -> str:
    return f"{member.name}: {size_text(member.size)}, of it {size_text(member.free)} free"


def _wait(trouble: str) -> Step:
    return Step(Action.WAIT, trouble, trouble)
