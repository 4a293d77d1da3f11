# SPDX-License-Identifier: Apache-2.0
"""Where policies come from: a directory of this host, and `holdfast/policies/v1/…` in etcd.

Both feed one table (name → policy).  A document that is refused changes nothing: the last good one of that
file or key stays in force, and the refusal is shown in status until it is mended.  The same name in both
places is an error; the one that was in force first keeps its place.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from core import metrics
from core.backoff import jittered
from core.errors import HoldfastError, shorten
from core.files import write_atomic
from core.table import Source, Table
from kvstore import schema
from policy.errors import PolicyError
from policy.language import parse_policies
from policy.model import Policy

DIRECTORY = "directory"
KVSTORE = "kvstore"
SUFFIXES = (".yaml", ".yml", ".json")
# The directory is small; a look at names, sizes and times costs 50 µs.
SCAN_S = 2.0

PolicyTable = Table[str, Policy]


@dataclass(frozen=True)
class Refusal:
    """A document that is not in force: `name` is the policy's or the file's."""

    name: str
    origin: str
    error: str
    since: float


class Refusals:
    """What was refused, by origin; the first screen of a person who asks why nothing changed."""

    def __init__(self) -> None:
        self._by_origin: dict[str, Refusal] = {}

    def add(self, name: str, origin: str, error: HoldfastError) -> None:
        known = self._by_origin.get(origin)
        if known is not None and known.error == str(error):
            return
        metrics.POLICY_IMPORT_ERRORS.inc()
        logger.error("policy from {} is refused, the last good one stays in force: {}", origin, error)
        self._by_origin[origin] = Refusal(name, origin, str(error), time.time())

    def clear(self, origin: str) -> None:
        self._by_origin.pop(origin, None)

    def all(self) -> list[Refusal]:
        return list(self._by_origin.values())


class _Documents:
    """Documents of one source: which names each origin (file, key) put into the table."""

    def __init__(self, table: PolicyTable, source: str, refusals: Refusals) -> None:
        self.refusals = refusals
        self._table = table
        self._source: Source[str, Policy] = table.source(source)
        self._others = [each for each in table.sources if each.name != source]
        self._names: dict[str, tuple[str, ...]] = {}

    def put(self, origin: str, text: str, default_name: str = "") -> None:
        """Take a document; a PolicyError is recorded and leaves what the origin gave before."""
        try:
            policies = parse_policies(text, origin, name=default_name)
            self._check_names(origin, policies)
        except PolicyError as error:
            self.refusals.add(default_name or origin, origin, error)
            return
        self.refusals.clear(origin)
        names = tuple(policy.name for policy in policies)
        for policy in policies:
            self._source.upsert(policy.name, policy)
        for name in set(self._names.get(origin, ())) - set(names):
            self._source.delete(name)
        self._names[origin] = names

    def drop(self, origin: str) -> None:
        self.refusals.clear(origin)
        for name in self._names.pop(origin, ()):
            self._source.delete(name)

    def origins(self) -> Iterable[str]:
        return tuple(self._names)

    def mark_in_sync(self) -> None:
        self._source.mark_in_sync()

    def _check_names(self, origin: str, policies: Iterable[Policy]) -> None:
        for policy in policies:
            for other in self._others:
                if policy.name in other.entries():
                    raise PolicyError(
                        f"policy {shorten(policy.name)} exists already, "
                        f"from {other.entries()[policy.name].origin}",
                        hint="delete one of the two or rename it",
                    )
            for known, names in self._names.items():
                if known != origin and policy.name in names:
                    raise PolicyError(f"policy {shorten(policy.name)} exists already, from {known}")


class PolicyDirectory:
    """Watches one directory; `rescan` may be called at any time."""

    def __init__(self, directory: Path, table: PolicyTable, refusals: Refusals) -> None:
        self.directory = directory
        self._documents = _Documents(table, DIRECTORY, refusals)
        self._seen: dict[Path, tuple[int, int, int]] = {}

    async def run(self) -> None:
        """Scan until cancelled."""
        while True:
            self.rescan()
            self._documents.mark_in_sync()
            await asyncio.sleep(jittered(SCAN_S))

    def rescan(self) -> None:
        """Take what is new, drop what is gone.  A directory that can not be read deletes nothing."""
        try:
            present = {path: _stamp(path) for path in self._files()}
        except FileNotFoundError:
            present = {}
        except OSError as error:
            logger.error("policy directory {} can not be read: {}", self.directory, error.strerror)
            return
        for path, stamp in present.items():
            if self._seen.get(path) != stamp:
                self._read(path)
        for path in self._seen.keys() - present.keys():
            self._documents.drop(f"file {path}")
        self._seen = present

    def path_of(self, name: str) -> Path:
        """Return the file that `write` uses for a policy: readable where the name allows it."""
        safe = "".join(each if each.isalnum() or each in "-_" else "_" for each in name)[:64]
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.directory / (f"{safe}.yaml" if safe == name else f"{safe}-{digest}.yaml")

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

    def _files(self) -> list[Path]:
        with os.scandir(self.directory) as entries:
            return sorted(
                Path(each.path) for each in entries if each.name.endswith(SUFFIXES) and each.is_file()
            )

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._documents.refusals.add(
                path.name, f"file {path}", PolicyError(f"it can not be read: {error}")
            )
            return
        self._documents.put(f"file {path}", text, path.stem)


class PolicyKeys:
    """The kvstore sink of `holdfast/policies/v1/`: a relist that lacks a policy keeps it for `grace` s."""

    def __init__(self, table: PolicyTable, refusals: Refusals, grace: float) -> None:
        self._documents = _Documents(table, KVSTORE, refusals)
        self._grace = grace
        self._missing: dict[str, float] = {}

    def listed(self, items: Mapping[str, bytes], revision: int) -> None:
        now = time.monotonic()
        for key in self._documents.origins():
            if key not in items:
                self._missing.setdefault(key, now + self._grace)
        for key, value in items.items():
            self.put(key, value)

    def put(self, key: str, value: bytes) -> None:
        self._missing.pop(key, None)
        try:
            name, text = schema.parse_policy(key, value)
        except HoldfastError as error:
            self._documents.refusals.add(key, key, error)
            return
        self._documents.put(key, text, name)

    def deleted(self, key: str) -> None:
        self._missing.pop(key, None)
        self._documents.drop(key)

    def in_sync(self) -> None:
        self._documents.mark_in_sync()

    def expire(self) -> list[str]:
        """Drop what relists lacked for longer than the grace; return the keys."""
        now = time.monotonic()
        ended = [key for key, deadline in self._missing.items() if deadline <= now]
        for key in ended:
            self.deleted(key)
        return ended

    @property
    def missing(self) -> int:
        return len(self._missing)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
