# SPDX-License-Identifier: Apache-2.0
"""What etcd said last, on disk: one SQLite file, a table for each view.

    <state-dir>/views.db    addresses, identities, nodes, policies, each with the place in etcd's history
                            at which it stood; read it with ``sqlite3 views.db 'select * from addresses'``

Records lie together in blocks, some dozens in each, as JSON: a row of SQLite's for each of 300 000 addresses
costs three times as much to write and twice as much to read.  Which block a record is in follows from its
key alone.  A change is merged into its block; who reads the file sees a table with a row for each record,
which is a view of the blocks in SQLite's sense.

SQLite, because it is what this needs: a change costs what has changed, a transaction is in the file or is
not, a full disk refuses the transaction and keeps what was.  Until the first view, the largest, has been
written, a page goes where it belongs at once; from then on into a log first (SQLite's WAL, which has
checksums), flushed to the disk when it is taken over, not at every write: a power cut may lose the last
seconds, and the watch brings them again.

Everything here blocks; `agent.remembered` calls it in one thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import msgspec

from agent.errors import CheckpointDamaged
from core.files import set_aside
from kvstore.watch import Witness

NAME = "views.db"
VERSION = 3
# Pages of 8 KiB: a block of 300 000 addresses fills one.
PAGE_BYTES = 8192
BLOCKS = 4096
READ_AT_ONCE = 13  # blocks: a thousand addresses
# In place of a cluster's number (a random one): the view is whole, but no history can be followed from it.
NO_CLUSTER = 1
COMPANIONS = ("-wal", "-shm", "-journal")

Row = tuple[Any, ...]  # without the key
Rows = dict[Any, Row]
T = TypeVar("T")


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

    `missing` comes behind them: true where etcd's last full list lacked the record.  Keys that differ in the
    last `together` characters only are in one block: what came together then lies together in memory too, and
    half of what writing costs is waiting for memory.
    """

    def __init__(self, name: str, /, *, together: int = 0, **columns: type) -> None:
        self.name = name
        self.together = together
        (key, key_type), *others = columns.items()
        values = dict(others) | {"missing": bool}
        blocks = f"{name}_blocks"
        named = "CAST(key AS INTEGER)" if key_type is int else "key"
        shown = ", ".join(
            [
                f"{named} AS {key}",
                *(f"json_extract(value, '$[{at}]') AS {each}" for at, each in enumerate(values)),
            ]
        )
        self.create = (
            f"CREATE TABLE {blocks} (block INTEGER PRIMARY KEY, records TEXT NOT NULL)",
            f"CREATE VIEW {name} AS SELECT {shown} FROM {blocks}, json_each(records)",
        )
        self.find = f"SELECT records FROM {blocks} WHERE block = ?"
        self.insert = f"INSERT OR REPLACE INTO {blocks} VALUES (?, ?)"
        self.delete = f"DELETE FROM {blocks} WHERE block = ?"
        self.clear = f"DELETE FROM {blocks}"
        self.select = (
            f"SELECT block, records FROM {blocks} WHERE block > ? ORDER BY block LIMIT {READ_AT_ONCE}"
        )
        self.decoder = msgspec.json.Decoder(dict[key_type, tuple[tuple(values.values())]])  # type: ignore[misc,valid-type]
        self.raw_decoder = msgspec.json.Decoder(dict[key_type, msgspec.Raw])  # type: ignore[valid-type]


class Part(msgspec.Struct, frozen=True, gc=False):
    """What changes in a block: the keys that do, and the rows of those that are not gone."""

    block: int
    keys: Sequence[Any]
    rows: Rows


def blocks_of(shape: Shape, keys: Iterable[T]) -> list[tuple[int, list[T]]]:
    """Return the numbers of the blocks that some keys are in, in order, with the keys."""
    blocks: defaultdict[int, list[T]] = defaultdict(list)
    end = -shape.together or None
    for key in keys:
        blocks[crc32(str(key)[:end].encode()) % BLOCKS].append(key)
    return sorted(blocks.items())


class ViewFile:
    """One open file.  `owner` says whose views these are: a file with another one is not read."""

    def __init__(self, path: Path, owner: str, shapes: Sequence[Shape]) -> None:
        self.path = path
        self._owner = owner
        self._shapes = shapes
        self._database: sqlite3.Connection | None = None
        self._filling = False

    def open(self) -> bool:
        """Open the file, or make it; return whether there was one.

        Raises CheckpointDamaged for one that can not be used, OSError and sqlite3.OperationalError where
        none can be opened or made.
        """
        self.close()
        existed = self.path.exists()
        if existed and not self.path.stat().st_size:
            raise CheckpointDamaged("it is empty")
        # SQLite gives its journal the rights of the file.
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            with self._named_damage():
                self._filling = not existed
                self._opened.execute("PRAGMA busy_timeout = 1000")
                if existed:
                    self._filling = not self._log_changes()
                    self._check()
                else:
                    self._make()
        except (OSError, sqlite3.Error):
            if not existed:  # no room for it: an empty one would be called damaged
                self._remove()
            raise
        return existed

    def open_to_read(self) -> bool:
        """Open a file beside which there is no room for the index of its log; return whether there is one.

        The index is kept in memory then, and nobody else can read the file meanwhile.  Raises as `open`.
        """
        self.close()
        if not self.path.exists():
            return False
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        with self._named_damage():
            self._opened.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._check()
        return True

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def set_aside(self) -> str:
        """Put a damaged file out of the way, for a person; return where it is."""
        self.close()
        self._remove_companions()
        return set_aside(self.path)

    def _remove(self) -> None:
        self.close()
        self._remove_companions()
        self.path.unlink(missing_ok=True)

    def _remove_companions(self) -> None:
        for companion in COMPANIONS:
            self.path.with_name(self.path.name + companion).unlink(missing_ok=True)

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

    def rows(self, shape: Shape) -> Iterator[Rows]:
        """Yield a view's rows, some at a time.  Raises CheckpointDamaged at any of them."""
        last = -1
        with self._named_damage():
            while found := self._opened.execute(shape.select, (last,)).fetchall():
                last = found[-1][0]
                rows: Rows = {}
                for _, records in found:
                    rows |= shape.decoder.decode(records)
                yield rows

    def begin(self) -> None:
        """Begin a transaction; one that was broken off is undone."""
        self.undo()
        self._opened.execute("BEGIN IMMEDIATE")

    def clear(self, shape: Shape) -> None:
        """Forget all rows of a view: what follows is all there is."""
        with self._named_damage():
            self._opened.execute(shape.clear)

    def merge(self, shape: Shape, parts: Iterable[Part]) -> None:
        """Write what changes in some blocks.  Raises CheckpointDamaged for one that can not be read."""
        with self._named_damage():
            for part in parts:
                self._merge(shape, part)

    def _merge(self, shape: Shape, part: Part) -> None:
        found = self._opened.execute(shape.find, (part.block,)).fetchone()
        records: dict[Any, Any] = part.rows
        if found:
            kept: dict[Any, msgspec.Raw] = shape.raw_decoder.decode(found[0])
            for key in part.keys:
                kept.pop(key, None)
            records = kept | part.rows
        if records:
            self._opened.execute(shape.insert, (part.block, msgspec.json.encode(records).decode()))
        elif found:
            self._opened.execute(shape.delete, (part.block,))

    def stand(self, shape: Shape, place: Place) -> None:
        """Say where a view stands with what this transaction writes."""
        self._opened.execute(
            "INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?, ?, ?)",
            (shape.name, place.revision, f"{place.cluster_id:x}", place.confirmed, *_columns(place.witness)),
        )

    def commit(self) -> None:
        self._opened.execute("COMMIT")
        if self._filling:
            self._end_of_filling()

    def _end_of_filling(self) -> None:
        largest = (self._shapes[0].name,)
        if self._opened.execute("SELECT 1 FROM places WHERE view = ?", largest).fetchone():
            self._filling = not self._log_changes()

    def undo(self) -> None:
        """Undo the transaction under way, if there is one."""
        if self._database is not None and self._database.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # a full disk has ended it already
                self._database.execute("ROLLBACK")

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            raise OSError(errno.EBADF, "not open", str(self.path))
        return self._database

    @contextlib.contextmanager
    def _named_damage(self) -> Iterator[None]:
        """Tell a file that is broken from a disk that is full or a directory that can not be written."""
        try:
            yield
        except sqlite3.OperationalError as error:
            # Python's own has no code: text in the file that is none.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            if code & 0xFF == sqlite3.SQLITE_ERROR:  # no such table, say: not as we made it
                raise CheckpointDamaged(str(error)) from error
            raise
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise CheckpointDamaged(str(error)) from error

    def _log_changes(self) -> bool:
        """Log changes from now on; False where somebody reads the file just now, which keeps it as it is."""
        try:
            self._opened.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return False
        self._opened.execute("PRAGMA synchronous = NORMAL")
        # Makes the log and its index, while there is room.
        self._opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return True

    def _check(self) -> None:
        version = int(self._opened.execute("PRAGMA user_version").fetchone()[0])
        if version != VERSION:
            raise CheckpointDamaged(f"version {version} is not {VERSION}")
        found = self._opened.execute("SELECT name FROM owner").fetchone()
        if found != (self._owner,):
            raise CheckpointDamaged(f"it is of {found and found[0]}, this is {self._owner}")

    def _make(self) -> None:
        self._opened.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._opened.execute("BEGIN IMMEDIATE")
        self._opened.execute("CREATE TABLE owner (name TEXT NOT NULL)")
        self._opened.execute("INSERT INTO owner VALUES (?)", (self._owner,))
        self._opened.execute(
            "CREATE TABLE places (view TEXT PRIMARY KEY, revision INTEGER NOT NULL, "
            "cluster_id TEXT NOT NULL, confirmed REAL NOT NULL, "
            "witness TEXT NOT NULL, written INTEGER NOT NULL)"
        )
        for statement in chain.from_iterable(shape.create for shape in self._shapes):
            self._opened.execute(statement)
        self._opened.execute(f"PRAGMA user_version = {VERSION}")
        self._opened.execute("COMMIT")


def _columns(witness: Witness | None) -> tuple[str, int]:
    """A key that is no text can be no witness: SQLite would refuse it."""
    return (witness.key, witness.revision) if witness and witness.key.isprintable() else ("", 0)
