# SPDX-License-Identifier: Apache-2.0
"""Which identities each selector of the installed rules selects, kept up to date one identity at a time.

Every distinct selector is here once, however many rules use it.  A new selector is answered from the
index of identities, a new identity from the index of selectors.  Owned by `policy.engine`; pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from identity.labels import EMPTY, Labels
from policy.index import LabelIndex, SelectorIndex
from policy.selectors import Selector


class SelectorUser(Protocol):
    """Who wants to know when one identity moves into or out of a selector, or brings a new value."""

    def mark_stale(self) -> None: ...

    def identity_changed(
        self, number: int, before: list[CachedSelector], after: list[CachedSelector]
    ) -> None: ...


class CachedSelector:
    """One selector and what it selects.  Compares by identity: there is one per selector.

    `identities` belongs to the cache; `users` to the policies that are resolved with it; `uses` counts
    clauses of installed rules.
    """

    __slots__ = ("identities", "selector", "users", "uses")

    def __init__(self, selector: Selector, identities: set[int]) -> None:
        self.selector = selector
        self.identities = identities
        self.users: set[SelectorUser] = set()
        self.uses = 0


class Moved(NamedTuple):
    """What one identity's change did: the selectors that selected it before and after, and who cares.

    `stale` are those for whom a label that they watch has a value that was not there before.
    """

    number: int
    before: list[CachedSelector]
    after: list[CachedSelector]
    users: set[SelectorUser]
    stale: set[SelectorUser]


class SelectorCache:
    """Identities and selectors, each found from the other."""

    def __init__(self) -> None:
        self._identities: LabelIndex[int] = LabelIndex()
        self._index: SelectorIndex[CachedSelector] = SelectorIndex()
        self._cached: dict[Selector, CachedSelector] = {}
        self._watched: dict[str, set[SelectorUser]] = {}

    def __iter__(self) -> Iterator[CachedSelector]:
        return iter(self._cached.values())

    def __len__(self) -> int:
        return len(self._cached)

    def labels(self, number: int) -> Labels | None:
        """Return the labels of a known identity."""
        return self._identities.get(number)

    def acquire(self, selector: Selector) -> CachedSelector:
        """Return the cached selector and count one use of it."""
        cached = self._cached.get(selector)
        if cached is None:
            cached = self._cached[selector] = CachedSelector(selector, self._identities.find(selector))
            self._index.add(selector, cached)
        cached.uses += 1
        return cached

    def release(self, cached: CachedSelector) -> None:
        """Count one use less; the last one removes the selector."""
        cached.uses -= 1
        if not cached.uses:
            del self._cached[cached.selector]
            self._index.remove(cached.selector)

    def values(self, key: str) -> Iterator[str]:
        """Yield every value that labels of `key` have, of any source."""
        return self._identities.values(key)

    def watch(self, user: SelectorUser, old: set[str], new: set[str]) -> None:
        """Tell `user` of new values of the label keys `new` from now on, of those in `old` no longer."""
        for key in old - new:
            self._watched[key].discard(user)
            if not self._watched[key]:
                del self._watched[key]
        for key in new - old:
            self._watched.setdefault(key, set()).add(user)

    def _brings_news_to(self, labels: Labels) -> set[SelectorUser]:
        """Return who watches for a value that nothing has but `labels`, which are not here yet."""
        found: set[SelectorUser] = set()
        for each in labels if self._watched else ():
            users = self._watched.get(each.key)
            if users and not self._identities.has_value(each.key, each.value):
                found |= users
        return found

    def upsert_identity(self, number: int, labels: Labels) -> Moved | None:
        """Add or relabel an identity; None if nothing is different.  An empty set removes it."""
        old = self._identities.get(number)
        if (old or EMPTY) == labels:
            return None
        stale = self._brings_news_to(labels)
        self._identities.remove(number)
        if labels:
            self._identities.add(number, labels)
        before = self._index.find(old) if old else []
        after = self._index.find(labels) if labels else []
        users: set[SelectorUser] = set()
        for cached in set(before) - set(after):
            cached.identities.discard(number)
            users |= cached.users
        for cached in set(after) - set(before):
            cached.identities.add(number)
            users |= cached.users
        return Moved(number, before, after, users, stale)

    def delete_identity(self, number: int) -> Moved | None:
        """Remove an identity; None if it was not known."""
        return self.upsert_identity(number, EMPTY)
