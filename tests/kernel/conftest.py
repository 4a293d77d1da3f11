# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on the kernel's data path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.families import NETS, Net
from tests.support.host import run


@pytest.fixture(scope="module", params=NETS, ids=["ipv4", "ipv6"])
def net(request: pytest.FixtureRequest) -> Net:
    """Each address family in turn."""
    made: Net = request.param
    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)])
    try:
        yield mounted
    finally:
        run(["umount", str(mounted)])
