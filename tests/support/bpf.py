# SPDX-License-Identifier: Apache-2.0
"""A BPF file system of a test's own, gone afterwards with every pin in it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from datapath.bpffs import ensure_bpffs
from datapath.errors import BpffsError
from tests.support.require import require, require_root


@contextlib.contextmanager
def own_bpffs(directory: Path) -> Iterator[Path]:
    """Mount a BPF file system below `directory`; yield the place for pins in it."""
    require_root()
    mount = directory / "bpf"
    try:
        ensure_bpffs(mount)
    except BpffsError as error:
        require(False, str(error))
    try:
        yield mount / "tc" / "globals"
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=10)
