# SPDX-License-Identifier: Apache-2.0
"""Where policy documents come from: a directory of this host, and `holdfast/policies/v1/…` in etcd.

Both feed the table of documents (`agent.policies`).  A document that is refused changes nothing: the last
good one of that file or key stays in force, and the refusal is shown in status until it is mended.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

from agent.policies import DIRECTORY, KVSTORE, TEXT, Document, DocumentTable, PolicyNames, Refusals
from core.backoff import jittered
from core.errors import HoldfastError
from core.files import write_atomic
from kvstore import schema
from kvstore.errors import RecordError
from kvstore.sink import TableSink
from policy.errors import DocumentError
from policy.language import parse_policies

SUFFIXES = (".yaml", ".yml", ".json")
# The directory is small; a look at names, sizes and times costs 50 µs.
SCAN_S = 2.0

Stamp = tuple[int, int, int, int]


class PolicyDirectory:
    """Watches one directory; `rescan` may be called at any time, in the loop."""

    def __init__(
        self, directory: Path, documents: DocumentTable, names: PolicyNames, refusals: Refusals
    ) -> None:
        self.directory = directory
        self._source = documents.source(DIRECTORY)
        self._names = names
        self._refusals = refusals
        self._seen: dict[Path, Stamp] = {}

    async def run(self) -> None:
        """Scan until cancelled."""
        while True:
            self.rescan()
            await asyncio.sleep(jittered(SCAN_S))

    def rescan(self) -> None:
        """Take what is new, drop what is gone.  A directory that can not be read deletes nothing."""
        try:
            present = self._stamps()
        except OSError as error:
            problem = f"it can not be read ({error.strerror}); what it held stays in force"
            self._refuse(self.directory, problem)
            return
        self._refusals.clear(_origin(self.directory), TEXT)
        for path in self._seen.keys() - present.keys():
            self._drop(path)
        read = {path for path, stamp in present.items() if self._seen.get(path) == stamp or self._read(path)}
        self._seen = {path: stamp for path, stamp in present.items() if path in read}
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

    def remove(self, name: str) -> Path | None:
        """Remove the file of one policy; None when there is none."""
        path = self.path_of(name)
        if not path.exists():
            return None
        path.unlink()
        self.rescan()
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

    def _read(self, path: Path) -> bool:
        """Take one file; False when it could not be read and is to be tried again at the next scan."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self._refuse(path, f"it is not UTF-8 ({error})")
            return True
        except OSError as error:
            self._refuse(path, f"it can not be read ({error.strerror})")
            return False
        try:
            document = tuple(parse_policies(text, _origin(path), name=path.stem))
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


class PolicyKeys(TableSink[str, Document]):
    """The kvstore sink of `holdfast/policies/v1/`: origin is the key."""

    def __init__(self, documents: DocumentTable, refusals: Refusals, grace: float) -> None:
        super().__init__(documents.source(KVSTORE), self._parsed, _same, grace=grace)
        self._refusals = refusals
        self._texts: dict[str, str] = {}

    def texts(self) -> dict[str, str]:
        """Return the text of every document in force, by key."""
        return {key: text for key, text in self._texts.items() if key in self.source.entries()}

    def listed(self, items: dict[str, bytes], revision: int) -> None:
        super().listed(items, revision)
        for origin in self._refusals.origins(TEXT):
            # Refused from the start and gone: nothing of it is in the table that could go later.
            if (
                origin.startswith(schema.POLICIES)
                and origin not in items
                and origin not in self.source.entries()
            ):
                self._refusals.clear(origin, TEXT)

    def deleted(self, key: str) -> None:
        self._refusals.clear(key, TEXT)
        self._texts.pop(key, None)
        super().deleted(key)

    def _parsed(self, key: str, value: bytes) -> tuple[str, Document]:
        try:
            name, text = schema.parse_policy(key, value)
            document = tuple(parse_policies(text, key, name=name))
        except RecordError as error:
            self._refusals.add(key, key, error)
            raise
        except HoldfastError as error:
            self._refusals.add(name, key, error)
            raise RecordError(key, error.message) from error
        self._refusals.clear(key, TEXT)
        self._texts[key] = text
        return key, document


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
