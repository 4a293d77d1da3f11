# SPDX-License-Identifier: Apache-2.0
"""What `holdfast monitor -t agent` shows: real tables, engine and hub; a kernel that takes writes or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Any

from msgspec import structs

from agent import ipcache
from agent.agent_events import AgentEvents, event
from agent.api.monitor import Listener, MonitorFilter, MonitorHub
from agent.derive import Derivations
from agent.endpoint import Endpoint, macs_of
from agent.policies import DIRECTORY, KVSTORE, PolicyTable, new_policies
from agent.policy_maps import PolicyMaps
from core.table import Table
from datapath.devices import host_name, temporary_name
from datapath.errors import DatapathError
from identity.cache import IdentityCache
from identity.labels import Labels
from identity.local import LocalIdentities
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import PolicyEntry, PolicyKey
from tests.support.eventually import eventually

WEB = Labels.parse("container:app=web;")
RULE = {"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}], "labels": ["team=shop"]}


class Kernel:
    """Policy maps that hold what they are told; `broken` ones refuse it."""

    def __init__(self) -> None:
        self.broken = False

    def applying(
        self, endpoint_id: int, upserts: Mapping[PolicyKey, PolicyEntry], deletes: set[PolicyKey]
    ) -> Iterator[None]:
        if self.broken:
            raise DatapathError("no room")
        yield from ()

    def replacing(self, endpoint_id: int, wanted: Mapping[PolicyKey, PolicyEntry]) -> Iterator[None]:
        return self.applying(endpoint_id, wanted, set())

    def held(self, endpoint_id: int) -> Mapping[Any, Any]:
        return {}


class Host:
    """The tables of an agent, and a reader of its events."""

    def __init__(self, listener: Listener, hub: MonitorHub) -> None:
        self.kernel = Kernel()
        self.policies: PolicyTable = new_policies()
        self.endpoints: Table[int, Endpoint] = Table("endpoints", ("agent",))
        self.maps = PolicyMaps(PolicyEngine(), self.kernel)
        self.identities = IdentityCache()
        local, addresses = LocalIdentities(self.identities.local), ipcache.new_table()
        self.derivations = Derivations(self.identities.table, self.policies, local, addresses, self.maps)
        self.told = AgentEvents(hub, self.policies, self.endpoints, self.maps, self.derivations)
        self.lines: list[str] = []
        self._listener = listener

    async def in_sync(self) -> None:
        """Everything is known, which is nothing yet; the maps may follow."""
        await asyncio.sleep(0)
        self.identities.local.mark_in_sync()
        self.identities.in_sync()
        for source in (DIRECTORY, KVSTORE):
            self.policies.source(source).mark_in_sync()
        await self.maps.opened.wait()

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self.maps.reconciler.run(),
            self.derivations.follow_identities(),
            self.derivations.follow_policies(),
            self.told.follow_policies(),
            self.told.follow_endpoints(),
            self.told.follow_maps(),
            self._listen(),
        ]

    async def _listen(self) -> None:
        while True:
            for line in (await self._listener.take()).splitlines():
                self.lines.append(json.loads(line)["summary"])

    def put(self, *rules: Mapping[str, Any]) -> None:
        (parsed,) = parse_policies(json.dumps(rules), "test", name="web")
        self.policies.source(KVSTORE).upsert("web", parsed)

    def set_endpoint(self, endpoint: Endpoint) -> None:
        self.endpoints.source("agent").upsert(endpoint.id, endpoint)
        if endpoint.identity:
            self.derivations.endpoint_identified(endpoint, WEB)

    async def tells(self, what: str, **message: object) -> None:
        """Wait until it is told that `what` happened, with at least this in its message."""

        def told() -> bool:
            said = [line.partition(": ") for line in self.lines]
            found = [json.loads(text) for name, _, text in said if name == f">> {what}"]
            return any(message.items() <= each.items() for each in found)

        try:
            await eventually(told, what, deadline=10)
        except AssertionError as error:
            raise AssertionError(f"{error}; told was {self.lines}") from error
        self.lines.clear()


def made(identity: int = 0) -> Endpoint:
    mac, node_mac = macs_of(IPv4Address("10.1.0.1"))
    return Endpoint(
        id=7,
        ipv4="10.1.0.1",
        mac=mac,
        node_mac=node_mac,
        interface=host_name(7),
        peer=temporary_name(7),
        identity=identity,
        labels=WEB.serialized if identity else "",
        container_name="shop",
    )


def run(story: Callable[[Host], Coroutine[Any, Any, None]], **wanted: frozenset[Any]) -> list[str]:
    """Run a story in an agent of its own; return what was told in it and not looked at."""

    async def main() -> list[str]:
        hub = MonitorHub(100)
        with hub.listen(MonitorFilter(**wanted)) as listener:
            host = Host(listener, hub)
            tasks = [asyncio.create_task(each) for each in host.tasks()]
            try:
                await host.in_sync()
                await asyncio.wait_for(story(host), 30)
                await asyncio.sleep(0.05)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            return host.lines

    return asyncio.run(main())


def test_a_policy_is_told_when_it_comes_changes_and_goes() -> None:
    async def story(host: Host) -> None:
        host.put(RULE)
        await host.tells("Policy updated", name="web", labels=["unspec:team=shop"], rule_count=1, revision=2)
        host.put(RULE, {**RULE, "labels": []})
        await host.tells("Policy updated", name="web", rule_count=2, revision=3)
        host.policies.source(KVSTORE).delete("web")
        await host.tells("Policy deleted", name="web", rule_count=2, revision=4)

    assert run(story) == []


def test_an_endpoint_is_told_from_its_beginning_to_its_end() -> None:
    async def story(host: Host) -> None:
        host.set_endpoint(made())
        await host.tells("Endpoint created", id=7, identity=0, addresses=["10.1.0.1"])
        host.set_endpoint(made(identity=300))
        await host.tells("Endpoint identity changed", id=7, identity=300, labels=["container:app=web"])
        host.set_endpoint(made(identity=400))
        await host.tells("Endpoint identity changed", id=7, identity=400, **{"old-identity": 300})
        host.endpoints.source("agent").delete(7)
        await host.tells("Endpoint deleted", id=7, **{"container-name": "shop"})

    run(story)


def test_an_endpoint_is_told_when_its_map_has_a_new_policy_or_can_not_have_it() -> None:
    async def story(host: Host) -> None:
        host.set_endpoint(made(identity=300))
        await host.tells("Endpoint regenerated", id=7, **{"policy-revision": 1})
        host.put(RULE)
        await host.tells("Endpoint regenerated", id=7, **{"policy-revision": 2})
        host.kernel.broken = True
        host.policies.source(KVSTORE).delete("web")
        await host.tells("Failed endpoint regeneration", id=7, error="no room")

    run(story)


def test_filters_find_events_of_an_endpoint() -> None:
    async def story(host: Host) -> None:
        host.put(RULE)
        host.set_endpoint(made())
        host.set_endpoint(structs.replace(made(), id=8))
        await asyncio.sleep(0.05)

    told = run(story, related=frozenset({8}))
    assert told
    assert all('"id":8' in line for line in told)
    assert run(story, types=frozenset({"drop"})) == []


def test_nothing_is_told_of_the_endpoints_of_the_start() -> None:
    async def main() -> list[str]:
        hub = MonitorHub(100)
        with hub.listen(MonitorFilter()) as listener:
            host = Host(listener, hub)
            host.set_endpoint(made(identity=300))
            following = asyncio.create_task(host.told.follow_endpoints())
            await asyncio.sleep(0.02)
            following.cancel()
            listener.close()
            return (await listener.take()).decode().splitlines()

    assert asyncio.run(main()) == []


def test_the_line_and_its_fields() -> None:
    one = event("Policy deleted", {"name": "web", "revision": 3})
    assert one.summary == '>> Policy deleted: {"name":"web","revision":3}'
    assert (one.type, one.reason, one.details) == ("agent", "Policy deleted", {"name": "web", "revision": 3})
