# SPDX-License-Identifier: Apache-2.0
"""A fleet of light agents on one etcd: how fast what one host says is known to all.

propagation_200_p99_ms
    A put of one entry → the last of 200 agents has it; ten changes a second.
relabel_converge_s
    200 agents with 20 000 entries of 250 identities give all of their endpoints other labels at once: from
    that moment until the last agent has learned the last entry.  Then every agent is compared with etcd.
relabel_put_p99_ms
    In that storm, the transaction in which an agent rewrites all of its own entries.
floor_relabel_s, floor_relabel_put_p99_ms
    The same events to as many watches that only count them, on keys that no agent follows: what etcd's
    deliveries, and reading them, take on this machine however little is made of them.
floor_turns_s, floor_turns_put_p99_ms
    The same when writers take turns as sessions do: within `kvstore.session.spread_s` seconds.

Agents are real clients (bench/fleet_agents.py), 200 in four processes; they share the machine's CPUs with
etcd, where each of a fleet has its own.

Run: python -m bench.fleet_sim
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.fleet_agents import Plan
from bench.harness import emit, emit_median, load, note
from kvstore import schema
from kvstore.client import Client
from kvstore.ops import Put, put_op
from kvstore.session import spread_s
from tests.support.etcd import EtcdServer

PLAN = Plan(agents=200, entries=20_000, identities=250)
OWN = PLAN.entries // PLAN.agents
PROCESSES = 4
STORMS, CHANGES, PAUSE_S = 3, 200, 0.1
START_S = 0.5  # from the command to the moment that it names
LIMIT_S = 300.0
PROBE = "probe-"
FLOOR_PREFIX = "bench/ip/v1/default/"
RUN = ("-c", "import sys; from bench.fleet_agents import main; main(*sys.argv[1:])")


class Agents:
    """A process of agents; a command goes to it as a line and is answered by one."""

    def __init__(self, endpoint: str, plan: Plan, first: int, end: int) -> None:
        figures = (plan.agents, plan.entries, plan.identities, first, end)
        self._process = subprocess.Popen(
            [sys.executable, *RUN, endpoint, *map(str, figures)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: object) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest question; SystemExit when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of agents ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class FleetOfAgents:
    """All processes of a plan's agents."""

    def __init__(self, endpoint: str, plan: Plan) -> None:
        size = plan.agents // PROCESSES
        self.groups = [Agents(endpoint, plan, first, first + size) for first in range(0, plan.agents, size)]

    def all(self, *words: object) -> list[dict[str, Any]]:
        """Give all the same command and return the answers."""
        for each in self.groups:
            each.ask(*words)
        return [each.answer() for each in self.groups]

    def latest(self, *words: object) -> float:
        return max(float(each["learned"]) for each in self.all(*words))

    def compare(self) -> None:
        """SystemExit when an agent knows anything otherwise than etcd."""
        wrong = [found for each in self.all("compare") for found in each["differs"]]
        if wrong:
            raise SystemExit(f"{len(wrong)} agents differ from etcd: {wrong[0]}")


@contextlib.contextmanager
def fleet(plan: Plan) -> Iterator[tuple[EtcdServer, FleetOfAgents]]:
    """Yield an etcd and the agents of a plan, all in sync."""
    with tempfile.TemporaryDirectory() as directory:
        server = EtcdServer(Path(directory)).start()
        agents = FleetOfAgents(server.endpoint, plan)
        try:
            began = time.monotonic()
            agents.all("join")
            agents.all("reach", asyncio.run(head(server)))
            note(
                f"{plan.agents} agents with {plan.entries} entries joined in {time.monotonic() - began:.1f} s"
            )
            yield server, agents
        finally:
            for each in agents.groups:
                each.close()
            server.stop()


async def head(server: EtcdServer) -> int:
    """Return etcd's present revision."""
    client = Client(server.config)
    try:
        return await client.head(schema.IPS)
    finally:
        await client.close()


class Storm(NamedTuple):
    """`converge`: until the last agent had the last entry; `puts`: each agent's own transaction; seconds."""

    converge: float
    puts: list[float]


def storm(agents: FleetOfAgents, turn: int) -> Storm:
    """Have every endpoint of every agent relabelled at one moment."""
    at = time.monotonic() + START_S
    answers = agents.all("relabel", at, turn)
    revision = max(int(each["revision"]) for each in answers)
    learned = agents.latest("reach", revision)
    agents.compare()
    puts = [float(seconds) for each in answers for seconds in each["taken"]]
    return Storm(learned - at, puts)


async def floor(server: EtcdServer, agents: FleetOfAgents, spread: float) -> Storm:
    """Return what as many events of the same size, written within `spread` seconds, take to watches that only
    count them."""
    plan, client = PLAN, Client(server.config)
    agents.all("count", FLOOR_PREFIX, plan.entries)
    batches = []
    for agent in range(plan.agents):
        host = plan.node_ip(agent)
        records = {
            plan.address(index): schema.ip_record(
                plan.address(index), 1000, host_ip=host, metadata=f"cilium-global:default:{host}:{index}"
            )
            for index in plan.indices(agent)
        }
        batches.append([put_op(FLOOR_PREFIX + key, schema.encode_ip(each)) for key, each in records.items()])
    puts: list[float] = []

    async def put(batch: list[Put]) -> None:
        await asyncio.sleep(random.uniform(0, spread))
        began = time.monotonic()
        await client.txn((), batch)
        puts.append(time.monotonic() - began)

    began = time.monotonic()
    await asyncio.gather(*map(put, batches))
    learned = await asyncio.to_thread(agents.latest, "counted")
    await client.close()
    return Storm(learned - began, puts)


async def propagation(server: EtcdServer, agents: FleetOfAgents) -> list[float]:
    """Return how long each of some changes took to the last agent."""
    client, put_at, revision = Client(server.config), {}, 0
    key = schema.ip_key(schema.DEFAULT_SPACE, "10.255.255.1")
    for number in range(CHANGES):
        value = f"{PROBE}{number}"
        put_at[value] = time.monotonic()
        revision = await client.put(key, value)
        await asyncio.sleep(PAUSE_S)
    await asyncio.to_thread(agents.all, "reach", revision)
    await client.delete(key)
    await client.close()
    learned: dict[str, float] = {}
    for answer in await asyncio.to_thread(agents.all, "applied", PROBE):
        for value, at in answer["applied"].items():
            learned[value] = max(at, learned.get(value, 0.0))
    if learned.keys() != put_at.keys():
        raise SystemExit(f"{len(learned)} of {CHANGES} changes were seen by all agents")
    return [learned[value] - put_at[value] for value in put_at]


def p99(samples: Sequence[float]) -> float:
    return statistics.quantiles(samples, n=100)[98]


def main() -> None:
    load()
    with fleet(PLAN) as (server, agents):
        delays = asyncio.run(propagation(server, agents))
        emit("propagation_200_p99_ms", p99(delays) * 1e3, "ms", len(delays))
        note(f"propagation: median {statistics.median(delays) * 1e3:.1f} ms, most {max(delays) * 1e3:.1f} ms")
        storms, floors, spread = [], [], []
        for turn in range(1, STORMS + 1):
            storms.append(storm(agents, turn))
            floors.append(asyncio.run(floor(server, agents, 0.0)))
            spread.append(asyncio.run(floor(server, agents, spread_s(OWN, PLAN.agents))))
        puts = [each for one in storms for each in one.puts]
        emit_median("relabel_converge_s", [each.converge for each in storms], "s")
        emit("relabel_put_p99_ms", p99(puts) * 1e3, "ms", len(puts))
        note(f"relabel_put: median {statistics.median(puts) * 1e3:.1f} ms, most {max(puts) * 1e3:.1f} ms")
        emit_median("floor_relabel_s", [each.converge for each in floors], "s")
        puts = [each for one in floors for each in one.puts]
        emit("floor_relabel_put_p99_ms", p99(puts) * 1e3, "ms", len(puts))
        emit_median("floor_turns_s", [each.converge for each in spread], "s")
        puts = [each for one in spread for each in one.puts]
        emit("floor_turns_put_p99_ms", p99(puts) * 1e3, "ms", len(puts))


if __name__ == "__main__":
    main()
