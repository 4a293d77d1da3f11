# SPDX-License-Identifier: Apache-2.0
"""A host that runs etcd, a docker engine and the agent, all real, all its own.

The agent runs from the checkout (`python -m agent`); the same from images is a `ComposedHost`
(tests.support.composed).  Used by tests/engine and tests/chaos; needs root.
"""

from __future__ import annotations

import base64
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from tests.support.engine import workload_images
from tests.support.host import REPO, Process, wait_for
from tests.support.node import Node

POOL = "10.50.0.0/16"
ETCD_PORT = 2379


class AgentHost(Node):
    """A docker host with the workload image; `start_etcd` and `start_agent` make it complete."""

    def __init__(self, prefix: str = "hfa", *, options: Sequence[str] = ()) -> None:
        super().__init__(prefix, options=options, images=workload_images())
        self.agent: Process | None = None
        self.source = REPO  # of the agents that are started
        self.state = self.directory / "state"
        self.run_dir = self.directory / "run"
        self.policies = self.directory / "policies"
        for each in (self.state, self.run_dir, self.policies):
            each.mkdir()
        self.socket = self.run_dir / "holdfast.sock"
        self.bpffs = "/sys/fs/bpf"
        self.etcd_address = "127.0.0.1"  # where its agent finds etcd: another host's, on the hub
        self.handed_over: dict[str, str] = {}  # what the start hook tells the next agent
        self._etcd: Process | None = None

    # --- etcd

    def start_etcd(self, *, shared: bool = False, quota: int = 0) -> None:
        """Start etcd on the host's loopback, `shared` on the hub as well, and wait until it answers.

        `quota`: bytes that its database may have, 0 for what etcd finds right.
        """
        url = f"http://127.0.0.1:{ETCD_PORT}"
        if shared:
            url += f",http://{self.address}:{ETCD_PORT}"
        self._etcd = self.popen(
            "etcd",
            *("--data-dir", str(self.directory / "etcd-data")),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync"),
            *("--logger", "zap", "--quota-backend-bytes", str(quota)),
        )
        wait_for(self._etcd_answers, "etcd's answer")

    def _etcd_answers(self) -> bool:
        # etcdctl that comes too early comes again after a second.
        assert self._etcd is not None
        return "serving client" in self._etcd.output() and "member" in self.etcdctl(
            "member", "list", "-w", "json", check=False
        )

    def stop_etcd(self) -> None:
        if self._etcd is not None:
            self._etcd.stop()

    def etcdctl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        """Run etcdctl in the host and return what it printed."""
        done = self.exec(
            "etcdctl", *arguments, check=check, stdin=stdin, environment={"ETCDCTL_API": "3"}, timeout=20
        )
        return done.stdout if done.returncode == 0 else ""

    def keys(self, prefix: str) -> dict[str, str]:
        """Return key → value below a prefix."""
        found = json.loads(self.etcdctl("get", "--prefix", prefix, "-w", "json")).get("kvs", [])
        return {_text(each["key"]): _text(each.get("value", "")) for each in found}

    # --- agent

    def options(self) -> dict[str, str]:
        """Return the options that every agent of a test has."""
        return {
            "kvstore-opt": f"etcd.address=http://{self.etcd_address}:{ETCD_PORT}",
            "state-dir": str(self.state),
            "socket-path": str(self.socket),
            "policy-dir": str(self.policies),
            "docker-endpoint": self.engine.url,
            "ipv4-range": POOL,
            "debug": "true",
        }

    def start_agent(self, **options: str) -> Process:
        """Start the agent and wait until its status is good."""
        started = self.launch_agent(**options)
        try:
            wait_for(self.healthy, "healthy agent", seconds=60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{started.output()[-6000:]}") from error
        return started

    def launch_agent(self, **options: str) -> Process:
        """Start the agent without waiting for anything."""
        given = self.options() | {name.replace("_", "-"): value for name, value in options.items()}
        arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
        python = {"PYTHONPATH": str(self.source), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment = python | self.handed_over
        self.agent = self.popen(sys.executable, "-m", "agent", *arguments, environment=environment)
        return self.agent

    def healthy(self) -> bool:
        """True when the agent says Ok of itself, of etcd and of the engine."""
        assert self.agent is None or self.agent.running, f"agent ended:\n{self.agent.output()[-6000:]}"
        status = self.api("/v1/healthz", check=False)
        wanted = ("holdfast", "kvstore", "container-runtime")
        return bool(status) and all(status[part]["state"] == "Ok" for part in wanted)

    def kill_agent(self) -> None:
        """SIGKILL, as an OOM killer would."""
        assert self.agent is not None
        self.agent.kill(signal.SIGKILL)
        self.agent.wait()

    def stop_agent(self) -> None:
        assert self.agent is not None
        self.agent.stop()

    def cli(self, *arguments: str, check: bool = True, stdin: str | None = None) -> Any:
        """Run `holdfast …` in the host and return the finished process."""
        return self.exec(
            *self._cli_command, *arguments, check=check, stdin=stdin, environment=self._cli_environment
        )

    def popen_cli(self, *arguments: str) -> Process:
        """Start `holdfast …` in the host and go on."""
        return self.popen(*self._cli_command, *arguments, environment=self._cli_environment)

    @property
    def _cli_command(self) -> tuple[str, ...]:
        return (sys.executable, "-c", "from cli.main import main; main()", "-H", str(self.socket))

    @property
    def _cli_environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(REPO), "COLUMNS": "200"}


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()
