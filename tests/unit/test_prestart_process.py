# SPDX-License-Identifier: Apache-2.0
"""The start hook as a process: what it execs, what it leaves behind, how it ends, what it costs."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from prestart import cluster, handover, state
from tests.support.starts import FOLDER, HOOK, INTERPRETER, cost

SHOW = ("/usr/bin/env",)
# Of two hosts in a window of a day one has its slot at six and the other at eighteen hours UTC: the one whose
# slot is hours away, or the instant would pass while a test looks.
HOST = "b" if time.gmtime().tm_hour < 12 else "a"
ALWAYS_LONG = ("--node-name", HOST, "--window", "24h")


def environment(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **more}


def run(
    directory: Path, *flags: str, command: tuple[str, ...] = SHOW, **more: str
) -> subprocess.CompletedProcess[str]:
    arguments = [*HOOK, "--state-dir", str(directory), *flags, "--", *command]
    return subprocess.run(
        arguments, env=environment(**more), cwd="/", capture_output=True, text=True, timeout=30
    )


def handed_over(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert result.returncode == 0, result.stderr
    return dict(line.split("=", 1) for line in result.stdout.splitlines())


def relist_in_a_long_window(directory: Path) -> None:
    (directory / cluster.FILE).write_bytes(cluster.encode(["a", "b"]))


def test_execs_at_once_and_hands_over_the_instant(tmp_path: Path) -> None:
    relist_in_a_long_window(tmp_path)
    given = handed_over(run(tmp_path, *ALWAYS_LONG))
    assert given[handover.KIND] == "relist"
    stored = json.loads((tmp_path / state.FILE).read_bytes())
    assert float(given[handover.CONNECT]) == pytest.approx(stored["connect_at"], abs=0.001)


def test_runs_as_module_from_the_directory_around_it(tmp_path: Path) -> None:
    arguments = [*INTERPRETER, "-m", "prestart", "--state-dir", str(tmp_path), "--nodes", "1", "--", *SHOW]
    result = subprocess.run(
        arguments, env=environment(), cwd=FOLDER.parent, capture_output=True, text=True, timeout=30
    )
    assert handed_over(result)[handover.KIND] == "fresh"


def test_restart_before_the_instant_keeps_it_and_after_it_waits_a_window(tmp_path: Path) -> None:
    relist_in_a_long_window(tmp_path)
    first, second = (float(handed_over(run(tmp_path, *ALWAYS_LONG))[handover.CONNECT]) for _ in range(2))
    assert second == pytest.approx(first, abs=0.01)
    content = json.loads((tmp_path / state.FILE).read_bytes())
    behind = content["connect_boot"] - handover.boot_time() + 1
    content |= {
        "connect_at": content["connect_at"] - behind,
        "connect_boot": content["connect_boot"] - behind,
    }
    (tmp_path / state.FILE).write_text(json.dumps(content))
    third = float(handed_over(run(tmp_path, *ALWAYS_LONG))[handover.CONNECT])
    assert third - content["connect_at"] >= 86_400 - 0.01


def test_override_starts_once_and_is_logged(tmp_path: Path) -> None:
    relist_in_a_long_window(tmp_path)
    first = run(tmp_path, *ALWAYS_LONG, HOLDFAST_START_NOW="alice")
    assert float(handed_over(first)[handover.CONNECT]) <= time.time()
    assert "by order of alice" in first.stderr
    second = run(tmp_path, *ALWAYS_LONG, HOLDFAST_START_NOW="alice")
    assert float(handed_over(second)[handover.CONNECT]) > time.time() + 86_000
    assert "not used again" in second.stderr


@pytest.mark.parametrize("file", [state.FILE, cluster.FILE])
@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": 99}', random.Random(1).randbytes(64)])
def test_damaged_file_is_kept_aside_and_reported(tmp_path: Path, file: str, damage: bytes) -> None:
    (tmp_path / file).write_bytes(damage)
    result = run(tmp_path)
    given = handed_over(result)
    assert given[handover.KIND] == "fresh"
    (kept,) = tmp_path.glob(f"{file}.damaged-*")
    assert kept.read_bytes() == damage
    assert "level=WARNING" in result.stderr
    assert str(kept) in result.stderr
    assert str(kept) in given[handover.TROUBLE], "what status shows"
    assert handed_over(run(tmp_path))[handover.TROUBLE] == ""


def test_state_directory_that_is_none_does_not_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "below")
    given = handed_over(result)
    assert given[handover.KIND] == "fresh"
    assert "starting without the state file" in result.stderr
    assert "starting without the state file" in given[handover.TROUBLE]


def test_senseless_option_ends_with_2_and_starts_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, "--window", "-1s")
    assert (result.returncode, result.stdout) == (2, "")
    assert "option window='-1s' from the command line" in result.stderr


@pytest.mark.parametrize(("command", "status"), [("/no/such/agent", 127), ("/etc/passwd", 126)])
def test_command_that_can_not_be_started_is_named(tmp_path: Path, command: str, status: int) -> None:
    result = run(tmp_path, command=(command,))
    assert result.returncode == status
    assert f"{command} can not be started" in result.stderr


def test_agent_inherits_neither_blocked_nor_ignored_signals(tmp_path: Path) -> None:
    result = run(tmp_path, command=("/bin/grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"))
    found = [int(line.split()[1], 16) for line in result.stdout.splitlines()]
    # Signals 32 and 33 are the C library's own: whoever starts the test may leave them ignored, nobody can
    # change that.
    assert [each & ~(0b11 << 31) for each in found] == [0, 0]


def test_gate_start_holds_the_process_until_its_slot(tmp_path: Path) -> None:
    result = run(tmp_path, "--gate", "start", "--window", "2s")
    given = handed_over(result)
    assert float(given[handover.CONNECT]) <= time.time()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_the_wait_ends_it_with_0(tmp_path: Path, ending: signal.Signals) -> None:
    relist_in_a_long_window(tmp_path)
    arguments = [*HOOK, "--state-dir", str(tmp_path), *ALWAYS_LONG, "--gate", "start", "--", "/bin/false"]
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "waiting" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(ending)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_an_order_ends_the_wait_and_counts_once(tmp_path: Path) -> None:
    relist_in_a_long_window(tmp_path)
    arguments = [*HOOK, "--state-dir", str(tmp_path), *ALWAYS_LONG, "--gate", "start", "--", *SHOW]
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        try:
            while "waiting" not in process.stderr.readline():
                assert process.poll() is None
            (tmp_path / state.ORDER).write_text("alice\x1b[2J\n")
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
        assert "by order of alice[2J" in process.stderr.read()
        now = time.time()
        given = dict(line.split("=", 1) for line in process.stdout.read().splitlines())
    assert max(float(given[handover.CONNECT]), float(given[handover.RELIST])) <= now, (
        "the agent waits as well"
    )
    assert "by order of alice" in given[handover.REASON]
    assert not (tmp_path / state.ORDER).exists()


def test_an_order_from_before_the_start_is_taken_by_it(tmp_path: Path) -> None:
    relist_in_a_long_window(tmp_path)
    for _ in range(2):  # the same person may order twice
        (tmp_path / state.ORDER).write_text("alice")
        result = run(tmp_path, *ALWAYS_LONG, "--gate", "start")
        assert "started at once by order of alice at" in result.stderr
        given = handed_over(result)
        assert given[handover.KIND] == "relist"
        assert float(given[handover.RELIST]) <= time.time()


def test_two_at_once_agree(tmp_path: Path) -> None:
    relist_in_a_long_window(tmp_path)
    arguments = [*HOOK, "--state-dir", str(tmp_path), *ALWAYS_LONG, "--", *SHOW]
    processes = [
        subprocess.Popen(
            arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(4)
    ]
    instants = {
        round(float(re.findall(rf"{handover.CONNECT}=(.*)", each.communicate()[0])[0]), 1)
        for each in processes
    }
    assert len(instants) == 1


def test_start_takes_little_memory(tmp_path: Path) -> None:
    """And time, of which bench/prestart.py tells."""
    relist_in_a_long_window(tmp_path)
    _, megabytes = cost([*HOOK, "--state-dir", str(tmp_path), "--", "/bin/true"])
    assert max(megabytes) < 15
