# SPDX-License-Identifier: Apache-2.0
"""Snapshots of an etcd member in a directory: taken, verified, and the older ones removed.

    etcd-1-20261120T102154Z.snapshot    root's alone (0600); there only once it is whole and verified

etcd's own `etcdctl` takes a snapshot and reads it back; that etcd's checksum fits is looked at here, because
`etcdctl` looks at it only when it restores, which is too late.

Called by: kvstore.maintenance.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from core.errors import shorten
from core.files import sync_directory
from kvstore.config import EtcdConfig
from kvstore.errors import KvstoreError
from kvstore.members import Member
from kvstore.schema import SnapshotRecord
from kvstore.upkeep import MIB, size_text

SUFFIX = ".snapshot"
STAMP = "%Y%m%dT%H%M%SZ"
# Seconds.  etcdctl waits for ever for a member that went away: one of whose snapshot nothing more came for so
# long, and reading one back, 8 GiB at 10 MiB/s.
STALL_S, READ_S = 60.0, 900.0
# What is left free beside a snapshot on its file system, which may be etcd's own.
SPARE = 64 * MIB
# etcd appends the SHA-256 of all before it.
DIGEST = 32
CHUNK = 1 << 20


class SnapshotFailed(KvstoreError):
    """Raised when a snapshot could not be taken, or is not what it should be."""


class Status(msgspec.Struct, frozen=True):
    """What `etcdctl snapshot status` says."""

    revision: int
    totalKey: int
    totalSize: int


class Snapshots:
    """The snapshots of one member, at most `keep`; one that does not grow for `stall` seconds has failed."""

    def __init__(self, directory: Path, member: str, keep: int, *, stall: float = STALL_S) -> None:
        self.directory = directory
        self.member = member
        self.keep = keep
        self._stall = stall

    def all(self) -> list[Path]:
        """Return what is there of this member, oldest first."""
        pattern = re.compile(rf"{re.escape(self.member)}-\d{{8}}T\d{{6}}Z{re.escape(SUFFIX)}")
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if pattern.fullmatch(path.name))

    def newest(self) -> datetime | None:
        """Return when the newest was taken."""
        found = self.all()
        return taken_at(found[-1]) if found else None

    async def take(self, config: EtcdConfig, member: Member) -> SnapshotRecord:
        """Take and verify one, then remove those beyond `keep`; SnapshotFailed, and nothing is removed."""
        now = datetime.now(UTC).replace(microsecond=0)
        target = self.directory / f"{self.member}-{now.strftime(STAMP)}{SUFFIX}"
        partial = self.directory / f".{target.name}.new"
        try:
            self._prepare(member)
            await self._save(partial, environment(config, member.endpoint))
            partial.chmod(0o600)
            record = await _verified(partial, target.name, now)
            os.replace(partial, target)
            sync_directory(self.directory)
        except OSError as error:
            raise SnapshotFailed(f"snapshot {target}: {error.strerror or error}") from error
        finally:
            self._remove_partial()
        self._remove_beyond(target)
        return record

    def _remove_beyond(self, taken: Path) -> None:
        """Keep this one, though by a clock that was wrong once others may seem younger."""
        for old in [each for each in self.all() if each != taken][: -(self.keep - 1) or None]:
            old.unlink(missing_ok=True)

    async def _save(self, partial: Path, settings: Mapping[str, str]) -> None:
        saving = asyncio.create_task(etcdctl("snapshot", "save", str(partial), settings=settings))
        size = -1
        while not (await asyncio.wait([saving], timeout=self._stall))[0]:
            # etcdctl's own name for what is not whole yet.
            grown = partial.with_name(f"{partial.name}.part")
            before, size = size, grown.stat().st_size if grown.exists() else 0
            if size <= before:
                saving.cancel()
                await asyncio.wait([saving])
                raise SnapshotFailed(f"snapshot {partial.name}: etcd sent nothing for {self._stall:g} s")
        await saving

    def _prepare(self, member: Member) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_partial()
        free = shutil.disk_usage(self.directory).free
        if free < member.size + SPARE:
            raise SnapshotFailed(
                f"no room for a snapshot in {self.directory}: {size_text(free)} free, "
                f"etcd's database has {size_text(member.size)}",
                hint="keep fewer, or put them on another file system",
            )

    def _remove_partial(self) -> None:
        """Remove what an interruption left: ours, and etcdctl's beside it."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.directory.glob(f".{self.member}-*{SUFFIX}.new*"):
                path.unlink(missing_ok=True)


def taken_at(path: Path) -> datetime:
    """Return the time in a snapshot's name."""
    stamp = path.name.removesuffix(SUFFIX).rpartition("-")[2]
    return datetime.strptime(stamp, STAMP).replace(tzinfo=UTC)


def has_its_digest(path: Path) -> bool:
    """Return whether a file ends with the SHA-256 of what is before it."""
    left = path.stat().st_size - DIGEST
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0:
            data = file.read(min(CHUNK, left))
            if not data:
                break
            digest.update(data)
            left -= len(data)
        return left == 0 and file.read() == digest.digest()


async def _verified(path: Path, name: str, taken: datetime) -> SnapshotRecord:
    if not await asyncio.to_thread(has_its_digest, path):
        raise SnapshotFailed(f"snapshot {name}: its checksum does not fit, it was cut off or damaged")
    try:
        async with asyncio.timeout(READ_S):
            text = await etcdctl("snapshot", "status", str(path), "--write-out=json", settings=environment())
    except TimeoutError as error:
        raise SnapshotFailed(f"snapshot {name}: etcdctl could not read it within {READ_S:g} s") from error
    try:
        status = msgspec.json.decode(text, type=Status)
    except msgspec.DecodeError as error:
        raise SnapshotFailed(f"snapshot {name}: etcdctl says of it {shorten(text)!r}") from error
    return SnapshotRecord(name, taken, path.stat().st_size, status.revision, status.totalKey)


async def etcdctl(*words: str, settings: Mapping[str, str]) -> str:
    """Run etcdctl and return what it printed; SnapshotFailed with its complaint."""
    try:
        process = await asyncio.create_subprocess_exec(
            "etcdctl", *words, env=settings,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise SnapshotFailed("etcdctl is not on PATH", hint="the image has it") from error
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SnapshotFailed(f"etcdctl {' '.join(words[:2])}: {_complaint(errors.decode(errors='replace'))}")
    return output.decode(errors="replace")


def environment(config: EtcdConfig | None = None, endpoint: str = "") -> dict[str, str]:
    """Return etcdctl's settings: nothing of ours but these may change what it does."""
    settings = {"PATH": os.environ.get("PATH", os.defpath), "ETCDCTL_API": "3"}
    if config is None:
        return settings
    scheme = "https" if config.secure else "http"
    files = {"CACERT": config.ca, "CERT": config.cert, "KEY": config.key}
    named = {f"ETCDCTL_{name}": str(path) for name, path in files.items() if path is not None}
    return {**settings, "ETCDCTL_ENDPOINTS": f"{scheme}://{endpoint}", **named}


def _complaint(errors: str) -> str:
    """Return the last line that is not JSON: etcdctl logs there, too."""
    lines = [line for line in errors.splitlines() if line and not line.startswith("{")]
    return shorten(lines[-1] if lines else errors, 300)
