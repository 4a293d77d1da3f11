# SPDX-License-Identifier: Apache-2.0
"""Private state files: written whole or not at all, 0600, and set aside when they are damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator

from core.errors import HoldfastError

# No pathlib here: the start hook, which writes its file with this, has not the time to load it.
StrPath = str | os.PathLike[str]


class FileDamaged(HoldfastError):
    """Raised when a state file exists but can not be read as what it should be."""


def write_atomic(path: StrPath, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Replace `path` by `data` so that a reader, a crash or a full disk sees the old or the new file.

    With `durable` that holds over a power cut as well, for two disk flushes; without, it holds for
    everything that the kernel survives.  Raises OSError when the directory can not be written; the old
    file is then untouched.
    """
    directory, name = os.path.split(path)
    # A thread's own: two may write the same file at once.
    temporary = os.path.join(directory, f".{name}.{threading.get_native_id()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with open(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if durable:
        sync_directory(directory or os.curdir)


@contextlib.contextmanager
def locked(path: StrPath, patience: float) -> Iterator[None]:
    """Hold a lock file, made if need be; TimeoutError when somebody else holds it for `patience` seconds.

    Raises OSError where it can not be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(handle, time.monotonic() + patience)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, end: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise TimeoutError(errno.ETIMEDOUT, "somebody else holds the lock") from error
            time.sleep(0.05)


def set_aside(path: StrPath) -> str:
    """Rename a damaged file to `<name>.damaged-<unix time>`, keep it for a person, return the new path."""
    target = f"{os.fspath(path)}.damaged-{int(time.time())}"
    os.replace(path, target)
    return target


def put_aside(path: StrPath) -> str:
    """Set a damaged file aside if that is possible; return what has become of it, for a message."""
    try:
        return f"kept as {set_aside(path)}"
    except OSError as error:
        return f"it stays in place, it can not be set aside: {error.strerror}"


def sync_directory(directory: StrPath) -> None:
    """Have the names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
