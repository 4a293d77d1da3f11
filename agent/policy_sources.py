# SPDX-License-Identifier: Apache-2.0
"""Where policy documents come from: a directory of this host, and `holdfast/policies/v1/…` in etcd.

Both feed the table of documents (`agent.policies`).  A document that is refused changes nothing: the last
good one of that file or key stays in force, and the refusal is shown in status until it is mended.

What is long is read in a thread: 10 000 rules take seconds, in which the loop has to go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from agent.policies import DIRECTORY, KVSTORE, TEXT, Document, DocumentTable, PolicyNames, Refusals
from core.backoff import jittered
from core.errors import HoldfastError
from core.files import write_atomic
from kvstore import schema
from kvstore.errors import RecordError
from kvstore.sink import TableSink
from policy.document import MAX_CHARACTERS
from policy.errors import DocumentError
from policy.language import parse_policies

SUFFIXES = (".yaml", ".yml", ".json")
# The directory is small; a look at names, sizes and times costs 50 µs.
SCAN_S = 2.0
# Texts up to this size are read at once: 2 ms of rules, at most 50 ms of CIDRs with exceptions.
AT_ONCE = 1024

Stamp = tuple[int, int, int, int]


async def read_document(text: str, origin: str, name: str) -> Document:
    """Return the policies of a text; raises what `parse_policies` does."""
    if len(text) <= AT_ONCE:
        return tuple(parse_policies(text, origin, name=name))
    return tuple(await asyncio.to_thread(parse_policies, text, origin, name=name))


class PolicyDirectory:
    """Watches one directory; `rescan` may be called at any time, and ends with all taken that was there."""

    def __init__(
        self, directory: Path, documents: DocumentTable, names: PolicyNames, refusals: Refusals
    ) -> None:
        self.directory = directory
        self._source = documents.source(DIRECTORY)
        self._names = names
        self._refusals = refusals
        self._seen: dict[Path, Stamp] = {}
        self._scanning = asyncio.Lock()

    async def run(self) -> None:
        """Scan until cancelled."""
        while True:
            await self.rescan()
            await asyncio.sleep(jittered(SCAN_S))

    async def rescan(self) -> None:
        """Take what is new, drop what is gone.  A directory that can not be read deletes nothing."""
        async with self._scanning:
            await self._scan()

    async def _scan(self) -> None:
        try:
            present = self._stamps()
        except OSError as error:
            problem = f"it can not be read ({error.strerror}); what it held stays in force"
            self._refuse(self.directory, problem)
            return
        self._refusals.clear(_origin(self.directory), TEXT)
        for path in self._seen.keys() - present.keys():
            self._drop(path)
        read = {}
        for path, stamp in present.items():
            if self._seen.get(path) == stamp or await self._read(path, size=stamp[2]):
                read[path] = stamp
        self._seen = read
        self._source.mark_in_sync()
        self._names.settle()

    def path_of(self, name: str) -> Path:
        """Return the file that `write` uses for a policy: readable where the name allows it."""
        safe = "".join(each if each.isalnum() or each in "-_" else "_" for each in name)[:64]
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.directory / (f"{safe}.yaml" if safe == name else f"{safe}-{digest}.yaml")

    def origin_of(self, name: str) -> str:
        """Return the origin of the document that `write` makes."""
        return _origin(self.path_of(name))

    def write(self, name: str, text: str) -> Path:
        """Write one document, in a thread if need be; the caller has parsed it before and rescans."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.path_of(name)
        write_atomic(path, text.encode())
        return path

    async def remove(self, name: str) -> Path | None:
        """Remove the file of one policy; None when there is none."""
        path = self.path_of(name)
        if not path.exists():
            return None
        path.unlink()
        await self.rescan()
        return path

    def _stamps(self) -> dict[Path, Stamp]:
        """Return the documents present.  A directory that never was holds none; one that went is an error."""
        try:
            with os.scandir(self.directory) as entries:
                named = sorted(Path(each.path) for each in entries if each.name.endswith(SUFFIXES))
        except FileNotFoundError:
            if self._seen:
                raise
            return {}
        stamped = ((path, _stamp(path)) for path in named if path.is_file())
        return {path: stamp for path, stamp in stamped if stamp is not None}

    async def _read(self, path: Path, *, size: int) -> bool:
        """Take one file; False when it could not be read and is to be tried again at the next scan."""
        try:
            document = _load(path, size) if size <= AT_ONCE else await asyncio.to_thread(_load, path, size)
        except UnicodeDecodeError as error:
            self._refuse(path, f"it is not UTF-8 ({error})")
            return True
        except OSError as error:
            self._refuse(path, f"it can not be read ({error.strerror})")
            return False
        except HoldfastError as error:
            self._refusals.add(path.stem, _origin(path), error)
            return True
        self._refusals.clear(_origin(path), TEXT)
        self._source.upsert(_origin(path), document)
        return True

    def _drop(self, path: Path) -> None:
        self._refusals.clear(_origin(path), TEXT)
        self._source.delete(_origin(path))

    def _refuse(self, path: Path, problem: str) -> None:
        origin = _origin(path)
        self._refusals.add(path.name, origin, DocumentError(origin, 0, problem))


class _Reading(NamedTuple):
    """What became of a value: the document, or why there is none."""

    value: bytes
    name: str
    text: str = ""
    document: Document = ()
    error: HoldfastError | None = None


class PolicyKeys(TableSink[str, Document]):
    """The kvstore sink of `holdfast/policies/v1/`: origin is the key."""

    def __init__(self, documents: DocumentTable, refusals: Refusals, grace: float) -> None:
        super().__init__(documents.source(KVSTORE), self._parsed, _same, grace=grace)
        self._refusals = refusals
        self._texts: dict[str, str] = {}
        self._listed: set[str] = set()  # keys of the list under way
        self._ahead: dict[str, _Reading] = {}  # of the long ones that `take` gets next

    def text(self, key: str) -> str:
        """Return the text of a document in force."""
        return self._texts[key]

    async def prepare(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Read what is long in a thread, before `take` gets it."""
        self._ahead.clear()
        for key, value in items:
            if len(value) > AT_ONCE:
                self._ahead[key] = await asyncio.to_thread(_reading, key, value)

    def begin_list(self) -> None:
        self._listed = set()
        super().begin_list()

    def take(self, items: Sequence[tuple[str, bytes]]) -> None:
        self._listed.update(key for key, _ in items)
        super().take(items)

    async def listed(self, revision: int) -> None:
        await super().listed(revision)
        for origin in self._refusals.origins(TEXT):
            # Refused from the start and gone: nothing of it is in the table that could go later.
            if (
                origin.startswith(schema.POLICIES)
                and origin not in self._listed
                and origin not in self.source.entries()
            ):
                self._refusals.clear(origin, TEXT)
        self._listed.clear()

    def deleted(self, key: str) -> None:
        self._refusals.clear(key, TEXT)
        self._texts.pop(key, None)
        super().deleted(key)

    def _parsed(self, key: str, value: bytes) -> tuple[str, Document]:
        reading = self._ahead.pop(key, None)
        if reading is None or reading.value != value:
            reading = _reading(key, value)
        if reading.error is not None:
            self._refusals.add(reading.name, key, reading.error)
            if isinstance(reading.error, RecordError):
                raise reading.error
            raise RecordError(key, reading.error.message) from reading.error
        self._refusals.clear(key, TEXT)
        self._texts[key] = reading.text
        return key, reading.document


def _reading(key: str, value: bytes) -> _Reading:
    try:
        name, text = schema.parse_policy(key, value)
    except RecordError as error:
        return _Reading(value, key, error=error)
    try:
        return _Reading(value, name, text, tuple(parse_policies(text, key, name=name)))
    except HoldfastError as error:
        return _Reading(value, name, error=error)


def _load(path: Path, size: int) -> Document:
    """Return the policies of a file; raises OSError, UnicodeDecodeError, PolicyError."""
    origin = _origin(path)
    if size > 4 * MAX_CHARACTERS:  # none has more bytes
        raise DocumentError(origin, 0, f"{size} bytes are more than {MAX_CHARACTERS} characters can have")
    return tuple(parse_policies(path.read_text(encoding="utf-8"), origin, name=path.stem))


def _same(key: str) -> str:
    return key


def _origin(path: Path) -> str:
    return f"file {path}"


def _stamp(path: Path) -> Stamp | None:
    """Return what changes with a file (also when only its rights do); None when it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
