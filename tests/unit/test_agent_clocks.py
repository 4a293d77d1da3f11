# SPDX-License-Identifier: Apache-2.0
"""Whose clock is wrong, and what an answer says of a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.clocks import TOLERATED_S, Clocks, Verdict, middle
from agent.probes import clock_ahead

NOON = 1_767_225_600.0  # Thu, 01 Jan 2026 00:00:00 GMT
HEAD = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nDate: {}\r\nConnection: close\r\n\r\n"


def verdict(**ahead: float) -> Verdict:
    clocks = Clocks()
    for node, seconds in ahead.items():
        clocks.put(node, seconds)
    return clocks.verdict()


def test_clocks_that_agree_say_nothing() -> None:
    assert verdict() == Verdict()
    assert verdict(a=0.4, b=-TOLERATED_S, c=TOLERATED_S) == Verdict(others=3)


def test_the_one_that_is_wrong_is_named_by_the_others() -> None:
    assert verdict(a=0.4, b=30.0) == Verdict(0.0, 1, 2, {"b": 30.0})
    assert verdict(a=0.4, b=-3600.0, c=1.0) == Verdict(0.0, 1, 3, {"b": -3600.0})


def test_the_one_that_is_wrong_says_so_and_names_nobody_who_is_right() -> None:
    """This host is 30 s behind: all others seem ahead."""
    assert verdict(a=30.0, b=30.4) == Verdict(-30.0, 2, 2, {})
    assert verdict(a=30.0, b=30.4, c=29.0, d=600.0) == Verdict(-30.0, 4, 4, {"d": 570.0})
    assert verdict(a=-20.0, b=-20.0, c=0.0, d=-20.0) == Verdict(20.0, 3, 4, {"c": 20.0})


def test_of_two_each_names_the_other() -> None:
    assert verdict(other=30.0) == Verdict(0.0, 1, 1, {"other": 30.0})
    assert verdict(other=-30.0) == Verdict(0.0, 1, 1, {"other": -30.0})


def test_who_left_or_said_nothing_does_not_count() -> None:
    clocks = Clocks()
    clocks.put("a", 40.0)
    clocks.put("b", 40.0)
    clocks.put("a", None)
    assert clocks.verdict() == Verdict(0.0, 1, 1, {"b": 40.0})
    clocks.forget("b")
    assert clocks.verdict() == Verdict()


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 30.0, -30.0]), max_size=9))
def test_the_quick_answer_is_the_long_ones(ahead: list[float]) -> None:
    """Nobody is looked for while most agree; the median would say the same."""
    found = verdict(**{f"n{number}": seconds for number, seconds in enumerate(ahead)})
    most = middle([0.0, *ahead])
    assert found.ahead == (-most if abs(most) > TOLERATED_S else 0.0)
    if not found.ahead:
        wrong = {f"n{number}" for number, each in enumerate(ahead) if abs(each) > TOLERATED_S}
        assert found.wrong.keys() == wrong


@pytest.mark.parametrize(
    ("date", "ahead"),
    [
        ("Thu, 01 Jan 2026 00:00:00 GMT", 0.5),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30.5),
        ("Wed, 31 Dec 2025 23:00:00 GMT", -3599.5),
        ("Thu, 01 Jan 2026 02:00:00 +0200", 0.5),
        ("Thu, 01 Jan 99999 00:00:00 GMT", None),
        ("soon", None),
        ("", None),
        ("\x1b[31m", None),
        ("Thu, 01 Jan 2026 00:00:00 GMT" + "x" * 100, None),
    ],
)
def test_the_date_of_an_answer(date: str, ahead: float | None) -> None:
    assert clock_ahead(HEAD.format(date).encode(), NOON - 1.0, NOON + 1.0) == ahead


def test_an_answer_without_a_date() -> None:
    assert clock_ahead(b"HTTP/1.1 200 OK\r\n\r\n", NOON, NOON) is None
