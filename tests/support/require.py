# SPDX-License-Identifier: Apache-2.0
"""What a test needs: without it the test is skipped with the reason — and fails when CI is set."""

from __future__ import annotations

import os
import shutil

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the running test when `condition` is false; fail it when CI is set, where nothing may miss."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI is set and a part is missing: {reason}")
    pytest.skip(reason)


def require_root() -> None:
    """Need root: namespaces, BPF, firewall."""
    require(os.geteuid() == 0, "needs root")


def require_tools(*names: str) -> None:
    """Need commands on PATH."""
    for name in names:
        require(shutil.which(name), f"needs {name} on PATH")
