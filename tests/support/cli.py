# SPDX-License-Identifier: Apache-2.0
"""Runs the real `holdfast` command as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(*words: str, socket: Path | None = None) -> list[str]:
    """Return the argument vector of one `holdfast`."""
    where = ["-H", str(socket)] if socket else []
    return [sys.executable, "-m", "cli.main", *where, *words]


def run(
    *words: str, socket: Path | None = None, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `holdfast WORDS` without a terminal and return what it said."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST_")}
    return subprocess.run(
        command(*words, socket=socket),
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=environment | dict(env or {}),
        check=False,
    )
