# SPDX-License-Identifier: Apache-2.0
"""This node's own entries in a real etcd, over a crash: what is left of the former life goes, no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from ipaddress import IPv4Address
from typing import Any

from agent import ipcache, publish
from agent.endpoint import Endpoint, macs_of
from agent.sinks import IpSink
from core.table import Table
from datapath.devices import host_name, temporary_name
from kvstore import schema
from kvstore.client import Client
from kvstore.session import Session
from kvstore.watcher import follow
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

NODE_IP = "10.99.0.2"
OURS = "cilium-global:default:node-1:"


def endpoint(number: int) -> Endpoint:
    address = f"10.50.0.{number}"
    mac, node_mac = macs_of(IPv4Address(address))
    return Endpoint(
        id=number,
        ipv4=address,
        mac=mac,
        node_mac=node_mac,
        interface=host_name(number),
        peer=temporary_name(number),
        identity=300,
        labels="container:app=web;",
    )


def key(number: int, space: str = "default") -> str:
    return schema.ip_key(space, f"10.50.0.{number}")


class Life:
    """One life of the agent, as far as its entries go."""

    def __init__(self, client: Client, lease: int, numbers: tuple[int, ...]) -> None:
        self.client = client
        self.session = Session(client, ttl=600, lease=lease)
        self.addresses = ipcache.new_table()
        self.entries = publish.OwnEntries(
            self.session,
            self.addresses,
            space="default",
            cluster="default",
            node="node-1",
            node_ip=IPv4Address(NODE_IP),
        )
        self.table: Table[int, Endpoint] = Table("endpoints", ("agent",))
        self.reconciler = publish.reconciler(self.table, self.entries)
        for number in numbers:
            self.table.source("agent").upsert(number, endpoint(number))

    def follow(self) -> Coroutine[Any, Any, None]:
        sink = IpSink(self.addresses.source(ipcache.KVSTORE_SOURCE), grace=600)
        return follow(self.client, schema.IPS, sink)

    async def in_sync(self) -> None:
        async def known() -> bool:
            return self.addresses.source(ipcache.KVSTORE_SOURCE).in_sync

        await eventually(known, "the addresses of etcd are known")
        self.table.source("agent").mark_in_sync()
        self.reconciler.poke()


@contextlib.asynccontextmanager
async def living(life: Life) -> AsyncIterator[Life]:
    """Let it live; it ends without a word: keys and lease stay."""
    tasks = [asyncio.create_task(main) for main in (life.session.run(), life.reconciler.run())]
    try:
        await life.reconciler.wait_idle()
        await asyncio.wait_for(life.session.settled(), 30)
        yield life
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def held(client: Client) -> set[str]:
    return {item.key for item in (await client.list(schema.IPS)).items}


async def test_an_entry_that_a_crash_left_goes_and_nobody_elses_does(etcd: EtcdServer) -> None:
    """Endpoint 2 went while etcd was away, and the agent died: its entry hangs on the lease that goes on."""
    client = Client(etcd.config)
    try:
        async with living(Life(client, 0, (1, 2))) as first:
            assert await held(client) == {key(1), key(2)}
            lease = first.session.lease_id
        others = await client.lease_grant(600)
        for number, host, metadata, hung in (
            (3, NODE_IP, f"{OURS}3", others),  # the same node's, it seems, but on a lease that is not ours
            (4, NODE_IP, f"{OURS}4", 0),
            (5, "10.99.0.3", "cilium-global:default:node-2:5", others),
            (6, "10.99.0.3", f"{OURS}6", lease),
            (7, NODE_IP, "cilium-global:default:node-11:7", lease),
            (8, "", "vm:legacy-1", 0),
        ):
            record = schema.ip_record(f"10.50.0.{number}", 300, host_ip=host, metadata=metadata)
            await client.put(key(number), schema.encode_ip(record), lease=hung)
        async with living(Life(client, lease, (1,))) as second:
            second.table.source("agent").mark_in_sync()
            second.reconciler.poke()
            assert await second.entries.prune(second.table) == 0
            assert await held(client) == {key(number) for number in range(1, 9)}, "etcd is not known yet"
            following = asyncio.create_task(second.follow())
            try:
                await second.in_sync()

                async def gone() -> bool:
                    return key(2) not in await held(client)

                await eventually(gone, "the entry of the endpoint that went is deleted")
                await asyncio.wait_for(second.session.settled(), 30)
                assert await held(client) == {key(number) for number in range(1, 9) if number != 2}
                assert second.session.own_keys.keys() == {key(1)}
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
    finally:
        await client.close()


async def test_an_address_that_is_given_again_at_that_moment_keeps_its_entry(etcd: EtcdServer) -> None:
    """The next endpoint gets the address between the look and the deletion."""
    client = Client(etcd.config)
    try:
        async with living(Life(client, 0, (2,))) as first:
            lease = first.session.lease_id
        second = Life(client, lease, ())
        record = ipcache.Record(300, NODE_IP, metadata=f"{OURS}2", space="default")
        source = second.addresses.source(ipcache.KVSTORE_SOURCE)
        source.upsert("10.50.0.2/32", record)
        source.mark_in_sync()
        assert await second.entries.prune(second.table) == 1
        second.table.source("agent").upsert(2, endpoint(2))
        async with living(second):
            found = await client.get(key(2))
            assert found is not None
            assert found.lease == lease
            assert await second.entries.prune(second.table) == 0
    finally:
        await client.close()
