# SPDX-License-Identifier: Apache-2.0
"""Claims of pools on a real etcd: never twice, kept while their node is away, released by a person alone."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from agent.registration import Registration, Silence
from kvstore import schema
from kvstore.client import Client
from kvstore.errors import NodeConflict
from kvstore.pools import Registrar, Wish
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

CLUSTER = "default"
RANGE = IPv4Network("10.50.0.0/16")
A = IPv4Network("10.50.1.0/24")


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Client]:
    client = Client(etcd.config, timeout=5)
    yield client
    await client.close()


def registrar(client: Client) -> Registrar:
    return Registrar(client, CLUSTER)


async def say(client: Client, name: str, address: str, pool: IPv4Network, lease: int = 0) -> None:
    """Register a node as its agent does."""
    record = schema.NodeRecord(
        name,
        CLUSTER,
        addresses=(schema.NodeAddress("InternalIP", address),),
        ipv4_alloc_cidr=schema.AllocCidr.of(str(pool)),
    )
    await client.put(schema.node_key(CLUSTER, name), schema.encode_node(record), lease=lease)


async def test_fifty_hosts_at_once_have_fifty_pools(client: Client) -> None:
    """Sixty-four blocks and three hosts with pools of other sizes, claimed at the same moment."""
    one = registrar(client)
    blocks = [Wish(f"n{n}", f"10.9.0.{n}", cluster_range=RANGE, length=22) for n in range(50)]
    fixed = [
        Wish(f"f{n}", f"10.9.1.{n}", fixed=IPv4Network(pool))
        for n, pool in enumerate(("10.50.4.0/23", "10.50.7.0/24", "10.50.64.0/21"))
    ]
    outcomes = await asyncio.gather(*map(one.claim, [*blocks, *fixed]), return_exceptions=True)
    pools = [each for each in outcomes if isinstance(each, IPv4Network)]
    refused = [each for each in outcomes if not isinstance(each, IPv4Network)]
    assert all(isinstance(each, NodeConflict) for each in refused), refused
    assert len(refused) <= len(fixed), "only a fixed pool may come too late"
    assert not [pair for pair in itertools.combinations(pools, 2) if pair[0].overlaps(pair[1])]
    claims = {claim.pool: claim.node for claim in (await one.known()).claims}
    assert sorted(claims) == sorted(pools)
    assert await asyncio.gather(*map(one.claim, blocks)) == outcomes[: len(blocks)], "and keep them"


async def test_claim_in_etcd_is_readable(client: Client) -> None:
    await registrar(client).claim(Wish("host-b", "10.9.0.2", fixed=A))
    found = await client.get("holdfast/pools/v1/default/10.50.1.0/24")
    assert found is not None
    assert (found.value, found.lease) == (b'{"Pool":"10.50.1.0/24","Node":"host-b"}', 0)


async def test_a_pool_is_free_again_once_its_node_is_gone_and_was_released(client: Client) -> None:
    one = registrar(client)
    lease = await client.lease_grant(60)
    await one.claim(Wish("old", "10.9.0.1", fixed=A))
    await say(client, "old", "10.9.0.1", A, lease)
    late = Wish("new", "10.9.0.2", fixed=A)
    with pytest.raises(NodeConflict, match="registered"):
        await one.release("old")
    await client.lease_revoke(lease)
    with pytest.raises(NodeConflict, match=r"belongs to node old"):
        await one.claim(late)
    assert await one.release("old") == [A]
    assert await one.claim(late) == A
    assert await one.release("old") == []


async def test_with_users_only_the_operator_claims(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path, tls=True)
    try:
        server.start().enable_auth("agent", "cilium/", readable="holdfast/")
        operator, agent = Client(server.config, timeout=5), Client(server.config_for("agent"), timeout=5)
        try:
            wish = Wish("host-b", "10.9.0.2", cluster_range=RANGE)
            with pytest.raises(NodeConflict, match="etcd lets only the operator") as refused:
                await registrar(agent).claim(wish)
            assert "holdfast node add host-b" in refused.value.hint
            pool = await registrar(operator).claim(wish)
            assert await registrar(agent).claim(wish) == pool
        finally:
            await operator.close()
            await agent.close()
    finally:
        server.stop()


async def test_a_second_host_with_the_name_is_refused_until_the_first_is_gone(client: Client) -> None:
    await say(client, "a", "10.9.0.1", A, lease := await client.lease_grant(60))
    second = Registration(client, CLUSTER, Wish("a", "10.9.0.2", fixed=IPv4Network("10.50.2.0/24")), ttl=60)
    task = asyncio.create_task(second.confirm())
    await eventually(lambda: "belongs to the node at 10.9.0.1" in second.refusal, "refused")
    await client.lease_revoke(lease)
    await asyncio.wait_for(task, 30)
    assert second.refusal == ""


async def test_a_host_with_a_new_address_ends_what_it_said_under_the_old_one(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until nobody renews its former lease: as long as somebody does, it may be a copied disk."""
    monkeypatch.setattr("agent.registration.RETRY_CAP_S", 0.5)
    lease = await client.lease_grant(600)
    wish = Wish("a", "10.9.0.2", fixed=A, lease=lease)
    await registrar(client).claim(wish)
    await say(client, "a", "10.9.0.1", A, lease)
    moved = Registration(client, CLUSTER, wish, ttl=4, former_lease=lease)  # silent after 3.3 s
    task = asyncio.create_task(moved.confirm())
    await eventually(lambda: "in use at 10.9.0.1" in moved.refusal, "refused at first")
    for _ in range(8):
        await asyncio.sleep(0.5)
        await client.lease_keepalive(lease)
    assert not task.done(), "its former self is alive"
    await asyncio.wait_for(task, 60)
    assert (moved.former_lease, moved.refusal) == (0, "")
    assert await client.get(schema.node_key(CLUSTER, "a")) is None
    assert await client.lease_remaining(lease) == 0


def test_silence() -> None:
    watch = Silence(86_400)
    assert watch.needed == 150
    assert not watch.lasts(100, 0.0)
    assert not watch.lasts(40, 60.0)
    assert not watch.lasts(100, 100.0), "renewed in between: it begins anew"
    assert not watch.lasts(30, 170.0)
    assert watch.lasts(0, 250.0)
    assert Silence(60).lasts(0, 0.0), "a lease that is gone has nobody"
