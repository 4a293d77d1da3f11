# SPDX-License-Identifier: Apache-2.0
"""What an agent's checkpoint says, read as a person would: with SQLite, beside the running agent."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from agent import viewfile


class Saved:
    """The views in one state directory."""

    def __init__(self, state: Path) -> None:
        self.path = state / viewfile.NAME

    def keys(self, view: str) -> list[Any]:
        """Return the keys of a view, none without a file."""
        return [row[0] for row in self.rows(view)]

    def rows(self, view: str) -> list[tuple[Any, ...]]:
        if not self.path.exists():
            return []
        with self._open() as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (view,)).fetchone():
                return []  # it is being made
            return database.execute(f"SELECT * FROM {view}").fetchall()

    def knows(self, view: str, key: object) -> bool:
        return key in self.keys(view)

    def revision(self, view: str) -> int:
        """Return where a view stands, 0 where there is none."""
        places = {row[0]: row[1] for row in self.rows("places")}
        return int(places.get(view, 0))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=5)) as database:
            yield database
