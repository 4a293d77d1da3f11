# SPDX-License-Identifier: Apache-2.0
"""Policy maps of 32 entries that are too small, or just large enough: what packets meet meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace

import pytest

from agent.policy_maps import PolicyMaps
from datapath.policy_order import RawPolicyMap
from datapath.records import IpcacheEntry
from datapath.testrun import ACT_OK, ACT_SHOT
from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import PolicyEntry, PolicyKey
from tests.support import frames
from tests.support.bpflab import CATALOGUE, Lab, address, lab

SIZE = 32
CATALOGUE_SMALL = replace(CATALOGUE, policy_max=SIZE)
ENDPOINT, CLIENT, CLIENT_NUMBER = address(1), "192.0.2.7", 400
WEB, API = Labels.of({"app": "web"}), Labels.of({"app": "api"})


class Written:
    """agent.policy_maps.PolicyTarget over the maps of a lab."""

    def __init__(self, host: Lab) -> None:
        self._host = host

    def applying(
        self, endpoint_id: int, upserts: Mapping[PolicyKey, PolicyEntry], deletes: set[PolicyKey]
    ) -> Iterator[None]:
        change = yield from self._host.policies[endpoint_id].applying(upserts.items(), deletes)
        assert not change.failed

    def replacing(self, endpoint_id: int, wanted: Mapping[PolicyKey, PolicyEntry]) -> Iterator[None]:
        change = yield from self._host.policies[endpoint_id].syncing(wanted.items())
        assert not change.failed

    def held(self, endpoint_id: int) -> RawPolicyMap:
        return dict(self._host.policies[endpoint_id].items())


class Enforced:
    """Endpoint 1, whose map follows an engine."""

    def __init__(self, host: Lab) -> None:
        self.host = host
        self.engine = PolicyEngine(limit=SIZE)
        self.maps = PolicyMaps(self.engine, Written(host))
        host.ipcache.upsert([(f"{CLIENT}/32", IpcacheEntry(CLIENT_NUMBER))])
        self.engine.upsert_identity(CLIENT_NUMBER, API)
        self._port = 10_000

    async def policy(self, *ports: str) -> None:
        """Let `api` in on these ports or ranges, and have that written."""
        listed = ", ".join(
            f"{{port: {first}, protocol: TCP{f', endPort: {last}' if last else ''}}}"
            for first, _, last in (each.partition("-") for each in ports)
        )
        text = (
            "[{endpointSelector: {}, ingress: [{fromEndpoints: [{matchLabels: {app: api}}],"
            f" toPorts: [{{ports: [{listed}]}}]}}]}}]"
        )
        (parsed,) = parse_policies(text, "test", name="p")
        self.engine.upsert_policy(parsed)
        self.maps.flush()
        await self.maps.reconciler.wait_idle()
        assert self.maps.reconciler.errors == {}

    def passes(self, port: int) -> bool:
        self._port += 1
        verdict = self.host.deliver(1, frames.tcp(CLIENT, ENDPOINT, self._port, port)).verdict
        assert verdict in (ACT_OK, ACT_SHOT)
        return verdict == ACT_OK

    def held(self) -> int:
        return len(self.host.hits(1))


@pytest.fixture
async def enforced() -> AsyncIterator[Enforced]:
    with lab(1, catalogue=CATALOGUE_SMALL) as host:
        made = Enforced(host)
        task = asyncio.create_task(made.maps.reconciler.run())
        made.maps.open_gate()
        yield made
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_policy_that_does_not_fit_leaves_the_last_one_in_force(enforced: Enforced) -> None:
    enforced.maps.add_endpoint(1, WEB)
    await enforced.policy("8000-8009")
    assert enforced.held() == 11  # and egress, which is open
    await enforced.policy("9000-9031")
    assert enforced.held() == 11
    assert enforced.passes(8000)
    assert enforced.passes(8009)
    assert not enforced.passes(9000)
    assert enforced.engine.errors().keys() == {1}
    await enforced.policy("9000-9030")
    assert enforced.held() == SIZE
    assert enforced.passes(9000)
    assert enforced.passes(9030)
    assert not enforced.passes(8000)
    assert enforced.engine.errors() == {}


async def test_endpoint_whose_first_policy_does_not_fit_is_closed(enforced: Enforced) -> None:
    await enforced.policy("9000-9031")
    enforced.maps.add_endpoint(1, WEB)
    while not enforced.maps.reconciler.errors:
        await asyncio.sleep(0.005)
    assert "needs 33 map entries, its map holds 32" in enforced.maps.reconciler.status(1).error
    assert enforced.held() == 0
    assert not enforced.passes(9000)


async def test_number_of_somebody_who_is_gone_lets_nobody_in(enforced: Enforced) -> None:
    """The policy that is kept knows 400 as `api`; without it, and with another 400, it lets nobody in."""
    enforced.maps.add_endpoint(1, WEB)
    await enforced.policy("8000-8009")
    await enforced.policy("9000-9031")
    for number in range(500, 502):
        enforced.engine.upsert_identity(number, API)
    assert enforced.passes(8000)
    for labels in (Labels(), Labels.of({"app": "somebody"})):
        enforced.engine.upsert_identity(CLIENT_NUMBER, labels)
        enforced.maps.flush()
        await enforced.maps.reconciler.wait_idle()
        assert enforced.engine.errors().keys() == {1}
        assert not enforced.passes(8000)
        assert enforced.held() == 1


async def test_full_map_becomes_another_full_map(enforced: Enforced) -> None:
    """Writing before deleting has no room for it; what comes out is entire nevertheless."""
    enforced.maps.add_endpoint(1, WEB)
    await enforced.policy("8000-8030")
    assert enforced.held() == SIZE
    await enforced.policy("9000-9030")
    assert enforced.held() == SIZE
    assert all(enforced.passes(port) for port in range(9000, 9031))
    assert not any(enforced.passes(port) for port in range(8000, 8031))


async def test_identity_that_makes_it_too_much(enforced: Enforced) -> None:
    """Sixteen more peers of two ports each; then all but one go."""
    enforced.maps.add_endpoint(1, WEB)
    await enforced.policy("80", "81")
    for number in range(500, 516):
        enforced.engine.upsert_identity(number, API)
    enforced.maps.flush()
    await enforced.maps.reconciler.wait_idle()
    assert enforced.held() == 3
    assert enforced.maps.pressure[1] == 35 / SIZE
    assert enforced.passes(81)
    for number in range(501, 516):
        enforced.engine.delete_identity(number)
    enforced.maps.flush()
    await enforced.maps.reconciler.wait_idle()
    assert enforced.held() == 5
    assert enforced.passes(81)
