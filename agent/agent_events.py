# SPDX-License-Identifier: Apache-2.0
"""What the agent itself does, as events of the monitor (`holdfast monitor -t agent`).

    the start    Agent started
    policies     Policy updated, Policy deleted
    endpoints    Endpoint created, Endpoint identity changed, Endpoint deleted
    policy maps  Endpoint regenerated, Failed endpoint regeneration: a map has the new policy, or has not

The lines are Cilium's, ``>> Policy updated: {"labels":[…],"revision":3,"rule_count":1}``.  Each is told once
it has happened; of several changes in between the last is told.  Called by `agent.tasks`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from agent.api.models import MonitorEvent
from agent.api.monitor import MonitorHub
from agent.derive import Derivations
from agent.endpoint import Endpoint
from agent.policies import PolicyTable
from agent.policy_maps import PolicyMaps
from core.reconciler import Kind
from core.table import Table
from identity.labels import Labels
from policy.model import Policy

AGENT = "agent"


def event(what: str, message: Mapping[str, object], endpoint: int = 0) -> MonitorEvent:
    """Return one event; `endpoint` is whom filters find it by."""
    text = msgspec.json.encode(message).decode()
    return MonitorEvent(
        time=time.time(),
        type=AGENT,
        summary=f">> {what}: {text}",
        source=endpoint,
        reason=what,
        details=dict(message),
    )


def start_event() -> MonitorEvent:
    return event("Agent started", {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})


class AgentEvents:
    """Follows the tables, each in a task of its own, for as long as the agent lives."""

    def __init__(
        self,
        hub: MonitorHub,
        policies: PolicyTable,
        endpoints: Table[int, Endpoint],
        maps: PolicyMaps,
        derivations: Derivations,
    ) -> None:
        self._hub = hub
        self._policies = policies
        self._endpoints = endpoints
        self._maps = maps
        self._derivations = derivations

    async def follow_policies(self) -> None:
        """Tell of each policy once it is in force, or no longer."""
        known: dict[str, Policy] = {}
        changes = self._policies.subscribe()
        try:
            while True:
                await changes.wait()
                names = changes.take()
                await self._derivations.policies_taken()
                for name in names:
                    self._policy(name, known)
        finally:
            self._policies.unsubscribe(changes)

    def _policy(self, name: str, known: dict[str, Policy]) -> None:
        policy = self._policies.get(name)
        told = known.pop(name, None) if policy is None else policy
        if told is None:
            return  # it came and went
        if policy is not None:
            known[name] = policy
        message = {
            "name": name,
            "labels": sorted({str(each) for rule in told.rules for each in rule.labels}),
            "revision": self._maps.engine.revision,
            "rule_count": len(told.rules),
        }
        self._hub.publish(event("Policy deleted" if policy is None else "Policy updated", message))

    async def follow_endpoints(self) -> None:
        """Tell of endpoints that come, change their identity, and go; those of the start are known."""
        known = dict(self._endpoints.items())
        changes = self._endpoints.subscribe()
        try:
            while True:
                await changes.wait()
                for number in changes.take():
                    before, now = known.pop(number, None), self._endpoints.get(number)
                    if now is not None:
                        known[number] = now
                    self._endpoint(before, now)
        finally:
            self._endpoints.unsubscribe(changes)

    def _endpoint(self, before: Endpoint | None, now: Endpoint | None) -> None:
        if before is None and now is not None:
            self._hub.publish(event("Endpoint created", _described(now), now.id))
        if before is not None and now is None:
            self._hub.publish(event("Endpoint deleted", _described(before), before.id))
        elif now is not None and now.identity and now.identity != (before.identity if before else 0):
            message = {**_described(now), "old-identity": before.identity if before else 0}
            self._hub.publish(event("Endpoint identity changed", message, now.id))

    async def follow_maps(self) -> None:
        """Tell of endpoints whose map has a new policy; identities that come and go are none."""
        revisions: dict[int, int] = {}
        changes = self._maps.table.subscribe()
        try:
            while True:
                await changes.wait()
                for number in changes.take():
                    await self._map(number, revisions)
        finally:
            self._maps.table.unsubscribe(changes)

    async def _map(self, number: int, revisions: dict[int, int]) -> None:
        status = await self._maps.reconciler.settled(number)
        endpoint, revision = self._endpoints.get(number), self._maps.revision(number)
        if endpoint is None:
            revisions.pop(number, None)
            return
        message = {**_described(endpoint), "policy-revision": revision}
        if status.kind is Kind.ERROR:
            failed = event("Failed endpoint regeneration", {**message, "error": status.error}, number)
            self._hub.publish(failed)
        elif revisions.get(number) != revision:
            revisions[number] = revision
            self._hub.publish(event("Endpoint regenerated", message, number))


def _described(endpoint: Endpoint) -> dict[str, object]:
    return {
        "id": endpoint.id,
        "identity": endpoint.identity,
        "labels": Labels.parse(endpoint.labels).texts(),
        "addresses": list(endpoint.addresses.values()),
        "container-name": endpoint.container_name,
    }
