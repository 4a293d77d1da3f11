# SPDX-License-Identifier: Apache-2.0
"""One resolved policy for all endpoints with equal labels, and what changed in it since it was published.

A `SharedPolicy` holds the wanted map (`state`) and, for every key that differs from what the endpoints
were last told, the old entry (`_undo`); nothing of that before they were told anything (`_untold`).  A rule
that comes or goes marks it stale and it is resolved again when it is next looked at; an identity that comes
or goes changes its own entries only.

A policy that needs more entries than a map holds is not spelt out: `state` stays what was last published (but
for identities that are gone, which the engine takes out), `size` counts on, and once it fits again it is
resolved anew.

Owned by `policy.engine`; pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from itertools import chain

from identity.labels import Labels
from policy.model import (
    Direction,
    Enforcement,
    EnforcementMode,
    MapChange,
    PolicyEntry,
    PolicyKey,
    Transport,
)
from policy.narrowing import Narrowing
from policy.repository import INIT_LABEL, InstalledClause, InstalledRule, Repository
from policy.resolve import DirectionRules, Entries, policy_keys
from policy.selector_cache import CachedSelector, SelectorCache

MapState = dict[PolicyKey, PolicyEntry]


class SharedPolicy:
    """The policy of every endpoint with `labels`.  Compares by identity.

    It adds itself to `pending` whenever there may be something to publish.
    """

    def __init__(
        self,
        labels: Labels,
        repository: Repository,
        cache: SelectorCache,
        mode: EnforcementMode,
        limit: int,
        pending: set[SharedPolicy],
    ) -> None:
        self.labels = labels
        self.enforcement = Enforcement(False, False)
        self.stale = True
        self.state: MapState = {}
        # How many entries the policy needs; `state` has as many unless that is above the limit.
        self.size = 0
        self._limit = limit
        self._repository = repository
        self._cache = cache
        self._mode = mode
        self._pending = pending
        self._directions: list[DirectionRules] = []
        self._selectors: set[CachedSelector] = set()
        # What only these endpoints need: narrowed selectors, and the labels whose values matter.
        self._held: list[CachedSelector] = []
        self._keys: set[str] = set()
        self._uses: dict[CachedSelector, list[tuple[DirectionRules, Transport, bool]]] | None = None
        self._undo: dict[PolicyKey, PolicyEntry | None] = {}
        self._untold = True

    @property
    def overflows(self) -> bool:
        """True if the policy needs more entries than a map holds; `state` is then the last that fitted."""
        return self.size > self._limit

    def mark_stale(self) -> None:
        """Say that a rule which is for these endpoints came or went."""
        self.stale = True
        self._pending.add(self)

    def refresh(self) -> None:
        """Resolve again if a rule came or went."""
        if not self.stale:
            return
        self.stale = False
        rules = self._repository.rules_for(self.labels) if self._mode is not EnforcementMode.NEVER else []
        self.enforcement = self._enforcement(rules)
        clauses = self._clauses(rules)
        self._directions = [
            DirectionRules(direction, clauses[direction], open_by_default=not self.enforcement[direction])
            for direction in Direction
        ]
        self._watch_selectors()
        resolved = [(each.direction, entries) for each in self._directions for entries in each.resolve()]
        self.size = sum(len(entries.identities) for _, entries in resolved)
        if self.overflows:
            self._keep_published()
            return
        self._replace(_spelt_out(resolved))

    def _clauses(self, rules: list[InstalledRule]) -> list[Iterable[InstalledClause]]:
        """Return by direction what the rules say for these endpoints."""
        released, self._held = self._held, []
        keys: set[str] = set()
        found: list[Iterable[InstalledClause]] = []
        plain = all(rule.plain for rule in rules)
        for direction in Direction:
            if plain:
                found.append(chain.from_iterable([rule.clauses[direction] for rule in rules]))
                continue
            narrowing = Narrowing(direction, self.labels, rules, self._cache)
            found.append(list(narrowing.clauses(rules)))
            self._held += narrowing.held
            keys |= narrowing.keys
        self._watch_values(keys)
        # New before old: a selector that both have keeps what is known about it.
        for cached in released:
            self._cache.release(cached)
        return found

    def _watch_values(self, keys: set[str]) -> None:
        self._cache.watch(self, self._keys, keys)
        self._keys = keys

    def _enforcement(self, rules: Iterable[InstalledRule]) -> Enforcement:
        if self._mode is EnforcementMode.NEVER:
            return Enforcement(False, False)
        if self._mode is EnforcementMode.ALWAYS or INIT_LABEL in self.labels:
            return Enforcement(True, True)
        wanted = {rule.enforces for rule in rules}
        return Enforcement(any(each.ingress for each in wanted), any(each.egress for each in wanted))

    def _watch_selectors(self) -> None:
        wanted: set[CachedSelector] = set()
        for direction in self._directions:
            for rules in direction.transports.values():
                wanted.update(rules.allowed, rules.denied)
        for cached in self._selectors - wanted:
            cached.users.discard(self)
        for cached in wanted - self._selectors:
            cached.users.add(self)
        self._selectors = wanted
        self._uses = None

    def close(self) -> None:
        """Let go of the selectors: the last endpoint with these labels is gone."""
        for cached in self._selectors:
            cached.users.discard(self)
        self._selectors = set()
        for cached in self._held:
            self._cache.release(cached)
        self._held = []
        self._watch_values(set())

    def identity_changed(
        self, number: int, before: list[CachedSelector], after: list[CachedSelector]
    ) -> None:
        """Change the entries of one identity that moved between selectors."""
        if self.stale:
            return
        old, new = self._entries_of(number, before), self._entries_of(number, after)
        overflowed = self.overflows
        self.size += len(new) - len(old)
        if overflowed:
            if not self.overflows:
                self.mark_stale()
            return
        for key in old.keys() - new.keys():
            self._note(key)
            del self.state[key]
        for key, entry in new.items():
            if self.state.get(key) != entry:
                self._note(key)
                self.state[key] = entry
        if self.overflows:
            self._keep_published()
        self._pending.add(self)

    def _entries_of(self, number: int, selectors: list[CachedSelector]) -> MapState:
        """Return the entries of one identity that exactly `selectors` select."""
        one = frozenset({number})
        sets: dict[DirectionRules, tuple[dict[Transport, frozenset[int]], dict[Transport, frozenset[int]]]]
        sets = {}
        uses = self._selector_uses()
        for cached in selectors:
            for direction, transport, deny in uses.get(cached, ()):
                sets.setdefault(direction, ({}, {}))[deny][transport] = one
        state: MapState = {}
        for direction, (allowed, denied) in sets.items():
            for entries in direction.entries_for(allowed, denied):
                if entries.identities:
                    state.update(dict.fromkeys(policy_keys(entries, direction.direction), entries.entry))
        return state

    def _selector_uses(self) -> dict[CachedSelector, list[tuple[DirectionRules, Transport, bool]]]:
        """Return where each selector stands; made when the first identity comes after a resolution."""
        if self._uses is None:
            self._uses = {}
            for direction in self._directions:
                for cached, transport, deny in direction.selectors():
                    self._uses.setdefault(cached, []).append((direction, transport, deny))
        return self._uses

    def _replace(self, state: MapState) -> None:
        old, self.state = self.state, state
        if self._untold:
            return
        undo = self._undo
        for key in old.keys() - state.keys():
            undo.setdefault(key, old[key])
        for key, entry in state.items():
            was = old.get(key)
            if was != entry:
                undo.setdefault(key, was)

    def _keep_published(self) -> None:
        self.state = self.published()
        self._undo = {}

    def _note(self, key: PolicyKey) -> None:
        if not self._untold:
            self._undo.setdefault(key, self.state.get(key))

    def published(self) -> MapState:
        """Return (in a new dict) the state that the endpoints were last told."""
        state = {} if self._untold else dict(self.state)
        for key, entry in self._undo.items():
            if entry is None:
                state.pop(key, None)
            else:
                state[key] = entry
        return state

    def publish(self) -> MapChange:
        """Return what changed since the last call, and count it as told."""
        if self._untold:
            self._untold = False
            return MapChange(dict(self.state))
        change = MapChange()
        state = self.state
        for key, old in self._undo.items():
            entry = state.get(key)
            if entry is None:
                if old is not None:
                    change.deletes.add(key)
            elif entry != old:
                change.upserts[key] = entry
        self._undo = {}
        return change


def _spelt_out(resolved: Iterable[tuple[Direction, Entries]]) -> MapState:
    """Return the map that these entries are, none of which says the same twice."""
    state: MapState = {}
    for direction, entries in resolved:
        spelt = dict.fromkeys(policy_keys(entries, direction), entries.entry)
        if state:
            state.update(spelt)
        else:  # most policies have one large part: it is not copied
            state = spelt
    return state


def difference(old: MapState, new: MapState) -> MapChange:
    """Return the change that turns the map `old` into `new`."""
    upserts = {key: entry for key, entry in new.items() if old.get(key) != entry}
    return MapChange(upserts, old.keys() - new.keys())


def forget(state: MapState, numbers: AbstractSet[int]) -> MapChange:
    """Take the entries of these identities out of `state`; return the change that does so to its map."""
    gone = {key for key in state if key.identity in numbers} if numbers else set()
    for key in gone:
        del state[key]
    return MapChange({}, gone)
