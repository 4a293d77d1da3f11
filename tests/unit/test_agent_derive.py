# SPDX-License-Identifier: Apache-2.0
"""The order of writes: policy maps know a number before an address has it, and forget it after.

Real tables, reconcilers, engine and local identities; the kernel is a model that checks each write.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any, cast

import pytest
from loguru import logger

from agent import ipcache, tasks
from agent.derive import IDENTITIES_AT_ONCE, PREFIXES_AT_ONCE, Derivations
from agent.endpoint import Endpoint, macs_of
from agent.parts import Parts
from agent.policies import DIRECTORY, KVSTORE, PolicyTable, new_policies
from agent.policy_maps import PolicyMaps
from core.reconciler import Kind, Reconciler, Status
from core.table import Table
from datapath.devices import host_name, temporary_name
from datapath.policy_order import RawPolicyMap
from identity.cache import IdentityCache
from identity.labels import Labels
from identity.local import FIRST, LocalIdentities
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import Direction, PolicyEntry, PolicyKey

WEB, CLIENT = (Labels.parse(f"container:app={name};") for name in ("web", "client"))
CLIENT_IP = "10.1.0.9/32"


def policy(peer: str) -> str:
    return f"[{{endpointSelector: {{matchLabels: {{app: web}}}}, ingress: [{peer}]}}]"


FROM_CLIENT = policy("{fromEndpoints: [{matchLabels: {app: client}}]}")
FROM_PREFIX = policy("{fromCIDR: [192.0.2.0/24]}")


class Kernel:
    """Policy maps and the ip→identity map, slow; `surprises` are writes in the wrong order."""

    def __init__(self) -> None:
        self.policies: dict[int, dict[PolicyKey, PolicyEntry]] = {}
        self.addresses: dict[str, int] = {}
        self.expected: set[int] = set()  # numbers that the policy map of endpoint 1 must name first
        self.surprises: list[str] = []

    # PolicyTarget
    def applying(
        self, endpoint_id: int, upserts: Mapping[PolicyKey, PolicyEntry], deletes: set[PolicyKey]
    ) -> Iterator[None]:
        state = self.policies.setdefault(endpoint_id, {})
        state.update(upserts)
        for key in deletes:
            state.pop(key, None)
            if key.identity and key.identity in self.addresses.values():
                self.surprises.append(f"{key.identity} is forgotten while an address has it")
        yield from ()

    def replacing(self, endpoint_id: int, wanted: Mapping[PolicyKey, PolicyEntry]) -> Iterator[None]:
        self.policies[endpoint_id] = dict(wanted)
        yield from ()

    def held(self, endpoint_id: int) -> RawPolicyMap:
        return dict(self.policies.get(endpoint_id, {}).items())

    def allowed(self) -> set[int]:
        return {key.identity for key in self.policies.get(1, {})}


class AddressTarget:
    def __init__(self, kernel: Kernel, before: ipcache.PolicyBarrier) -> None:
        self.kernel = kernel
        self.before = before

    async def update(self, items: Sequence[tuple[str, ipcache.Record]]) -> Mapping[str, Exception]:
        await self.before.wait_idle()
        for prefix, record in items:
            if record.identity in self.kernel.expected - self.kernel.allowed():
                self.kernel.surprises.append(f"{prefix} is {record.identity}, which no map knows")
            self.kernel.addresses[prefix] = record.identity
        return {}

    async def delete(self, keys: Sequence[str]) -> Mapping[str, Exception]:
        await asyncio.sleep(0.005)
        for key in keys:
            self.kernel.addresses.pop(key, None)
        return {}

    async def prune(self, table: ipcache.IpTable) -> int:
        stale = [prefix for prefix in self.kernel.addresses if prefix not in table]
        await self.delete(stale)
        return len(stale)


class Nothing:
    async def update(self, items: Sequence[tuple[int, Endpoint]]) -> Mapping[int, Exception]:
        return {}

    async def delete(self, keys: Sequence[int]) -> Mapping[int, Exception]:
        return {}

    async def prune(self, table: Table[int, Endpoint]) -> int:
        return 0


class Host:
    def __init__(self, restore_grace: float = 0.0) -> None:
        self.kernel = Kernel()
        self.identities = IdentityCache()
        self.local = LocalIdentities(self.identities.local)
        self.policies: PolicyTable = new_policies()
        self.maps = PolicyMaps(PolicyEngine(), self.kernel)
        self.addresses = ipcache.new_table()
        self.derivations = Derivations(
            self.identities.table,
            self.policies,
            self.local,
            self.addresses,
            self.maps,
            restore_grace=restore_grace,
        )
        self.reconciler: Reconciler[str, ipcache.Record] = Reconciler(
            "ipcache", self.addresses, AddressTarget(self.kernel, self.derivations)
        )
        self.endpoints: Reconciler[int, Endpoint] = Reconciler(
            "endpoints", Table("endpoints", ("agent",)), Nothing()
        )
        self.derivations._reconcilers.append(self.endpoints)
        self.derivations._ipcache = self.reconciler

    def in_sync(self) -> None:
        self.identities.local.mark_in_sync()
        self.identities.in_sync()
        for source in (DIRECTORY, KVSTORE):
            self.policies.source(source).mark_in_sync()

    def put(self, text: str) -> None:
        (parsed,) = parse_policies(text, "test", name="p")
        self.policies.source(KVSTORE).upsert("p", parsed)

    async def endpoint(self) -> Endpoint:
        mac, node_mac = macs_of(IPv4Address("10.1.0.1"))
        made = Endpoint(
            id=1,
            ipv4="10.1.0.1",
            mac=mac,
            node_mac=node_mac,
            interface=host_name(1),
            peer=temporary_name(1),
            identity=300,
        )
        self.derivations.endpoint_identified(made, WEB)
        assert await self.derivations.settled(made) == Status(Kind.DONE)
        return made

    async def idle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0.005)
        await self.derivations.policies_enforced()


def run(test: Callable[[Host], Coroutine[Any, Any, None]], *, restore_grace: float = 0.0) -> None:
    async def main() -> None:
        host = Host(restore_grace)
        tasks = [
            asyncio.create_task(each)
            for each in (
                host.maps.reconciler.run(),
                host.reconciler.run(),
                host.derivations.follow_identities(),
                host.derivations.follow_policies(),
            )
        ]
        try:
            await asyncio.wait_for(test(host), 20)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        assert host.kernel.surprises == []

    asyncio.run(main())


def test_maps_wait_for_identities_and_policies() -> None:
    async def story(host: Host) -> None:
        await host.endpoint()
        await asyncio.sleep(0.02)
        assert host.kernel.policies == {}
        assert host.kernel.addresses["10.1.0.1/32"] == 300
        host.put(FROM_CLIENT)
        host.in_sync()
        await host.maps.opened.wait()
        await host.idle()
        assert PolicyKey(0, 0, 0, Direction.INGRESS) not in host.kernel.policies[1]  # ingress is enforced

    run(story)


def test_a_number_is_known_before_an_address_has_it() -> None:
    async def story(host: Host) -> None:
        host.in_sync()
        host.put(FROM_CLIENT)
        await host.endpoint()
        await host.idle()
        for number in range(400, 420):
            host.kernel.expected.add(number)
            host.identities.source.upsert(number, CLIENT)
            await asyncio.sleep(0)
            host.addresses.source(ipcache.KVSTORE_SOURCE).upsert(CLIENT_IP, ipcache.Record(number))
            await asyncio.sleep(0.001 * (number % 3))
        await host.idle()
        assert host.kernel.addresses[CLIENT_IP] == 419
        assert set(range(400, 420)) <= host.kernel.allowed()

    run(story)


def test_a_number_that_etcd_has_deleted_is_allowed_as_long_as_an_address_has_it() -> None:
    async def story(host: Host) -> None:
        entries = host.addresses.source(ipcache.KVSTORE_SOURCE)
        host.in_sync()
        host.put(FROM_CLIENT)
        await host.endpoint()
        host.kernel.expected.update((400, 401))
        host.identities.source.upsert(400, CLIENT)
        entries.upsert(CLIENT_IP, ipcache.Record(400))
        await host.idle()
        host.identities.source.delete(400)
        host.identities.source.upsert(401, CLIENT)
        await host.idle()
        await host.derivations.forget_unused()
        await host.idle()
        assert {400, 401} <= host.kernel.allowed()
        entries.upsert(CLIENT_IP, ipcache.Record(401))
        await host.idle()
        await host.derivations.forget_unused()
        await host.idle()
        assert 400 not in host.kernel.allowed()
        assert 401 in host.kernel.allowed()

    run(story)


def test_a_prefix_is_known_before_and_forgotten_after() -> None:
    async def story(host: Host) -> None:
        host.in_sync()
        await host.endpoint()
        for _ in range(3):
            host.put(FROM_PREFIX)
            await host.idle()
            number = host.local.number("192.0.2.0/24")
            assert number is not None
            assert host.kernel.addresses["192.0.2.0/24"] == number
            assert number in host.kernel.allowed()
            host.policies.source(KVSTORE).delete("p")
            await host.idle()
            while host.local.number("192.0.2.0/24") is not None:
                assert host.identities.table.get(number) is not None or (
                    "192.0.2.0/24" not in host.kernel.addresses
                )
                await asyncio.sleep(0.001)
            assert "192.0.2.0/24" not in host.kernel.addresses
        host.kernel.surprises.clear()  # the map forgets the rule first: then nothing is allowed, at once

    run(story)


def test_thousands_of_prefixes_hold_nobody_up() -> None:
    """Everybody else gets a turn while they are named; who waits for the policy waits for all of them."""
    many = [f"192.0.{high}.{low}/32" for high in range(2) for low in range(200)]

    async def story(host: Host) -> None:
        host.in_sync()
        await host.endpoint()
        await host.idle()
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        host.put(policy(f"{{fromCIDR: {json.dumps(many)}}}"))
        await asyncio.sleep(0)
        first = host.derivations.policies_enforced()
        await asyncio.wait_for(first, 20)
        assert turns > len(many) / PREFIXES_AT_ONCE
        assert set(many) <= host.kernel.addresses.keys()
        assert {host.local.number(each) for each in many} <= host.kernel.allowed()
        ticking.cancel()

    run(story)


def test_a_change_that_comes_while_prefixes_are_named_is_waited_for() -> None:
    many = [f"192.0.2.{low}/32" for low in range(200)]

    async def story(host: Host) -> None:
        host.in_sync()
        await host.endpoint()
        await host.idle()
        host.put(policy(f"{{fromCIDR: {json.dumps(many)}}}"))
        while not host.local.numbers():
            await asyncio.sleep(0)  # until the first of them have numbers
        host.put(FROM_PREFIX)
        await host.derivations.policies_enforced()
        assert host.kernel.allowed() >= {host.local.number("192.0.2.0/24")}
        assert host.kernel.addresses["192.0.2.0/24"] == host.local.number("192.0.2.0/24")
        await host.idle()
        assert host.local.numbers().keys() == {"192.0.2.0/24"}
        # Of what was taken back the map forgets the rule first: then nothing is allowed, at once.
        host.kernel.surprises.clear()

    run(story)


def test_numbers_of_a_former_life_are_kept_until_nothing_bears_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wanted prefix keeps its number; the other's is free once its packets have another identity."""
    monkeypatch.setattr(tasks, "UNUSED_S", 0.001)
    named, gone = ("192.0.2.0/24", FIRST + 4), ("198.51.100.0/24", FIRST + 5)

    async def story(host: Host) -> None:
        host.local.restore(dict([named, gone]))
        host.kernel.addresses.update([named, gone])
        parts = SimpleNamespace(derivations=host.derivations)
        chore = asyncio.create_task(tasks._forget_unused(cast("Parts", parts)))
        host.put(FROM_PREFIX)
        host.in_sync()
        await host.idle()
        assert host.local.numbers() == dict([named, gone])
        for source in host.addresses.sources:
            source.mark_in_sync()
        while len(host.local.numbers()) > 1:
            await asyncio.sleep(0.001)
        assert host.local.numbers() == dict([named])
        assert host.kernel.addresses.items() >= {named}
        assert gone[0] not in host.kernel.addresses
        chore.cancel()
        await asyncio.wait({chore})

    run(story)


def test_a_removed_endpoint_leaves_nothing() -> None:
    async def story(host: Host) -> None:
        host.in_sync()
        endpoint = await host.endpoint()
        host.derivations.endpoint_removed(endpoint)
        await host.derivations.settled(endpoint)
        assert "10.1.0.1/32" not in host.kernel.addresses

    run(story)


def test_who_waits_for_a_policy_does_not_wait_for_the_next_ones() -> None:
    """A policy changes at every turn of the loop, 2 000 times; the first is waited for in the middle."""
    turns = 2000

    async def story(host: Host) -> None:
        host.in_sync()
        await host.endpoint()
        done = 0

        async def change() -> None:
            nonlocal done
            for done in range(turns):
                host.put(FROM_CLIENT if done % 2 else FROM_PREFIX)
                await asyncio.sleep(0)

        changes = asyncio.create_task(change())
        await asyncio.sleep(0)
        await host.derivations.policies_enforced()
        assert 0 < done < turns - 1
        await changes
        await host.idle()
        host.kernel.surprises.clear()  # as above: the prefix is no longer named

    run(story)


def test_a_policy_that_went_while_the_task_was_dead() -> None:
    async def story() -> None:
        host = Host()
        host.in_sync()
        host.put(FROM_CLIENT)
        for gone in (False, True):
            if gone:
                host.policies.source(KVSTORE).delete("p")
            task = asyncio.create_task(host.derivations.follow_policies())
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait({task})
        assert dict(host.maps.engine.policies) == {}

    asyncio.run(story())


def test_an_address_waits_for_every_identity_of_before() -> None:
    """More come at once than are taken in one go, and the address is that of the last one."""
    last = 1000 + 2 * IDENTITIES_AT_ONCE

    async def story(host: Host) -> None:
        await host.endpoint()
        host.put(FROM_CLIENT)
        host.in_sync()
        await host.idle()
        host.kernel.expected = {last}
        others = [(number, Labels.parse(f"container:copy={number};")) for number in range(1000, last)]
        host.identities.source.upsert_many([*others, (last, CLIENT)])
        host.addresses.source(ipcache.KVSTORE_SOURCE).upsert(CLIENT_IP, ipcache.Record(last))
        await host.reconciler.wait_idle()
        assert host.kernel.addresses[CLIENT_IP] == last
        assert last in host.kernel.allowed()

    run(story)


@pytest.mark.parametrize("grace", [0.0, 3600.0])
def test_prefixes_of_the_last_life_keep_their_numbers_for_their_grace(grace: float) -> None:
    """At its end they are freed, with a warning; before, and before the kernel is pruned, they stay."""
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["level"].name), filter="agent.derive")

    async def story(host: Host) -> None:
        host.local.restore({"10.7.0.0/16": FIRST + 7})
        assert host.derivations.free_restored_prefixes() == 0
        host.in_sync()
        await host.idle()
        for source in host.addresses.sources:
            source.mark_in_sync()
        while not host.reconciler.has_pruned:
            await asyncio.sleep(0.005)
        assert host.derivations.free_restored_prefixes() == (0 if grace else 1)
        assert host.local.numbers() == ({"10.7.0.0/16": FIRST + 7} if grace else {})

    try:
        run(story, restore_grace=grace)
    finally:
        logger.remove(sink)
    assert said == ([] if grace else ["WARNING"])
