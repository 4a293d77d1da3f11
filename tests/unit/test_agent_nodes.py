# SPDX-License-Identifier: Apache-2.0
"""Nodes' own addresses in the ip→identity table: an address is there as long as some node says it is its."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from ipaddress import IPv4Network

from agent import ipcache
from agent.ipcache import IpTable, Record
from agent.nodes import follow_nodes
from agent.options import OPTIONS
from agent.pool import Pool
from agent.publish import node_record
from core.options import load
from core.table import Table
from identity.numbers import REMOTE_NODE
from kvstore.schema import NodeRecord
from tests.support.eventually import eventually

HOST, ROUTER = "10.9.9.9/32", "10.60.0.1/32"


def record(name: str, node_ip: str = "10.9.9.9", router: str = "10.60.0.1") -> NodeRecord:
    return node_record(
        name=name,
        cluster="default",
        cluster_id=0,
        node_ips=(node_ip,),
        pool=Pool(IPv4Network(f"{router}/16", strict=False)),
    )


class Cluster:
    """The nodes as etcd says they are, and the addresses that this host (`me`) makes of it."""

    def __init__(self) -> None:
        self.nodes: Table[str, NodeRecord] = Table("nodes", ("kvstore",))
        self.addresses: IpTable = ipcache.new_table()

    def say(self, name: str, *addresses: str) -> None:
        self.nodes.source("kvstore").upsert(f"default/{name}", record(name, *addresses))

    def end(self, name: str) -> None:
        self.nodes.source("kvstore").delete(f"default/{name}")

    async def are(self, **expected: str) -> None:
        """Wait until the addresses (`HOST`, `ROUTER`) are those of these hosts, and no others are there."""
        known = {"host": HOST, "router": ROUTER}
        wanted = {known[name]: Record(REMOTE_NODE, host) for name, host in expected.items()}
        source = self.addresses.source(ipcache.NODES_SOURCE)
        await eventually(lambda: dict(source.entries()) == wanted, f"addresses are {wanted}")

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        config = load(OPTIONS)
        task = asyncio.create_task(follow_nodes(self.nodes, self.addresses, "me", config))
        try:
            yield
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert not self.nodes._subscriptions, "a task that has ended goes on noting changes"


async def test_a_host_that_was_renamed_keeps_its_address_when_the_old_record_ends() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("old")
        await cluster.are(host="10.9.9.9", router="10.9.9.9")
        cluster.say("new")
        cluster.end("old")
        cluster.say("me", "10.9.9.1", "10.61.0.1")
        await cluster.are(host="10.9.9.9", router="10.9.9.9")
        cluster.end("new")
        await cluster.are()


async def test_of_two_hosts_with_one_address_the_one_that_spoke_last_counts() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("old", "10.9.9.9")
        await cluster.are(host="10.9.9.9", router="10.9.9.9")
        cluster.say("new", "10.9.9.8")
        source = cluster.addresses.source(ipcache.NODES_SOURCE)
        await eventually(lambda: source.entries()[ROUTER].host_ip == "10.9.9.8", "the new host has it")
        cluster.end("new")
        await cluster.are(host="10.9.9.9", router="10.9.9.9")


async def test_what_changed_while_the_task_was_down_is_made_up_for() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("a")
        await cluster.are(host="10.9.9.9", router="10.9.9.9")
    cluster.end("a")
    cluster.say("b", "10.9.9.7")
    async with cluster.followed():
        source = cluster.addresses.source(ipcache.NODES_SOURCE)
        await eventually(
            lambda: (
                {prefix: each.host_ip for prefix, each in source.entries().items()}
                == {"10.9.9.7/32": "10.9.9.7", ROUTER: "10.9.9.7"}
            ),
            "only the node that is left",
        )
    cluster.end("b")
    async with cluster.followed():
        await cluster.are()
