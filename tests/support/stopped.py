# SPDX-License-Identifier: Apache-2.0
"""A command that was stopped (^Z, a debugger, a frozen container) while it held the lock of the orders."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.host import REPO

HOLDER = """
import signal, sys
from pathlib import Path
from datapath import allowall
with allowall.locked(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


@contextlib.contextmanager
def stopped_command(state: Path) -> Iterator[None]:
    """Have a stopped process hold the lock of the orders in this state directory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(state)],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            holder.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
            yield
        finally:
            holder.kill()
