# SPDX-License-Identifier: Apache-2.0
"""The window, the slots in it, and the decision of the start hook: values in, values out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestart.decision import Cluster, Decision, Kind, Last, Now, Setting, backoff, decide, healthy_after
from prestart.window import next_slot, slot_fraction, window_length

WALL = 1_800_000_000.0
NOW = Now(WALL, 5_000.0, "boot-1")
NAMES = tuple(f"host-{number:04}" for number in range(5_000))
FLEET = Cluster(5_000, NAMES)


def later(seconds: float, now: Now = NOW) -> Now:
    return now._replace(wall=now.wall + seconds, boot=now.boot + seconds)


def rebooted(now: Now) -> Now:
    return now._replace(boot=12.0, boot_id="boot-2")


def remembered(now: Now, decision: Decision) -> Last:
    """What the state file tells the next start."""
    boot = now.boot + decision.connect_at - now.wall
    return Last(decision.kind, decision.connect_at, boot, now.boot_id, decision.failures, decision.override)


def test_window_goes_through_the_two_known_points() -> None:
    assert window_length(1_000) == pytest.approx(20 * 60)
    assert window_length(5_000) == pytest.approx(60 * 60)


def test_window_is_nothing_for_one_and_seconds_for_a_handful() -> None:
    assert window_length(1) == 0
    assert 5 < window_length(2) < window_length(5) < 30


@given(st.integers(1, 100_000))
def test_window_is_monotone_and_has_no_jumps(nodes: int) -> None:
    step = window_length(nodes + 1) - window_length(nodes)
    assert 0 < step <= window_length(2)


@given(st.floats(0, 4e9), st.floats(0, 90_000), st.floats(0, 0.999999))
def test_next_slot_is_at_most_one_window_away(moment: float, window: float, fraction: float) -> None:
    slot = next_slot(moment, window, fraction)
    assert moment <= slot <= moment + window * 1.000001 + 1e-3


@given(st.floats(1e9, 4e9), st.floats(1, 90_000), st.floats(0, 0.999999))
def test_a_slot_is_its_own_next_slot(moment: float, window: float, fraction: float) -> None:
    slot = next_slot(moment, window, fraction)
    assert next_slot(slot, window, fraction) - slot < 1e-3


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=40, unique=True))
def test_ranks_are_distinct_and_evenly_spaced(names: list[str]) -> None:
    fractions = sorted(slot_fraction(name, names) for name in names)
    assert all(0 <= each < 1 for each in fractions)
    gaps = [after - before for before, after in pairwise(fractions)]
    assert gaps == pytest.approx([1 / len(names)] * len(gaps))


def test_rank_does_not_depend_on_the_order_of_the_list() -> None:
    assert slot_fraction("b", ["c", "b", "a", "b"]) == slot_fraction("b", ["a", "b", "c"]) == 0.5


def test_names_that_differ_in_a_digit_hash_evenly() -> None:
    bins = Counter(int(slot_fraction(name) * 20) for name in NAMES)
    assert len(bins) == 20
    assert max(bins.values()) < 1.25 * len(NAMES) / 20


@pytest.mark.parametrize("boot_spread", [0.0, 1_800.0])
def test_power_cut_of_5000_hosts_keeps_the_even_rate(boot_spread: float) -> None:
    """Whether all come back in one second or rack by rack: peak in 10 s ≤ 1.1 x the even rate."""
    starts = []
    for index, name in enumerate(NAMES):
        boot = later(boot_spread * index / len(NAMES))
        starts.append(decide(boot, Setting(name), FLEET, None).connect_at)
    window = window_length(5_000)
    peak = max(Counter(int(start // 10) for start in starts).values())
    ratio = peak / (len(NAMES) * 10 / window)
    print(f"prestart_peak_ratio {ratio:.3f} (boots spread over {boot_spread:.0f} s)")
    assert ratio <= 1.1


def test_kind_and_wait_follow_from_what_is_on_disk() -> None:
    fresh = decide(NOW, Setting("host-0001"), None, None)
    resume = decide(NOW, Setting("host-0001"), FLEET._replace(revision=7), None)
    relist = decide(NOW, Setting("host-0001"), FLEET, None)
    assert [each.kind for each in (fresh, resume, relist)] == [Kind.FRESH, Kind.RESUME, Kind.RELIST]
    assert fresh.connect_at - WALL <= 30
    assert resume.connect_at - WALL <= 60
    assert resume.connect_at <= resume.relist_at <= resume.connect_at + 3_600
    assert relist.relist_at == relist.connect_at <= WALL + 3_600.001


@given(st.integers(0, 200_000), st.text(min_size=1, max_size=20))
def test_a_host_without_state_connects_within_30_s(nodes: int, name: str) -> None:
    assert 0 <= decide(NOW, Setting(name, nodes), None, None).connect_at - WALL <= 30


def test_a_host_on_its_own_never_waits() -> None:
    assert decide(NOW, Setting("a", nodes=1), None, None).connect_at == WALL
    assert decide(NOW, Setting("a"), Cluster(1, ("a",), 9), None).relist_at == WALL


def test_the_operators_window_replaces_the_computed_one() -> None:
    assert decide(NOW, Setting("a", window=7_200.0), FLEET, None).window == 7_200.0


def test_second_start_in_a_window_waits_for_the_next() -> None:
    first = decide(NOW, Setting("host-0001"), FLEET, None)
    again = later(first.connect_at - WALL + 5)
    second = decide(again, Setting("host-0001"), FLEET, remembered(NOW, first))
    assert second.connect_at - first.connect_at == pytest.approx(first.window)
    assert second.failures == 1


@given(st.lists(st.floats(0.5, 8_000), min_size=2, max_size=25), st.sampled_from([0, 7]))
def test_two_starts_are_never_in_one_window(runs: list[float], revision: int) -> None:
    cluster, now, last = Cluster(5_000, NAMES[:50], revision), NOW, None
    connections = []
    for run in runs:
        decision = decide(now, Setting("host-0042"), cluster, last)
        last = remembered(now, decision)
        connections.append(decision.connect_at)
        now = later(decision.connect_at - now.wall + run, now)
    gaps = [after - before for before, after in pairwise(connections)]
    assert min(gaps) >= decision.window - 1e-3


def test_crash_loop_backs_off_exponentially_to_an_end() -> None:
    cluster, now, last, waits = FLEET._replace(revision=1), NOW, None, []
    for _ in range(9):
        decision = decide(now, Setting("host-0001"), cluster, last)
        waits.append(decision.connect_at - now.wall)
        last = remembered(now, decision)
        now = later(waits[-1] + 1, now)
    assert waits[1:] == pytest.approx([59, 119, 239, 479, 599, 599, 599, 599])


@given(st.integers(1, 1_000), st.floats(0, 86_400))
def test_backoff_never_shrinks(failures: int, window: float) -> None:
    assert 0 < backoff(failures, window) <= backoff(failures + 1, window)


def test_long_healthy_run_clears_the_history() -> None:
    last = Last(Kind.RESUME, WALL, NOW.boot, NOW.boot_id, failures=5)
    cluster = FLEET._replace(revision=1)
    short = decide(later(healthy_after(60) - 1), Setting("host-0001"), cluster, last)
    long = decide(later(healthy_after(60)), Setting("host-0001"), cluster, last)
    assert (short.failures, long.failures) == (6, 0)


def test_start_that_died_before_its_instant_keeps_it() -> None:
    first = decide(NOW, Setting("host-4999"), FLEET, None)
    second = decide(later(30), Setting("host-4999"), FLEET, remembered(NOW, first))
    assert second.connect_at == pytest.approx(first.connect_at)
    assert second.failures == 0


def test_instant_planned_for_another_kind_or_window_is_not_kept() -> None:
    last = remembered(NOW, decide(NOW, Setting("host-0001"), FLEET, None))
    resume = decide(later(1), Setting("host-0001"), FLEET._replace(revision=3), last)
    assert resume.connect_at - later(1).wall <= 60
    absurd = last._replace(connect_boot=NOW.boot + 9e6)
    assert decide(NOW, Setting("host-0001"), FLEET, absurd).connect_at - WALL <= 3_601


@given(st.floats(-1e8, 1e8))
def test_clock_set_during_the_boot_does_not_move_the_last_start(jump: float) -> None:
    """The time since boot tells that the last start was a second ago, whatever the wall clock says."""
    last = Last(Kind.RELIST, WALL - 1, NOW.boot - 1, NOW.boot_id)
    moved = NOW._replace(wall=WALL + jump)
    decision = decide(moved, Setting("host-0001"), FLEET, last)
    assert decision.connect_at - moved.wall >= decision.window - 1.001


def test_reboot_in_the_window_still_counts() -> None:
    first = decide(NOW, Setting("host-0001"), FLEET, None)
    last = remembered(NOW, first)
    back = rebooted(later(first.connect_at - WALL + 60))
    assert decide(back, Setting("host-0001"), FLEET, last).connect_at == pytest.approx(
        first.connect_at + first.window
    )


def test_override_counts_for_one_start() -> None:
    first = decide(NOW, Setting("host-0001"), FLEET, None, "alice")
    assert first.connect_at == first.relist_at == WALL
    assert "alice" in first.reason
    second = decide(later(1), Setting("host-0001"), FLEET, remembered(NOW, first), "alice")
    assert second.connect_at > WALL + first.window
    third = decide(later(2), Setting("host-0001"), FLEET, remembered(later(1), second), "bob")
    assert third.connect_at == later(2).wall


def test_reason_says_what_is_waited_for() -> None:
    last = Last(Kind.RELIST, WALL - 1, NOW.boot - 1, NOW.boot_id, failures=1)
    reason = decide(NOW, Setting("host-0001"), FLEET, last).reason
    assert "full list in" in reason
    assert "window 3600 s, after 2 failed starts in a row" in reason
