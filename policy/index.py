# SPDX-License-Identifier: Apache-2.0
"""Two indexes, each the mirror of the other: labelled things by selector, selectors by labels.

`LabelIndex` answers "which identities does this new selector select", `SelectorIndex` "which selectors
select this new identity"; neither looks at all of its members unless a selector gives it nothing to
look up (only NotIn and DoesNotExist).  The same two serve endpoints and the subjects of rules.

Called by `policy.selector_cache` and `policy.repository`; pure.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from identity.labels import ANY, CIDR, Label, Labels
from policy.selectors import Operator, Requirement, Selector

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# All prefix labels share one index key, with the prefix as the value: each has a key of its own, and an
# index key is built by looking at every member once.  No label has such a key.
_PREFIXES = "\0cidr"


class LabelIndex(Generic[K]):
    """Things with labels, found by selector.

    Buckets exist only for label keys that some selector asked for: a cluster has tens of thousands of
    identities with a dozen keys each, and policies name a few of these.
    """

    def __init__(self) -> None:
        self._labels: dict[K, Labels] = {}
        self._keys: dict[str, dict[str, set[K]]] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[K]:
        return iter(self._labels)

    def get(self, item: K) -> Labels | None:
        """Return the labels of `item`, None if it is not here."""
        return self._labels.get(item)

    def add(self, item: K, labels: Labels) -> None:
        """Add `item`, which must not be here."""
        self._labels[item] = labels
        for label in labels if self._keys else ():
            key, value = _term(label)
            buckets = self._keys.get(key)
            if buckets is not None:
                buckets.setdefault(value, set()).add(item)

    def remove(self, item: K) -> Labels | None:
        """Remove `item` and return its labels, None if it was not here."""
        labels = self._labels.pop(item, None)
        for label in labels or ():
            key, value = _term(label)
            bucket = self._keys.get(key, {}).get(value)
            if bucket is not None:
                bucket.discard(item)
                if not bucket:
                    del self._keys[key][value]
        return labels

    def values(self, key: str) -> Iterator[str]:
        """Yield every value that labels of `key` have, whatever their source."""
        return iter(self._key(key))

    def has_value(self, key: str, value: str) -> bool:
        """True if anything has a label `key` with this value."""
        return value in self._key(key)

    def find(self, selector: Selector) -> set[K]:
        """Return (in a new set) what `selector` selects."""
        positive = sorted(
            ((each, self._buckets(each)) for each in selector.requirements if each.positive),
            key=lambda pair: sum(map(len, pair[1])),
        )
        found: set[K] = set().union(*positive[0][1]) if positive else set(self._labels)
        for at, (each, buckets) in enumerate(positive):
            if at:
                found = found & set().union(*buckets)
            found = self._check_source(each, found)
        for each in selector.requirements:
            if not each.positive:
                found = self._without(each, found)
        return found

    def _without(self, requirement: Requirement, candidates: set[K]) -> set[K]:
        """Return `candidates` without those for which NotIn or DoesNotExist does not hold."""
        suspects = candidates & set().union(*self._buckets(requirement))
        if not _any_source(requirement):
            suspects -= self._check_source(requirement, suspects)
        return candidates - suspects

    def _check_source(self, requirement: Requirement, candidates: set[K]) -> set[K]:
        """Return those of `candidates` for which the requirement holds: buckets do not know sources."""
        if _any_source(requirement):
            return candidates
        return {item for item in candidates if requirement.holds(self._labels[item])}

    def _buckets(self, requirement: Requirement) -> list[set[K]]:
        """Return the sets of everything that has the key of `requirement`, with one of its values if
        it has any."""
        if requirement.source == CIDR:
            found = [self._key(_PREFIXES).get(requirement.key)]
        elif not requirement.values:
            return list(self._key(requirement.key).values())
        else:
            found = [self._key(requirement.key).get(value) for value in requirement.values]
        return [bucket for bucket in found if bucket]

    def _key(self, key: str) -> dict[str, set[K]]:
        buckets = self._keys.get(key)
        if buckets is None:
            buckets = self._keys[key] = {}
            for item, labels in self._labels.items():
                for label in labels:
                    term, value = _term(label)
                    if term == key:
                        buckets.setdefault(value, set()).add(item)
        return buckets


class SelectorIndex(Generic[T]):
    """Selectors with something attached to each, found by labels.

    Each selector stands under one of its requirements that can only hold when a label is there: that under
    which fewest stand, so that of a hundred selectors "app=shop, service=…" one is looked at and not all.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[Selector, T]] = {}
        self._keys: dict[str, dict[Selector, T]] = {}
        self._rest: dict[Selector, T] = {}
        self._anchors: dict[Selector, Requirement] = {}

    def add(self, selector: Selector, item: T) -> None:
        """Attach `item` to `selector`, which must not be here."""
        anchor = min((each for each in selector.requirements if each.positive), key=self._crowd, default=None)
        if anchor is None:
            self._rest[selector] = item
            return
        self._anchors[selector] = anchor
        if _any_value(anchor):
            self._keys.setdefault(anchor.key, {})[selector] = item
        for term in _terms(anchor):
            self._values.setdefault(term, {})[selector] = item

    def remove(self, selector: Selector) -> None:
        """Remove `selector`, which must be here."""
        anchor = self._anchors.pop(selector, None)
        if anchor is None:
            del self._rest[selector]
            return
        if _any_value(anchor):
            _drop(self._keys, anchor.key, selector)
        for term in _terms(anchor):
            _drop(self._values, term, selector)

    def _crowd(self, requirement: Requirement) -> tuple[bool, int]:
        """Return what decides where a selector is looked for: a key alone is met by most labels."""
        if _any_value(requirement):
            return True, len(self._keys.get(requirement.key, ()))
        terms = _terms(requirement)
        return False, len(terms) + sum(len(self._values.get(term, ())) for term in terms)

    def find(self, labels: Labels) -> list[T]:
        """Return what is attached to the selectors that select `labels`."""
        found = {each: item for each, item in self._rest.items() if each.selects(labels)}
        for label in labels if self._anchors else ():
            term = _term(label)
            for bucket in (self._values.get(term), self._keys.get(term[0])):
                if bucket:
                    found.update((each, item) for each, item in bucket.items() if each.selects(labels))
        return list(found.values())


def _term(label: Label) -> tuple[str, str]:
    """Return the key and value a label is indexed under."""
    return (_PREFIXES, label.key) if label.source == CIDR else (label.key, label.value)


def _any_source(requirement: Requirement) -> bool:
    """True if the buckets of `requirement` hold exactly what it speaks of."""
    return requirement.source in (ANY, CIDR)


def _any_value(requirement: Requirement) -> bool:
    """True if any label with the key meets it.  (A prefix's key is indexed as a value.)"""
    return requirement.operator is Operator.EXISTS and requirement.source != CIDR


def _terms(requirement: Requirement) -> list[tuple[str, str]]:
    """Return the keys and values that a positive requirement may be met by; none if by any value."""
    if requirement.source == CIDR:
        return [(_PREFIXES, requirement.key)]
    return [(requirement.key, value) for value in requirement.values]


def _drop(buckets: dict[K, dict[Selector, T]], key: K, selector: Selector) -> None:
    del buckets[key][selector]
    if not buckets[key]:
        del buckets[key]
