# SPDX-License-Identifier: Apache-2.0
"""`holdfast kvstore maintain` and `status` as real processes beside a real etcd."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import etcd_pb2 as pb
from kvstore import rpc
from kvstore.client import Client
from tests.support.cli import ROOT, command, run
from tests.support.etcd import EtcdServer
from tests.support.host import wait_for


@pytest.fixture
def config(etcd: EtcdServer, tmp_path: Path) -> Path:
    """An etcd.config for the running etcd."""
    path = tmp_path / "etcd.config"
    path.write_text(f"endpoints: [{json.dumps(etcd.endpoint)}]\n")
    return path


@pytest.fixture
def maintenance(config: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon beside m0, once it works."""
    words = ("kvstore", "maintain", "--member", "m0", "--directory", str(tmp_path / "kept"))
    daemon = subprocess.Popen(
        command(*words, "--etcd-config", str(config), "-o", "json"), cwd=ROOT, stderr=subprocess.PIPE
    )
    try:
        wait_for_snapshot(config)
        yield daemon
    finally:
        daemon.kill()
        daemon.communicate()


def wait_for_snapshot(config: Path) -> None:
    def taken() -> bool:
        (member,) = json.loads(status(config, "-o", "json")[1])["members"]
        return bool((member["maintenance"] or {}).get("snapshot"))

    wait_for(taken, "snapshot in the status")


def status(config: Path, *words: str) -> tuple[int, str, str]:
    done = run("kvstore", "status", *words, "--etcd-config", str(config))
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def check(directory: Path) -> tuple[int, str]:
    done = run("kvstore", "maintain", "--member", "m0", "--directory", str(directory), "--check")
    return done.returncode, done.stdout


def raise_alarm(etcd: EtcdServer) -> None:
    async def ask() -> None:
        client = Client(etcd.config)
        (status,) = await client.status()
        assert not status.error
        answer = await client.transport.call(rpc.MEMBERS, pb.MemberListRequest(), "")
        request = pb.AlarmRequest(
            action=pb.AlarmRequest.ACTIVATE, memberID=answer.members[0].ID, alarm=pb.AlarmType.CORRUPT
        )
        await client.transport.call(rpc.ALARM, request, "")
        await client.close()

    asyncio.run(ask())


def test_daemon_takes_a_snapshot_is_healthy_and_ends_when_told(
    config: Path, tmp_path: Path, maintenance: subprocess.Popen[bytes]
) -> None:
    code, shown, _ = status(config)
    header, row = shown.splitlines()
    assert header.split() == ["MEMBER", "ENDPOINT", "STATE", "SIZE", "FREE", "SNAPSHOT", "DEFRAGMENTED"]
    assert row.split()[0] == "m0"
    assert "leader" in row
    assert row.endswith("never")
    assert code == 0
    assert check(tmp_path / "kept")[0] == 0
    maintenance.terminate()
    _, log = maintenance.communicate(timeout=20)
    assert maintenance.returncode == 0
    assert any(json.loads(line)["msg"].startswith("snapshot m0-") for line in log.splitlines())


def test_alarm_comes_first_and_fails(
    config: Path, tmp_path: Path, etcd: EtcdServer, maintenance: subprocess.Popen[bytes]
) -> None:
    raise_alarm(etcd)
    code, shown, _ = status(config)
    assert (code, shown.splitlines()[0]) == (1, "ALARM CORRUPT on m0")
    found = json.loads(status(config, "-o", "json")[1])
    assert (found["healthy"], found["alarms"]) == (False, [{"kind": "CORRUPT", "member": "m0"}])


def test_etcd_that_is_away_and_wrong_names_are_told(config: Path, tmp_path: Path, etcd: EtcdServer) -> None:
    other = tmp_path / "other"
    words = ["kvstore", "maintain", "--member", "m7", "--directory", str(other), "--etcd-config", str(config)]
    daemon = subprocess.Popen(command(*words), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: "etcd has no member 'm7', its members are m0" in check(other)[1], "the reason")
        assert check(other)[0] == 1
    finally:
        daemon.kill()
        daemon.wait()
    assert check(tmp_path / "none")[0] == 1
    assert run("kvstore", "maintain", "--member", "a/b", "--etcd-config", str(config)).returncode == 1
    assert run("kvstore", "maintain", "--member", "m0", "--snapshot-interval", "soon").returncode == 2
    etcd.stop()
    code, shown, _ = status(config)
    assert code == 3
    assert "not serving" in shown
