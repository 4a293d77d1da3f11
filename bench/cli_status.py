# SPDX-License-Identifier: Apache-2.0
"""`cli_status_s`: all of `holdfast status`, interpreter included, against a small agent on a real socket.

The agent is the one of the tests, in a process of its own, so that the figure is the command's and the
handler's, not that of a busy host.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.harness import emit, load, note

SAMPLES = 15
SERVER = """
import sys, threading
from pathlib import Path
from tests.support.agent_view import FakeAgent, serving
with serving(FakeAgent(), Path(sys.argv[1])):
    sys.stdin.read()
"""


def main() -> None:
    """Print the median of `SAMPLES` runs and, beside it, what the interpreter alone takes."""
    load()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "h.sock"
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(path)], stdin=subprocess.PIPE)
        try:
            _wait_for(path)
            command = [str(Path(sys.executable).with_name("holdfast")), "-H", str(path), "status"]
            samples = [_wall(command) for _ in range(SAMPLES)]
            bare = statistics.median(_wall([sys.executable, "-c", ""]) for _ in range(SAMPLES))
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(10)
    emit("cli_status_s", statistics.median(samples), "s", SAMPLES)
    note(f"slowest {max(samples):.3f} s; the interpreter alone {bare:.3f} s")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody serves {path}")
        time.sleep(0.05)


def _wall(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
