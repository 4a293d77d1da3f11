# SPDX-License-Identifier: Apache-2.0
"""Back-off, files, waits and supervision."""

from __future__ import annotations

import asyncio
import os
import random
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import waiting
from core.backoff import Backoff, cluster_interval, jittered
from core.errors import HoldfastError, shorten
from core.files import put_aside, write_atomic
from core.supervisor import OnDeath, Supervisor


@given(st.integers(0, 40), st.integers(0, 1000))
def test_a_backoff_stays_under_its_ceiling_and_above_zero(attempts: int, seed: int) -> None:
    backoff = Backoff(base=0.1, cap=60, attempts=attempts, rng=random.Random(seed))
    delay = backoff.next()
    assert 0 < delay <= max(0.01, min(60, 0.1 * 2**attempts))


def test_a_jittered_period_is_spread_and_stays_close() -> None:
    rng = random.Random(1)
    values = [jittered(100, rng=rng) for _ in range(1000)]
    assert min(values) >= 90
    assert max(values) <= 110
    assert max(values) - min(values) > 15


def test_periods_grow_with_the_logarithm_of_the_cluster() -> None:
    assert cluster_interval(10, 1) == 10
    assert cluster_interval(10, 100) == pytest.approx(46.15, abs=0.1)
    assert cluster_interval(10, 10_000) == pytest.approx(92.1, abs=0.1)


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, None)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    texts = [bytes([number]) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        writes = [pool.submit(write_atomic, path, text, durable=False) for text in texts * 40]
        assert [write.exception() for write in writes] == [None] * len(writes)
    assert path.read_bytes() in texts
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_damaged_file_is_kept_beside(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"{")
    assert put_aside(path) == f"kept as {(kept := next(tmp_path.iterdir()))}"
    assert kept.read_bytes() == b"{"
    assert kept != path


def test_a_damaged_file_that_can_not_be_kept_stays_and_is_told(tmp_path: Path) -> None:
    told = put_aside(tmp_path / "not-there.json")
    assert told == "it stays in place, it can not be set aside: No such file or directory"


async def test_a_wait_is_registered_while_it_lasts() -> None:
    with waiting.waiting("etcd", "first connection") as wait:
        assert wait in waiting.current()
        wait.note = "refused"
        assert wait.sentence().endswith("for etcd (first connection): refused")
    assert wait not in waiting.current()


async def test_a_child_that_dies_is_restarted_and_counted() -> None:
    supervisor = Supervisor()
    lives: list[int] = []
    alive = asyncio.Event()

    async def child() -> None:
        lives.append(len(lives))
        if len(lives) < 3:
            raise OSError("broken")
        alive.set()
        await asyncio.Event().wait()

    supervisor.start("child", child)
    await asyncio.wait_for(alive.wait(), 20)
    assert supervisor.children["child"].restarts == 2
    assert supervisor.children["child"].state == "running"
    await supervisor.stop()
    assert supervisor.children == {}


async def test_a_degraded_child_stays_dead_and_shown_and_exit_is_announced() -> None:
    supervisor = Supervisor()

    async def child() -> None:
        raise OSError("no ring buffer")

    supervisor.start("events", child, OnDeath.DEGRADE)
    supervisor.start("vital", child, OnDeath.EXIT)
    await asyncio.wait_for(supervisor.failed.wait(), 5)
    assert supervisor.children["events"].error == "OSError: no ring buffer"
    await supervisor.stop()


def test_an_error_carries_its_hint_and_hostile_text_is_escaped() -> None:
    assert str(HoldfastError("pool is full", hint="grow it")) == "pool is full (grow it)"
    assert "\x1b" not in shorten("\x1b[31mred")
    assert shorten("x" * 500).endswith("(500 characters)")
