# SPDX-License-Identifier: Apache-2.0
"""A fleet's state in etcd: what it is, who writes it, and clients that do no more with it than they must.

`sync_state` runs `main` inside the host whose etcd it is about; each command prints lines of JSON::

    fill ADDRESSES IDENTITIES NODES     every key, in transactions of 128
    rewrite ADDRESSES IDENTITIES NODES STEP TURN PREFIX
                                        every STEP-th address gets another identity: 500 a transaction, 4 of
                                        them at once
    lead                                holds the elected role, as one of many hosts does, until it is killed
    list                                the addresses, page by page; each page is decoded and dropped
    watch COUNT PREFIX                  counts so many events

Records are those that a real cilium-agent writes: a lease, the host's address and metadata in each entry.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from agent.parts import OPERATOR
from kvstore import rpc, schema
from kvstore.client import PAGE, Client
from kvstore.config import EtcdConfig
from kvstore.election import Election
from kvstore.etcd_pb2 import RangeRequest, TxnRequest
from kvstore.ops import Put, put_op, span, txn_to_wire
from kvstore.session import Session
from tests.support.agent import ETCD_PORT

FIRST_IDENTITY = 256
REWRITTEN_AT_ONCE, IN_FLIGHT = 500, 4
LEASE_S = 24 * 3600
CLUSTER = "default"
ENVIRONMENTS = ("dev", "prod", "staging")


@dataclass(frozen=True)
class Fleet:
    """So many addresses on so many nodes, with so many identities.  Pure."""

    addresses: int
    identities: int
    nodes: int

    def address(self, index: int) -> str:
        """Node n has the pool 10.<n / 256>.<n % 256>.0/24; of it .0 is the router's."""
        each, node = divmod(index, self.nodes)
        return f"10.{node >> 8}.{node & 255}.{each + 1}"

    def node_ip(self, node: int) -> str:
        return f"172.{16 + (node >> 16)}.{node >> 8 & 255}.{node & 255}"

    def identity(self, index: int, turn: int = 0) -> int:
        """The identity of an address after `turn` rewritings."""
        return FIRST_IDENTITY + (index + turn) % self.identities

    def entry(self, index: int, turn: int = 0) -> bytes:
        node = index % self.nodes
        record = schema.ip_record(
            self.address(index),
            self.identity(index, turn),
            host_ip=self.node_ip(node),
            metadata=f"cilium-global:{CLUSTER}:host-{node:05d}:{index % 65_521}",
        )
        return schema.encode_ip(record)

    def entries(self) -> Iterator[tuple[str, bytes]]:
        prefix = schema.ip_space_prefix(schema.keys.DEFAULT_SPACE)
        return ((prefix + self.address(index), self.entry(index)) for index in range(self.addresses))

    def labels(self) -> Iterator[tuple[str, bytes]]:
        for number in range(self.identities):
            project, service = divmod(number, 10)
            text = (
                f"container:app=app-{service};container:com.docker.compose.project=project-{project};"
                f"container:com.docker.compose.service=service-{service};"
                f"container:env={ENVIRONMENTS[project % 3]};container:holdfast.network=net-{project % 50};"
            )
            yield schema.identity_id_key(FIRST_IDENTITY + number), text.encode()

    def node_records(self) -> Iterator[tuple[str, bytes]]:
        for number in range(self.nodes):
            pool = f"10.{number >> 8}.{number & 255}"
            addresses = (
                schema.NodeAddress("InternalIP", self.node_ip(number)),
                schema.NodeAddress("CiliumInternalIP", f"{pool}.0"),
            )
            record = schema.NodeRecord(
                name=f"host-{number:05d}",
                cluster=CLUSTER,
                addresses=addresses,
                ipv4_alloc_cidr=schema.AllocCidr.of(f"{pool}.0/24"),
                source="local",
                identity=1,
            )
            yield schema.node_key(CLUSTER, record.name), schema.encode_node(record)


def say(**values: float) -> None:
    print(json.dumps(values), flush=True)


async def fill(client: Client, addresses: int, identities: int, nodes: int) -> None:
    fleet = Fleet(addresses, identities, nodes)
    lease = await client.lease_grant(LEASE_S)
    began = time.monotonic()
    for part in (fleet.labels(), fleet.node_records(), fleet.entries()):
        await client.write_many(put_op(key, value, lease) for key, value in part)
    say(seconds=time.monotonic() - began)


async def rewrite(client: Client, fleet: Fleet, step: int, turn: int, prefix: str) -> None:
    """Write from transactions that were made before the clock began."""
    lease = await client.lease_grant(LEASE_S)
    indices = range(0, fleet.addresses, step)
    puts = [Put(prefix + fleet.address(index), fleet.entry(index, turn), lease) for index in indices]
    waiting = [
        txn_to_wire((), puts[start : start + REWRITTEN_AT_ONCE], ())
        for start in range(0, len(puts), REWRITTEN_AT_ONCE)
    ][::-1]
    began = time.monotonic()
    await asyncio.gather(*(_write(client, waiting) for _ in range(IN_FLIGHT)))
    say(began=began, written=time.monotonic())


async def _write(client: Client, waiting: list[TxnRequest]) -> None:
    while waiting:
        await client.transport.call(rpc.TXN, waiting.pop(), "")


async def list_all(client: Client) -> None:
    (start, end), revision, found = span(schema.IPS), 0, 0
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    while True:
        request = RangeRequest(key=start, range_end=end, limit=PAGE, revision=revision)
        answer = await client.transport.call(rpc.RANGE, request, schema.IPS)
        revision, found = answer.header.revision, found + len(answer.kvs)
        if not answer.more:
            break
        start = answer.kvs[-1].key + b"\0"
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    say(seconds=time.monotonic() - began, cpu=cpu, entries=found)


async def watch(client: Client, count: int, prefix: str) -> None:
    async with client.watch_stream(prefix) as stream:
        await stream.create(prefix, 0, prefix=True)
        await stream.read()
        say(ready=1)
        used = resource.getrusage(resource.RUSAGE_SELF)
        while count > 0:
            count -= len((await stream.read()).events)
        now = resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        say(ended=time.monotonic(), cpu=cpu)


async def lead(client: Client) -> None:
    session = Session(client, ttl=LEASE_S, name="another-host")
    await asyncio.gather(session.run(), Election(client, session, OPERATOR).run())


async def run(command: str, *given: str) -> None:
    client = Client(EtcdConfig((f"http://127.0.0.1:{ETCD_PORT}",)))
    try:
        if command == "fill":
            await fill(client, *map(int, given))
        elif command == "rewrite":
            addresses, identities, nodes, step, turn = map(int, given[:5])
            await rewrite(client, Fleet(addresses, identities, nodes), step, turn, given[5])
        elif command == "lead":
            await lead(client)
        elif command == "watch":
            await watch(client, int(given[0]), given[1])
        else:
            await list_all(client)
    finally:
        await client.close()


def main() -> None:
    asyncio.run(run(*sys.argv[1:]))
