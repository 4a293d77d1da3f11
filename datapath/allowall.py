# SPDX-License-Identifier: Apache-2.0
"""An operator's order to let everything pass: to and from one endpoint, or all of this host, for a time.

    <state-dir>/allow-all.json      the orders, with who and why, for the agent and for everybody who looks
    cilium_policy_<id>              the all-zero entry of each direction, with the second at which it ends

The entry is what acts, and the kernel looks at its end itself: it takes effect without an agent, and ends
without one.  The file is for an agent, which would else take back what no policy says, and gives the entries
to endpoints that come later.  An entry that names an identity or a port and denies still wins: the all-zero
entry is the last that a packet asks for.

Called by: `holdfast allow-all`, which writes both; agent.allow_all, which reads the file; cli.main.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from core import files
from core.errors import HoldfastError
from core.files import FileDamaged, sync_directory, write_atomic
from datapath.layouts import POLICY_ENTRY
from datapath.maps import PolicyMap
from datapath.mapspec import open_pinned, policy_map_name
from datapath.policy_order import ALL, RawPolicyEntry, RawPolicyKey, rank
from datapath.records import PolicyEntry, PolicyKey

FILE = "allow-all.json"
LOCK = "allow-all.lock"
LOCK_PATIENCE_S = 0.3
VERSION = 1
# Long enough for a night and the morning after; an emergency that lasts is a policy.
LONGEST_S = 24 * 3600.0
WHOLE_HOST = 0  # no endpoint has this number
BOTH_WAYS = (PolicyKey(0, 0, 0, 0), PolicyKey(0, 0, 0, 1))
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LARGEST = 2**32  # seconds; also what an entry can hold


class Now(NamedTuple):
    """Unix time and CLOCK_MONOTONIC, both in seconds, and which boot the latter counts from."""

    wall: float
    monotonic: float
    boot_id: str

    @classmethod
    def read(cls) -> Self:
        return cls(time.time(), time.monotonic(), _BOOT_ID.read_text().strip())


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One order; times are unix seconds, `deadline` is CLOCK_MONOTONIC of boot `boot_id`."""

    endpoint: int  # WHOLE_HOST, or its number
    since: float
    until: float
    deadline: float
    boot_id: str
    reason: str
    by: str

    def left(self, now: Now) -> float:
        """Return the seconds that it is still in force, 0 or less when it has ended.

        Within one boot a clock that is set changes nothing.  After a reboot the wall clock tells; where that
        is before the order, it can not be believed, and nothing that has ended may begin again.
        """
        if now.boot_id == self.boot_id:
            return self.deadline - now.monotonic
        return self.until - now.wall if now.wall >= self.since else 0.0


class _Content(msgspec.Struct, frozen=True):
    orders: tuple[Order, ...]
    version: int = VERSION


def order(endpoint: int, seconds: float, *, reason: str, by: str, now: Now) -> Order:
    """Return an order for the next `seconds`."""
    return Order(
        endpoint=endpoint,
        since=now.wall,
        until=now.wall + seconds,
        deadline=now.monotonic + seconds,
        boot_id=now.boot_id,
        reason=reason,
        by=by,
    )


def read(directory: Path) -> tuple[Order, ...]:
    """Return the orders of a state directory, those that have ended too.

    Raises FileDamaged with the reason for a file that holds none, and OSError for one that can not be read.
    """
    path = directory / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        content = msgspec.json.decode(data, type=_Content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FileDamaged(f"{path}: {error}") from error
    if content.version != VERSION:
        raise FileDamaged(f"{path} has version {content.version}, not {VERSION}")
    for each in content.orders:
        if not 0 <= each.endpoint <= 0xFFFF:
            raise FileDamaged(f"{path}: endpoint {each.endpoint} is not a number from 0 to 65535")
        if not all(0 <= number < _LARGEST for number in (each.since, each.until, each.deadline)):
            raise FileDamaged(f"{path}: the times of endpoint {each.endpoint} make no sense")
    return content.orders


def write(directory: Path, orders: Iterable[Order]) -> None:
    """Replace the orders of a state directory.  Raises OSError.

    Where none is left and that can not be written, the file is removed, for which a full disk has room.  It
    is not the first choice: an agent that has set a damaged file aside has to see one that says so.
    """
    path, content = directory / FILE, _Content(tuple(orders))
    try:
        write_atomic(path, msgspec.json.encode(content))
    except OSError as error:
        if content.orders:
            raise
        try:
            path.unlink()
            sync_directory(directory)
        except OSError:
            raise error from None


def is_damaged(directory: Path) -> bool:
    """True where the file does not tell what is ordered: it can not be used, or was set aside for that."""
    try:
        read(directory)
    except (FileDamaged, OSError):
        return True
    path = directory / FILE
    return not path.exists() and any(directory.glob(f"{FILE}.damaged-*"))


def locked(directory: Path) -> AbstractContextManager[None]:
    """Keep others from changing the orders meanwhile, which is for milliseconds.

    Raises TimeoutError where another command holds the lock, which may be a stopped one, and OSError where
    it can not be had at all: an emergency goes on without it.
    """
    return files.locked(directory / LOCK, LOCK_PATIENCE_S)


def in_force(orders: Iterable[Order], now: Now) -> tuple[Order, ...]:
    """Return those that have not ended."""
    return tuple(each for each in orders if each.left(now) > 0)


def entries(orders: Iterable[Order], endpoint: int, now: Now) -> dict[RawPolicyKey, RawPolicyEntry]:
    """Return what the orders add to the map of `endpoint`; nothing where none is in force."""
    left = max((each.left(now) for each in orders if each.endpoint in (endpoint, WHOLE_HOST)), default=0.0)
    if left <= 0:
        return {}
    return dict.fromkeys(BOTH_WAYS, PolicyEntry(deny=False, until=int(now.monotonic + left)))


def laid_over(
    upserts: Iterable[tuple[RawPolicyKey, RawPolicyEntry]],
    deletes: Iterable[RawPolicyKey],
    added: Mapping[RawPolicyKey, RawPolicyEntry],
) -> tuple[dict[RawPolicyKey, RawPolicyEntry], set[RawPolicyKey]]:
    """Return a change by policy as it is while `added` is in force: it denies and deletes none of it."""
    written, gone = dict(upserts), set(deletes)
    for key, entry in added.items():
        if key in gone or (key in written and written[key][0]):
            gone.discard(key)
            written[key] = entry
    return written, gone


class Outcome(NamedTuple):
    """What became of one endpoint's map: `denials` are entries that deny and still win."""

    endpoint: int
    denials: int = 0
    error: str = ""


def give(endpoint: int, orders: Sequence[Order], now: Now, root: Path) -> Outcome:
    """Make a pinned map allow all as long as the orders say, or, where none is in force, take that back.

    What already allows all for ever is left alone.
    """
    wanted = entries(orders, endpoint, now)
    try:
        opened = PolicyMap(open_pinned(policy_map_name(endpoint), root))
    except HoldfastError as error:
        return Outcome(endpoint, error=str(error))
    with opened.handle:
        if opened.handle.info.value_size != POLICY_ENTRY.size:
            return Outcome(endpoint, error=f"{root / opened.name} is a map of another layout")
        held = dict(opened.items())
        forever = {key for key in BOTH_WAYS if key in held and not held[key][2]}
        if not wanted:
            opened.delete(key for key in BOTH_WAYS if key in held and key not in forever)
            return Outcome(endpoint)
        allowed = {key for key in forever if not held[key][0]}
        refused = opened.upsert((key, entry) for key, entry in wanted.items() if key not in allowed)
        denials = sum(deny and rank(key) != ALL for key, (deny, *_) in held.items())
        return Outcome(endpoint, denials, next((str(each) for each in refused.values()), ""))
