# SPDX-License-Identifier: Apache-2.0
"""Each layout in Python is the struct that the compiled programs have, member by member."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from datapath.layouts import LAYOUTS, Layout
from tests.support.require import require, require_tools

BUILD = Path(__file__).parents[2] / "bpf" / "build"

Member = tuple[str, int, int]  # name, offset in bits, width of a bit field (0: none)


@cache
def structs(path: Path) -> dict[str, tuple[int, list[Member]]]:
    """Return name → (size, members) of every struct in an object's BTF."""
    dumped = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "file", str(path)], capture_output=True, check=True, timeout=30
    )
    types: list[dict[str, Any]] = json.loads(dumped.stdout)["types"]
    return {
        found["name"]: (
            found["size"],
            [(each["name"], each["bits_offset"], each.get("bitfield_size", 0)) for each in found["members"]],
        )
        for found in types
        if found["kind"] == "STRUCT"
    }


def members(layout: Layout) -> list[Member]:
    """Return a layout's members as BTF would list them: bit fields one by one."""
    found: list[Member] = []
    for field in layout.fields:
        position = layout.offsets[field.name] * 8
        if not field.bits:
            found.append((field.name, position, 0))
        for name, width in field.bits:
            found.append((name, position, width))
            position += width
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_is_the_compiled_struct(layout: Layout) -> None:
    require_tools("bpftool")
    found = []
    for name in ("endpoint.o", "endpoint6.o"):
        require((BUILD / name).exists(), f"{BUILD / name} is not built: make -C bpf")
        compiled = structs(BUILD / name)
        if layout.name in compiled:
            found.append(compiled[layout.name])
    # What both families have is the same struct in both.
    assert found
    assert found == [(layout.size, members(layout))] * len(found)
