# SPDX-License-Identifier: Apache-2.0
"""From rules and identities to the policy maps of the endpoints of this host.

    policies, identities, endpoints ──▶ PolicyEngine ──▶ changes an endpoint ──▶ cilium_policy_<id>

Nothing is written before policies and identities are complete (`open_gate`): a restarted agent that does
not know its policies yet would otherwise write "not enforced, all allowed" over maps that deny.  Until
then restored maps enforce what they hold, and maps of new endpoints are empty, which denies everything.

Where a rule names a CIDR, the prefix gets an identity of this host, and the policy maps know it before the
ip→identity table does: an address must never move to a number that no map allows yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from loguru import logger

from core import metrics
from core.errors import HoldfastError
from core.reconciler import Reconciler
from core.table import Table
from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.model import MapChange, PolicyEntry, PolicyKey

Upserts = Mapping[PolicyKey, PolicyEntry]


class PolicyTarget(Protocol):
    """The kernel side: one endpoint's pinned policy map."""

    def apply(self, endpoint_id: int, upserts: Upserts, deletes: set[PolicyKey]) -> None:
        """Write upserts first, then deletes; raises DatapathError."""
        ...

    def replace(self, endpoint_id: int, wanted: Upserts) -> int:
        """Make the map hold exactly `wanted`; return how many entries differed."""
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
        self._take_changes()
        for endpoint_id in self._wanted:
            self._want(endpoint_id, None)
        self._source.mark_in_sync()

    def add_endpoint(self, endpoint_id: int, labels: Labels) -> None:
        """Have the map of an endpoint follow the policy for `labels`."""
        self._wanted.add(endpoint_id)
        self.engine.upsert_endpoint(endpoint_id, labels)
        if self.is_open:
            self.flush()
            self._want(endpoint_id, None)

    def remove_endpoint(self, endpoint_id: int) -> None:
        """Forget an endpoint; its map is emptied and unpinned by whoever removes its programs."""
        self._wanted.discard(endpoint_id)
        self.engine.delete_endpoint(endpoint_id)
        self._overflows.discard(endpoint_id)
        self.pressure = {each: level for each, level in self.pressure.items() if each != endpoint_id}
        self._changes.pop(endpoint_id, None)
        self._source.delete(endpoint_id)

    def flush(self) -> None:
        """Hand what changed in the engine to the reconciler."""
        if not self.is_open:
            return
        for endpoint_id, change in self._take_changes().items():
            self._want(endpoint_id, change)
        metrics.POLICY_REVISION.set(self.engine.revision)

    def _take_changes(self) -> dict[int, MapChange]:
        """Return the engine's changes, and say which endpoints' policies stopped or began to fit."""
        changes = self.engine.take_changes()
        errors = self.engine.errors()
        for endpoint_id in errors.keys() - self._overflows:
            logger.error("{}", errors[endpoint_id])
        for endpoint_id in self._overflows - errors.keys():
            logger.info("the policy of endpoint {} fits into its map again", endpoint_id)
        if changes or errors or self._overflows:
            self.pressure = {each: size / self.engine.limit for each, size in self.engine.sizes().items()}
        self._overflows = set(errors)
        return changes

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
        for endpoint_id, _ in items:
            if endpoint_id not in self._wanted:
                continue
            change = self._changes.pop(endpoint_id, None)
            try:
                self._write(endpoint_id, change)
            except HoldfastError as error:
                self._changes[endpoint_id] = None
                failed[endpoint_id] = error
            await asyncio.sleep(0)
        return failed

    def _write(self, endpoint_id: int, change: MapChange | None) -> None:
        metrics.POLICY_REGENERATIONS.inc()
        if change is None:
            self._target.replace(endpoint_id, self.engine.map_state(endpoint_id))
        else:
            self._target.apply(endpoint_id, change.upserts, set(change.deletes))

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
