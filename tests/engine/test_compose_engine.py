# SPDX-License-Identifier: Apache-2.0
"""The private engine that set-up starts when CI is set: found again, ended with all it runs, nothing left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import REPO, run

ENGINE = str(REPO / "compose" / "setup" / "engine.sh")


@pytest.fixture
def setting(engine_parts: None) -> Iterator[dict[str, str]]:
    """Variables for an engine of the test's own, which is ended afterwards."""
    # Not tmp_path: a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="hfe") as directory:
        # What `docker` finds by default must not answer, or there is nothing to start.
        context = {"DOCKER_CONFIG": directory, "DOCKER_CONTEXT": ""}
        variables = {"CI": "1", "HOLDFAST_ENGINE_DIR": f"{directory}/engine", "DOCKER_HOST": "", **context}
        try:
            yield variables
        finally:
            run([ENGINE, "stop"], environment=variables)


def start(setting: dict[str, str]) -> str:
    found = run([ENGINE, "start"], environment=setting).stdout.strip()
    if not found.startswith(f"unix://{setting['HOLDFAST_ENGINE_DIR']}"):
        pytest.skip("an engine runs on this machine: set-up takes that one")
    return found


def test_engine_is_started_found_again_and_ended(setting: dict[str, str]) -> None:
    rules, namespaces = run(["iptables-save"]).stdout, run(["ip", "netns"]).stdout
    url = start(setting)
    assert start(setting) == url
    assert run(["docker", "version"], environment={"DOCKER_HOST": url}).returncode == 0
    run([ENGINE, "stop"], environment=setting)
    assert run(["docker", "version"], check=False, environment={"DOCKER_HOST": url}).returncode != 0
    mine = Path(setting["HOLDFAST_ENGINE_DIR"])
    assert not (mine / "host").exists()
    assert str(mine) not in Path("/proc/mounts").read_text()
    assert "docker" not in set(run(["iptables-save"]).stdout.split()) - set(rules.split())
    added = set(run(["ip", "netns"]).stdout.splitlines()) - set(namespaces.splitlines())
    assert not any(line.startswith("holdfast-") for line in added)


def test_stale_pid_of_somebody_else_is_left_alone(setting: dict[str, str]) -> None:
    """After a reboot the number in the file may be another process's: here it is this test's own."""
    host = Path(setting["HOLDFAST_ENGINE_DIR"]) / "host"
    host.mkdir(parents=True)
    (host / "name").write_text("holdfast-gone\n")
    (host / "pid").write_text(f"{os.getpid()}\n")
    run([ENGINE, "stop"], environment=setting)
    assert not host.exists()
