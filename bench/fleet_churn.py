# SPDX-License-Identifier: Apache-2.0
"""A thousand nodes that join and leave at random, and what one real agent's kernel has of them afterwards.

churn_nodes_joins_per_s
    Joins a second over the whole: a lease, a pool claimed in etcd, a node record, entries of endpoints.

Nodes are real clients with sessions of their own in one process; the agent is a real one, in tunnel mode.
Nodes leave politely, or fall silent until their lease ends, or come back under another address or another
name; some release their pool, which is somebody else's then.  In the end many are there: the agent's
ipcache, its tunnel map and its routes are compared with what etcd says, entry by entry.  Then all of them
die at once, and what is left must be what was there before the first one came.

Run: python -m bench.fleet_churn [nodes [seconds]]
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import sys
import time
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from loguru import logger

from bench.harness import emit, load, note
from bench.sync_state import Seen, SyncHost, all_in_sync, launch, poll, said
from datapath.maps import TunnelMap
from datapath.noderoutes import PROTOCOL
from identity.numbers import REMOTE_NODE, WORLD
from kvstore import schema
from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.errors import KvstoreError
from kvstore.pools import Registrar, Wish
from kvstore.session import Session
from tests.support.agent import ETCD_PORT
from tests.support.host import Hub, wait_for

NODES, SECONDS = 1_000, 60.0
AT_ONCE = 24  # nodes that join or leave at a time
CLIENTS = 10
TTL_S = 5
ENDPOINTS = 4
CLUSTER = "default"
RANGE = IPv4Network("10.128.0.0/12")
FIRST_ADDRESS = IPv4Address("172.20.0.1")
SEED = 20_260
# Every lease has ended, and every agent has been told.
CALM_S = 4.0 * TTL_S
DRIVER = ("-c", "import sys; from bench.fleet_churn import drive; drive(*sys.argv[1:])")


# --- the nodes, in a process inside the host


class LightNode:
    """One node: at most one life at a time, each under a lease of its own."""

    def __init__(self, client: Client, number: int, addresses: itertools.count[int]) -> None:
        self.alive = False
        self._client = client
        self._addresses = addresses
        self._name = f"node-{number:04d}"
        self._renamed = 0
        self._address = str(FIRST_ADDRESS + next(addresses))
        self._session = Session(client, ttl=TTL_S, name=self._name)
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Return once everything of this life is in etcd."""
        self._session = Session(
            self._client, ttl=TTL_S, name=self._name, elsewhere=(schema.IPS, schema.IDENTITY_VALUES)
        )
        self._task = asyncio.create_task(self._session.run())
        lease = await self._session.ready()
        wish = Wish(self._name, self._address, cluster_range=RANGE, length=24, lease=lease)
        pool = await Registrar(self._client, CLUSTER).claim(wish)
        await self._session.own(schema.node_key(CLUSTER, self._name), schema.encode_node(self._record(pool)))
        for each in range(2, 2 + ENDPOINTS):
            address = str(pool[each])
            record = schema.ip_record(address, 1000 + int(pool[each]) % 5000, host_ip=self._address)
            await self._session.own(schema.ip_key(schema.DEFAULT_SPACE, address), schema.encode_ip(record))
        await self._session.settled()
        self.alive = True

    def _record(self, pool: IPv4Network) -> schema.NodeRecord:
        addresses = (
            schema.NodeAddress("InternalIP", self._address),
            schema.NodeAddress("CiliumInternalIP", str(pool[1])),
        )
        return schema.NodeRecord(
            self._name, CLUSTER, addresses, schema.AllocCidr.of(str(pool)), source="local", identity=1
        )

    async def leave(self, chance: random.Random) -> None:
        """End this life in one of the ways that there are, and change what a machine may change meanwhile."""
        self.alive = False
        if chance.random() < 0.4:
            await self._fall_silent()
        else:
            await self._go()
        if chance.random() < 0.2:
            self._address = str(FIRST_ADDRESS + next(self._addresses))
        if chance.random() < 0.1:
            await Registrar(self._client, CLUSTER).release(self._name)
            self._renamed += 1
            self._name = f"{self._name.partition('.')[0]}.{self._renamed}"

    async def _go(self) -> None:
        for key in list(self._session.own_keys):
            await self._session.disown(key)
        await self._session.settled()
        lease = self._session.lease_id
        await self._stop()
        await self._client.lease_revoke(lease)

    async def _fall_silent(self) -> None:
        """Say nothing any more; return when etcd has ended the lease, for a node is not two at once."""
        await self._stop()
        while await self._client.get(schema.node_key(CLUSTER, self._name)) is not None:
            await asyncio.sleep(0.5)

    async def _stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def _churn(nodes: int, seconds: float) -> None:
    clients = [Client(EtcdConfig((f"http://127.0.0.1:{ETCD_PORT}",))) for _ in range(CLIENTS)]
    chance, addresses = random.Random(SEED), itertools.count()
    fleet = [LightNode(clients[number % CLIENTS], number, addresses) for number in range(nodes)]
    waiting = list(fleet)
    joins = leaves = failures = 0
    ends = time.monotonic() + seconds

    async def worker() -> None:
        nonlocal joins, leaves, failures
        while time.monotonic() < ends:
            node = waiting.pop(chance.randrange(len(waiting)))
            try:
                if node.alive:
                    await node.leave(chance)
                    leaves += 1
                else:
                    await node.join()
                    joins += 1
            except KvstoreError as error:
                failures += 1
                print(f"{error}", file=sys.stderr, flush=True)
            waiting.append(node)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    alive = sum(node.alive for node in fleet)
    print(json.dumps({"joins": joins, "leaves": leaves, "failures": failures, "alive": alive}), flush=True)
    await asyncio.sleep(3600)  # those that are there stay, until the process is killed


def drive(nodes: str, seconds: str) -> None:
    logger.remove()
    asyncio.run(_churn(int(nodes), float(seconds)))


# --- what the agent must have


class Kernel(NamedTuple):
    """What an agent has written about others: prefix → identity, pool → host, pool → host of its route."""

    ipcache: dict[str, int]
    tunnel: dict[str, str]
    routes: dict[str, str]

    @classmethod
    def of(cls, host: SyncHost) -> Kernel:
        # Not as JSON: there the pool and the host behind it are two members called dst, and one is lost.
        lines = host.exec("ip", "route", "show", "proto", str(PROTOCOL)).stdout.splitlines()
        routes = {words[0]: words[words.index("dst") + 1] for words in map(str.split, lines)}
        with contextlib.closing(TunnelMap.reader("cilium_tunnel_map", host.ipcache)) as tunnel:
            hosts = dict(tunnel.items())
        return cls(Seen(host.ipcache).identities(), hosts, routes)


def wanted(host: SyncHost, before: Kernel) -> Kernel:
    """Return what etcd says, over what was there before the first node came."""
    ipcache, tunnel, routes = dict(before.ipcache), dict(before.tunnel), dict(before.routes)
    for key, value in host.keys(schema.node_cluster_prefix(CLUSTER)).items():
        node = schema.parse_node(key, value.encode())
        if node.ipv4_alloc_cidr is None or not node.name.startswith("node-"):
            continue
        pool = node.ipv4_alloc_cidr.prefix
        ipcache |= {f"{each.ip}/32": REMOTE_NODE for each in node.addresses or ()}
        ipcache[pool] = WORLD
        tunnel[pool.partition("/")[0]] = routes[pool] = node.address()
    for key, value in host.keys(schema.IPS).items():
        _, record = schema.parse_ip_entry(key, value.encode())
        ipcache[f"{record.ip}/32"] = record.identity
    return Kernel(ipcache, tunnel, routes)


def differences(have: Kernel, want: Kernel) -> str:
    """Say in one line what is not as it should be; empty if all is."""
    parts: list[tuple[str, Mapping[str, object], Mapping[str, object]]] = [
        ("ipcache", have.ipcache, want.ipcache),
        ("tunnel", have.tunnel, want.tunnel),
        ("routes", have.routes, want.routes),
    ]
    wrong = {name: set(a.items()) ^ set(b.items()) for name, a, b in parts}
    return "; ".join(
        f"{name}: {len(each)}, {sorted(map(str, each))[:2]}" for name, each in wrong.items() if each
    )


def check(host: SyncHost, before: Kernel, what: str) -> Kernel:
    """Compare with etcd until all is the same; SystemExit when it does not come to that."""
    deadline = time.monotonic() + CALM_S
    while wrong := differences(have := Kernel.of(host), wanted(host, before)):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: the kernel differs from etcd: {wrong}")
        time.sleep(1)
    return have


def churn(host: SyncHost, nodes: int, seconds: float) -> None:
    launch(host)
    poll(lambda: all_in_sync(host), "table in sync")
    time.sleep(1)
    before = Kernel.of(host)
    driver = host.popen(sys.executable, *DRIVER, str(nodes), str(seconds), environment={"PYTHONPATH": "."})
    wait_for(lambda: bool(said(driver)), "end of the churn", seconds=seconds + 90, pause=0.5)
    counts = said(driver)
    note(" ".join(f"{name} {count:.0f}" for name, count in counts.items()))
    if counts["failures"] or not counts["alive"]:
        raise SystemExit(driver.output()[-2000:])
    emit("churn_nodes_joins_per_s", counts["joins"] / seconds, "1/s", int(counts["joins"]))
    have = check(host, before, f"with {counts['alive']:.0f} nodes")
    note(f"equal to etcd: {len(have.ipcache)} entries, {len(have.tunnel)} hosts, {len(have.routes)} routes")
    driver.kill()
    time.sleep(2 * TTL_S)
    left = host.keys(schema.node_cluster_prefix(CLUSTER))
    wait_for(lambda: len(host.keys(schema.node_cluster_prefix(CLUSTER))) <= 1, "end of the leases")
    have = check(host, before, "after all had died")
    if differences(have, before):
        raise SystemExit(f"left over: {differences(have, before)}; in etcd {list(left)[:3]}")
    note("nothing is left of them: entries, hosts and routes are those from before")


def main() -> None:
    load()
    nodes = int(sys.argv[1]) if len(sys.argv) > 1 else NODES
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else SECONDS
    with Hub() as hub, SyncHost("hfchurn") as host:
        host.address = hub.join(host)
        host.start_large_etcd()
        churn(host, nodes, seconds)


if __name__ == "__main__":
    main()
