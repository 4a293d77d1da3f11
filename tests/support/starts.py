# SPDX-License-Identifier: Apache-2.0
"""What a process costs from its start to its end, and the start hook as one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import prestart

FOLDER = Path(prestart.__file__).parent
INTERPRETER = (os.path.realpath(sys.executable), "-S", "-E")
HOOK = (*INTERPRETER, str(FOLDER / "__main__.py"))

# Run by a small process of its own: a child's peak memory begins with what it was forked from.
_MEASURE = """
import os, sys, time
for _ in range(9):
    begin = time.perf_counter()
    pid = os.posix_spawn(sys.argv[1], sys.argv[1:], {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 2)])
    usage = os.wait4(pid, 0)[2]
    print(time.perf_counter() - begin, usage.ru_maxrss)
"""


def cost(arguments: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return milliseconds and peak resident megabytes of nine runs of a command."""
    measured = subprocess.run(
        [*INTERPRETER, "-c", _MEASURE, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    rows = [tuple(map(float, line.split())) for line in measured.stdout.splitlines()]
    return [seconds * 1000 for seconds, _ in rows], [kilobytes / 1024 for _, kilobytes in rows]
