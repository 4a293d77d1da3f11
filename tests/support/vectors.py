# SPDX-License-Identifier: Apache-2.0
"""What a real cilium-agent 1.11 wrote, from tests/data: dumps of etcd and listings of its pinned maps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parents[1] / "data"

_ENTRY = re.compile(r"KEY   (?P<key>.*)\nVALUE (?P<value>.*)\n  lease=(?P<lease>[0-9a-f]+) ")


class Entry(NamedTuple):
    """One key of a dump; `leased` says whether it hangs on a lease."""

    key: str
    value: str
    leased: bool


class MapRow(NamedTuple):
    """One pinned map; sizes in bytes."""

    type: str
    key: int
    value: int
    max_entries: int
    flags: int


def etcd_dump(name: str) -> list[Entry]:
    """Return the keys of a file under tests/data/etcd, in its order."""
    text = (DATA / "etcd" / name).read_text()
    return [Entry(each["key"], each["value"], int(each["lease"], 16) != 0) for each in _ENTRY.finditer(text)]


def map_listing(name: str) -> dict[str, MapRow]:
    """Return the maps of a listing under tests/data by name."""
    return dict(_map_rows((DATA / name).read_text()))


def _map_rows(text: str) -> Iterator[tuple[str, MapRow]]:
    for line in text.splitlines()[1:]:
        name, kind, *sizes = line.split()
        key, value, entries, flags = (int(size, 0) for size in sizes[:4])
        yield name, MapRow(kind, key, value, entries, flags)
