# SPDX-License-Identifier: Apache-2.0
"""What is to be done for an etcd member now.  Pure: what a look saw and what is remembered in, one step out.

    in order       an alarm CORRUPT                          WAIT, for a person
                   NOSPACE, a member does not serve          WAIT
                   NOSPACE, all files have room              DISARM
                   NOSPACE, keys and history fill etcd       COMPACT, once for a revision
                   NOSPACE, this file is full                DEFRAGMENT; still full: COMPACT, and again
                   NOSPACE, another file is full             PASS the turn; DEFRAGMENT it where nobody waits
    otherwise      enough free pages here, a day since       DEFRAGMENT; who leads lets others go first
                   enough free pages elsewhere               PASS
                   nothing of that                           NOTHING

A step is taken only by who has the turn (`kvstore.turn`), and a member is defragmented only while all serve:
one that is being defragmented does not, so that even two that believe to have the turn do it to one at most.
The lead stays where it is: why, docs/decisions/etcd-maintenance.md has measured.

Called by: kvstore.maintenance, cli.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.members import Alarm, Cluster, Member

NOSPACE, CORRUPT = "NOSPACE", "CORRUPT"
MIB = 1 << 20
DEFAULT_QUOTA = 8 << 30
# Parts of the quota.  Above the first, free pages are given back although they are few; below the second
# there is room again after NOSPACE.
NEAR, ROOM = 0.75, 0.8
# So much must be free for a full file to be written anew a second time.
GAIN = 0.05
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


@dataclass(frozen=True)
class Memory:
    """What was done before: seconds since the last attempt here, etcd's revision at the last of each member.

    `passed` counts how often the turn was passed on although a defragmentation was due here.  A compaction
    forgets `defragmented`: what was too full before it need not be after it.
    """

    since: float = float("inf")
    passed: int = 0
    defragmented: Mapping[str, int] = field(default_factory=dict)
    compacted: int = 0


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
    full = [each for each in cluster.members if each.size > ROOM * rules.quota]
    if absent:
        return _wait(f"{prefix}; room can be made once all members serve: {absent[0]}")
    if not full:
        return Step(Action.DISARM, f"{prefix}; there is room again: it is disarmed", prefix)
    may_compact = memory.compacted < local.revision
    most = max(each.used for each in cluster.members)
    if most > ROOM * rules.quota and may_compact:
        return _compact(prefix, f"{size_text(most)} of {size_text(rules.quota)} in use", local)
    if local not in full and waiting:
        names = ", ".join(each.name for each in full)
        return Step(Action.PASS, f"{prefix}; {names} to be defragmented", f"{prefix}; waits for {names}")
    # Whoever passed the turn is in the queue again when etcd takes keys: nobody may be left to pass it to.
    target = local if local in full else full[0]
    if memory.defragmented.get(target.name, 0) >= target.revision and not _has_gained(target, rules):
        after = f"{target.name}: {size_text(target.size)} after a defragmentation"
        if may_compact:
            return _compact(prefix, after, local)
        return _wait(f"{prefix}; {after}: the keys alone fill it: delete some, or give etcd a larger quota")
    return Step(Action.DEFRAGMENT, f"{prefix}; {_defragment(target).reason}", prefix, target)


def _compact(prefix: str, why: str, local: Member) -> Step:
    return Step(Action.COMPACT, f"{prefix}; {why}: history is compacted", prefix, revision=local.revision)


def _has_gained(member: Member, rules: Rules) -> bool:
    """True when pages became free in a full file since it was written anew, and enough to make room.

    A compaction is carried out by each member in its own time, minutes where much is forgotten.
    """
    return member.free >= GAIN * rules.quota and member.used <= ROOM * rules.quota


def _defragment(target: Member) -> Step:
    return Step(Action.DEFRAGMENT, f"{_fill(target)}: it is defragmented", target=target)


def _fill(member: Member) -> str:
    return f"{member.name}: {size_text(member.size)}, of it {size_text(member.free)} free"


def _wait(trouble: str) -> Step:
    return Step(Action.WAIT, trouble, trouble)
