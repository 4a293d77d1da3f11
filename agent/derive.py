# SPDX-License-Identifier: Apache-2.0
"""What follows from what: identities and policies into the engine, prefixes into identities.

The order of writes is the point of this module.  An address must never be given an identity that the
policy maps do not know yet, and an identity must not be forgotten while an address still has it; so new
things go engine → policy maps → ip→identity table, and old things the other way round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence

from loguru import logger

from agent.conntrack import Conntrack
from agent.endpoint import Endpoint
from agent.firewall import FirewallRules
from agent.ipcache import CIDR_SOURCE, LOCAL_SOURCE, IpTable, Record, used
from agent.policies import PolicyTable
from agent.policy_maps import PolicyMaps
from core import metrics
from core.errors import HoldfastError
from core.reconciler import Kind, Reconciler, Status
from core.table import Subscription, Table
from identity.labels import Labels
from identity.local import LocalIdentities, prefix_labels
from policy.model import Policy

# So many prefixes of policies get their identities before anybody else may run.
PREFIXES_AT_ONCE = 16
# So many identities are handed to the engine before anybody else may run: some milliseconds.
IDENTITIES_AT_ONCE = 500


class Derivations:
    """Follows identities and policies; implements `agent.kernel.Kernel`."""

    def __init__(
        self,
        identities: Table[int, Labels],
        policies: PolicyTable,
        local: LocalIdentities,
        addresses: IpTable,
        policy_maps: PolicyMaps,
        *,
        restore_grace: float = 0.0,
    ) -> None:
        self.identities = identities
        self.policies = policies
        self.local = local
        self.policy_maps = policy_maps
        self._restored_until = time.monotonic() + restore_grace
        self._addresses = addresses
        self._own = addresses.source(LOCAL_SOURCE)
        self._prefixes = addresses.source(CIDR_SOURCE)
        self._reconcilers: list[Reconciler[int, Endpoint]] = []
        self._ipcache: Reconciler[str, Record] | None = None
        self._conntrack: Conntrack | None = None
        self._firewall: FirewallRules | None = None
        self._identity_changes: Subscription[int] | None = None
        self._identities_taken = 0
        # Identities that are deleted while addresses have them; the policy maps know them until none has.
        self._fading: set[int] = set()
        self._identity_pulse = asyncio.Event()
        self._policy_changes: Subscription[str] | None = None
        self._policies_taken = asyncio.Event()
        self._rounds = 0  # in which changed policies were taken
        self._rounds_done = 0
        self._followed: set[str] = set()

    def attach(
        self,
        endpoints: Reconciler[int, Endpoint],
        ipcache: Reconciler[str, Record],
        conntrack: Conntrack,
        firewall: FirewallRules,
    ) -> None:
        """Name the reconcilers that are waited for, and who flushes connections."""
        self._reconcilers.append(endpoints)
        self._ipcache = ipcache
        self._conntrack = conntrack
        self._firewall = firewall

    # --- tasks

    async def follow_identities(self) -> None:
        """Keep the engine's identities equal to the table."""
        changes = self._identity_changes = self.identities.subscribe()
        try:
            while True:
                await changes.wait()
                await self._take_identities(changes.take(IDENTITIES_AT_ONCE))
                if self.identities.complete and not len(changes):
                    self._caught_up("identities")
                await asyncio.sleep(0)
        finally:
            self.identities.unsubscribe(changes)

    async def _take_identities(self, numbers: Sequence[int]) -> None:
        engine, gone = self.policy_maps.engine, list[int]()
        for number in numbers:
            labels = self.identities.get(number)
            if labels is None:
                gone.append(number)
            else:
                engine.upsert_identity(number, labels)
        self._fading.update(gone)
        if gone:
            await self.forget_unused()
        self.policy_maps.flush()
        self._identities_taken += len(numbers)
        self._identity_pulse.set()
        self._identity_pulse = asyncio.Event()

    async def forget_unused(self) -> None:
        """Take deleted identities out of the policy maps, but for those that an address still has.

        A host that had no etcd for a while goes on to speak as the number that it knows until it has heard of
        another one: what is allowed to it has to be allowed until then.
        """
        if not self._fading:
            return
        having = await used(self._addresses, self._fading)
        for number in list(self._fading):
            back = self.identities.get(number) is not None
            if back or number not in having:
                self._fading.discard(number)
            if not back and number not in having:
                self.policy_maps.engine.delete_identity(number)
        self.policy_maps.flush()

    async def wait_idle(self) -> None:
        """Wait until the policy maps know every identity of now: what addresses wait for.

        Changed identities are taken in the order of their change, so counting is enough.
        """
        pending = self._identity_changes
        wanted = self._identities_taken + (len(pending) if pending is not None else 0)
        while self._identities_taken < wanted:
            await self._identity_pulse.wait()
        await self.policy_maps.reconciler.wait_idle()

    async def follow_policies(self) -> None:
        """Keep the engine's policies, and the identities of the prefixes they name, equal to the table."""
        changes = self._policy_changes = self.policies.subscribe()
        for name in self.policy_maps.engine.policies.keys() - set(self.policies.keys()):
            changes.mark(name)  # it went while this task was dead
        try:
            while True:
                await changes.wait()
                self._rounds += 1
                await self._take_policies({name: self.policies.get(name) for name in changes.take()})
        finally:
            self.policies.unsubscribe(changes)

    async def _take_policies(self, taken: Mapping[str, Policy | None]) -> None:
        engine = self.policy_maps.engine
        named = await self._identify(taken.values())
        for name, policy in taken.items():
            if policy is None:
                engine.delete_policy(name)
                logger.info("policy {} is no longer in force", name)
            else:
                engine.upsert_policy(policy)
                logger.info("policy {} from {} is in force", name, policy.origin)
        metrics.POLICY_COUNT.set(len(self.policies))
        for prefix, number in named.items():
            self._prefixes.upsert(prefix, Record(number))
        stale = self._prefixes.entries().keys() - engine.cidrs()
        self.policy_maps.flush()
        self._wake_policy_waiters()
        if self.policies.complete:
            self._caught_up("policies")
        if self.policies.in_sync:
            self._prefixes.mark_in_sync()
            await self._forget_prefixes(stale)

    def _wake_policy_waiters(self) -> None:
        self._rounds_done = self._rounds
        self._policies_taken.set()
        self._policies_taken = asyncio.Event()

    async def policies_enforced(self) -> None:
        """Wait until everything that the table of policies holds now was written to the kernel."""
        await self.policies_taken()
        await self.policy_maps.reconciler.wait_idle()
        if self._ipcache is not None:
            await self._ipcache.wait_idle()

    async def policies_taken(self) -> None:
        """Wait until the engine has everything that the table of policies holds now."""
        # The round under way does not have what has changed since it began; the next one has all.
        waits = self._policy_changes is None or len(self._policy_changes) > 0
        wanted = self._rounds + 1 if waits else self._rounds
        while self._rounds_done < wanted:
            await self._policies_taken.wait()

    def _caught_up(self, follower: str) -> None:
        """A follower has handed on everything of a table that is whole; with both, the maps may follow."""
        self._followed.add(follower)
        if self._followed == {"identities", "policies"}:
            self.policy_maps.open_gate()

    async def _identify(self, policies: Iterable[Policy | None]) -> dict[str, int]:
        """Return an identity for each prefix that has none yet, of these policies and of those in force.

        The engine knows them then, before a rule or an address does.  Some at a time: each takes up to a
        millisecond, and a policy may name thousands.
        """
        wanted = self.policy_maps.engine.cidrs().union(*(each.cidrs for each in policies if each is not None))
        found: dict[str, int] = {}
        for prefix in wanted - self._prefixes.entries().keys():
            # It has a number already where an earlier round was broken off.
            number = self.local.number(prefix) or self._acquire(prefix)
            if number is not None:
                self.policy_maps.engine.upsert_identity(number, prefix_labels(prefix))
                found[prefix] = number
            if len(found) % PREFIXES_AT_ONCE == 0:
                await asyncio.sleep(0)
        return found

    def _acquire(self, prefix: str) -> int | None:
        try:
            return self.local.acquire(prefix)
        except HoldfastError as error:
            # Tried again at the next change; until then nothing is allowed to it that the rest is not.
            logger.error("prefix {} of a policy gets no identity: {}", prefix, error)
            return None

    async def _forget_prefixes(self, stale: set[str]) -> None:
        for prefix in stale:
            self._prefixes.delete(prefix)
        if stale and self._ipcache is not None:
            await self._ipcache.wait_idle()
        for prefix in stale:
            if prefix not in self._prefixes.entries():
                self.local.release(prefix)

    def free_restored_prefixes(self) -> int:
        """Free the numbers of a former life whose prefixes no policy names any more; return how many.

        Not before their grace has ended, for a policy that comes back, and not before cilium_ipcache was
        pruned, which is after all policies were taken: until then packets of such a prefix still bear its
        number, and whoever got it next would be taken for the prefix.
        """
        if self._ipcache is None or not self._ipcache.has_pruned or time.monotonic() < self._restored_until:
            return 0
        freed = self.local.forget_restored()
        if freed:
            logger.warning("{} identities of prefixes that no policy has named since the start: freed", freed)
        return freed

    # --- agent.kernel.Kernel

    def endpoint_identified(self, endpoint: Endpoint, labels: Labels) -> None:
        """Enforce an endpoint's identity and policy, and tell this host's other endpoints who it is."""
        self.policy_maps.engine.upsert_identity(endpoint.identity, labels)
        self.policy_maps.add_endpoint(endpoint.id, labels)
        self.policy_maps.flush()
        for prefix in endpoint.prefixes:
            self._own.upsert(prefix, Record(endpoint.identity))

    def endpoint_removed(self, endpoint: Endpoint) -> None:
        for prefix in endpoint.prefixes:
            self._own.delete(prefix)
        self.policy_maps.remove_endpoint(endpoint.id)

    async def address_freed(self, address: str) -> None:
        """Forget the connections of an address before somebody else gets it."""
        if self._conntrack is not None:
            await self._conntrack.flush(address)

    async def published(self, endpoints: Iterable[Endpoint]) -> Status:
        """Wait until the host's rules for the ports of these endpoints were written."""
        if self._firewall is None:
            return Status(Kind.DONE)
        return await self._firewall.settled(endpoints)

    async def interface_settled(self, endpoint_id: int) -> Status:
        """Wait for the interface of an endpoint alone."""
        return _worst([await each.settled(endpoint_id) for each in self._reconcilers])

    async def settled(self, endpoint: Endpoint) -> Status:
        """Wait for the interface, the policy map and the address of an endpoint; the first error wins."""
        outcomes = [await self.interface_settled(endpoint.id)]
        if self.policy_maps.is_open:
            outcomes.append(await self.policy_maps.reconciler.settled(endpoint.id))
        if self._ipcache is not None:
            # Its own addresses only: the table may have 100 000 others under way.
            outcomes += [await self._ipcache.settled(prefix) for prefix in endpoint.prefixes]
        return _worst(outcomes)

    def status(self, endpoint_id: int) -> Status:
        """Return what `settled` would, without waiting."""
        statuses = [reconciler.status(endpoint_id) for reconciler in self._reconcilers]
        statuses.append(self.policy_maps.reconciler.status(endpoint_id))
        return next((each for each in statuses if each.kind is not Kind.DONE), Status(Kind.DONE))


def _worst(outcomes: Sequence[Status]) -> Status:
    return next((each for each in outcomes if each.kind is Kind.ERROR), Status(Kind.DONE))
