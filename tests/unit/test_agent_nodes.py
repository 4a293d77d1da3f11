# SPDX-License-Identifier: Apache-2.0
"""What other nodes' records mean: addresses, pools, and the hosts that packets may be encapsulated to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from ipaddress import IPv4Network, ip_network

import pytest

from agent import ipcache
from agent.ipcache import IpTable, Record
from agent.nodes import NodeFollower, NodePool, NodeTable, Own, PoolTable, why_unusable
from agent.pool import Pool
from agent.publish import node_record
from core.table import Table
from identity.numbers import REMOTE_NODE, WORLD
from kvstore.schema import NodeRecord
from tests.support.eventually import eventually

HOST, ROUTER, POOL = "10.9.9.9/32", "10.60.0.1/32", "10.60.0.0/16"
OWN = Own("default/me", (ip_network("10.61.0.0/16"), ip_network("fd00:61::/96")), frozenset({"192.0.2.9"}))


def record(
    name: str, node_ip: str = "10.9.9.9", router: str = "10.60.0.1", *, cluster: str = "default"
) -> NodeRecord:
    return node_record(
        name=name,
        cluster=cluster,
        cluster_id=0,
        node_ips=(node_ip,),
        pool=Pool(IPv4Network(f"{router}/16", strict=False)),
    )


class Cluster:
    """The nodes as etcd says they are, and the addresses that this host (`me`) makes of it."""

    def __init__(self, *hosts: str) -> None:
        self.nodes: NodeTable = Table("nodes", ("kvstore",))
        self.addresses: IpTable = ipcache.new_table()
        self.pools: PoolTable = Table("node-pools", ("nodes",))
        self.hosts = set(hosts)
        self.moved: list[set[str]] = []
        self.follower = NodeFollower(
            self.nodes, self.addresses, self.pools, OWN, hosts=self.hosts, moved=self._moved
        )

    async def _moved(self, hosts: set[str]) -> None:
        self.moved.append(hosts)

    def say(self, name: str, *addresses: str, cluster: str = "default") -> None:
        self.nodes.source("kvstore").upsert(f"{cluster}/{name}", record(name, *addresses, cluster=cluster))

    def listed(self) -> None:
        self.nodes.source("kvstore").mark_in_sync()

    def end(self, name: str) -> None:
        self.nodes.source("kvstore").delete(f"default/{name}")

    async def is_at(self, host: str) -> None:
        """Wait until the router and the pool lie behind this host, and no others are there; "": nobody's."""
        wanted = {
            f"{host}/32": Record(REMOTE_NODE),
            ROUTER: Record(REMOTE_NODE, host),
            POOL: Record(WORLD, host),
        }
        source = self.addresses.source(ipcache.NODES_SOURCE)
        await eventually(lambda: dict(source.entries()) == (wanted if host else {}), f"all is at {host}")

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.follower.run())
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
        await cluster.is_at("10.9.9.9")
        cluster.say("new")
        cluster.end("old")
        cluster.say("me", "10.9.9.1", "10.61.0.1")
        await eventually(lambda: cluster.pools.get(POOL) == NodePool("new", "10.9.9.9"), "the new one has it")
        await cluster.is_at("10.9.9.9")
        cluster.end("new")
        await cluster.is_at("")
        assert not len(cluster.pools)


async def test_of_two_hosts_with_one_pool_the_one_that_spoke_last_counts() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("old", "10.9.9.9")
        await cluster.is_at("10.9.9.9")
        cluster.say("new", "10.9.9.8")
        source = cluster.addresses.source(ipcache.NODES_SOURCE)
        await eventually(lambda: source.entries()[ROUTER].host_ip == "10.9.9.8", "the new host has it")
        await eventually(lambda: cluster.pools.get(POOL) == NodePool("new", "10.9.9.8"), "and the pool")
        cluster.end("new")
        await cluster.is_at("10.9.9.9")


async def test_who_says_the_same_again_has_not_the_last_word() -> None:
    """Nor who is only held, or missing in a list: that is a change of the table too."""
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("old", "10.9.9.9")
        cluster.say("new", "10.9.9.8")
        await eventually(lambda: cluster.pools.get(POOL) == NodePool("new", "10.9.9.8"), "the new one has it")
        source = cluster.nodes.source("kvstore")
        source.mark_missing(["default/old"], 1e12)
        source.hold("default/old", 1e12)
        cluster.say("other", "10.9.9.7", "10.63.0.1")
        await eventually(lambda: len(cluster.pools) == 2, "a later change")
        assert cluster.pools.get(POOL) == NodePool("new", "10.9.9.8")


async def test_what_changed_while_the_task_was_down_is_made_up_for() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("a")
        await cluster.is_at("10.9.9.9")
    cluster.end("a")
    cluster.say("b", "10.9.9.7")
    async with cluster.followed():
        await cluster.is_at("10.9.9.7")
    cluster.end("b")
    async with cluster.followed():
        await cluster.is_at("")
        assert not len(cluster.pools)


async def test_hosts_of_a_former_life_stay_until_the_nodes_are_listed() -> None:
    """An agent that starts while etcd is away goes on sending by the tunnel to all that it knew."""
    cluster = Cluster("10.9.9.9", "10.9.9.8")
    async with cluster.followed():
        cluster.say("a", "10.9.9.9")
        cluster.say("c", "10.9.9.7", "10.63.0.1")
        await eventually(lambda: cluster.moved == [{"10.9.9.7"}], "a host is added")
        assert cluster.hosts == {"10.9.9.9", "10.9.9.8", "10.9.9.7"}
        assert not cluster.follower.caught_up.is_set()
        cluster.listed()
        await eventually(cluster.follower.caught_up.is_set, "all nodes are known")
        assert cluster.hosts == {"10.9.9.9", "10.9.9.7"}
        assert cluster.moved == [{"10.9.9.7"}, {"10.9.9.8"}]
        cluster.end("c")
        await eventually(lambda: cluster.moved[2:] == [{"10.9.9.7"}], "and one goes")
        assert cluster.hosts == {"10.9.9.9"}


async def test_nodes_of_a_checkpoint_let_addresses_be_followed_and_forget_no_host() -> None:
    """etcd was restored, say, and the slot of this host's list is an hour away."""
    cluster = Cluster("10.9.9.9", "10.9.9.8")
    async with cluster.followed():
        cluster.say("a", "10.9.9.9")
        cluster.nodes.source("kvstore").mark_complete()
        await eventually(cluster.follower.caught_up.is_set, "all nodes of the checkpoint are known")
        assert cluster.hosts == {"10.9.9.9", "10.9.9.8"}
        assert not cluster.pools.in_sync


async def test_node_of_another_cluster_is_ignored_and_named() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("far", cluster="other")
        key = "cilium/state/nodes/v1/other/far"
        await eventually(lambda: key in cluster.follower.refused, "the record is refused")
        assert "cluster other" in cluster.follower.refused[key]
        await cluster.is_at("")
        cluster.nodes.source("kvstore").delete("other/far")
        await eventually(lambda: not cluster.follower.refused, "and forgotten with its end")


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        ("0.0.0.0/0", "shorter than /8"),
        ("8.0.0.0/7", "shorter than /8"),
        ("10.61.7.0/24", "overlaps this host's 10.61.0.0/16"),
        ("10.0.0.0/8", "overlaps this host's 10.61.0.0/16"),
        ("192.0.2.0/24", "holds this host's address 192.0.2.9"),
        ("::/0", "shorter than /32"),
        ("fd00:61::/64", "overlaps this host's fd00:61::/96"),
        ("10.62.0.0/16", ""),
        ("fd00:62::/96", ""),
    ],
)
def test_pools_that_nobody_may_have(pool: str, reason: str) -> None:
    found = why_unusable(ip_network(pool), OWN)
    assert reason in found
    assert bool(found) == bool(reason)


async def test_a_pool_that_swallows_others_is_not_taken_and_the_rest_of_the_record_is() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.say("greedy", "10.9.9.9", "10.61.0.1")
        key = "cilium/state/nodes/v1/default/greedy"
        await eventually(lambda: key in cluster.follower.refused, "the pool is refused")
        entries = cluster.addresses.source(ipcache.NODES_SOURCE).entries()
        assert entries == {HOST: Record(REMOTE_NODE)}
        assert not len(cluster.pools)
