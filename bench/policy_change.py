# SPDX-License-Identifier: Apache-2.0
"""A rule comes while 200 endpoints are there, and selects one of them: how long until its map has the entry.

policy_change_one_of_200_ms
    From the rule as text, put into the agent's table of policies, to its entry being read from the one
    endpoint's pinned BPF map by a descriptor of the reader's own.

Everything between is the agent's: the table, the task that follows it, the engine, the reconciler, the maps.
1 000 other rules, five for each endpoint, and 3 000 identities are there; each endpoint has labels of its
own.  That no other map changed is checked.  Comment lines tell the same with 1 000 rules that all select
that one endpoint, and a rule that selects all 200.

Run: python -m bench.policy_change [--profile]
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from agent import ipcache
from agent.derive import Derivations
from agent.plumbing import PolicyMapStore
from agent.policies import KVSTORE, new_policies
from agent.policy_maps import PolicyMaps
from bench import harness
from core.table import Table
from datapath.maps import PolicyMap
from datapath.mapspec import MapCatalogue, policy_map_name
from identity.labels import Labels
from identity.local import LocalIdentities
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import TCP, Direction, PolicyKey
from tests.support.bpf import own_bpffs

ENDPOINTS, RULES, IDENTITIES, ROUNDS = 200, 1_000, 3_000, 25
FIRST = 256
CATALOGUE = MapCatalogue(preallocate=False)


@dataclass(frozen=True)
class Host:
    """The part of an agent between a policy and the maps, running."""

    derivations: Derivations
    root: Path

    def apply(self, name: str, text: str) -> None:
        """Hand rules over, as a source does."""
        source = self.derivations.policies.source(KVSTORE)
        for policy in parse_policies(text, "bench", name=name):
            source.upsert(policy.name, policy)

    async def settled(self) -> None:
        await self.derivations.policies_enforced()


def rule(subject: str, peer: str, port: int) -> str:
    return (
        f'[{{"endpointSelector": {{"matchLabels": {subject}}}, "ingress": [{{'
        f'"fromEndpoints": [{{"matchLabels": {{"app": "{peer}"}}}}],'
        f' "toPorts": [{{"ports": [{{"port": "{port}", "protocol": "TCP"}}]}}]}}]}}]'
    )


def endpoint(number: int) -> str:
    return f'{{"app": "subject", "copy": "{number}"}}'


@contextlib.asynccontextmanager
async def agent(root: Path, *, rules_for_one: bool) -> AsyncIterator[Host]:
    """Yield a host with all endpoints, rules and identities, its maps written."""
    identities: Table[int, Labels] = Table("identities", ("bench",))
    maps = PolicyMaps(PolicyEngine(), PolicyMapStore(CATALOGUE, root))
    derivations = Derivations(identities, new_policies(), LocalIdentities(), ipcache.new_table(), maps)
    host = Host(derivations, root)
    for number in range(IDENTITIES):
        maps.engine.upsert_identity(FIRST + number, Labels.of({"app": f"app-{number % RULES}"}))
    for number in range(RULES):
        subject = 1 if rules_for_one else 1 + number % ENDPOINTS
        host.apply(f"rule-{number}", rule(endpoint(subject), f"app-{number}", 80))
    for number in range(1, ENDPOINTS + 1):
        maps.add_endpoint(number, Labels.of({"app": "subject", "copy": str(number)}))
    tasks = [asyncio.create_task(each()) for each in (derivations.follow_policies, maps.reconciler.run)]
    maps.open_gate()
    await asyncio.sleep(0)
    await host.settled()
    try:
        yield host
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def change(host: Host, number: int, subject: str) -> float:
    """Return the milliseconds until endpoint 1's map has the entry of one more rule."""
    peer = number % RULES
    port = 10_000 + number
    text = rule(subject, f"app-{peer}", port)
    key = PolicyKey(FIRST + peer, port, TCP, Direction.INGRESS)
    with PolicyMap.reader(policy_map_name(1), host.root).handle as handle:
        reader = PolicyMap(handle)
        started = time.perf_counter()
        host.apply("new", text)
        while reader.get(key) is None:
            await asyncio.sleep(0)
        taken = (time.perf_counter() - started) * 1e3
    await host.settled()
    return taken


async def samples(host: Host, subject: str, profiler: cProfile.Profile | None = None) -> list[float]:
    found = []
    for number in range(ROUNDS):
        if profiler:
            profiler.enable()
        found.append(await change(host, number, subject))
        if profiler:
            profiler.disable()
    return found


def entries(host: Host) -> dict[int, int]:
    """Return how many entries each endpoint's map holds."""
    found = {}
    for number in range(1, ENDPOINTS + 1):
        with PolicyMap.reader(policy_map_name(number), host.root).handle as handle:
            found[number] = handle.count()
    return found


async def figure(root: Path, profiler: cProfile.Profile | None = None) -> None:
    async with agent(root, rules_for_one=False) as host:
        before = entries(host)
        one = await samples(host, endpoint(1), profiler)
        changed = [number for number, count in entries(host).items() if count != before[number]]
        if changed != [1]:
            raise SystemExit(f"the maps of endpoints {changed} changed, not that of endpoint 1 alone")
        harness.emit_median("policy_change_one_of_200_ms", one, "ms")
        everybody = statistics.median(await samples(host, '{"app": "subject"}'))
    harness.note(f"a rule that selects all {ENDPOINTS}: {everybody:.1f} ms until endpoint 1 has it")


async def crowded(root: Path) -> None:
    async with agent(root, rules_for_one=True) as host:
        found = statistics.median(await samples(host, endpoint(1)))
    harness.note(f"{RULES} rules select the endpoint already: {found:.1f} ms")


def main() -> None:
    logger.remove()
    harness.load()
    profiler = cProfile.Profile() if "--profile" in sys.argv else None
    for work in (lambda root: figure(root, profiler), crowded):
        with tempfile.TemporaryDirectory() as directory, own_bpffs(Path(directory)) as root:
            asyncio.run(work(root))
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
