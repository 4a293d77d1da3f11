# SPDX-License-Identifier: Apache-2.0
"""The policy engine: the one facade the agent uses.

In go policies, identities and endpoints, one at a time; out comes, per endpoint, what its policy map
must change.  Work is proportional to the change: an identity touches the selectors that select it and
the policies that use these, a rule the endpoints it selects, and endpoints with equal labels share one
resolved policy.

    engine.upsert_policy(policy); engine.upsert_identity(1234, labels); engine.upsert_endpoint(7, labels)
    for endpoint_id, change in engine.take_changes().items(): …write it as datapath.policy_order says…

Synchronous and pure: owned by one task of the agent, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from identity.labels import EMPTY, Labels
from policy.distillery import MapState, SharedPolicy, difference, forget
from policy.errors import PolicyMapOverflow
from policy.index import LabelIndex
from policy.model import (
    MAX_ENTRIES,
    Direction,
    Enforcement,
    EnforcementMode,
    MapChange,
    Policy,
    PolicyEntry,
    PolicyKey,
)
from policy.repository import INIT_LABELS, Repository, concerns
from policy.selector_cache import Moved, SelectorCache
from policy.selectors import Selector


@dataclass(slots=True)
class _Endpoint:
    """`base` is what the endpoint's map holds, while that is not what its policy last published."""

    policy: SharedPolicy
    base: MapState | None


class SelectorUse(NamedTuple):
    """One line of `policy selectors`: how many clauses use it, which identities it selects."""

    selector: Selector
    users: int
    identities: frozenset[int]


class PolicyEngine:
    """Policies, identities and endpoints in; changes of policy maps out.

    `limit` is the number of entries a policy map holds; `mode` the option enable-policy.
    """

    def __init__(self, *, limit: int = MAX_ENTRIES, mode: EnforcementMode = EnforcementMode.DEFAULT) -> None:
        self.limit = limit
        self.mode = mode
        self.revision = 1
        self._cache = SelectorCache()
        self._repository = Repository(self._cache)
        self._endpoints: dict[int, _Endpoint] = {}
        self._shared: dict[Labels, SharedPolicy] = {}
        self._members: dict[SharedPolicy, set[int]] = {}
        self._subjects: LabelIndex[SharedPolicy] = LabelIndex()
        # What take_changes has to look at; errors are those that it found.
        self._pending: set[SharedPolicy] = set()
        self._errors: dict[int, PolicyMapOverflow] = {}
        # Numbers that stopped to mean what they meant when changes were last taken.
        self._gone: set[int] = set()

    # Policies.

    @property
    def policies(self) -> Mapping[str, Policy]:
        """Policy by name (a live view)."""
        return MappingProxyType(self._repository.policies)

    def upsert_policy(self, policy: Policy) -> None:
        """Install a policy, or replace the one of its name.  Equal rules are no change."""
        self._rules_changed(self._repository.upsert(policy))

    def delete_policy(self, name: str) -> bool:
        """Remove a policy; False if there is none of that name."""
        if name not in self._repository.policies:
            return False
        self._rules_changed(self._repository.delete(name))
        return True

    def cidrs(self) -> frozenset[str]:
        """Return the prefixes that installed rules name, each in canonical form.

        Each needs an identity with its labels (`identity.local`) and an ipcache entry to be of effect.
        /0 is not among them: what no prefix covers is `world`, and rules for /0 select that.
        """
        return frozenset(self._repository.cidrs)

    def selectors(self) -> Iterator[SelectorUse]:
        """Return every distinct peer selector of the installed rules, but for the wildcard."""
        for cached in self._cache:
            yield SelectorUse(cached.selector, cached.uses, frozenset(cached.identities))

    def _rules_changed(self, subjects: set[Selector]) -> None:
        if not subjects:
            return
        self.revision += 1
        for subject in subjects:
            for shared in self._subjects.find(subject):
                if concerns(subject, shared.labels):
                    shared.mark_stale()

    # Identities.

    def upsert_identity(self, number: int, labels: Labels) -> None:
        """Add an identity or change its labels; an empty set of labels removes it."""
        known = self._cache.labels(number) is not None
        self._identity_moved(self._cache.upsert_identity(number, labels), known)

    def delete_identity(self, number: int) -> None:
        """Remove an identity; unknown ones are no change."""
        self.upsert_identity(number, EMPTY)

    def _identity_moved(self, moved: Moved | None, known: bool) -> None:
        if moved is None:
            return
        if known:
            self._gone.add(moved.number)
        for user in moved.stale:
            user.mark_stale()
        for user in moved.users:
            user.identity_changed(moved.number, moved.before, moved.after)

    # Endpoints.

    def upsert_endpoint(self, endpoint_id: int, labels: Labels) -> bool:
        """Add an endpoint or change its labels; False if it has them already.

        Without labels it is in the state `init`: nothing is allowed but by rules that name reserved:init.
        """
        labels = labels or INIT_LABELS
        old = self._endpoints.get(endpoint_id)
        if old is not None and old.policy.labels == labels:
            return False
        base: MapState = {}
        if old is not None:
            base = old.policy.published() if old.base is None else old.base
            self._leave(endpoint_id, old)
        shared = self._shared.get(labels) or self._share(labels)
        self._members[shared].add(endpoint_id)
        self._endpoints[endpoint_id] = _Endpoint(shared, base)
        self._pending.add(shared)
        return True

    def adopt(
        self, endpoint_id: int, held: Mapping[tuple[int, int, int, int], tuple[bool, int, int]]
    ) -> MapState:
        """Take what a new endpoint's map holds already for its last state, and return what that leaves of it:
        nothing of identities that nobody has.  KeyError for an unknown endpoint.
        """
        self._endpoints[endpoint_id].base = base = {
            PolicyKey(number, port, protocol, Direction(direction)): PolicyEntry(*entry)
            for (number, port, protocol, direction), entry in held.items()
            if not number or self._cache.labels(number) is not None
        }
        return base

    def delete_endpoint(self, endpoint_id: int) -> None:
        """Forget an endpoint; an unknown one is no change."""
        endpoint = self._endpoints.pop(endpoint_id, None)
        if endpoint is not None:
            self._leave(endpoint_id, endpoint)

    def _share(self, labels: Labels) -> SharedPolicy:
        shared = self._shared[labels] = SharedPolicy(
            labels, self._repository, self._cache, self.mode, self.limit, self._pending
        )
        self._members[shared] = set()
        self._subjects.add(shared, labels)
        return shared

    def _leave(self, endpoint_id: int, endpoint: _Endpoint) -> None:
        shared = endpoint.policy
        self._errors.pop(endpoint_id, None)
        members = self._members[shared]
        members.discard(endpoint_id)
        if not members:
            shared.close()
            del self._members[shared], self._shared[shared.labels]
            self._subjects.remove(shared)
            self._pending.discard(shared)

    # What comes out.

    def enforcement(self, endpoint_id: int) -> Enforcement:
        """Return which directions of an endpoint are enforced; KeyError for an unknown endpoint."""
        shared = self._endpoints[endpoint_id].policy
        shared.refresh()
        return shared.enforcement

    def map_state(self, endpoint_id: int) -> Mapping[PolicyKey, PolicyEntry]:
        """Return everything an endpoint's map must hold (a live view; do not keep it over a change).

        If the policy does not fit, that is the last state that fitted; PolicyMapOverflow if none is
        known, so that nobody mistakes "unknown" for "empty" and prunes a pinned map that still enforces.
        KeyError for an unknown endpoint.
        """
        endpoint = self._endpoints[endpoint_id]
        shared = endpoint.policy
        shared.refresh()
        if not shared.overflows:
            return MappingProxyType(shared.state)
        last = shared.state if endpoint.base is None else endpoint.base
        if not last:
            raise PolicyMapOverflow(endpoint_id, shared.size, self.limit)
        return MappingProxyType(last)

    def take_changes(self) -> dict[int, MapChange]:
        """Return what each endpoint's map must change since the last call; endpoints without a change
        are left out.

        An endpoint whose policy does not fit keeps its last state and stands in `errors` until it fits.  But
        an identity that is gone, or has other labels, is taken out of that: whoever has its number next is
        not who was allowed or denied.  Endpoints that share a policy share the change: do not modify it.
        """
        changes: dict[int, MapChange] = {}
        for shared in list(self._pending):
            shared.refresh()
            if shared.overflows:
                self._keep(shared, changes)
                continue
            self._pending.discard(shared)
            self._publish(shared, changes)
        self._gone.clear()
        return changes

    def _keep(self, shared: SharedPolicy, changes: dict[int, MapChange]) -> None:
        common = forget(shared.state, self._gone)
        for endpoint_id in self._members[shared]:
            self._errors[endpoint_id] = PolicyMapOverflow(endpoint_id, shared.size, self.limit)
            base = self._endpoints[endpoint_id].base
            change = common if base is None else forget(base, self._gone)
            if change:
                changes[endpoint_id] = change

    def _publish(self, shared: SharedPolicy, changes: dict[int, MapChange]) -> None:
        common = shared.publish()
        for endpoint_id in self._members[shared]:
            endpoint = self._endpoints[endpoint_id]
            self._errors.pop(endpoint_id, None)
            change = common
            if endpoint.base is not None:
                change = difference(endpoint.base, shared.state)
                endpoint.base = None
            if change:
                changes[endpoint_id] = change

    def sizes(self) -> dict[int, int]:
        """Return how many entries the policy of each endpoint needs, as far as it was looked at: what fits
        and what does not."""
        return {endpoint_id: endpoint.policy.size for endpoint_id, endpoint in self._endpoints.items()}

    def errors(self) -> Mapping[int, PolicyMapOverflow]:
        """Return the endpoints whose policy did not fit when changes were last taken (a copy)."""
        return dict(self._errors)
