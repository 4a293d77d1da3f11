# SPDX-License-Identifier: Apache-2.0
"""What this node says of itself in a real etcd, over crashes: what former lives left goes, and no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from agent import publish
from agent.endpoint import Endpoint, macs_of
from agent.pool import Pool
from core.table import Table
from datapath.devices import host_name, temporary_name
from identity.allocator import Allocator
from identity.cache import IdentityCache
from identity.gc import Collector
from identity.labels import Labels
from identity.transactions import Slot
from kvstore import former, schema
from kvstore.client import Client
from kvstore.errors import PermissionDenied
from kvstore.session import Session
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

NODE_IP = "10.99.0.2"
WEB, DB = Labels.of({"app": "web"}), Labels.of({"app": "db"})


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Client]:
    client = Client(etcd.config, timeout=2)
    yield client
    await client.close()


def endpoint(number: int, identity: int) -> Endpoint:
    address = f"10.50.0.{number}"
    mac, node_mac = macs_of(IPv4Address(address))
    return Endpoint(
        id=number,
        ipv4=address,
        mac=mac,
        node_mac=node_mac,
        interface=host_name(number),
        peer=temporary_name(number),
        identity=identity,
        labels="container:app=web;",
    )


def ip_key(number: int, space: str = "default") -> str:
    return schema.ip_key(space, f"10.50.0.{number}")


def value_key(labels: Labels) -> str:
    return Slot(labels, NODE_IP).value_key


class Life:
    """One life of an agent, as far as etcd is concerned: its record, its endpoints, their identities."""

    def __init__(self, client: Client, lease: int = 0, *, node: str = "n1", space: str = "default") -> None:
        self.client = client
        self.node_key = schema.node_key("default", node)
        self.session = Session(client, ttl=600, lease=lease)
        self.allocator = Allocator(client, self.session, IdentityCache(), owner=NODE_IP)
        self.table: Table[int, Endpoint] = Table("endpoints", ("agent",))
        entries = publish.OwnEntries(
            self.session, space=space, cluster="default", node=node, node_ip=IPv4Address(NODE_IP)
        )
        self.reconciler = publish.reconciler(self.table, entries)
        self.record = publish.node_record(
            name=node,
            cluster="default",
            cluster_id=0,
            node_ips=(NODE_IP,),
            pool=Pool(IPv4Network("10.50.0.0/24")),
        )

    def has(self, number: int, identity: int) -> None:
        self.table.source("agent").upsert(number, endpoint(number, identity))

    @contextlib.asynccontextmanager
    async def lived(self) -> AsyncIterator[Life]:
        """Live; the end is without a word: keys and lease stay."""
        await self.session.own(self.node_key, schema.encode_node(self.record))
        mains = (self.session.run(), self.allocator.run(), self.reconciler.run())
        tasks = [asyncio.create_task(main) for main in mains]
        try:
            await self.reconciler.wait_idle()
            await asyncio.wait_for(self.session.settled(), 30)
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def tidy(self) -> int:
        """Do what the agent does when its endpoints are complete; return how many keys went."""
        count = await former.abandon(self.client, self.session, self.allocator.value_keys)
        await asyncio.wait_for(self.session.settled(), 30)
        return count


async def held(client: Client) -> set[str]:
    """Return every key of the nodes, addresses, and users of identities."""
    prefixes = (schema.NODES, schema.IPS, schema.IDENTITY_VALUES)
    return {item.key for prefix in prefixes for item in (await client.list(prefix)).items}


async def test_what_a_snapshot_brings_back_on_a_lease_that_was_lost_since(
    etcd: EtcdServer, client: Client, tmp_path: Path
) -> None:
    """An endpoint ended, etcd was wiped, so there is another lease, and then restored."""
    async with Life(client).lived() as life:
        life.has(1, 300)
        life.has(2, 301)
        await life.reconciler.wait_idle()
        await asyncio.wait_for(life.session.settled(), 30)
        etcd.snapshot(tmp_path / "snapshot")
        life.table.source("agent").delete(2)
        await asyncio.to_thread(etcd.wipe)
        await eventually(lambda: len(life.session.lost) == 1 and life.session.alive, "another lease")
        await asyncio.wait_for(life.session.settled(), 30)
        await asyncio.to_thread(etcd.restore, tmp_path / "snapshot")
        await asyncio.to_thread(etcd.start)
        await eventually(lambda: len(life.session.lost) == 2 and life.session.alive, "a third one")
        await asyncio.wait_for(life.session.settled(), 30)
        assert ip_key(2) in await held(client), "the snapshot's"
        assert await life.tidy() == 1
        assert await held(client) == {life.node_key, ip_key(1)}
        kept = await client.get(ip_key(1))
        assert kept is not None
        assert kept.lease == life.session.lease_id


async def test_an_identity_that_nobody_uses_since_a_crash_becomes_free(client: Client) -> None:
    """Two endpoints of two identities; the one with `db` ends while etcd is away, and the agent dies."""
    async with Life(client).lived() as first:
        web, db = await first.allocator.allocate(WEB), await first.allocator.allocate(DB)
        first.has(1, web)
        first.has(2, db)
        await first.reconciler.wait_idle()
        await asyncio.wait_for(first.session.settled(), 30)
        before = await held(client)
        assert before == {first.node_key, ip_key(1), ip_key(2), value_key(WEB), value_key(DB)}
    collector = Collector(client, deletions_per_minute=60_000)
    second = Life(client, first.session.lease_id)
    second.has(1, web)
    async with second.lived():
        assert second.session.lease_id == first.session.lease_id
        assert second.allocator.restore(WEB, web)
        await collector.collect()
        await collector.collect()
        assert await client.get(schema.identity_id_key(db)) is not None, "etcd holds a user of it still"
        assert await second.tidy() == 2
        assert await held(client) == before - {ip_key(2), value_key(DB)}
        await collector.collect()
        await collector.collect()
        assert await client.get(schema.identity_id_key(db)) is None
        assert await client.get(schema.identity_id_key(web)) is not None
        assert await second.tidy() == 0


async def test_a_node_that_is_called_otherwise_leaves_no_record_behind(client: Client) -> None:
    async with Life(client, node="old").lived() as first:
        pass
    async with Life(client, first.session.lease_id, node="new").lived() as second:
        assert await held(client) == {first.node_key, second.node_key}
        await second.tidy()
        assert await held(client) == {second.node_key}


async def test_entries_move_to_another_address_space(client: Client) -> None:
    first = Life(client)
    first.has(1, 300)
    async with first.lived():
        assert await held(client) == {first.node_key, ip_key(1)}
    second = Life(client, first.session.lease_id, space="blue")
    second.has(1, 300)
    async with second.lived():
        await second.tidy()
        assert await held(client) == {second.node_key, ip_key(1, "blue")}


async def test_keys_of_others_stay(client: Client) -> None:
    """They name this node, its address and its endpoints, but do not hang on its lease."""
    async with Life(client).lived() as first:
        pass
    others = await client.lease_grant(600)
    theirs = {ip_key(3): others, ip_key(4): 0, value_key(WEB): others, schema.node_key("default", "n2"): 0}
    for key, lease in theirs.items():
        await client.put(key, "theirs", lease=lease)
    await client.put(ip_key(5), "ours", lease=first.session.lease_id)
    async with Life(client, first.session.lease_id).lived() as second:
        assert await second.tidy() == 1
        assert await held(client) == {second.node_key, *theirs}


async def test_what_is_written_at_that_moment_stays(client: Client) -> None:
    """Left by the first life; the second one wants them between the look and the deletion."""
    async with Life(client).lived() as first:
        lease = first.session.lease_id
    for key in (ip_key(1), ip_key(2), value_key(WEB)):
        await client.put(key, "1", lease=lease)
    second = Life(client, lease)
    async with second.lived():
        found = await client.get(value_key(WEB))
        assert found is not None
        # An identity's key is written by the allocator, and owned by the session afterwards.
        revision = await client.put(value_key(WEB), "1", lease=lease)
        assert await second.session.abandon(value_key(WEB), found.mod_revision)
        await asyncio.wait_for(second.session.settled(), 30)
        assert await client.get(value_key(WEB)) is not None
        await second.session.adopt(value_key(WEB), "1", revision)
        second.has(1, 300)
        await second.reconciler.wait_idle()
        assert await second.tidy() == 1
        assert await held(client) == {second.node_key, ip_key(1), value_key(WEB)}


async def test_an_identity_that_is_being_asked_for_is_no_former_key(etcd: EtcdServer, client: Client) -> None:
    async with Life(client).lived() as first:
        number = await first.allocator.allocate(WEB)
        lease = first.session.lease_id
    second = Life(client, lease)
    # Restored, but not compared with etcd yet: its key is in etcd and in no session.
    assert second.allocator.restore(WEB, number)
    running = asyncio.create_task(second.session.run())
    try:
        await second.session.own(second.node_key, schema.encode_node(second.record))
        assert value_key(WEB) not in second.session.own_keys
        assert await second.tidy() == 0
        assert await client.get(value_key(WEB)) is not None
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_lease_that_is_gone_took_everything_with_it(client: Client) -> None:
    async with Life(client).lived() as first:
        lease = first.session.lease_id
    await client.lease_revoke(lease)
    assert await client.lease_keys(lease) == []
    async with Life(client, lease).lived() as second:
        assert second.session.lease_id not in (0, lease)
        assert await second.tidy() == 0
        assert await held(client) == {second.node_key}


async def test_it_is_done_when_etcd_is_back_or_gives_the_right(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd", tls=True)
    try:
        server.start().enable_auth("agent", "mine/", "yours/")
        client = Client(server.config_for("agent"), timeout=2)
        session = Session(client)
        running = asyncio.create_task(session.run())
        await client.put("yours/a", "1", lease=await asyncio.wait_for(session.ready(), 20))
        server.ctl("role", "revoke-permission", "agent", "yours/", "--prefix=true")
        with pytest.raises(PermissionDenied, match="yours/a"):
            await former.abandon(client, session, frozenset)
        tidying = asyncio.create_task(former.abandon_all(client, session, frozenset))
        server.stop()
        server.start()
        server.ctl("role", "grant-permission", "agent", "readwrite", "yours/", "--prefix=true")
        await asyncio.wait_for(tidying, 60)

        async def gone() -> bool:
            return await client.get("yours/a") is None

        await eventually(gone, "the key is deleted")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
    finally:
        server.stop()
