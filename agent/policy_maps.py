# SPDX-License-Identifier: Apache-2.0
"""From rules and identities to the policy maps of the endpoints of this host.

    policies, identities, endpoints ──▶ PolicyEngine ──▶ changes an endpoint ──▶ cilium_policy_<id>

Nothing is written before policies and identities are complete (`open_gate`): a restarted agent that does
not know its policies yet would otherwise write "not enforced, all allowed" over maps that deny.  Until
then restored maps enforce what they hold, and maps of new endpoints are empty, which denies everything.

A change of a map pauses where programs that run have to end before it goes on (`datapath.policy_order`): all
endpoints of a batch wait for that together.

Where a rule names a CIDR, the prefix gets an identity of this host, and the policy maps know it before the
ip→identity table does: an address must never move to a number that no map allows yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from loguru import logger

from core import metrics
from core.errors import HoldfastError
from core.reconciler import Reconciler
from core.table import Table
from datapath.grace import let_programs_end
from datapath.policy_order import RawPolicyMap
from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.errors import PolicyMapOverflow
from policy.model import MapChange, PolicyEntry, PolicyKey

Upserts = Mapping[PolicyKey, PolicyEntry]


class PolicyTarget(Protocol):
    """The kernel side: endpoints' pinned policy maps.

    A change is made while its iterator is run; where that pauses, programs that run have to end before it
    goes on.  It raises DatapathError; the map then holds the old policy, or one between that and the new one.
    """

    def applying(self, endpoint_id: int, upserts: Upserts, deletes: set[PolicyKey]) -> Iterator[None]:
        """Write and delete these entries."""
        ...

    def replacing(self, endpoint_id: int, wanted: Upserts) -> Iterator[None]:
        """Make the map hold exactly `wanted`, which may change as soon as this has paused."""
        ...

    def held(self, endpoint_id: int) -> RawPolicyMap:
        """Return what the map holds."""
        ...


class PolicyMaps:
    """Operations over the table endpoint id → wanted revision; owner of the engine."""

    def __init__(self, engine: PolicyEngine, target: PolicyTarget) -> None:
        self.engine = engine
        self.table: Table[int, int] = Table("policy-maps", ("engine",))
        self._source = self.table.source("engine")
        self._target = target
        self._wanted: set[int] = set()
        # Endpoint → what changed since the map was last written; None: compare the whole map.
        self._changes: dict[int, MapChange | None] = {}
        self._revision = 0
        # The engine's revision that was handed on last; endpoint → the one that its map enforces, where that
        # is an older one, and the one that is being written.
        self._newest = 0
        self._behind: dict[int, int] = {}
        self._writing: dict[int, int] = {}
        # Endpoint → what its policy needs of what the map holds; above 1 it keeps the last that fitted.
        self.pressure: Mapping[int, float] = {}
        self._overflows: set[int] = set()
        self.opened = asyncio.Event()
        self.waiting_since = time.monotonic()
        self.reconciler: Reconciler[int, int] = Reconciler("policy-maps", self.table, self)

    @property
    def is_open(self) -> bool:
        return self.opened.is_set()

    def open_gate(self) -> None:
        """Policies and identities are complete: from now on maps follow the engine."""
        if self.is_open:
            return
        self.opened.set()
        self.flush()
        self.compare()
        self._source.mark_in_sync()

    def revision(self, endpoint_id: int) -> int:
        """Return the revision of the policies that an endpoint's map enforces; 0 for none of this life.

        It stays behind the engine's while a change is not written, can not be, or does not fit into the map.
        """
        return self._behind.get(endpoint_id, self._newest)

    def add_endpoint(self, endpoint_id: int, labels: Labels) -> None:
        """Have the map of an endpoint follow the policy for `labels`."""
        self._wanted.add(endpoint_id)
        if self.engine.upsert_endpoint(endpoint_id, labels):
            self._behind[endpoint_id] = 0
            self._writing.pop(endpoint_id, None)
        if self.is_open:
            self.flush()
            self._want(endpoint_id, None)

    def compare(self, endpoint_ids: Collection[int] | None = None) -> None:
        """Have maps, or all, compared with what they ought to hold: the target wants something else."""
        if self.is_open:
            for endpoint_id in self._wanted if endpoint_ids is None else endpoint_ids:
                self._want(endpoint_id, None)

    def remove_endpoint(self, endpoint_id: int) -> None:
        """Forget an endpoint; its map is emptied and unpinned by whoever removes its programs."""
        self._wanted.discard(endpoint_id)
        self.engine.delete_endpoint(endpoint_id)
        self._overflows.discard(endpoint_id)
        self._behind.pop(endpoint_id, None)
        self._writing.pop(endpoint_id, None)
        self.pressure = {each: level for each, level in self.pressure.items() if each != endpoint_id}
        self._changes.pop(endpoint_id, None)
        self._source.delete(endpoint_id)

    def flush(self) -> None:
        """Hand what changed in the engine to the reconciler."""
        if not self.is_open:
            return
        changes = self._take_changes()
        for endpoint_id in changes:
            self._behind.setdefault(endpoint_id, self._newest)
        for endpoint_id in self._overflows:
            self._lags(endpoint_id)
        self._newest = self.engine.revision
        for endpoint_id, change in changes.items():
            self._want(endpoint_id, change)
        metrics.POLICY_REVISION.set(self._newest)

    def _take_changes(self) -> dict[int, MapChange]:
        """Return the engine's changes, and say which endpoints' policies stopped or began to fit."""
        changes, errors = self.engine.take_changes(), self.engine.errors()
        for endpoint_id in errors.keys() - self._overflows:
            logger.error("{}", errors[endpoint_id])
        for endpoint_id in self._overflows - errors.keys():
            logger.info("the policy of endpoint {} fits into its map again", endpoint_id)
            changes.setdefault(endpoint_id, _NOTHING)  # it may need nothing else to be up to date
        if changes or errors or self._overflows:
            self.pressure = {each: size / self.engine.limit for each, size in self.engine.sizes().items()}
        self._overflows = set(errors)
        return changes

    def _lags(self, endpoint_id: int) -> None:
        """Note that a part of the engine's revision, be it only an identity, is not in an endpoint's map."""
        last = self._behind.get(endpoint_id, self._newest)
        self._behind[endpoint_id] = min(last, self.engine.revision - 1)

    def _want(self, endpoint_id: int, change: MapChange | None) -> None:
        if endpoint_id not in self._wanted:
            return
        pending = self._changes.get(endpoint_id, _NOTHING)
        if change is not None and pending is not None:
            self._changes[endpoint_id] = merge(pending, change)
        else:
            self._changes[endpoint_id] = None
        self._revision += 1
        self._source.upsert(endpoint_id, self._revision)

    # --- the target, called by the reconciler only

    async def update(self, items: Sequence[tuple[int, int]]) -> Mapping[int, Exception]:
        """Write each endpoint's changes; one that fails is compared as a whole at its retry."""
        failed: dict[int, Exception] = {}
        writing = {endpoint_id: self._write(endpoint_id) for endpoint_id, _ in items}
        while writing:
            for endpoint_id, steps in list(writing.items()):
                if not self._goes_on(endpoint_id, steps, failed):
                    del writing[endpoint_id]
                await asyncio.sleep(0)
            if writing:
                await asyncio.to_thread(let_programs_end)
        return failed

    def _goes_on(self, endpoint_id: int, steps: Iterator[None], failed: dict[int, Exception]) -> bool:
        """Write until the next pause; False if there is nothing more to write."""
        try:
            return endpoint_id in self._wanted and next(steps, _ENDED) is not _ENDED
        except HoldfastError as error:
            failed[endpoint_id] = error
            self._changes[endpoint_id] = None
            self._lags(endpoint_id)
            return False

    def _write(self, endpoint_id: int) -> Iterator[None]:
        metrics.POLICY_REGENERATIONS.inc()
        change = self._changes.pop(endpoint_id, None)
        self._writing.pop(endpoint_id, None)
        if endpoint_id not in self._overflows:
            self._writing[endpoint_id] = self._newest
        if change is None:
            yield from self._target.replacing(endpoint_id, self._whole(endpoint_id))
        else:
            yield from self._target.applying(endpoint_id, change.upserts, set(change.deletes))
        self._written(endpoint_id)

    def _whole(self, endpoint_id: int) -> Upserts:
        """Return all that a map has to hold.

        Where the policy does not fit, and no other is known, that is what a former life has written: but for
        identities that are gone, whose numbers may be somebody else's soon.
        """
        try:
            return self.engine.map_state(endpoint_id)
        except PolicyMapOverflow:
            held = self._target.held(endpoint_id)
            if not held:
                raise
            return self.engine.adopt(endpoint_id, held)

    def _written(self, endpoint_id: int) -> None:
        revision = self._writing.pop(endpoint_id, None)
        if revision is None:
            return
        self._behind[endpoint_id] = revision
        if endpoint_id in self._overflows:
            self._lags(endpoint_id)
        elif endpoint_id not in self._changes:
            del self._behind[endpoint_id]

    async def delete(self, keys: Sequence[int]) -> Mapping[int, Exception]:
        """Nothing: the map goes with the endpoint's programs, so that no packet meets half of it."""
        return {}

    async def prune(self, table: Table[int, int]) -> int:
        return 0


def merge(first: MapChange, second: MapChange) -> MapChange:
    """Return one change with the effect of `first` and then `second`.  Pure."""
    upserts = {key: entry for key, entry in first.upserts.items() if key not in second.deletes}
    deletes = {key for key in first.deletes if key not in second.upserts}
    return MapChange({**upserts, **second.upserts}, deletes | set(second.deletes))


_NOTHING = MapChange({}, set())
_ENDED = object()
