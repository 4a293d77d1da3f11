# SPDX-License-Identifier: Apache-2.0
"""Resolution: from the clauses that are for an endpoint to the entries of its policy map.

What the rules mean.  A packet of identity i on transport t (port and protocol) is denied if any deny
clause covers (i, t), else allowed if any allow clause does, else dropped for want of a rule.

What the data path does.  It looks up (i, t), (any, t), (i, any), (any, any); the first hit decides.

So the entries are, per direction, with "denied" and "allowed" meaning what clauses for that transport
alone say, and "everywhere" what clauses without transports say:

    (any, any)   deny if everybody is denied everywhere; else allow if everybody is allowed everywhere
    (i, any)     deny if i is denied everywhere; allow if i is allowed everywhere
    (any, t)     deny if everybody is denied on t; allow if everybody is allowed on t
    (i, t)       deny if i is denied on t, or if i is denied everywhere but (any, t) would let it in;
                 allow if i is allowed on t and nothing above denies it

and none that repeats what the lookup would find without it.  All of it is set algebra over identities,
so one function serves a whole map (sets of thousands) and one identity that came (sets of one).

Called by `policy.distillery`; pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import repeat
from typing import Final, NamedTuple

from policy.model import (
    ALLOW,
    ANY_TRANSPORT,
    DENY,
    Direction,
    PolicyEntry,
    PolicyKey,
    Transport,
)
from policy.repository import InstalledClause
from policy.selector_cache import CachedSelector

NOBODY: Final[frozenset[int]] = frozenset()
_EVERYWHERE: Final = (ANY_TRANSPORT,)

IdentitySets = Mapping[Transport, AbstractSet[int]]


class Entries(NamedTuple):
    """The same entry for many identities on one transport."""

    transport: Transport
    identities: AbstractSet[int]
    entry: PolicyEntry


class TransportRules:
    """What the clauses for one transport say: who is allowed, who is denied."""

    __slots__ = ("allowed", "allows_everybody", "denied", "denies_everybody")

    def __init__(self) -> None:
        self.allowed: set[CachedSelector] = set()
        self.denied: set[CachedSelector] = set()
        self.allows_everybody = False
        self.denies_everybody = False


class DirectionRules:
    """What all clauses of one direction that are for an endpoint say, by transport."""

    def __init__(self, direction: Direction, clauses: Iterable[InstalledClause], *, open_by_default: bool):
        self.direction = direction
        self.transports: dict[Transport, TransportRules] = {}
        everywhere = self.transports[ANY_TRANSPORT] = TransportRules()
        everywhere.allows_everybody = open_by_default
        for deny, peers, transports, _, _ in clauses:
            for transport in _EVERYWHERE if transports is None else transports:
                rules = self.transports.get(transport)
                if rules is None:
                    rules = self.transports[transport] = TransportRules()
                if peers is not None:
                    (rules.denied if deny else rules.allowed).update(peers)
                elif deny:
                    rules.denies_everybody = True
                else:
                    rules.allows_everybody = True
        self.denies_all = everywhere.denies_everybody
        self.allows_all = everywhere.allows_everybody
        # Transports with an entry (any, t): those that deny everybody, and those that let everybody in.
        specific = {key: rules for key, rules in self.transports.items() if rules is not everywhere}
        self.closed = frozenset(key for key, rules in specific.items() if rules.denies_everybody)
        opened = (key for key, rules in specific.items() if rules.allows_everybody)
        self.opened = NO_TRANSPORTS if self.allows_all else frozenset(opened) - self.closed

    def selectors(self) -> Iterator[tuple[CachedSelector, Transport, bool]]:
        """Return every use of a selector: with which transport, and whether it denies."""
        for transport, rules in self.transports.items():
            for cached in rules.allowed:
                yield cached, transport, False
            for cached in rules.denied:
                yield cached, transport, True

    def entries_for_any(self) -> Iterator[Entries]:
        """Return the entries for identity 0."""
        if self.denies_all:
            yield Entries(ANY_TRANSPORT, _ANYBODY, DENY)
            return
        if self.allows_all:
            yield Entries(ANY_TRANSPORT, _ANYBODY, ALLOW)
        for transport in self.closed:
            yield Entries(transport, _ANYBODY, DENY)
        for transport in self.opened:
            yield Entries(transport, _ANYBODY, ALLOW)

    def entries_for(self, allowed: IdentitySets, denied: IdentitySets) -> Iterator[Entries]:
        """Return the entries for the identities that selectors allow and deny on each transport."""
        if self.denies_all:
            return
        banned = denied.get(ANY_TRANSPORT, NOBODY)
        yield Entries(ANY_TRANSPORT, banned, DENY)
        for transport in self.opened if banned else ():
            yield Entries(transport, banned - denied.get(transport, NOBODY), DENY)
        for transport, identities in denied.items():
            if transport in self.opened:
                yield Entries(transport, identities, DENY)
            elif transport != ANY_TRANSPORT and transport not in self.closed:
                yield Entries(transport, identities - banned, DENY)
        if not self.allows_all:
            yield from self._allowed(allowed, denied, banned)

    def _allowed(
        self, allowed: IdentitySets, denied: IdentitySets, banned: AbstractSet[int]
    ) -> Iterator[Entries]:
        everywhere = allowed.get(ANY_TRANSPORT, NOBODY)
        yield Entries(ANY_TRANSPORT, everywhere - banned if banned else everywhere, ALLOW)
        settled = everywhere | banned
        for transport, identities in allowed.items():
            if transport == ANY_TRANSPORT or transport in self.opened or transport in self.closed:
                continue
            yield Entries(transport, identities - settled - denied.get(transport, NOBODY), ALLOW)

    def resolve(self) -> list[Entries]:
        """Return all entries of this direction; no key is in two of them."""
        allowed: dict[Transport, AbstractSet[int]] = {}
        denied: dict[Transport, AbstractSet[int]] = {}
        for transport, rules in self.transports.items():
            if rules.allowed:
                allowed[transport] = _identities(rules.allowed)
            if rules.denied:
                denied[transport] = _identities(rules.denied)
        return [*self.entries_for_any(), *self.entries_for(allowed, denied)]


def _identities(selectors: set[CachedSelector]) -> AbstractSet[int]:
    """Return what any of `selectors` selects; not a copy if it is only one."""
    if len(selectors) == 1:
        return next(iter(selectors)).identities
    return set().union(*[each.identities for each in selectors])


_ANYBODY: Final = frozenset({0})
NO_TRANSPORTS: Final[frozenset[Transport]] = frozenset()


def policy_keys(entries: Entries, direction: Direction) -> Iterator[PolicyKey]:
    """Return the map keys of `entries`.

    Built without a Python call for each: resolving a map is mostly this (see docs/policy.md).
    """
    port, protocol = entries.transport
    fields = zip(entries.identities, repeat(port), repeat(protocol), repeat(direction), strict=False)
    return map(tuple.__new__, repeat(PolicyKey), fields)
