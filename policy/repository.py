# SPDX-License-Identifier: Apache-2.0
"""The installed policies, and which of their rules are for which endpoint.

Rules with the same subject form a group: a set of labels is tested against each distinct subject that
the index offers, not against each rule.  Owned by `policy.engine`; pure.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from identity.labels import RESERVED, Label, Labels
from policy.index import SelectorIndex
from policy.model import Clause, Enforcement, NamedPort, Policy, Requires, Rule, Transport
from policy.selector_cache import CachedSelector, SelectorCache
from policy.selectors import Selector

# What an endpoint is while nobody knows its labels.
INIT_LABEL = Label(RESERVED, "init")
INIT_LABELS = Labels([INIT_LABEL])


class InstalledClause(NamedTuple):
    """A clause with its selectors resolved.  `peers` None is everybody, `transports` None everything.

    A wildcard among the peers is everybody too and needs no selector: its entry is that of identity 0.
    `names` and `endpoints` are those of the clause, and mean work for `policy.narrowing`.
    """

    deny: bool
    peers: tuple[CachedSelector, ...] | None
    transports: tuple[Transport, ...] | None
    names: tuple[NamedPort, ...] = ()
    endpoints: bool = False


class InstalledRule:
    """A rule in the repository, its clauses by direction.  Compares by identity.

    `plain` says that its clauses mean the same for every endpoint, unless another rule requires something.
    """

    __slots__ = ("clauses", "enforces", "plain", "requires", "subject")

    def __init__(self, rule: Rule, cache: SelectorCache) -> None:
        self.subject = rule.subject
        self.enforces: Enforcement = rule.enforces
        self.clauses: tuple[list[InstalledClause], list[InstalledClause]] = ([], [])
        self.requires: tuple[Requires, ...] = rule.requires
        self.plain = not rule.requires and not any(clause.names for clause in rule.clauses)
        for clause in rule.clauses:
            self.clauses[clause.direction].append(_install(clause, cache))

    def release(self, cache: SelectorCache) -> None:
        for clauses in self.clauses:
            for clause in clauses:
                for cached in clause.peers or ():
                    cache.release(cached)


def _install(clause: Clause, cache: SelectorCache) -> InstalledClause:
    peers = clause.peers
    installed: tuple[CachedSelector, ...] | None = None
    if peers is not None and not any(peer.wildcard for peer in peers):
        installed = tuple(cache.acquire(peer) for peer in peers)
    return InstalledClause(clause.deny, installed, clause.transports, clause.names, clause.endpoints)


class _Group:
    """The rules of one subject, in the order they were installed."""

    __slots__ = ("rules", "subject")

    def __init__(self, subject: Selector) -> None:
        self.subject = subject
        self.rules: dict[InstalledRule, None] = {}


class Repository:
    """Policies by name; rules by the labels of the endpoints they are for."""

    def __init__(self, cache: SelectorCache) -> None:
        self.policies: dict[str, Policy] = {}
        self.cidrs: Counter[str] = Counter()
        self._cache = cache
        self._installed: dict[str, list[InstalledRule]] = {}
        self._groups: dict[Selector, _Group] = {}
        self._index: SelectorIndex[_Group] = SelectorIndex()

    def upsert(self, policy: Policy) -> set[Selector]:
        """Install or replace a policy; return the subjects of the rules that came or went."""
        old = self.policies.get(policy.name)
        if old is not None and old.rules == policy.rules:
            self.policies[policy.name] = policy
            return set()
        # New before old: a selector that both use keeps what is known about it.
        rules = [InstalledRule(rule, self._cache) for rule in policy.rules]
        touched = self.delete(policy.name)
        self.policies[policy.name] = policy
        self._installed[policy.name] = rules
        self.cidrs.update(policy.cidrs)
        for rule in rules:
            self._group(rule.subject).rules[rule] = None
        return touched | {rule.subject for rule in rules}

    def delete(self, name: str) -> set[Selector]:
        """Remove a policy if it is there; return the subjects of its rules."""
        policy = self.policies.pop(name, None)
        if policy is None:
            return set()
        self.cidrs.subtract(policy.cidrs)
        self.cidrs = +self.cidrs
        rules = self._installed.pop(name)
        for rule in rules:
            self._remove(rule)
        return {rule.subject for rule in rules}

    def rules_for(self, labels: Labels) -> list[InstalledRule]:
        """Return the rules whose subject selects `labels`."""
        groups = [group for group in self._index.find(labels) if concerns(group.subject, labels)]
        return [rule for group in groups for rule in group.rules]

    def _group(self, subject: Selector) -> _Group:
        group = self._groups.get(subject)
        if group is None:
            group = self._groups[subject] = _Group(subject)
            self._index.add(subject, group)
        return group

    def _remove(self, rule: InstalledRule) -> None:
        group = self._groups[rule.subject]
        del group.rules[rule]
        if not group.rules:
            del self._groups[rule.subject]
            self._index.remove(rule.subject)
        rule.release(self._cache)


def concerns(subject: Selector, labels: Labels) -> bool:
    """True if a rule of `subject`, which selects `labels`, is for an endpoint with them.

    While an endpoint's labels are not known (``reserved:init``), only rules that name that state are
    for it: one that allows something to every endpoint must not open it before a rule that denies
    the same to some could see its labels.
    """
    return INIT_LABEL not in labels or subject.names(RESERVED, INIT_LABEL.key)
