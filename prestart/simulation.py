# SPDX-License-Identifier: Apache-2.0
"""What the start window does to etcd: the starts of a whole fleet with it, with random delays, with nothing.

Pure and repeatable: a `Plan` goes in, the instants at which each host asks etcd come out.  The instants of
the start window are those that `prestart.decision` decides, host by host; nothing is computed again here.
Random numbers, all from the plan's seed, are drawn for boots and for the other ways, never for the window.

    way       a host that starts                            an agent whose etcd was away
    WINDOW    `decide_at`: its slot                         its back-off with full jitter (`core.backoff`)
    JITTER    a random share of the same window, from boot  a random share of the longest pause
    NONE      at once                                       at once

Times are seconds since the outage ended (power, or etcd, is back).

Called by: cli.commands.prestart, bench.prestart, bench.start_storm.  The hook itself never loads it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from core.backoff import Backoff
from prestart.decision import Cluster, Decision, Now, Setting, decide_at
from prestart.window import next_slot, slot_fraction, slot_fractions, window_length

# Any moment will do: it only says where in a window the outage ends.
BACK_AT = 1_767_225_600.0
PEAK_S = 10.0
# Ten times the largest fleet known.
MOST_HOSTS = 100_000
# An address of etcd's ip/v1 as an agent writes it, in an answer: key, value, revisions, lease and framing.
ENTRY_BYTES = 190
# 300 000 workloads on 10 000 hosts.
ENTRIES_OF_A_HOST = 30
# Of a long absence only so many of the longest pauses count: by then it does not matter when it began.
PAUSES = 20
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 21_600, 86_400)


class Outage(enum.Enum):
    """What happened."""

    POWER_CUT = "power-cut"  # all hosts boot together
    RACKS = "racks"  # rack after rack boots
    ROLLING = "rolling"  # host after host boots
    ETCD = "etcd"  # etcd was away; no agent restarts


class History(enum.Enum):
    """What a host has kept, and whether etcd still has what came after it."""

    KEPT = "kept"  # a checkpoint, and the changes since: the watch resumes
    COMPACTED = "compacted"  # a checkpoint, but etcd has lost the changes: connects, then lists
    LOST = "lost"  # a checkpoint that names no revision: lists
    NONE = "none"  # no checkpoint: lists, for the first time


class Way(enum.Enum):
    """What keeps hosts from asking etcd together."""

    WINDOW = "window"
    JITTER = "jitter"
    NONE = "none"


class Ask(enum.Enum):
    """What is asked of etcd."""

    CONNECT = "connect"  # the first contact, and what has changed since
    LIST = "list"  # everything


class Plan(NamedTuple):
    """A fleet and what happens to it; seconds.  `window` None means by the cluster's size.

    `over`: from the first rack or host to the last; or how long etcd was away.  `retry_base` and
    `retry_cap` are the agents' back-off (`kvstore.patience`), which only an outage of etcd needs.
    """

    nodes: int
    outage: Outage = Outage.POWER_CUT
    history: History = History.COMPACTED
    boot_spread: float = 60.0
    racks: int = 20
    over: float = 1_800.0
    window: float | None = None
    seed: int = 1
    retry_base: float = 0.0
    retry_cap: float = 0.0


class Phase(NamedTuple):
    """When hosts ask etcd for one kind of thing, by each way (sorted), and the `window` meant for it."""

    ask: Ask
    window: float
    instants: Mapping[Way, Sequence[float]]

    @property
    def even(self) -> float:
        """Starts a second if all were spread evenly over the window; 0 where there is none."""
        return len(self.instants[Way.WINDOW]) / self.window if self.window else 0.0

    def peak(self, way: Way) -> float:
        """Starts a second in the busiest ten seconds."""
        return busiest(self.instants[way], PEAK_S) / PEAK_S

    def ratio(self, way: Way) -> float | None:
        """The busiest ten seconds by the even rate; None where there is no window to be even in."""
        return self.peak(way) / self.even if self.even else None

    @property
    def end(self) -> float:
        return max(instants[-1] for instants in self.instants.values())


def simulate(plan: Plan) -> list[Phase]:
    """Return the phases: first contacts (if they are not lists themselves), then lists (if there are any)."""
    rng = random.Random(plan.seed)
    return _reconnects(plan, rng) if plan.outage is Outage.ETCD else _starts(plan, rng)


def host_names(nodes: int) -> list[str]:
    """Return names for a fleet, in order of rank: neighbours in a rack are neighbours in the window."""
    return [f"host-{number:06}" for number in range(nodes)]


def boots(plan: Plan, rng: random.Random) -> list[float]:
    """Return when each host boots."""
    groups = {Outage.RACKS: plan.racks, Outage.ROLLING: plan.nodes}.get(plan.outage, 1)
    pause = plan.over / max(groups - 1, 1)
    return [
        pause * (number * groups // plan.nodes) + rng.uniform(0, plan.boot_spread)
        for number in range(plan.nodes)
    ]


def decisions(plan: Plan, booted: Sequence[float]) -> list[Decision]:
    """Return what the start hook of each host decides."""
    names = host_names(plan.nodes)
    cluster = {
        History.KEPT: Cluster(plan.nodes, names, revision=1),
        History.COMPACTED: Cluster(plan.nodes, names, revision=1),
        History.LOST: Cluster(plan.nodes, names),
        History.NONE: None,
    }[plan.history]
    slots = slot_fractions(names) if cluster else {name: slot_fraction(name) for name in names}
    return [
        decide_at(
            slots[name],
            Now(BACK_AT + boot, 0.0, "simulated"),
            Setting(name, plan.nodes, plan.window),
            cluster,
            None,
        )
        for name, boot in zip(names, booted, strict=True)
    ]


def busiest(instants: Sequence[float], span: float) -> int:
    """Return how many of the sorted `instants` lie in the fullest `span` seconds, wherever they begin."""
    most = first = 0
    for last, instant in enumerate(instants):
        while instant - instants[first] >= span:
            first += 1
        most = max(most, last - first + 1)
    return most


def step_for(length: float, most: int) -> float:
    """Return a round step, seconds, of which at most `most` cover `length` seconds."""
    return next((step for step in STEPS_S if length <= step * most), length / most)


def rates(instants: Sequence[float], step: float, end: float) -> list[float]:
    """Return instants a second in each step from 0 until all of `end` is covered."""
    counts = [0] * (int(end // step) + 1)
    for instant in instants:
        counts[int(instant // step)] += 1
    return [count / step for count in counts]


def _starts(plan: Plan, rng: random.Random) -> list[Phase]:
    booted = boots(plan, rng)
    decided = decisions(plan, booted)
    shares = [rng.random() for _ in booted]

    def phase(ask: Ask, window: float, ours: list[float]) -> Phase:
        jitter = [boot + share * window for boot, share in zip(booted, shares, strict=True)]
        ways = {Way.WINDOW: ours, Way.JITTER: jitter, Way.NONE: booted}
        return Phase(ask, window, {way: sorted(instants) for way, instants in ways.items()})

    connects = [each.connect_at - BACK_AT for each in decided]
    lists = [each.relist_at - BACK_AT for each in decided]
    if plan.history in (History.LOST, History.NONE):
        return [phase(Ask.LIST, decided[0].window, connects)]
    first = phase(Ask.CONNECT, decided[0].window, connects)
    if plan.history is History.KEPT:
        return [first]
    long = window_length(plan.nodes) if plan.window is None else plan.window
    return [first, phase(Ask.LIST, long, lists)]


def _reconnects(plan: Plan, rng: random.Random) -> list[Phase]:
    """Agents that live ask for what is missing once they are connected; for everything, in their slot."""
    back = [_reconnect(plan, rng) for _ in range(plan.nodes)]
    ways = {
        Way.WINDOW: back,
        Way.JITTER: [rng.uniform(0, plan.retry_cap) for _ in range(plan.nodes)],
        Way.NONE: [0.0] * plan.nodes,
    }
    first = Phase(Ask.CONNECT, plan.retry_cap, {way: sorted(instants) for way, instants in ways.items()})
    if plan.history is History.KEPT:
        return [first]
    long = window_length(plan.nodes) if plan.window is None else plan.window
    slots = slot_fractions(host_names(plan.nodes)).values()
    ways = {
        Way.WINDOW: [
            next_slot(BACK_AT + at, long, slot) - BACK_AT for at, slot in zip(back, slots, strict=True)
        ],
        Way.JITTER: [at + rng.uniform(0, long) for at in back],
        Way.NONE: back,
    }
    return [first, Phase(Ask.LIST, long, {way: sorted(instants) for way, instants in ways.items()})]


def _reconnect(plan: Plan, rng: random.Random) -> float:
    """Return when, after etcd is back, the next attempt of an agent comes."""
    backoff = Backoff(plan.retry_base, plan.retry_cap, rng=rng)
    left = plan.over
    if left > PAUSES * plan.retry_cap:
        left, backoff.attempts = PAUSES * plan.retry_cap, PAUSES
    while left > 0:
        left -= backoff.next()
    return -left
