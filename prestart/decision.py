# SPDX-License-Identifier: Apache-2.0
"""When may this host talk to etcd?  Values in, one `Decision` out; no file, clock or process is touched.

Which window applies follows from what the host has kept:

    kind     what is on disk                          waits for its slot in
    FRESH    no checkpoint                            at most 30 s
    RESUME   a checkpoint with etcd's revision        at most 60 s (should it become a relist: the long one)
    RELIST   a checkpoint without a revision          the long window

A start that reached its instant and died before it ran healthily for a while is a failure: the next one
waits one window, then two, four… from there, still on the host's own slot.  A start that died before its
instant has not troubled anybody: its instant stays.  Times are seconds; wall times are unix times.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from prestart.values import NamedTuple
from prestart.window import next_slot, slot_fraction, window_length

FRESH_LIMIT_S = 30.0
RESUME_LIMIT_S = 60.0
# A run that lasts 20 windows after it connected was healthy; but a minute at least, ten at most (a day would
# never forgive), and never less than the window, or a host could start twice in one.
HEALTHY_WINDOWS = 20.0
SHORTEST_HEALTHY_S = 60.0
LONGEST_HEALTHY_S = 600.0
# The step of the back-off where there is no window: a lone host that crashes.
SMALLEST_STEP_S = 2.0
# The back-off ends at this many windows, or at ten minutes where that is longer: patience, not despair.
LONGEST_BACKOFF_WINDOWS = 4.0
LONGEST_BACKOFF_S = 600.0


class Kind(enum.Enum):
    """What the agent will ask of etcd when it connects."""

    FRESH = "fresh"  # everything, for the first time
    RESUME = "resume"  # only what changed since the checkpoint
    RELIST = "relist"  # everything again


class Now(NamedTuple):
    """The present on both clocks: `wall` may jump, `boot` (since boot, with sleep) may not."""

    wall: float
    boot: float
    boot_id: str


class Setting(NamedTuple):
    """What the operator configured; `nodes` 0 means unknown, `window` None means by cluster size."""

    name: str
    nodes: int = 0
    window: float | None = None


class Cluster(NamedTuple):
    """What the agent left beside its checkpoint; `revision` 0 means that a watch can not be resumed."""

    nodes: int
    names: Sequence[str] = ()
    revision: int = 0


class Last(NamedTuple):
    """The previous start: when it was allowed to connect, on both clocks, and the failures before it."""

    kind: Kind
    connect_at: float
    connect_boot: float
    boot_id: str
    failures: int = 0
    override: str = ""


class Decision(NamedTuple):
    """When this start may connect (`connect_at`) and list everything (`relist_at`), and why."""

    kind: Kind
    window: float
    connect_at: float
    relist_at: float
    failures: int
    override: str
    reason: str


def decide(
    now: Now, setting: Setting, cluster: Cluster | None, last: Last | None, override: str = ""
) -> Decision:
    """Return when this start may connect.

    `override` names the person who wants it now; the same word as at the previous start is not honoured, so
    that a forgotten environment variable is an override of one start and not of a crash loop.
    """
    fraction = slot_fraction(setting.name, cluster.names if cluster else ())
    return decide_at(fraction, now, setting, cluster, last, override)


def decide_at(
    fraction: float,
    now: Now,
    setting: Setting,
    cluster: Cluster | None,
    last: Last | None,
    override: str = "",
) -> Decision:
    """Return what `decide` does, for a host of which it is known where in the window its slot is."""
    kind = _kind(cluster)
    window, relist_window = _windows(kind, setting, cluster)
    connect_at, failures = _connect(now, kind, window, fraction, last)
    accepted = "" if last is not None and last.override == override else override
    if accepted:
        reason = f"started at once by order of {accepted}"
        return Decision(kind, window, now.wall, now.wall, failures, override, reason)
    relist_at = next_slot(connect_at, relist_window, fraction) if kind is Kind.RESUME else connect_at
    reason = _reason(kind, window, connect_at - now.wall, failures)
    return Decision(kind, window, connect_at, relist_at, failures, override, reason)


def backoff(failures: int, window: float) -> float:
    """Return how long after the last connection the next one may come: 1, 2, 4… windows, with an end."""
    step = max(window, SMALLEST_STEP_S)
    longest = max(window * LONGEST_BACKOFF_WINDOWS, LONGEST_BACKOFF_S)
    return float(min(step * 2 ** min(failures - 1, 32), longest))


def healthy_after(window: float) -> float:
    """Return how long a run must last after its connection to clear the history of failures."""
    bounded = min(max(HEALTHY_WINDOWS * window, SHORTEST_HEALTHY_S), LONGEST_HEALTHY_S)
    return max(bounded, window)


def _kind(cluster: Cluster | None) -> Kind:
    if cluster is None:
        return Kind.FRESH
    return Kind.RESUME if cluster.revision > 0 else Kind.RELIST


def _windows(kind: Kind, setting: Setting, cluster: Cluster | None) -> tuple[float, float]:
    """Return the window for connecting and the one for a relist."""
    nodes = cluster.nodes if cluster else setting.nodes
    if setting.window is not None:
        long = setting.window
    elif nodes:
        long = window_length(nodes)
    else:
        long = FRESH_LIMIT_S  # nobody knows the cluster's size yet
    limit = {Kind.FRESH: FRESH_LIMIT_S, Kind.RESUME: RESUME_LIMIT_S, Kind.RELIST: long}[kind]
    return min(limit, long), long


def _connect(now: Now, kind: Kind, window: float, fraction: float, last: Last | None) -> tuple[float, int]:
    """Return the instant of this start's connection and the failures counted so far."""
    if last is None:
        return next_slot(now.wall, window, fraction), 0
    previous = _on_this_clock(now, last)
    if previous > now.wall:
        return _not_reached(now, kind, window, fraction, last, previous)
    if now.wall - previous >= healthy_after(window):
        return next_slot(now.wall, window, fraction), 0
    failures = last.failures + 1
    earliest = max(now.wall, previous + backoff(failures, window))
    return next_slot(earliest, window, fraction), failures


def _not_reached(
    now: Now, kind: Kind, window: float, fraction: float, last: Last, previous: float
) -> tuple[float, int]:
    """The last start never came to its instant: keep it, unless the plan it was made for has changed."""
    longest = backoff(max(last.failures, 1), window) + window
    if kind is last.kind and previous - now.wall <= longest:
        return previous, last.failures
    return next_slot(now.wall, window, fraction), last.failures


def _on_this_clock(now: Now, last: Last) -> float:
    """Return the last connection as wall time of today's clock, even if that was set in between."""
    if last.boot_id == now.boot_id:
        return now.wall + last.connect_boot - now.boot
    return last.connect_at


def _reason(kind: Kind, window: float, wait: float, failures: int) -> str:
    what = {Kind.FRESH: "first contact", Kind.RESUME: "resumed watch", Kind.RELIST: "full list"}[kind]
    tail = f", after {failures} failed start{'s' if failures > 1 else ''} in a row" if failures else ""
    return f"{what} in {wait:.1f} s (window {window:.0f} s{tail})"
