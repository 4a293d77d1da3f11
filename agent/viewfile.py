# SPDX-License-Identifier: Apache-2.0
"""What etcd said last, on disk: one SQLite file, a table for each view.

    <state-dir>/views.db    addresses, identities, nodes, policies, each with the place in etcd's history
                            at which it stood; read it with ``sqlite3 views.db 'select * from addresses'``

SQLite, because it is what this needs: a change costs what has changed, a transaction is in the file or is
not (its journal has checksums), a full disk refuses the transaction and keeps what was.  Flushed to the disk
when the journal is taken over, not at every write: a power cut may lose the last seconds, and the watch
brings them again.

Everything here blocks; `agent.remembered` calls it in one thread.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import CheckpointDamaged
from core.files import set_aside
from kvstore.watch import Witness

NAME = "views.db"
VERSION = 2
# Pages of 8 KiB: 300 000 addresses are written in three quarters of the time that 4 KiB take.
PAGE_BYTES = 8192
READ_AT_ONCE = 2000
WRITTEN_AT_ONCE = 500
TYPES = {str: "TEXT", int: "INTEGER"}
COMPANIONS = ("-wal", "-shm")

Row = tuple[Any, ...]


class Place(msgspec.Struct, frozen=True):
    """Where in etcd's history a view stands, and when etcd last said that it is current (unix seconds).

    Revision 0 means that nothing is known.  `witness` is the write by which the history is known again
    (`kvstore.merge`).
    """

    revision: int = 0
    cluster_id: int = 0
    confirmed: float = 0.0
    witness: Witness | None = None


class Shape:
    """A view's table: its columns with their types, str or int; the first one is the key.

    `missing` comes behind them: 1 where etcd's last full list lacked the record.
    """

    def __init__(self, name: str, /, **columns: type) -> None:
        self.name = name
        self.key = next(iter(columns))
        whole = columns | {"missing": int}
        declared = [f"{column} {TYPES[kind]} NOT NULL" for column, kind in whole.items()]
        declared[0] += " PRIMARY KEY"
        names, values = ", ".join(whole), ", ".join("?" * len(whole))
        self.create = f"CREATE TABLE {name} ({', '.join(declared)}) WITHOUT ROWID"
        self.insert = f"INSERT OR REPLACE INTO {name} VALUES ({values})"
        # One step for many rows, in which SQLite lets the other threads go on: row by row it would wait
        # for a busy loop after each.
        self.insert_many = self.insert + f", ({values})" * (WRITTEN_AT_ONCE - 1)
        self.delete = f"DELETE FROM {name} WHERE {self.key} = ?"
        self.select = (
            f"SELECT json_group_array(json_array({names})), max({self.key}) "
            f"FROM (SELECT * FROM {name} {{}} ORDER BY {self.key} LIMIT {READ_AT_ONCE})"
        )
        self.decoder = msgspec.json.Decoder(list[tuple[tuple(whole.values())]])  # type: ignore[misc]


class ViewFile:
    """One open file.  `owner` says whose views these are: a file with another one is not read."""

    def __init__(self, path: Path, owner: str, shapes: Sequence[Shape]) -> None:
        self.path = path
        self._owner = owner
        self._shapes = shapes
        self._database: sqlite3.Connection | None = None

    def open(self) -> bool:
        """Open the file, or make it; return whether there was one.

        Raises CheckpointDamaged for one that can not be used, OSError and sqlite3.OperationalError where
        none can be opened or made.
        """
        self.close()
        existed = self.path.exists() and self.path.stat().st_size > 0
        # SQLite gives its journal the rights of the file.
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        with self._named_damage():
            self._settings(new=not existed)
            if existed:
                self._check()
            else:
                self._make()
        return existed

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def set_aside(self) -> Path:
        """Put a damaged file out of the way, for a person; return where it is."""
        self.close()
        for companion in COMPANIONS:
            self.path.with_name(self.path.name + companion).unlink(missing_ok=True)
        return set_aside(self.path)

    def place(self, shape: Shape) -> Place:
        """Return where a view stands."""
        with self._named_damage():
            found = self._opened.execute(
                "SELECT revision, cluster_id, confirmed, witness, written FROM places WHERE view = ?",
                (shape.name,),
            ).fetchone()
            if found is None:
                return Place()
            revision, cluster_id, confirmed, key, written = found
            witness = Witness(str(key), int(written)) if written else None
            return Place(int(revision), int(cluster_id, 16), float(confirmed), witness)

    def rows(self, shape: Shape) -> Iterator[list[Row]]:
        """Yield a view's rows, some at a time.  Raises CheckpointDamaged at any of them."""
        where = ""
        last: tuple[Any, ...] = ()
        with self._named_damage():
            while True:
                found, last_key = self._opened.execute(shape.select.format(where), last).fetchone()
                if last_key is None:
                    return
                where, last = f"WHERE {shape.key} > ?", (last_key,)
                yield shape.decoder.decode(found)

    def begin(self) -> None:
        """Begin a transaction; one that was broken off is undone."""
        self.undo()
        self._opened.execute("BEGIN IMMEDIATE")

    def put(self, shape: Shape, rows: Sequence[Row]) -> None:
        """Insert or replace rows."""
        whole = len(rows) - len(rows) % WRITTEN_AT_ONCE
        for start in range(0, whole, WRITTEN_AT_ONCE):
            some = rows[start : start + WRITTEN_AT_ONCE]
            self._opened.execute(shape.insert_many, tuple(chain.from_iterable(some)))
        self._opened.executemany(shape.insert, rows[whole:])

    def drop(self, shape: Shape, keys: Iterable[Any]) -> None:
        self._opened.executemany(shape.delete, ((key,) for key in keys))

    def stand(self, shape: Shape, place: Place) -> None:
        """Say where a view stands with what this transaction writes."""
        self._opened.execute(
            "INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?, ?)",
            (shape.name, place.revision, f"{place.cluster_id:x}", place.confirmed, *_columns(place.witness)),
        )

    def commit(self) -> None:
        self._opened.execute("COMMIT")

    def undo(self) -> None:
        """Undo the transaction under way, if there is one."""
        if self._database is not None and self._database.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # a full disk has ended it already
                self._database.execute("ROLLBACK")

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise sqlite3.OperationalError(f"{self.path} is not open")
        return self._database

    @contextlib.contextmanager
    def _named_damage(self) -> Iterator[None]:
        """Tell a file that is broken from a disk that is full or a directory that can not be written."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_ERROR:  # no such table, say: not as we made it
                raise CheckpointDamaged(str(error)) from error
            raise
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise CheckpointDamaged(str(error)) from error

    def _settings(self, *, new: bool) -> None:
        if new:
            self._opened.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._opened.execute("PRAGMA journal_mode = WAL")
        self._opened.execute("PRAGMA synchronous = NORMAL")
        self._opened.execute("PRAGMA busy_timeout = 1000")

    def _check(self) -> None:
        version = int(self._opened.execute("PRAGMA user_version").fetchone()[0])
        if version != VERSION:
            raise CheckpointDamaged(f"version {version} is not {VERSION}")
        found = self._opened.execute("SELECT name FROM owner").fetchone()
        if found != (self._owner,):
            raise CheckpointDamaged(f"it is of {found and found[0]}, this is {self._owner}")

    def _make(self) -> None:
        self._opened.execute("BEGIN IMMEDIATE")
        self._opened.execute("CREATE TABLE owner (name TEXT NOT NULL)")
        self._opened.execute("INSERT INTO owner VALUES (?)", (self._owner,))
        self._opened.execute(
            "CREATE TABLE places (view TEXT PRIMARY KEY, revision INTEGER NOT NULL, "
            "cluster_id TEXT NOT NULL, confirmed REAL NOT NULL, "
            "witness TEXT NOT NULL, written INTEGER NOT NULL)"
        )
        for shape in self._shapes:
            self._opened.execute(shape.create)
        self._opened.execute(f"PRAGMA user_version = {VERSION}")
        self._opened.execute("COMMIT")


def _columns(witness: Witness | None) -> tuple[str, int]:
    """A key that is no text can be no witness: SQLite would refuse it."""
    return (witness.key, witness.revision) if witness and witness.key.isprintable() else ("", 0)
