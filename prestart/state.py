# SPDX-License-Identifier: Apache-2.0
"""The one file that remembers starts: ``<state-dir>/prestart.json``, private, atomic, locked, versioned.

A file that can not be used (empty, cut, of another version or host, from the future) is refused by
`parse` with a reason; the caller sets it aside and goes on as on a first start.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

from core import files
from core.errors import shorten
from core.files import StrPath, write_atomic
from prestart.decision import Decision, Kind, Last, Now
from prestart.errors import StateRefused

FILE = "prestart.json"
ORDER = "start-now"
LOCK = "prestart.lock"
VERSION = 1
# How far another boot's clock may be ahead before the file counts as one from the future.
CLOCK_SLACK_S = 300.0
LOCK_PATIENCE_S = 5.0
LARGEST = 2**53
LONGEST_NAME = 200


@contextlib.contextmanager
def locked(directory: StrPath) -> Iterator[None]:
    """Hold the lock of the state file; StateRefused when another start keeps it for five seconds."""
    path = os.path.join(directory, LOCK)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, LOCK_PATIENCE_S))
        except TimeoutError as error:
            raise StateRefused(f"{path} is held by another start", hint="is the hook run twice?") from error
        except OSError as error:
            raise StateRefused(f"{path} can not be opened: {error.strerror}") from error
        yield


def ordered(directory: StrPath) -> str:
    """Take an operator's order for one start (`holdfast start-now`); return whose it is, or ""."""
    path = os.path.join(directory, ORDER)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(LONGEST_NAME)
        os.unlink(path)
    except OSError:
        return ""
    return "".join(each for each in text.strip() if each.isprintable()) or "nobody named"


def load(directory: StrPath, host: str, now: Now) -> Last | None:
    """Return the previous start, None if there was none; StateRefused says why a file can not be used."""
    path = os.path.join(directory, FILE)
    try:
        with open(path, "rb") as file:
            return parse(file.read(), path, host, now)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateRefused(f"{path} can not be read: {error.strerror}") from error


def save(directory: StrPath, host: str, now: Now, decision: Decision) -> None:
    """Write down this start; OSError when that is not possible."""
    write_atomic(os.path.join(directory, FILE), encode(host, now, decision))


def encode(host: str, now: Now, decision: Decision) -> bytes:
    """Return the file's content for a start that was decided at `now`."""
    content = {
        "version": VERSION,
        "host": host,
        "written": now.wall,
        "boot_id": now.boot_id,
        "kind": decision.kind.value,
        "window": decision.window,
        "connect_at": decision.connect_at,
        "connect_boot": now.boot + decision.connect_at - now.wall,
        "failures": decision.failures,
        "override": decision.override,
        "reason": decision.reason,
    }
    return json.dumps(content, indent=1).encode()


def parse(data: bytes, origin: str, host: str, now: Now) -> Last:
    """Return the start that the file tells of; StateRefused names `origin` and what is wrong with it."""
    content = _content(data, origin)
    owner = _text(content, "host", origin)
    if owner != host:
        raise StateRefused(
            f"{origin} is of host {shorten(owner)}, not of {host}", hint="a copied state directory?"
        )
    boot_id = _text(content, "boot_id", origin)
    written = _number(content, "written", origin)
    if boot_id != now.boot_id and written > now.wall + CLOCK_SLACK_S:
        raise StateRefused(
            f"{origin} is from the future, by {written - now.wall:.0f} s", hint="check the host's clock"
        )
    return Last(
        _kind(content, origin),
        _number(content, "connect_at", origin),
        _number(content, "connect_boot", origin),
        boot_id,
        max(0, int(_number(content, "failures", origin))),
        _text(content, "override", origin),
    )


def _content(data: bytes, origin: str) -> dict[str, object]:
    if not data:
        raise StateRefused(f"{origin} is empty")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateRefused(f"{origin} is cut or damaged: {error}") from error
    if not isinstance(content, dict):
        raise StateRefused(f"{origin} is not a JSON object")
    if content.get("version") != VERSION:
        raise StateRefused(f"{origin} has version {shorten(content.get('version'))}, not {VERSION}")
    return content


def _number(content: dict[str, object], name: str, origin: str) -> float:
    value = content.get(name)
    # The bound keeps out infinities, NaN and integers that no float holds.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < LARGEST:
        raise StateRefused(f"{origin}: {name} is {shorten(value)}, not a number of a sensible size")
    return float(value)


def _text(content: dict[str, object], name: str, origin: str) -> str:
    value = content.get(name)
    if not isinstance(value, str):
        raise StateRefused(f"{origin}: {name} is {shorten(value)}, not a text")
    return value


def _kind(content: dict[str, object], origin: str) -> Kind:
    try:
        return Kind(content.get("kind"))
    except ValueError as error:
        raise StateRefused(f"{origin}: kind is {shorten(content.get('kind'))}, which is unknown") from error
