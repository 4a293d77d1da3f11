# SPDX-License-Identifier: Apache-2.0
"""The files and options of the start hook: what is accepted, what is refused, and what the message says."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestart import cluster, handover, options, state
from prestart.decision import Cluster, Decision, Kind, Last, Now, Setting, decide
from prestart.errors import OptionRefused, StateRefused

NOW = Now(1_800_000_000.0, 5_000.0, "boot-1")
DECISION = Decision(Kind.RELIST, 1_200.0, NOW.wall + 600, NOW.wall + 600, 2, "alice", "because")


def written(**changes: Any) -> bytes:
    return json.dumps(json.loads(state.encode("a", NOW, DECISION)) | changes).encode()


def test_state_comes_back_as_written(tmp_path: Path) -> None:
    state.save(tmp_path, "a", NOW, DECISION)
    last = state.load(tmp_path, "a", NOW)
    assert last == Last(Kind.RELIST, NOW.wall + 600, NOW.boot + 600, "boot-1", 2, "alice")
    assert (tmp_path / state.FILE).stat().st_mode & 0o777 == 0o600


def test_no_state_is_no_error(tmp_path: Path) -> None:
    assert state.load(tmp_path, "a", NOW) is None
    assert cluster.load(tmp_path) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (written()[:40], "is cut or damaged"),
        (b"\xff\x00" * 40, "is cut or damaged"),
        (b"[]", "is not a JSON object"),
        (written(version=2), "has version 2, not 1"),
        (written(host="b"), "is of host b, not of a"),
        (written(boot_id="boot-0", written=NOW.wall + 4_000), "is from the future, by 4000 s"),
        (written(connect_at="soon"), "connect_at is soon"),
        (written(connect_boot=True), "connect_boot is True"),
        (written(failures=10**400), "failures is 1000"),
        (written(failures=float("nan")), "failures is nan"),
        (written(kind="other"), "kind is other, which is unknown"),
        (written(override=None), "override is None"),
    ],
)
def test_unusable_state_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(StateRefused, match=r"prestart\.json") as refused:
        state.parse(data, "/var/lib/holdfast/prestart.json", "a", NOW)
    assert reason in str(refused.value)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_state_parser(data: bytes) -> None:
    with pytest.raises(StateRefused):
        state.parse(data, "x", "a", NOW)


@given(
    st.dictionaries(
        st.sampled_from(
            ["version", "host", "written", "boot_id", "kind", "connect_at", "connect_boot", "failures"]
        ),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([[]]),
    )
)
def test_whatever_the_state_says_a_start_comes_of_it(changes: dict[str, Any]) -> None:
    try:
        last = state.parse(written(**changes), "x", "a", NOW)
    except StateRefused:
        return
    decision = decide(NOW, Setting("a"), Cluster(1_000), last)
    assert NOW.wall <= decision.connect_at <= NOW.wall + 6 * decision.window


def test_clock_set_back_in_the_same_boot_is_not_the_future() -> None:
    assert state.parse(written(), "x", "a", NOW._replace(wall=1_000.0)).failures == 2


def test_lock_is_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "LOCK_PATIENCE_S", 0.1)
    other = os.open(tmp_path / state.LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(StateRefused, match="held by another start"), state.locked(tmp_path):
        pass
    os.close(other)
    with state.locked(tmp_path):
        pass


def test_cluster_file_comes_back(tmp_path: Path) -> None:
    (tmp_path / cluster.FILE).write_bytes(cluster.encode(["b", "a"], revision=12))
    assert cluster.load(tmp_path) == Cluster(2, ("a", "b"), 12)
    assert cluster.parse(b'{"nodes": 7}', "x") == Cluster(7, (), 0)
    assert cluster.parse(cluster.encode([], nodes=9), "x").nodes == 9


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not JSON"),
        (b"3", "is not a JSON object"),
        (b'{"version": 9, "nodes": 1}', "has version 9"),
        (b'{"nodes": -1}', "nodes is -1"),
        (b'{"nodes": true}', "nodes is True"),
        (b'{"nodes": 2, "names": [1]}', "names is"),
        (b'{"nodes": 2, "revision": "x"}', "revision is x"),
    ],
)
def test_unusable_cluster_file_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(StateRefused, match=reason):
        cluster.parse(data, "/var/lib/holdfast/cluster.json")


def test_options_come_from_flags_before_environment() -> None:
    environment = {
        "HOLDFAST_PRESTART_NODES": "10",
        "HOLDFAST_PRESTART_GATE": "start",
        "HOLDFAST_START_NOW": "al",
    }
    parsed = options.parse(["--nodes=20", "--window", "45m", "--", "agent", "--x"], environment)
    assert (parsed.nodes, parsed.window, parsed.gate) == (20, 2_700.0, options.Gate.START)
    assert (parsed.override, parsed.command) == ("al", ("agent", "--x"))
    assert parsed.node_name == os.uname().nodename


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--nodes", "-4"], {}, "option nodes='-4' from the command line is refused"),
        (["--nodes", "²"], {}, "option nodes="),
        (
            [],
            {"HOLDFAST_PRESTART_WINDOW": "3d"},
            "option window='3d' from environment HOLDFAST_PRESTART_WINDOW",
        ),
        (["--window", "25h"], {}, "at most 24h"),
        (["--gate", "shut"], {}, "one of connect, start"),
        (["--state-dir", "x"], {}, "absolute path"),
        (["--node-name", "a b"], {}, "must be a host name"),
        (["--node", "3"], {}, "unknown flag --node"),
        (["--nodes"], {}, "flag --nodes has no value"),
        (["--nodes", "1", "--nodes", "2"], {}, "given twice"),
        ([], {"HOLDFAST_PRESTART_NODE": "3"}, "unknown environment variable HOLDFAST_PRESTART_NODE"),
        ([], {"HOLDFAST_START_NOW": "a\nb"}, "HOLDFAST_START_NOW"),
    ],
)
def test_senseless_options_are_refused(flags: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(OptionRefused) as refused:
        options.parse([*flags, "--", "agent"], environment)
    assert message in str(refused.value)


@pytest.mark.parametrize("arguments", [[], ["--"], ["--nodes", "1"]])
def test_no_command_is_refused(arguments: list[str]) -> None:
    with pytest.raises(OptionRefused, match="no command"):
        options.parse(arguments, {})


def test_usage_names_every_option() -> None:
    assert all(f"--{option.name}" in options.usage() for option in options.TABLE)


def test_agent_reads_what_the_hook_hands_over() -> None:
    boot = handover.boot_time()
    now = Now(1_800_000_000.0, boot, "boot-1")
    decision = DECISION._replace(kind=Kind.RESUME, connect_at=now.wall + 40, relist_at=now.wall + 900)
    message = handover.Handover.read(handover.variables(now, decision, trouble="a file is empty"))
    assert message.window is None
    assert message.trouble == "a file is empty"
    assert handover.Handover.read(handover.variables(now, decision, 90.0)).window == 90
    assert (message.kind, message.reason) == (Kind.RESUME, "because")
    assert message.connect_boot == pytest.approx(boot + 40, abs=0.01)
    assert message.relist_boot == pytest.approx(boot + 900, abs=0.01)
    assert 0 < message.connect_wait() <= 40.01 < message.relist_wait() <= 900.01


def test_agent_without_the_hook_waits_for_nothing() -> None:
    message = handover.Handover.read({})
    assert (message.connect_wait(), message.relist_wait(), message.kind) == (0, 0, None)


@pytest.mark.parametrize(
    "name", [handover.CONNECT, handover.CONNECT_BOOT, handover.RELIST, handover.WINDOW, handover.KIND]
)
@pytest.mark.parametrize("text", ["", "soon", "nan", "inf"])
def test_damaged_handover_is_refused(name: str, text: str) -> None:
    with pytest.raises(OptionRefused, match=name):
        handover.Handover.read({handover.CONNECT: "1", name: text})
