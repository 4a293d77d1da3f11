# SPDX-License-Identifier: Apache-2.0
"""Registering and unregistering external resources in a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from external_resources import registry
from external_resources.errors import AddressConflict, HostUnknown, InvalidResource
from external_resources.resource import Resource
from identity import heartbeat
from identity.attempt import Attempt
from identity.gc import Collector
from identity.labels import Labels
from identity.transactions import Slot
from kvstore import schema
from kvstore.client import Client
from kvstore.election import Election
from kvstore.session import Session
from tests.support.etcd import EtcdServer

LABELS = {"app": "legacyvm", "site": "dc1"}
LEGACY = Resource.of("legacy-1", ["10.77.0.5"], LABELS)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path_factory.mktemp("external"))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Client]:
    """A client of an empty store."""
    etcd.ctl("del", "", "--prefix")
    client = Client(etcd.config)
    try:
        yield client
    finally:
        await client.close()


async def everything(client: Client) -> dict[str, bytes]:
    return {
        item.key: item.value
        for prefix in ("cilium/", "holdfast/")
        for item in (await client.list(prefix)).items
    }


async def test_registering_writes_the_record_and_what_follows_from_it(client: Client) -> None:
    result = await registry.register(client, LEGACY)
    assert result.changed
    record = {schema.external_key("legacy-1"): schema.encode_external(LEGACY.record())}
    assert await everything(client) == {**LEGACY.keys(result.number), **record}
    assert all(item.lease == 0 for item in (await client.list("cilium/")).items)


async def test_registering_again_writes_nothing(client: Client) -> None:
    first = await registry.register(client, LEGACY)
    revision = (await client.list(schema.EXTERNAL)).revision
    again = await registry.register(client, LEGACY)
    assert (again.number, again.changed) == (first.number, False)
    assert (await client.list(schema.EXTERNAL)).revision == revision


async def test_a_vm_joins_the_identity_of_a_container(client: Client) -> None:
    slot = Slot(Labels.of(LABELS), "10.0.0.1")
    number = (await Attempt(client, slot, range(256, 65_536)).run()).number
    assert (await registry.register(client, LEGACY)).number == number


async def test_unregistering_leaves_the_number_to_garbage_collection(client: Client) -> None:
    number = (await registry.register(client, LEGACY)).number
    assert await registry.unregister(client, "legacy-1")
    assert list(await everything(client)) == [schema.identity_id_key(number)]
    assert not await registry.unregister(client, "legacy-1")
    collector = Collector(client)
    await collector.collect()
    await collector.collect()
    assert not await everything(client)


BEGINS_ALIKE = Resource.of("rack7", ["10.78.0.5"], {"app": "legacyvm", "site": "dc1", "zone": "z"})


@pytest.mark.parametrize("others", [[], [BEGINS_ALIKE]], ids=["alone", "labels that begin alike are in use"])
async def test_registering_after_unregistering_finds_the_number_again(
    client: Client, others: list[Resource]
) -> None:
    for other in others:
        await registry.register(client, other)
    number = (await registry.register(client, LEGACY)).number
    for _ in range(3):
        await registry.unregister(client, "legacy-1")
        assert (await registry.register(client, LEGACY)).number == number
    keys = await everything(client)
    assert keys.items() >= LEGACY.keys(number).items()
    assert len([key for key in keys if key.startswith(schema.IDENTITY_IDS)]) == 1 + len(others)
    assert not [key for key in keys if key.startswith(schema.IDENTITY_LOCKS)]


async def test_a_number_of_another_cluster_is_not_used_again(client: Client) -> None:
    """id/<N> of cluster 3 is a copy in a meshed store: it goes when that cluster says so."""
    await client.put(schema.identity_id_key((3 << 16) + 500), LEGACY.slot.text)
    assert (await registry.register(client, LEGACY)).number < 1 << 16


async def test_machines_that_come_back_at_once_share_the_number_that_was_left(client: Client) -> None:
    """Also with garbage collection at work: whoever comes first, every key says the same number."""
    machines = [Resource.of(f"vm-{n}", [f"10.79.0.{n}"], LABELS) for n in range(1, 9)]
    collector = Collector(client, deletions_per_minute=1e9)
    for _ in range(10):
        first, *rest = machines
        await registry.register(client, first)
        await registry.unregister(client, first.name)
        await collector.collect()
        outcomes = await asyncio.gather(
            collector.collect(), *(registry.register(client, each) for each in [first, *rest])
        )
        numbers = {outcome.number for outcome in outcomes if isinstance(outcome, registry.Registration)}
        assert len(numbers) == 1
        keys = await everything(client)
        for each in machines:
            assert keys.items() >= each.keys(min(numbers)).items()
            await registry.unregister(client, each.name)


async def test_two_machines_of_the_same_labels_do_not_release_each_other(client: Client) -> None:
    other = Resource.of("legacy-2", ["10.77.0.6"], LABELS)
    number = (await registry.register(client, LEGACY)).number
    assert (await registry.register(client, other)).number == number
    await registry.unregister(client, "legacy-1")
    assert (await everything(client)).items() >= other.keys(number).items()
    assert [entry.name for entry in await registry.list_all(client)] == ["legacy-2"]


async def test_other_labels_and_addresses_replace_the_old_ones(client: Client) -> None:
    await registry.register(client, Resource.of("legacy-1", ["10.77.0.5", "10.77.0.9"], LABELS))
    moved = Resource.of("legacy-1", ["10.77.0.9", "10.77.0.7"], {"app": "newvm"})
    number = (await registry.register(client, moved)).number
    keys = await everything(client)
    assert keys.items() >= moved.keys(number).items()
    assert not [key for key in keys if key.endswith("/10.77.0.5")]
    assert len([key for key in keys if key.startswith(schema.IDENTITY_VALUES)]) == 1


async def test_a_conflict_names_the_owner_and_changes_nothing(client: Client) -> None:
    await registry.register(client, LEGACY)
    taken = schema.ip_record("10.77.0.8", 300, host_ip="10.0.0.1", metadata="cilium-global:default:vm:52")
    await client.put(schema.ip_key("default", "10.77.0.8"), schema.encode_ip(taken))
    before = await everything(client)
    with pytest.raises(AddressConflict, match=r"10\.77\.0\.5 of thief belongs to vm:legacy-1"):
        await registry.register(client, Resource.of("thief", ["10.77.0.5"], LABELS))
    with pytest.raises(AddressConflict, match=r"cilium-global:default:vm:52 on 10\.0\.0\.1"):
        await registry.register(client, Resource.of("legacy-1", ["10.77.0.8"], LABELS))
    assert await everything(client) == before


async def test_an_address_that_others_took_over_stays_when_unregistering(client: Client) -> None:
    await registry.register(client, LEGACY)
    key = schema.ip_key("default", "10.77.0.5")
    theirs = schema.encode_ip(schema.ip_record("10.77.0.5", 300, metadata="somebody"))
    await client.put(key, theirs)
    assert "somebody" in (await registry.list_all(client))[0].problem
    assert await registry.unregister(client, "legacy-1")
    assert (await everything(client))[key] == theirs


async def test_a_crash_in_the_middle_is_completed(client: Client) -> None:
    await client.put(schema.external_key("legacy-1"), schema.encode_external(LEGACY.record()))
    assert "register it again" in (await registry.list_all(client))[0].problem
    result = await registry.register(client, LEGACY)
    assert result.changed
    assert (await registry.list_all(client))[0].number == result.number
    await client.delete(LEGACY.slot.value_key)
    assert (await registry.register(client, LEGACY)) == result
    assert (await everything(client)).items() >= LEGACY.keys(result.number).items()


async def test_many_writers_of_one_resource_end_with_one_of_them(client: Client) -> None:
    versions = [Resource.of("legacy-1", ["10.77.0.5"], {"app": f"v{n % 3}"}) for n in range(6)]
    outcomes = await asyncio.gather(
        *(registry.register(client, each) for each in versions), return_exceptions=True
    )
    assert any(isinstance(outcome, registry.Registration) for outcome in outcomes)
    entry = (await registry.list_all(client))[0]
    assert entry.resource in versions
    final = await registry.register(client, entry.resource or LEGACY)
    assert (await everything(client)).items() >= (entry.resource or LEGACY).keys(final.number).items()


async def test_the_host_must_be_a_registered_node(client: Client) -> None:
    placed = Resource.of("legacy-1", ["10.77.0.5"], LABELS, host_ip="192.0.2.10")
    with pytest.raises(HostUnknown, match=r"192\.0\.2\.10"):
        await registry.register(client, placed)
    assert not await everything(client)
    node = schema.NodeRecord("n1", "default", (schema.NodeAddress("InternalIP", "192.0.2.10"),))
    await client.put(schema.node_key("default", "n1"), schema.encode_node(node))
    number = (await registry.register(client, placed)).number
    assert (await everything(client)).items() >= placed.keys(number).items()


async def test_a_garbage_record_is_listed_and_replaced_but_not_guessed_at(client: Client) -> None:
    await client.put(schema.external_key("legacy-1"), b"{garbage")
    entry = (await registry.list_all(client))[0]
    assert (entry.name, entry.resource) == ("legacy-1", None)
    assert entry.problem
    with pytest.raises(InvalidResource, match="legacy-1"):
        await registry.unregister(client, "legacy-1")
    await registry.register(client, LEGACY)
    assert await registry.unregister(client, "legacy-1")


async def test_the_elected_writes_the_heartbeat(client: Client) -> None:
    session = Session(client, ttl=30, name="operator")
    election = Election(client, session, "operator")
    mains = (session.run(), election.run(), heartbeat.run(client, election, interval=0.05))
    tasks = [asyncio.create_task(main) for main in mains]
    try:
        async with asyncio.timeout(30):
            while (item := await client.get("cilium/.heartbeat")) is None or item.version < 2:
                await asyncio.sleep(0.05)
        schema.parse_heartbeat(item.value)
        assert item.lease == 0
        assert len(item.value) == len("2026-11-20T10:21:54Z")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
