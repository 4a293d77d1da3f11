# SPDX-License-Identifier: Apache-2.0
"""Light agents: the client, session, allocator and schema of the agent, and no kernel; many in a process.

Each holds a lease, owns the ip/v1 entries of its endpoints, has an identity for each application among them,
and follows all identities and all entries.  What it knows of entries is kept as it came, so that it can be
compared with etcd byte by byte.

`fleet_sim` starts some of these processes and speaks with them in lines: a command and its arguments in, a
line of JSON out.  Times are seconds of the monotonic clock, which all processes of a machine share::

    join              until every agent is in sync and its entries are written
    relabel AT TURN   at AT every agent gives all of its endpoints the labels of TURN
    reach REVISION    waits until all have seen that revision; says when the last one learned anything
    compare           compares everything that all agents know with etcd
    applied PREFIX    says when each value that begins with PREFIX was known to the last of the agents
    count PREFIX N    as many watches as there are agents begin to count events of keys that no agent follows
    counted           waits until each has counted N; says when the last one had

Run by: bench.fleet_sim.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loguru import logger

from core.loop import spare_the_collector
from identity.allocator import Allocator
from identity.cache import IdentityCache
from identity.labels import CONTAINER, Label, Labels
from kvstore import schema
from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.ops import Compare, Op, Put, TxnResult
from kvstore.session import Session
from kvstore.watcher import Follower, State

LEASE_S = 24 * 3600
CLUSTER = "default"
POLL_S = 0.005


@dataclass(frozen=True)
class Plan:
    """Who there is: `agents` with `entries` of `identities` among them, in this order.  Pure."""

    agents: int
    entries: int
    identities: int

    def node_ip(self, agent: int) -> str:
        return f"172.16.{agent >> 8}.{agent & 255}"

    def indices(self, agent: int) -> range:
        """Entries of an agent: a piece of all, so that it has as many identities as it can."""
        size = self.entries // self.agents
        return range(agent * size, (agent + 1) * size)

    def address(self, index: int) -> str:
        return f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}"

    def labels(self, index: int, turn: int) -> Labels:
        """Labels of an entry's endpoint as a compose application has them."""
        service = index % self.identities
        return Labels(
            Label(CONTAINER, key, value)
            for key, value in (
                ("app", f"app-{service}"),
                ("com.docker.compose.project", f"project-{service % 25}"),
                ("com.docker.compose.service", f"service-{service}"),
                ("release", str(turn)),
            )
        )


class TimedClient(Client):
    """Remembers how long each transaction with ip entries took."""

    def __init__(self, config: EtcdConfig) -> None:
        super().__init__(config)
        self.taken: list[float] = []
        self.last_revision = 0

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        began = time.monotonic()
        answer = await super().txn(compares, success, failure)
        if any(isinstance(op, Put) and op.key.startswith(schema.IPS) for op in success):
            self.taken.append(time.monotonic() - began)
            self.last_revision = answer.revision
        return answer


class KnownEntries:
    """A sink (`kvstore.watcher.Sink`) that keeps keys and values as they come, and when it last learned."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.learned_at = 0.0
        self.probes: dict[bytes, float] = {}

    def begin_list(self) -> None:
        self.held = {}

    def take(self, items: Sequence[tuple[str, bytes]]) -> None:
        self.held.update(items)
        self.learned_at = time.monotonic()
        if len(items) == 1:
            self.probes[items[0][1]] = self.learned_at

    def deleted(self, key: str) -> None:
        self.held.pop(key, None)
        self.learned_at = time.monotonic()

    async def listed(self, revision: int) -> None: ...

    def in_sync(self) -> None: ...


class LightAgent:
    """One agent of the plan.  Owner of its client."""

    def __init__(self, config: EtcdConfig, plan: Plan, number: int) -> None:
        self.client = TimedClient(config)
        self.known = KnownEntries()
        self.identities = IdentityCache()
        self.session = Session(
            self.client,
            ttl=LEASE_S,
            name=f"agent-{number}",
            elsewhere=(schema.IPS, schema.IDENTITY_VALUES),
            nodes=lambda: plan.agents,
        )
        self.allocator = Allocator(
            self.client, self.session, self.identities, owner=plan.node_ip(number), on_renumbered=None
        )
        self.entries = Follower(self.client, schema.IPS, self.known, observer=self.session.seen)
        self.ids = Follower(self.client, schema.IDENTITY_IDS, self.identities)
        self._plan = plan
        self._number = number
        self._uses: list[Labels] = []

    async def run(self) -> None:
        await asyncio.gather(
            self.session.run(), self.allocator.run(), self.entries.run(), self.ids.run(), self._forget()
        )

    async def _forget(self) -> None:
        """Missing records end as they do in an agent."""
        while True:
            await asyncio.sleep(60)
            self.identities.source.expire()

    async def relabel(self, turn: int) -> None:
        """Give every endpoint the labels of a turn: identities, then all entries in one transaction."""
        indices = self._plan.indices(self._number)
        of_index = {index: self._plan.labels(index, turn) for index in indices}
        wanted = list(dict.fromkeys(of_index.values()))
        numbers = dict(zip(wanted, await asyncio.gather(*map(self.allocator.allocate, wanted)), strict=True))
        host = self._plan.node_ip(self._number)
        for index, labels in of_index.items():
            address = self._plan.address(index)
            record = schema.ip_record(
                address, numbers[labels], host_ip=host, metadata=f"cilium-global:{CLUSTER}:{host}:{index}"
            )
            key = schema.ip_key(schema.DEFAULT_SPACE, address)
            await self.session.own(key, schema.encode_ip(record))
        await self.session.settled()
        released, self._uses = self._uses, wanted
        for labels in released:
            await self.allocator.release(labels)

    @property
    def in_sync(self) -> bool:
        return self.entries.state is State.WATCHING and self.ids.state is State.WATCHING

    def differs(self, entries: dict[str, bytes], identities: dict[str, bytes]) -> str:
        """Say what this agent knows otherwise than etcd; nothing if all is the same."""
        if self.known.held != entries:
            return f"agent {self._number}: {len(self.known.held)} entries, in etcd {len(entries)}"
        for key, text in identities.items():
            labels = self.identities.get(schema.parse_identity_id_key(key))
            if labels is None or labels.serialized.encode() != text:
                return f"agent {self._number}: {key} is {labels}, in etcd {text!r}"
        return ""


class Group:
    """The agents of one process, and the commands of the module's text."""

    def __init__(self, config: EtcdConfig, plan: Plan, numbers: range) -> None:
        self.config = config
        self.agents = [LightAgent(config, plan, number) for number in numbers]
        self._counting: list[asyncio.Task[float]] = []

    async def join(self) -> dict[str, object]:
        await asyncio.gather(*(each.relabel(0) for each in self.agents))
        while not all(each.in_sync for each in self.agents):
            await asyncio.sleep(POLL_S)
        spare_the_collector()  # what fifty agents know is fifty times what the collector of one would look at
        return {"joined": len(self.agents)}

    async def relabel(self, at: str, turn: str) -> dict[str, object]:
        for each in self.agents:
            each.client.taken.clear()
        await asyncio.sleep(float(at) - time.monotonic())
        await asyncio.gather(*(each.relabel(int(turn)) for each in self.agents))
        taken = [seconds for each in self.agents for seconds in each.client.taken]
        revision = max(each.client.last_revision for each in self.agents)
        return {"taken": taken, "revision": revision, "written": time.monotonic()}

    async def reach(self, revision: str) -> dict[str, object]:
        while any(each.entries.revision < int(revision) for each in self.agents):
            await asyncio.sleep(POLL_S)
        return {"learned": max(each.known.learned_at for each in self.agents)}

    async def compare(self) -> dict[str, object]:
        client = Client(self.config)
        try:
            entries = (await client.snapshot(schema.IPS)).items
            identities = (await client.snapshot(schema.IDENTITY_IDS)).items
        finally:
            await client.close()
        return {"differs": [found for each in self.agents if (found := each.differs(entries, identities))]}

    async def applied(self, prefix: str) -> dict[str, object]:
        values = set.intersection(*(set(each.known.probes) for each in self.agents))
        wanted = [value for value in values if value.startswith(prefix.encode())]
        return {
            "applied": {
                value.decode(): max(each.known.probes[value] for each in self.agents) for value in wanted
            }
        }

    async def count(self, prefix: str, number: str) -> dict[str, object]:
        ready = [asyncio.Event() for _ in self.agents]
        self._counting = [
            asyncio.create_task(counted(each.client, prefix, int(number), event))
            for each, event in zip(self.agents, ready, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in ready))
        return {"ready": len(ready)}

    async def counted(self) -> dict[str, object]:
        return {"learned": max(await asyncio.gather(*self._counting))}

    async def serve(self) -> None:
        """Run the agents, and obey until the input ends."""
        tasks = [asyncio.create_task(each.run()) for each in self.agents]
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := (await reader.readline()).decode().split():
            answer = await getattr(self, line[0])(*line[1:])
            print(json.dumps(answer), flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.gather(*(each.client.close() for each in self.agents))


async def counted(client: Client, prefix: str, number: int, ready: asyncio.Event) -> float:
    """Count events and make nothing of them; return when the last one had come."""
    async with client.watch_stream(prefix) as stream:
        await stream.create(prefix, 0, prefix=True)
        await stream.read()
        ready.set()
        while number > 0:
            number -= len((await stream.read()).events)
    return time.monotonic()


def main(endpoint: str, *given: str) -> None:
    """Arguments: etcd's URL, agents, entries and identities of the plan, first and last + 1 of ours."""
    os.nice(10)  # etcd of a fleet has a machine of its own; here it is not to wait for its clients
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    spare_the_collector()  # as an agent does
    agents, entries, identities, first, end = map(int, given)
    group = Group(EtcdConfig((endpoint,)), Plan(agents, entries, identities), range(first, end))
    asyncio.run(group.serve())
