# SPDX-License-Identifier: Apache-2.0
"""The simulated fleet: it decides as hosts do, loses nobody, and is as even as the start window promises."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prestart
from kvstore import schema
from kvstore.etcd_pb2 import KeyValue, RangeResponse
from kvstore.patience import RETRY_BASE_S, RETRY_CAP_S
from prestart.decision import Cluster, Kind, Now, Setting, decide
from prestart.handover import Handover
from prestart.simulation import (
    BACK_AT,
    ENTRY_BYTES,
    PEAK_S,
    STEPS_S,
    Ask,
    History,
    Outage,
    Phase,
    Plan,
    Way,
    boots,
    busiest,
    host_names,
    rates,
    simulate,
    step_for,
)
from prestart.window import slot_fraction, slot_fractions, window_length

STARTS = st.builds(
    Plan,
    nodes=st.integers(1, 40),
    outage=st.sampled_from([Outage.POWER_CUT, Outage.RACKS, Outage.ROLLING]),
    history=st.sampled_from(History),
    boot_spread=st.floats(0, 600),
    racks=st.integers(1, 40),
    over=st.floats(1, 7_200),
    window=st.none() | st.floats(0, 7_200),
    seed=st.integers(),
)
RECONNECTS = st.builds(
    Plan,
    nodes=st.integers(1, 40),
    outage=st.just(Outage.ETCD),
    history=st.sampled_from([History.KEPT, History.COMPACTED]),
    over=st.floats(1, 86_400),
    window=st.none() | st.floats(0, 7_200),
    seed=st.integers(),
    retry_base=st.just(RETRY_BASE_S),
    retry_cap=st.just(RETRY_CAP_S),
)
POWER_CUT = Plan(5_000, history=History.LOST)


def only(plan: Plan) -> Phase:
    (phase,) = simulate(plan)
    return phase


@given(STARTS)
def test_the_window_is_what_the_start_hook_of_each_host_decides(plan: Plan) -> None:
    names = host_names(plan.nodes)
    revision = 0 if plan.history is History.LOST else 7
    cluster = None if plan.history is History.NONE else Cluster(plan.nodes, names, revision)
    decided = [
        decide(Now(BACK_AT + boot, 0, "a"), Setting(name, plan.nodes, plan.window), cluster, None)
        for name, boot in zip(names, boots(plan, random.Random(plan.seed)), strict=True)
    ]
    for phase in simulate(plan):
        instants = (each.connect_at if phase.ask is Ask.CONNECT else each.relist_at for each in decided)
        assert phase.instants[Way.WINDOW] == sorted(instant - BACK_AT for instant in instants)


@given(STARTS | RECONNECTS)
def test_every_host_asks_once_by_every_way_and_never_before_it_can(plan: Plan) -> None:
    for phase in simulate(plan):
        assert phase.end >= 0
        for way in Way:
            instants = phase.instants[way]
            assert len(instants) == plan.nodes
            # To a microsecond: unix times have no more digits.
            pairs = zip(phase.instants[Way.NONE], instants, strict=True)
            assert all(earliest <= instant + 1e-6 for earliest, instant in pairs)
            step = step_for(phase.end, 50)
            counted = [rate * step for rate in rates(instants, step, phase.end)]
            assert sum(counted) == pytest.approx(plan.nodes)
            assert 1 <= busiest(instants, PEAK_S) <= plan.nodes


@given(STARTS)
def test_the_same_seed_is_the_same_fleet(plan: Plan) -> None:
    assert simulate(plan) == simulate(plan)


@pytest.mark.parametrize(
    ("history", "asks"),
    [
        (History.KEPT, [Ask.CONNECT]),
        (History.COMPACTED, [Ask.CONNECT, Ask.LIST]),
        (History.LOST, [Ask.LIST]),
        (History.NONE, [Ask.LIST]),
    ],
)
def test_who_lists_follows_from_what_was_kept(history: History, asks: list[Ask]) -> None:
    phases = simulate(Plan(5_000, history=history))
    assert [phase.ask for phase in phases] == asks
    longest = {
        Ask.CONNECT: 60.0,
        Ask.LIST: 30.0 if history is History.NONE else window_length(5_000),
    }
    assert [phase.window for phase in phases] == pytest.approx([longest[each] for each in asks])


@pytest.mark.parametrize("outage", [Outage.POWER_CUT, Outage.RACKS, Outage.ROLLING])
@pytest.mark.parametrize("spread", [0.0, 60.0, 1_800.0])
def test_however_5000_hosts_come_back_lists_keep_the_even_rate(outage: Outage, spread: float) -> None:
    ratio = only(POWER_CUT._replace(outage=outage, boot_spread=spread)).ratio(Way.WINDOW)
    assert ratio is not None
    assert ratio <= 1.1


def test_after_one_power_cut_random_delays_pile_up_and_nothing_is_a_storm() -> None:
    phase = only(POWER_CUT)
    jitter, none = phase.ratio(Way.JITTER), phase.ratio(Way.NONE)
    assert jitter is not None
    assert none is not None
    assert 1.5 < jitter < 3
    assert none > 50
    # All 5 000 within a minute.
    assert phase.peak(Way.NONE) * 60 == pytest.approx(5_000, rel=0.1)


def test_agents_that_live_through_an_outage_come_back_within_their_longest_pause() -> None:
    """At first up to twice as many as if evenly: `kvstore.patience` reckons with that."""
    plan = Plan(3_000, Outage.ETCD, History.KEPT, retry_base=RETRY_BASE_S, retry_cap=RETRY_CAP_S)
    phase = only(plan)
    assert phase.end <= RETRY_CAP_S
    assert 1 < phase.peak(Way.WINDOW) / phase.even < 2
    # An outage of a day is an outage of ten minutes: the pauses have long been at their longest.
    day = only(plan._replace(over=86_400.0))
    assert day.peak(Way.WINDOW) == pytest.approx(phase.peak(Way.WINDOW), rel=0.1)


def test_agents_that_live_list_a_store_without_history_in_their_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the gate of an agent says it: at the even rate, whenever each of them has heard of it."""
    plan = Plan(300, Outage.ETCD, History.COMPACTED, retry_base=RETRY_BASE_S, retry_cap=RETRY_CAP_S)
    back, lists = simulate(plan)
    assert (back.ask, lists.ask, lists.window) == (Ask.CONNECT, Ask.LIST, window_length(300))
    ratio = lists.ratio(Way.WINDOW)
    assert ratio is not None
    assert ratio <= 1.1
    monkeypatch.setattr("prestart.handover.time.time", lambda: BACK_AT)
    monkeypatch.setattr("prestart.handover.boot_time", lambda: 0.0)
    names, handover = host_names(300), Handover(kind=Kind.RESUME)
    of_agents = sorted(handover.next_relist(name, names) for name in names)
    simulated = sorted(instant % lists.window for instant in lists.instants[Way.WINDOW])
    assert simulated == pytest.approx(of_agents, abs=1e-3)


def test_a_host_that_is_alone_has_no_window_to_be_even_in() -> None:
    for phase in simulate(Plan(1)):
        assert (phase.window, phase.even, phase.ratio(Way.WINDOW)) == (0, 0, None)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=40))
def test_all_slots_at_once_are_the_slots_one_by_one(names: list[str]) -> None:
    assert slot_fractions(names) == {name: slot_fraction(name, names) for name in names}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40).map(sorted), st.floats(0.5, 60))
def test_the_busiest_span_is_found_wherever_it_begins(instants: list[float], span: float) -> None:
    """Some fullest span begins with an instant."""
    slow = max(sum(0 <= each - begin < span for each in instants) for begin in instants)
    assert busiest(instants, span) == slow


@given(st.floats(0, 1e6), st.integers(5, 200))
def test_steps_are_round_and_cover_the_time(length: float, most: int) -> None:
    step = step_for(length, most)
    assert step in STEPS_S or step > STEPS_S[-1]
    assert step * most >= length * 0.999999


def test_an_entry_is_as_large_as_an_agent_writes_it() -> None:
    """With addresses, identities and revisions of a large cluster, in etcd's answer."""
    size = 0
    for number in range(1_000):
        address, host = (
            f"10.{number % 250}.{number % 240}.{number % 230}",
            f"172.16.{number % 9}.{number % 255}",
        )
        record = schema.ip_record(
            address,
            256 + number * 60,
            host_ip=host,
            metadata=f"cilium-global:default:host-{number:05}:{number}",
        )
        entry = KeyValue(
            key=schema.ip_key(schema.DEFAULT_SPACE, address).encode(),
            value=schema.encode_ip(record),
            create_revision=1_000_000,
            mod_revision=1_200_000,
            version=1,
            lease=1 << 62,
        )
        size += RangeResponse(kvs=[entry]).ByteSize()
    assert size / 1_000 == pytest.approx(ENTRY_BYTES, rel=0.05)


def test_the_start_hook_never_loads_the_simulation() -> None:
    program = (
        "import sys, prestart.main; print('prestart.simulation' in sys.modules, 'random' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", program],
        cwd=Path(prestart.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]
