# SPDX-License-Identifier: Apache-2.0
"""Three etcd members of one cluster, each at an address of its own on a hub; killed and brought back by name.

with EtcdMembers(hub) as members:      # running, with a leader
    members.kill(members.leader())     # SIGKILL; members.start(name) brings it back on its data
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.host import COMMAND_TIMEOUT_S, Hub, run, wait_for
from tests.support.places import Neighbour

CLIENTS, PEERS = 2379, 2380
NAMES = ("m1", "m2", "m3")


class EtcdMembers:
    """The members; `config` is a file with the endpoints of all, as an agent reads it."""

    def __init__(self, hub: Hub) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="members."))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._machines = {name: Neighbour(hub) for name in NAMES}
        self.config = self._directory / "etcd.config"
        self.config.write_text(json.dumps({"endpoints": self._urls(NAMES)}))

    def __enter__(self) -> Self:
        try:
            for name in NAMES:
                self.start(name)
            self.wait_serving()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> list[str]:
        return sorted(self._processes)

    def start(self, name: str) -> None:
        """Start a member on the data that it has; the first time all are needed before one serves."""
        with (self._directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._inside(name, *self._command(name)), stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        """SIGKILL, as a machine that loses its power."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def wait_serving(self) -> None:
        """Wait until every running member answers what needs a quorum."""
        wait_for(lambda: all(map(self._serves, self.running)), "etcd members that serve", pause=0.2)

    def leader(self) -> str:
        """Return the name of the leader."""
        statuses = {name: self._status(name) for name in self.running}
        return next(name for name, each in statuses.items() if each["leader"] == each["header"]["member_id"])

    def keys(self, prefix: str) -> dict[str, str]:
        """Return key → value below a prefix."""
        done = self._ctl(self.running[0], "get", "--prefix", prefix, "-w", "json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout).get("kvs", [])
        return {_text(each["key"]): _text(each.get("value", "")) for each in found}

    def stop(self) -> None:
        """End the members and remove their machines and data."""
        for name in self.running:
            self.kill(name)
        for machine in self._machines.values():
            machine.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _serves(self, name: str) -> bool:
        assert self._processes[name].poll() is None, (self._directory / f"{name}.log").read_text()[-2000:]
        return self._ctl(name, "get", "nothing").returncode == 0

    def _status(self, name: str) -> Any:
        return json.loads(self._ctl(name, "endpoint", "status", "-w", "json").stdout)[0]["Status"]

    def _ctl(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["etcdctl", "--endpoints", *self._urls([name]), "--command-timeout", "2s", *arguments]
        environment = {"ETCDCTL_API": "3"}
        return run(
            self._inside(name, *command), check=False, timeout=COMMAND_TIMEOUT_S, environment=environment
        )

    def _inside(self, name: str, *command: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self._machines[name].netns}", *command]

    def _urls(self, names: Sequence[str], port: int = CLIENTS) -> list[str]:
        return [f"http://{self._machines[name].address}:{port}" for name in names]

    def _command(self, name: str) -> list[str]:
        peers = dict(zip(NAMES, self._urls(NAMES, PEERS), strict=True))
        (clients,) = self._urls([name])
        return [
            "etcd",
            *("--name", name, "--data-dir", str(self._directory / name)),
            *("--listen-client-urls", clients, "--advertise-client-urls", clients),
            *("--listen-peer-urls", peers[name], "--initial-advertise-peer-urls", peers[name]),
            *("--initial-cluster", ",".join(f"{each}={url}" for each, url in peers.items())),
            *("--unsafe-no-fsync", "--logger", "zap"),
        ]


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()
