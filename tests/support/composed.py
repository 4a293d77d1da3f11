# SPDX-License-Identifier: Apache-2.0
"""Hosts that the project's own set-up has made, from its images and compose files.

`ComposedHost.make` runs one of compose/setup's scripts there, as `make certs`, `make member` and `make join`
do for a person who follows docs/installation.md; `certificates` is the first of them.  A `ComposedFleet` is
some such hosts in one cluster; the first one's machine is the etcd member as well.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.engine import AGENT_IMAGE, ETCD_IMAGE, project_images
from tests.support.host import REPO, Hub, wait_for
from tests.support.node import Node, acquainted

SETUP = REPO / "compose" / "setup"
SETUP_SECONDS = 300
MEMBER = "etcd-1"
Done = subprocess.CompletedProcess[str]


class ComposedHost(Node):
    """A machine with an engine and the project's images; what runs there the scripts start."""

    def __init__(self, prefix: str = "hfc") -> None:
        super().__init__(prefix, images=project_images())
        self.socket = self.private("/run/holdfast") / "holdfast.sock"

    @property
    def environment(self) -> dict[str, str]:
        """What the project's scripts need to know on this machine."""
        return {
            **self.engine.environment,
            "HOLDFAST_IMAGE": AGENT_IMAGE,
            "HOLDFAST_ETCD_IMAGE": ETCD_IMAGE,
            "HOLDFAST_STATE_DIR": f"{self.directory}/state",
            "HOLDFAST_BIN_DIR": f"{self.directory}/bin",
        }

    def make(self, script: str, *arguments: str, check: bool = True, start_now: str = "test") -> Done:
        """Run one of compose/setup's scripts, as `make` does there.

        `start_now`: the word by which an agent skips its start window.  A new one is another setting of the
        agent's container, so compose makes that anew.
        """
        environment = self.environment | {"HOLDFAST_START_NOW": start_now}
        return self.exec(
            str(SETUP / script), *arguments, check=check, timeout=SETUP_SECONDS, environment=environment
        )

    def cli(self, *arguments: str, check: bool = True, stdin: str | None = None) -> Done:
        """Run the `holdfast` that the set-up has installed."""
        command = f"{self.directory}/bin/holdfast"
        return self.exec(command, *arguments, check=check, stdin=stdin, environment=self.engine.environment)

    def set_options(self, options: Mapping[str, str]) -> None:
        """Give the next agent these options (with _ for -): a file for each."""
        directory = self.private("/etc/holdfast") / "config"
        directory.mkdir(exist_ok=True)
        for name, value in options.items():
            (directory / name.replace("_", "-")).write_text(f"{value}\n")

    def container_of(self, role: str) -> str:
        """Return the container of one of the services, running or not."""
        (found,) = self.engine.docker("ps", "-aq", "--filter", f"label=holdfast.role={role}").stdout.split()
        return found

    def log(self) -> str:
        """Return what the agent has written since its container was made."""
        done = self.engine.docker("logs", self.container_of("agent"))
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def agent_stopped(self) -> Iterator[None]:
        """Have the agent's process stand still for the length of the block."""
        self._signal_agent("STOP")
        try:
            yield
        finally:
            self._signal_agent("CONT")

    def _signal_agent(self, signal: str) -> None:
        """Signal the child of the container's first process, an init that does not pass on everything."""
        state: Any = self.engine.inspect(self.container_of("agent"))["State"]
        self.exec("pkill", f"-{signal}", "--parent", str(state["Pid"]))


def certificates(folder: Path, members: Mapping[str, ComposedHost], hosts: Sequence[ComposedHost]) -> None:
    """Write an inventory into `folder` and have the first member make everybody's folders beside it."""
    inventory = {
        "members": {name: host.address for name, host in members.items()},
        "hosts": [host.name for host in hosts],
        "operators": ["admin"],
    }
    path = folder / "inventory.yaml"
    path.write_text(json.dumps(inventory))
    next(iter(members.values())).make("fleet.sh", str(path))


class ComposedFleet:
    """The hosts, with etcd; `start` gives them agents."""

    def __init__(self, hub: Hub, hosts: Sequence[ComposedHost], folder: Path) -> None:
        self.hub = hub
        self.hosts = hosts
        self._folder = folder
        members = {MEMBER: hosts[0]}
        certificates(folder, members, hosts)
        for name, host in members.items():
            host.make("member.sh", str(folder / "members" / name))

    def start(self, mode: str, **options: str) -> None:
        """Have each join with these options, or start anew with them, and wait until all know each other."""
        for host in self.hosts:
            host.set_options(options)
            host.make("join.sh", str(self._folder / "hosts" / host.name), start_now=mode)
        wait_for(lambda: acquainted(self.hosts), "host that knows all others", seconds=30)


@contextlib.contextmanager
def composed_fleet(size: int, folder: Path) -> Iterator[ComposedFleet]:
    """Make hosts on a switch of their own, and etcd; `folder` gets the certificates."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(Hub())
        hosts = [stack.enter_context(ComposedHost()) for _ in range(size)]
        for host in hosts:
            host.address = hub.join(host)
        yield ComposedFleet(hub, hosts, folder)
