# SPDX-License-Identifier: Apache-2.0
"""An emergency with nobody there: neither agent nor etcd.

allow_all_s
    `holdfast allow-all --endpoint …` is started → the first packet of a stranger passes, which is tried every
    two milliseconds.
allow_all_500_s
    The same with `--host` on a host of 500 endpoints, until the command has written the map of each.

Run: python -m bench.allow_all
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench import harness
from datapath import syscall
from datapath.maps import PolicyMap
from datapath.mapspec import policy_map_name
from datapath.testrun import ACT_OK
from tests.support import frames
from tests.support.bpf import own_bpffs
from tests.support.bpflab import CATALOGUE, Lab, lab
from tests.support.cli import command
from tests.support.families import NET4

ROUNDS = 9
ENDPOINTS = 500
LOOK_S = 0.002


class Host:
    """Endpoint 1 with its programs, and others of which there are the maps, all pinned below `root`."""

    def __init__(self, host: Lab, root: Path, state: Path) -> None:
        self._host, self._root, self._state = host, root, state
        self._ports = itertools.cycle(range(1_024, 60_000))
        root.mkdir(parents=True)
        syscall.obj_pin(host.policies[1].fd, root / policy_map_name(1))

    def add_others(self, stack: ExitStack) -> None:
        for number in range(2, ENDPOINTS + 1):
            stack.callback(PolicyMap.of(number, CATALOGUE, self._root).close)

    def holdfast(self, *words: str) -> subprocess.Popen[bytes]:
        where = ("--state-dir", str(self._state), "--bpf-root", str(self._root.parents[1]))
        return subprocess.Popen(command("allow-all", *words, *where), stdout=subprocess.DEVNULL)

    def is_open(self) -> bool:
        frame = frames.tcp(NET4.vm, NET4.endpoint(1), next(self._ports), 80)
        return self._host.deliver(1, frame).verdict == ACT_OK

    def first_packet(self) -> Iterator[float]:
        """Yield seconds from the start of the command to the first packet that passes."""
        for _ in range(ROUNDS):
            began = time.perf_counter()
            ordering = self.holdfast("--endpoint", "1", "--reason", "bench")
            while not self.is_open():
                time.sleep(LOOK_S)
            yield time.perf_counter() - began
            self._finished(ordering)
            self.take_back()

    def whole_host(self) -> Iterator[float]:
        """Yield seconds that the command takes to open every endpoint."""
        for _ in range(ROUNDS):
            began = time.perf_counter()
            self._finished(self.holdfast("--host", "--reason", "bench"))
            yield time.perf_counter() - began
            if not self.is_open():
                raise RuntimeError("the endpoint is not open")
            self.take_back()

    def take_back(self) -> None:
        self._finished(self.holdfast("--end"))
        if self.is_open():
            raise RuntimeError("the endpoint is still open")

    @staticmethod
    def _finished(process: subprocess.Popen[bytes]) -> None:
        if process.wait(60) != 0:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")


def main() -> None:
    """Print the figures."""
    harness.load()
    with tempfile.TemporaryDirectory() as directory, lab(1) as made, own_bpffs(Path(directory)) as root:
        state = Path(directory) / "state"
        state.mkdir()
        host = Host(made, root, state)
        harness.emit_median("allow_all_s", list(host.first_packet()), "s")
        with ExitStack() as stack:
            host.add_others(stack)
            harness.emit_median("allow_all_500_s", list(host.whole_host()), "s")


if __name__ == "__main__":
    main()
