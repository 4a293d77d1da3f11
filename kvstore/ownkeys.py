# SPDX-License-Identifier: Apache-2.0
"""What this process wants to be in etcd under its lease, and what is known to be there.  Pure.

    want ──▶ dirty ──▶ (written by the session) ──▶ clean
                ▲                                     │  deleted or overwritten by somebody
                └─────────── observed, verify ◀───────┘
    unwant, abandon ──▶ leaving ──▶ (deleted by the session) ──▶ gone

Two processes that want the same key would overwrite each other for ever: a key that has to be restored
again and again is restored at growing intervals.  So is a refused deletion repeated.

Used by: kvstore.session.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from core.backoff import Backoff
from kvstore.ops import KeyValue
from kvstore.watch import Change

# Seconds.  The first restoration is immediate, the further ones back off; calm for longer forgives.
FIGHT_BASE_S, FIGHT_CAP_S, CALM_S = 1.0, 60.0, 300.0


@dataclass
class _Own:
    """One wanted key.  At `revision` it was in etcd as wanted; 0 while that is not known."""

    value: bytes
    revision: int = 0
    not_before: float = 0.0
    restored_at: float = 0.0
    error: str = ""
    fight: Backoff = field(default_factory=lambda: Backoff(FIGHT_BASE_S, FIGHT_CAP_S))


@dataclass(eq=False)
class Leaving:
    """One key to delete if it is ours: if it hangs on our lease, or, with `value`, if it has that value.

    The value is the one that was wanted and never seen in etcd: it may be there from before, under an older
    lease.  With `revision` the key is left of a former life, and ours only while it is what it was then.
    """

    value: bytes | None = None
    revision: int = 0
    not_before: float = 0.0
    error: str = ""
    fight: Backoff = field(default_factory=lambda: Backoff(FIGHT_BASE_S, FIGHT_CAP_S))


class OwnKeys:
    """See the module's text.  Times are seconds of time.monotonic()."""

    def __init__(self) -> None:
        self._own: dict[str, _Own] = {}
        self._dirty: dict[str, None] = {}
        self._leaving: dict[str, Leaving] = {}
        self._turned: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._own)

    def __contains__(self, key: str) -> bool:
        return key in self._own

    def values(self) -> dict[str, bytes]:
        """Return what is wanted."""
        return {key: own.value for key, own in self._own.items()}

    def errors(self) -> dict[str, str]:
        """Return why keys could not be written or deleted, for status."""
        refused = {key: own.error for key, own in self._own.items() if own.error}
        return refused | {key: each.error for key, each in self._leaving.items() if each.error}

    # --- what is wanted

    def want(self, key: str, value: bytes) -> bool:
        """Want `key` to have this value; returns False when it is known to be so already."""
        old = self._own.get(key)
        if old is not None and old.value == value:
            return old.revision == 0
        self._leaving.pop(key, None)
        self._own[key] = _Own(value)
        self._dirty[key] = self._turned[key] = None
        return True

    def adopt(self, key: str, value: bytes, revision: int) -> None:
        """Want a key that the caller has just written itself, under the session's lease, at `revision`."""
        self._leaving.pop(key, None)
        self._dirty.pop(key, None)
        self._own[key] = _Own(value, revision)
        self._turned[key] = None

    def watchable(self) -> dict[str, int]:
        """Return the keys that are in etcd as wanted, with the revision at which that was so."""
        return {key: own.revision for key, own in self._own.items() if own.revision}

    def take_turned(self) -> dict[str, int]:
        """Return the keys that may have become watchable, or no longer be (0), since the last call."""
        turned, self._turned = self._turned, {}
        return {key: own.revision if (own := self._own.get(key)) else 0 for key in turned}

    def unwant(self, key: str) -> None:
        """No longer want `key`: it is to be deleted.  Unwanting what is not wanted is no change."""
        own = self._own.pop(key, None)
        if own is not None:
            self._dirty.pop(key, None)
            self._turned[key] = None
            self._leaving[key] = Leaving(None if own.revision else own.value)

    def abandon(self, key: str, revision: int) -> bool:
        """Have a key deleted that is, as of `revision`, what a former life of this process left.

        Returns False, and changes nothing, when it is wanted, or is to be deleted already.
        """
        if key in self._own or key in self._leaving:
            return False
        self._leaving[key] = Leaving(revision=revision)
        return True

    # --- what is to be done

    def is_clean(self, key: str) -> bool:
        """True when `key` is known to be in etcd as wanted; KeyError when it is not wanted."""
        return self._own[key].revision > 0

    @property
    def settled(self) -> bool:
        """True when there is nothing to write and nothing to delete."""
        return not self._dirty and not self._leaving

    @property
    def dirty(self) -> int:
        """How many keys are to be written."""
        return len(self._dirty)

    def due(self, limit: int, now: float | None = None) -> dict[str, bytes]:
        """Return up to `limit` keys and values to write now."""
        at = time.monotonic() if now is None else now
        found: dict[str, bytes] = {}
        for key in self._dirty:
            if self._own[key].not_before <= at:
                found[key] = self._own[key].value
                if len(found) == limit:
                    break
        return found

    def next_due(self) -> float | None:
        """Return when the next write or deletion is due, or None when nothing waits."""
        writes = (self._own[key].not_before for key in self._dirty)
        deletions = (leaving.not_before for leaving in self._leaving.values())
        return min((*writes, *deletions), default=None)

    def leaving(self, now: float | None = None) -> dict[str, Leaving]:
        """Return the keys to delete now."""
        at = time.monotonic() if now is None else now
        return {key: leaving for key, leaving in self._leaving.items() if leaving.not_before <= at}

    # --- what has been done

    def wrote(self, values: Mapping[str, bytes], revision: int) -> None:
        """These were written at `revision`; a key that changed its mind meanwhile stays dirty."""
        for key, value in values.items():
            own = self._own.get(key)
            if own is not None and own.value == value:
                own.revision, own.error = revision, ""
                self._turned[key] = None
                self._dirty.pop(key, None)

    def failed(self, key: str, error: str, now: float | None = None) -> None:
        """Writing `key` was refused: tell, and try again later."""
        own = self._own.get(key)
        if own is not None:
            own.error = error
            own.not_before = (time.monotonic() if now is None else now) + own.fight.next()

    def left(self, key: str, leaving: Leaving) -> None:
        """What `leaving` said was done; a key that was wanted and unwanted again meanwhile stays to be."""
        if self._leaving.get(key) is leaving:
            del self._leaving[key]

    def not_left(self, leaving: Leaving, error: str, now: float | None = None) -> None:
        """A deletion was refused: tell, and try again later."""
        leaving.error = error
        leaving.not_before = (time.monotonic() if now is None else now) + leaving.fight.next()

    # --- what others do

    def observed(self, found: KeyValue, *, deleted: bool, lease: int, now: float | None = None) -> bool:
        """Take an event of a key; returns True when somebody deleted or changed an own key."""
        own = self._own.get(found.key)
        if own is None or own.revision == 0 or found.mod_revision <= own.revision:
            return False
        if not deleted and found.value == own.value and found.lease == lease:
            own.revision = found.mod_revision
            return False
        self._restore(found.key, own, time.monotonic() if now is None else now)
        return True

    def seen(self, changes: Iterable[Change], now: float | None = None) -> list[Change]:
        """Take what was seen of keys where their leases are not; returns what somebody did to own keys."""
        at, own = time.monotonic() if now is None else now, self._own
        found = []
        for change in [each for each in changes if each.key in own]:
            mine = own[change.key]
            if 0 < mine.revision < change.revision and change.value != mine.value:
                self._restore(change.key, mine, at)
                found.append(change)
        return found

    def verify(
        self, keys: Iterable[str], found: Mapping[str, KeyValue], lease: int, revision: int
    ) -> list[str]:
        """Compare keys with what was read of them at `revision`; returns those that have to be written."""
        wrong = []
        for key in keys:
            own, there = self._own.get(key), found.get(key)
            if own is None:
                continue
            self._turned[key] = None
            if there is not None and there.value == own.value and there.lease == lease:
                own.revision = revision
                self._dirty.pop(key, None)
            else:
                wrong.append(key)
                own.revision = 0
                self._dirty[key] = None
        return wrong

    def all_lost(self) -> None:
        """The lease is gone and every key with it."""
        for key, own in self._own.items():
            own.revision = 0
            self._dirty[key] = self._turned[key] = None

    def _restore(self, key: str, own: _Own, now: float) -> None:
        if now - own.restored_at > CALM_S:
            own.fight.reset()
            own.not_before = now
        else:
            own.not_before = now + own.fight.next()
        own.restored_at = now
        own.revision = 0
        self._dirty[key] = self._turned[key] = None
