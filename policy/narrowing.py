# SPDX-License-Identifier: Apache-2.0
"""What a clause says for one endpoint: requirements put into its peers, names of ports into numbers.

Requirements.  As in Cilium 1.11, what fromRequires of any rule that is for the endpoint says is added to
every selector under fromEndpoints of every such rule (so too for toRequires, and for the deny sections
apart).  Prefixes, entities and elements without peers are not narrowed.

Names.  A packet's destination port is the receiver's.  In ingress that is the endpoint, whose labels say
which number a name is, if any.  In egress it is the peer, so a name becomes one clause for each number that
any identity gives it, with the peers narrowed to the identities that do.  That needs the values of the
label that are in use: the cache tells who asked when there is one more.

Each narrowed selector is in the cache like any other, so an identity that comes later finds its way
through it.

Called by `policy.distillery`; pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from identity.labels import ANY, Labels
from policy.model import Direction, NamedPort, Transport
from policy.names import port_key, port_of
from policy.repository import InstalledClause, InstalledRule
from policy.selector_cache import CachedSelector, SelectorCache
from policy.selectors import WILDCARD, Operator, Requirement, requirement, selector

Requirements = tuple[Requirement, ...]


class Narrowing:
    """The clauses of one direction for the endpoints with `labels`.

    `held` are the selectors that it took from the cache, `keys` the labels whose values it depends on;
    whoever uses the clauses gives the former back and asks anew when the latter get a new value.
    """

    def __init__(
        self, direction: Direction, labels: Labels, rules: Iterable[InstalledRule], cache: SelectorCache
    ) -> None:
        self.held: list[CachedSelector] = []
        self.keys: set[str] = set()
        self._direction = direction
        self._labels = labels
        self._cache = cache
        found = [each for rule in rules for each in rule.requires if each.direction is direction]
        # By `deny`; a set for the order in which rules came must not make different selectors.
        self._required: tuple[Requirements, Requirements] = (
            tuple({one for each in found if not each.deny for one in each.requirements}),
            tuple({one for each in found if each.deny for one in each.requirements}),
        )

    def clauses(self, rules: Iterable[InstalledRule]) -> Iterator[InstalledClause]:
        """Yield the clauses of `rules` as they are for these endpoints."""
        for rule in rules:
            for clause in rule.clauses[self._direction]:
                if clause.names or (clause.endpoints and self._required[clause.deny]):
                    yield from self._narrowed(clause)
                else:
                    yield clause

    def _narrowed(self, clause: InstalledClause) -> Iterator[InstalledClause]:
        required = self._required[clause.deny] if clause.endpoints else ()
        if clause.transports is None or clause.transports:
            yield InstalledClause(clause.deny, self._peers(clause, required), clause.transports)
        for name in clause.names:
            for transport, more in self._meanings(name):
                yield InstalledClause(clause.deny, self._peers(clause, (*required, *more)), (transport,))

    def _meanings(self, name: NamedPort) -> Iterator[tuple[Transport, Requirements]]:
        """Yield which ports a name is, each with what the peer must be for it."""
        key = port_key(name.name)
        if self._direction is Direction.INGRESS:
            transport = port_of(self._labels.get(ANY, key) or "")
            if transport is not None and transport.protocol == name.protocol:
                yield transport, ()
            return
        self.keys.add(key)
        found: dict[Transport, list[str]] = {}
        for value in self._cache.values(key):
            transport = port_of(value)
            if transport is not None and transport.protocol == name.protocol:
                found.setdefault(transport, []).append(value)
        for transport, values in found.items():
            yield transport, (requirement(ANY, key, Operator.IN, values),)

    def _peers(self, clause: InstalledClause, more: Requirements) -> tuple[CachedSelector, ...] | None:
        if not more:
            return clause.peers
        wide = (WILDCARD,) if clause.peers is None else [each.selector for each in clause.peers]
        taken = [self._cache.acquire(selector((*each.requirements, *more))) for each in wide]
        self.held += taken
        return tuple(taken)
