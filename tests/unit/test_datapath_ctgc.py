# SPDX-License-Identifier: Apache-2.0
"""When connections are collected next: the rule, and what becomes of it under a load."""

from __future__ import annotations

import pytest

from datapath.ctgc import FIRST_INTERVAL_S, LONGEST_S, SHORTEST_S, Scan, next_interval

CAPACITY = 1000

# waited, entries found, of them deleted → wait
RULE = [
    # much room: rarer, up to the longest, whatever there was to delete
    (300, 0, 0, 450),
    (300, 200, 4, 450),
    (300, 200, 200, 450),
    (1500, 100, 0, LONGEST_S),
    # less room, and little to delete: rarer
    (300, 400, 8, 450),
    # as much as it should find: as before
    (300, 400, 40, 300),
    # much: more often, down to the shortest
    (300, 400, 200, 150),
    (12, 400, 200, SHORTEST_S),
    # however little there was to delete, a map that fills is looked at
    (1800, 249, 0, 1800),
    (1800, 250, 0, 900),
    (1800, 500, 0, 300),
    (1800, 750, 0, 60),
    (1800, 900, 0, SHORTEST_S),
    (1800, 1000, 1000, SHORTEST_S),
    # and where it is looked at often enough already, what it finds decides
    (40, 500, 100, 40),
    (40, 500, 0, 60),
]


@pytest.mark.parametrize(("waited", "scanned", "deleted", "wait"), RULE)
def test_the_rule(waited: float, scanned: int, deleted: int, wait: float) -> None:
    assert next_interval(waited, Scan(scanned, deleted, CAPACITY)) == wait


def test_what_a_scan_says_of_itself() -> None:
    assert str(Scan(600, 400, 1000)) == "400 of 600 connections deleted, the map was 60% full"


@pytest.mark.parametrize("per_second", [0.0, 0.1, 1.0, 5.0])
def test_short_flows_never_fill_the_map(per_second: float) -> None:
    """Entries that live a minute, from an empty map on, at rates that its size allows for.

    5 a second keep 300 alive: half an hour without a look would put 9 000 into a map of 1 000.
    """
    interval, present = FIRST_INTERVAL_S, 0.0
    for _ in range(200):
        present = min(present + per_second * interval, CAPACITY)
        alive = min(present, 60 * per_second)
        scan = Scan(int(present), int(present - alive), CAPACITY)
        interval = next_interval(interval, scan)
        present = alive
    assert scan.fill < 0.9
    assert interval == LONGEST_S or per_second > 0.1
