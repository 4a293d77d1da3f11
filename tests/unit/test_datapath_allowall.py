# SPDX-License-Identifier: Apache-2.0
"""Orders to allow all: when each ends, whatever clocks do; what their file holds; what policy leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.files import FileDamaged
from datapath import allowall
from datapath.allowall import BOTH_WAYS, FILE, WHOLE_HOST, Now, Order, entries, laid_over
from datapath.policy_order import RawPolicyEntry, RawPolicyKey

WALL, BOOTED = 1_700_000_000.0, 5_000.0
NOW = Now(WALL, BOOTED, "a")
KEYS = st.sampled_from([*BOTH_WAYS, (7, 0, 0, 0), (0, 80, 6, 0), (7, 80, 6, 1)])
STATES = st.dictionaries(KEYS, st.sampled_from([(False, 0, 0), (True, 0, 0)]))
ORDERED = st.sampled_from([{}, dict.fromkeys(BOTH_WAYS, (False, 0, 6_800)), {BOTH_WAYS[0]: (False, 0, 9)}])

State = dict[RawPolicyKey, RawPolicyEntry]


def half_an_hour(endpoint: int = 7) -> Order:
    return allowall.order(endpoint, 1800.0, reason="incident 4711", by="alice", now=NOW)


@pytest.mark.parametrize(
    ("now", "left"),
    [
        pytest.param(NOW, 1800, id="at once"),
        pytest.param(Now(WALL + 1799, BOOTED + 1799, "a"), 1, id="a second before its end"),
        pytest.param(Now(WALL + 1800, BOOTED + 1800, "a"), 0, id="at its end"),
        pytest.param(Now(WALL - 86400, BOOTED + 60, "a"), 1740, id="clock set back"),
        pytest.param(Now(WALL + 86400, BOOTED + 60, "a"), 1740, id="clock set ahead"),
        pytest.param(Now(WALL + 600, 30.0, "b"), 1200, id="after a reboot"),
        pytest.param(Now(0.0, 30.0, "b"), 0, id="after a reboot into 1970"),
        pytest.param(Now(WALL + 1801, 30.0, "b"), -1, id="ended while the host was down"),
    ],
)
def test_time_that_is_left(now: Now, left: float) -> None:
    assert half_an_hour().left(now) == pytest.approx(left)


def test_an_entry_ends_with_the_last_order_for_its_endpoint() -> None:
    longer = allowall.order(WHOLE_HOST, 3600.0, reason="r", by="b", now=NOW)
    assert entries([half_an_hour()], 7, NOW) == dict.fromkeys(BOTH_WAYS, (False, 0, 6800))
    assert entries([half_an_hour(), longer], 7, NOW) == dict.fromkeys(BOTH_WAYS, (False, 0, 8600))
    assert entries([half_an_hour(8)], 7, NOW) == {}
    assert entries([half_an_hour()], 7, Now(WALL, BOOTED + 1800, "a")) == {}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert allowall.read(tmp_path) == ()
    allowall.write(tmp_path, [half_an_hour(), half_an_hour(8)])
    assert allowall.read(tmp_path) == (half_an_hour(), half_an_hour(8))
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"\xff\xfe", "malformed"),
        (b"[]", "Expected `object`"),
        (b'{"orders": [], "version": 2}', "has version 2, not 1"),
        (b'{"orders": [{"endpoint": 7}], "version": 1}', "missing required field"),
        (b'{"version": 1}', "missing required field `orders`"),
    ],
)
def test_a_file_that_holds_no_orders_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(FileDamaged, match=reason) as raised:
        allowall.read(tmp_path)
    assert str(tmp_path / FILE) in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"endpoint":7', b'"endpoint":70000', "endpoint 70000 is not a number"),
        (b'"endpoint":7', b'"endpoint":-1', "endpoint -1 is not a number"),
        (b'"deadline":6800.0', b'"deadline":1e300', "times of endpoint 7 make no sense"),
        (b'"until":1700001800.0', b'"until":-5', "times of endpoint 7 make no sense"),
    ],
)
def test_an_order_that_makes_no_sense_is_named(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    allowall.write(tmp_path, [half_an_hour()])
    data = (tmp_path / FILE).read_bytes()
    assert old in data
    (tmp_path / FILE).write_bytes(data.replace(old, new))
    with pytest.raises(FileDamaged, match=reason):
        allowall.read(tmp_path)


@given(STATES, STATES, ORDERED)
def test_policy_that_changes_leaves_what_is_ordered(before: State, after: State, ordered: State) -> None:
    """By a change or as a whole: what is ordered allows, and everything else is as the policy says."""

    def over(state: State) -> State:
        """What a map ought to hold: an order where policy does not allow that much for ever."""
        kept = {key: entry for key, entry in ordered.items() if key not in state or state[key][0]}
        return state | kept

    upserts = {key: entry for key, entry in after.items() if before.get(key) != entry}
    written, gone = laid_over(upserts.items(), before.keys() - after.keys(), ordered)
    present = over(before)
    changed = {key: entry for key, entry in (present | written).items() if key not in gone}
    assert changed == over(after)
