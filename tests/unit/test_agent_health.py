# SPDX-License-Identifier: Apache-2.0
"""Who is probed when, what a node's record is good for, and what is made of the outcomes."""

from __future__ import annotations

import random
import time
import timeit
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.health import (
    ADDRESSES_MAX,
    FIRST_PER_S,
    FIRST_S,
    NodeHealth,
    Path,
    Prober,
    Schedule,
    State,
    addresses,
    first_within,
)
from agent.health_server import HealthServer, answer_to
from agent.probes import ECHO_TRIES, Outcome, checksum, echo_request, replied
from agent.report_health import SERIES_NODES_MAX, SHOWN, HealthCollector, health, summary
from core.backoff import cluster_interval
from core.table import Table
from kvstore.schema import NodeAddress, NodeRecord

BASE = 60.0
BOTH = frozenset({4, 6})


def schedule_of(nodes: int, *, seed: int = 1) -> Schedule:
    made = Schedule(BASE, random.Random(seed))
    made.join([f"default/n{number}" for number in range(nodes)], 0.0)
    return made


def run_for(schedule: Schedule, seconds: float) -> list[tuple[float, str]]:
    """Return (time, name) of every probe until then, each taken when it is due."""
    now, taken = 0.0, []
    while (wait := schedule.wait(now)) is not None and now + wait <= seconds:
        now += wait
        taken += [(now, name) for name in schedule.take(now)]
    return taken


# --- the schedule


@pytest.mark.parametrize("nodes", [1, 3, 100, 500])
def test_every_node_is_probed_once_a_period(nodes: int) -> None:
    schedule = schedule_of(nodes)
    period = cluster_interval(BASE, nodes)
    assert schedule.period == period
    times: dict[str, list[float]] = {}
    for at, name in run_for(schedule, 5 * period):
        times.setdefault(name, []).append(at)
    assert len(times) == nodes
    gaps = [later - before for each in times.values() for before, later in pairwise(each)]
    assert min(gaps) >= 0.9 * period
    assert max(gaps) <= 1.1 * period


def test_a_node_of_a_small_cluster_is_probed_at_once_and_of_a_large_one_by_few_agents_a_second() -> None:
    assert first_within(3) == FIRST_S
    assert max(at for at, _ in run_for(schedule_of(3), FIRST_S)) <= FIRST_S
    for nodes in (100, 1000, 10_000):
        assert nodes / first_within(nodes) <= FIRST_PER_S


def test_probes_of_a_large_cluster_are_spread_over_the_period() -> None:
    schedule = schedule_of(10_000)
    seconds = Counter(int(at) for at, _ in run_for(schedule, 2 * schedule.period))
    assert max(seconds.values()) < 60, "of 18 a second"


def test_a_new_node_does_not_move_the_others_and_one_that_left_is_never_due_again() -> None:
    schedule = schedule_of(3)
    before = run_for(schedule, 2.0)
    schedule.join(["default/new", "default/n1"], 2.0)
    assert len(schedule) == 4
    (first,) = (name for wait in [schedule.wait(2.0)] for name in schedule.take(2.0 + (wait or 0)))
    assert (first, len(before)) == ("default/new", 3)
    schedule.leave("default/n1")
    schedule.leave("default/nobody")
    assert "default/n1" not in schedule
    assert "default/n1" not in {name for _, name in run_for(schedule, 500.0)}
    for name in list(schedule):
        schedule.leave(name)
    assert (schedule.wait(0.0), schedule.take(10_000.0)) == (None, [])


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.floats(0, 100)), max_size=40))
def test_nobody_is_due_twice_or_forgotten_whoever_comes_and_goes(
    moves: list[tuple[str, bool, float]],
) -> None:
    schedule, there, now = Schedule(BASE, random.Random(1)), set(), 0.0
    for name, comes, pause in moves:
        now += pause
        if comes:
            schedule.join([name], now)
            there.add(name)
        else:
            schedule.leave(name)
            there.discard(name)
        taken = schedule.take(now)
        assert len(taken) == len(set(taken))
        assert set(taken) <= there
    assert set(schedule) == there
    longest = 1.1 * cluster_interval(BASE, 4)  # one that was probed while there were four of them
    assert set(schedule.take(now + longest)) == there


# --- what a record is good for


def record(*pairs: tuple[str, str]) -> NodeRecord:
    return NodeRecord("b", "default", tuple(NodeAddress(kind, ip) for kind, ip in pairs))


def test_internal_addresses_of_families_that_this_host_has() -> None:
    both = record(
        ("InternalIP", "fd77::2"),
        ("InternalIP", "10.77.0.2"),
        ("CiliumInternalIP", "10.50.0.1"),
        ("Hostname", "b.example"),
    )
    assert addresses(both, BOTH) == ("10.77.0.2", "fd77::2")
    assert addresses(both, frozenset({4})) == ("10.77.0.2",)
    assert addresses(record(("ExternalIP", "192.0.2.1")), BOTH) == ()
    assert addresses(NodeRecord("b", "default"), BOTH) == ()


@pytest.mark.parametrize(
    "ip", ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "169.254.169.254"]
)
def test_an_address_that_is_no_other_hosts_is_not_probed(ip: str) -> None:
    assert addresses(record(("InternalIP", ip), ("InternalIP", "10.77.0.2")), BOTH) == ("10.77.0.2",)


def test_a_record_with_very_many_addresses_is_probed_at_some() -> None:
    many = record(*(("InternalIP", f"10.77.{number // 256}.{number % 256}") for number in range(1, 1000)))
    assert len(addresses(many, BOTH)) == ADDRESSES_MAX


# --- outcomes

FINE, BAD = Outcome(0.0005), Outcome(error="Connection refused")


def test_a_node_is_reachable_when_every_probe_was_answered() -> None:
    assert NodeHealth().state is State.UNKNOWN
    assert NodeHealth((Path("10.0.0.1", FINE, FINE),)).state is State.REACHABLE
    assert NodeHealth((Path("10.0.0.1", FINE, FINE, FINE),)).state is State.REACHABLE
    for path in (
        Path("fd00::1", BAD, BAD),
        Path("fd00::1", FINE, BAD),
        Path("fd00::1", FINE, FINE, BAD),
    ):
        assert NodeHealth((Path("10.0.0.1", FINE, FINE), path)).state is State.UNREACHABLE
    assert Path("10.0.0.1", BAD, BAD, BAD).error == "TCP: Connection refused"
    assert Path("10.0.0.1", FINE, BAD).error == "HTTP: Connection refused"
    assert Path("10.0.0.1", FINE, FINE, BAD).error == "ICMP: Connection refused"


def prober_of(results: dict[str, NodeHealth], *, more: int = 0) -> Prober:
    """Return a prober that has found this; `more` nodes were not probed yet."""
    table: Table[str, NodeRecord] = Table("nodes", ("kvstore",))
    made = Prober(table, "default/me", ["10.0.0.9"], port=4240, base=BASE)
    made.schedule.join([*results, *(f"default/more{number}" for number in range(more))], 0.0)
    for name, found in results.items():
        made.results.put(name, found)
    return made


RESULTS = {
    "default/b": NodeHealth((Path("10.0.0.2", BAD, BAD, FINE), Path("fd00::2", FINE, FINE, None)), 1000.0),
    "default/me": NodeHealth((Path("10.0.0.9", FINE, FINE, FINE),), 2000.0),
    "far/c": NodeHealth((Path("10.0.0.3", FINE, FINE, FINE),), 3000.0),
}


def test_the_answer_of_the_api_has_this_node_first_and_ciliums_shape() -> None:
    found = health(prober_of(RESULTS, more=1))
    assert [each.name for each in found.nodes] == ["default/me", "default/b", "default/more0", "far/c"]
    assert [each.state for each in found.nodes] == ["reachable", "unreachable", "unknown", "reachable"]
    assert (found.local.name, found.timestamp) == ("default/me", "1970-01-01T00:50:00Z")
    b, more = found.nodes[1:3]
    assert b.host.primary_address is not None
    assert (b.host.primary_address.http.status, b.host.primary_address.ip) == (
        "Connection refused",
        "10.0.0.2",
    )
    (secondary,) = b.host.secondary_addresses
    assert (secondary.icmp, secondary.http.latency, secondary.http.status) == (None, 500_000, "")
    assert (more.host.primary_address, more.probed, more.age) == (None, "", -1.0)


def server() -> HealthServer:
    return HealthServer("default/a", ["10.0.0.9"], 4240)


def test_the_line_of_status_counts_and_names_the_first() -> None:
    many = {f"default/x{number}": RESULTS["default/b"] for number in range(SHOWN + 5)}
    found = summary(prober_of({**RESULTS, **many}, more=2), server())
    assert (found.state, found.nodes, found.reachable, found.unreachable) == (
        "Ok",
        len(many) + 5,
        2,
        len(many) + 1,
    )
    assert len(found.unreachable_nodes) == SHOWN
    first = found.unreachable_nodes[0]
    assert (first.name, first.ip, first.error) == ("default/b", "10.0.0.2", "TCP: Connection refused")
    assert summary(None, None).state == "Disabled"
    assert summary(prober_of({}), server()).age == -1.0


def test_an_address_that_can_not_be_listened_on_is_a_warning_that_names_it() -> None:
    listening = server()
    listening.errors["10.0.0.9"] = "Address already in use"
    found = summary(prober_of(RESULTS), listening)
    assert found.state == "Warning"
    assert "10.0.0.9 port 4240: Address already in use" in found.msg


def series(prober: Prober) -> dict[str, dict[tuple[str, ...], float]]:
    """Return metric → values of its labels → value, without those that name this node."""
    return {
        family.name: {
            tuple(
                value for name, value in sample.labels.items() if not name.startswith("source_")
            ): sample.value
            for sample in family.samples
        }
        for family in HealthCollector(prober).collect()
    }


def test_metrics_are_ciliums() -> None:
    found = series(prober_of(RESULTS, more=1))
    assert found["cilium_unreachable_nodes"] == {(): 1}
    assert found["cilium_node_health_connectivity_status"] == {
        ("node", "reachable"): 2,
        ("node", "unreachable"): 1,
        ("node", "unknown"): 1,
    }
    assert found["cilium_node_connectivity_status"] == {
        ("default", "me", "local_node", "node"): 1,
        ("default", "b", "remote_intra_cluster", "node"): 0,
        ("far", "c", "remote_inter_cluster", "node"): 1,
    }
    b = {
        labels: value
        for labels, value in found["cilium_node_connectivity_latency_seconds"].items()
        if "b" in labels
    }
    where = ("default", "b", "remote_intra_cluster", "node")
    assert b == {
        (*where, "10.0.0.2", "icmp", "primary"): 0.0005,
        (*where, "fd00::2", "http", "secondary"): 0.0005,
    }


def test_a_large_cluster_has_totals_and_no_series_a_node() -> None:
    small = prober_of({f"default/x{number}": RESULTS["far/c"] for number in range(SERIES_NODES_MAX)})
    assert len(series(small)["cilium_node_connectivity_status"]) == SERIES_NODES_MAX
    small.schedule.join(["default/one-more"], 0.0)
    totals = {"cilium_unreachable_nodes", "cilium_node_health_connectivity_status"}
    totals |= {"holdfast_narrow_paths", "holdfast_clock_ahead_seconds", "holdfast_wrong_clocks"}
    assert series(small).keys() == totals


# --- ICMP


@given(st.binary(min_size=0, max_size=40), st.sampled_from([4, 6]))
def test_nothing_but_the_reply_is_one(message: bytes, family: int) -> None:
    assert replied(message, family, b"01234567") is None


@pytest.mark.parametrize(("family", "reply"), [(4, 0), (6, 129)])
def test_a_reply_says_which_request_it_is_to(family: int, reply: int) -> None:
    for sequence in range(ECHO_TRIES):
        request = echo_request(family, sequence, b"01234567")
        assert checksum(request) == 0, "a sum over the sum is nothing"
        assert replied(request, family, b"01234567") is None
        answer = bytes([reply]) + request[1:]
        assert replied(answer + b"more", family, b"01234567") == sequence
        assert replied(answer, family, b"76543210") is None
        assert replied(bytes([reply, 1]) + request[2:], family, b"01234567") is None
    assert replied(bytes([reply]) + echo_request(family, 999, b"01234567")[1:], family, b"01234567") is None


# --- the answering side


def test_a_strangers_question_costs_as_much_as_it_is_long() -> None:
    """Not its square: whoever reaches the port would stop the agent with it."""

    def cost(length: int, fill: bytes) -> float:
        request_ = b"GET /hello HTTP/1.1\r\nHoldfast-Node:" + fill * (length // len(fill)) + b"\n\r\n\r\n"
        work = partial(answer_to, request_, "default/a", 0.0)
        return min(timeit.repeat(work, timer=time.process_time, number=10, repeat=5))

    for fill in (b" ", b"\t", b"a", b"%f", b"\r\nHoldfast-Node:", b"\r\nHoldfast-Node: "):
        assert cost(16 * 600, fill) < 5 * 16 * max(cost(600, fill), 20e-6), fill


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /hello HTTP/1.0\r\n\r\n", 200),
        (b"GET /hello HTTP/1.1\r\nHoldfast-Node: default/a\r\n\r\n", 200),
        (b"GET /hello HTTP/1.1\r\nholdfast-node:default%2Fa\r\nHost: x\r\n\r\n", 200),
        (b"GET /hello HTTP/1.1\r\nHoldfast-Node: default/b\r\n\r\n", 421),
        (b"GET /hello HTTP/1.1\r\nHoldfast-Node: other/a\r\n\r\n", 421),
        (b"GET /hello HTTP/1.1\r\nHoldfast-Node: \xff\x00%zz%ff\r\n\r\n", 421),
        (b"GET /hello HTTP/1.1\r\nHoldfast-Node: default/a", 404),  # never ended
        (b"GET / HTTP/1.1\r\nHoldfast-Node: default/b\r\n\r\n", 404),
        (b"GET /hello HTTP/1.1\r\nHost: x\r\n", 404),  # never ended
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /hello/../metrics HTTP/1.1\r\n\r\n", 404),
        (b"GET /hello2 HTTP/1.1\r\n\r\n", 404),
        (b"POST /hello HTTP/1.1\r\n\r\n", 404),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 404),
        (b"", 404),
    ],
)
def test_hello_is_all_that_is_answered(request_: bytes, code: int) -> None:
    answer = answer_to(request_, "default/a", 1_767_225_600.9)
    assert int(answer.split()[1]) == code
    head, end, body = answer.partition(b"\r\n\r\n")
    assert (end, body) == (b"\r\n\r\n", b"")
    assert head.split(b"\r\n")[1:] == [
        b"Date: Thu, 01 Jan 2026 00:00:00 GMT",
        b"Content-Length: 0",
        b"Connection: close",
    ]
