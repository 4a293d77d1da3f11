# SPDX-License-Identifier: Apache-2.0
"""`health_10k_cpu_percent`: what probing and being probed costs an agent in a cluster of 10 000 nodes.

    prober ── 10 000 addresses of each family, all local in a namespace of its own ── one server for all

Rounds of all nodes, by IPv4 and by both families with ICMP; the CPU of the two sides apart, and times
10 000 / period what the agent spends: each node asks as often as it is asked.  Also what 10 000 results
take, and how long the API's answer, the line of status and a scrape hold the loop or a thread up.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from loguru import logger

from agent.api.wire import json_response
from agent.health import Prober
from agent.health_server import HealthServer
from agent.probes import granted
from agent.report_health import HealthCollector, health, summary
from bench.agent_idle_cpu import cpu_seconds
from bench.harness import emit, emit_median, load, note
from core.table import Table
from kvstore.schema import NodeAddress, NodeRecord
from tests.support.netns import inside_new_netns

NODES = 10_000
ROUNDS = 3
PORT = 4240
BASE_S = 60.0
FIRST = {4: IPv4Address("10.128.0.1"), 6: IPv6Address("fd77::1")}
UNLIMITED = 1e9


def serve() -> None:
    """Answer at every address; without the limit on a flood, which a round of all nodes is."""

    async def run() -> None:
        await HealthServer("default/node", ["0.0.0.0", "::"], PORT, rate=UNLIMITED, burst=UNLIMITED).run()

    logger.remove()
    asyncio.run(run())


def prober_of(families: tuple[int, ...]) -> Prober:
    table: Table[str, NodeRecord] = Table("nodes", ("kvstore",))
    for number in range(NODES):
        name = f"node-{number:05}"
        ips = (NodeAddress("InternalIP", str(FIRST[family] + number)) for family in families)
        table.source("kvstore").upsert(f"default/{name}", NodeRecord(name, "default", tuple(ips)))
    own = [str(FIRST[family]) for family in families]
    made = Prober(table, "default/node-00000", own, port=PORT, base=BASE_S)
    made.schedule.join(table.keys(), time.monotonic())
    return made


async def rounds(prober: Prober, server: int, label: str) -> None:
    asking, answering, both = [], [], []
    for _ in range(ROUNDS):
        before, others = time.process_time(), cpu_seconds(server)
        await prober.probe_all()
        asking.append((time.process_time() - before) / NODES * 1000)
        answering.append((cpu_seconds(server) - others) / NODES * 1000)
        both.append((asking[-1] + answering[-1]) / 1000 * NODES / prober.schedule.period * 100)
    reachable = summary(prober, HealthServer("", [], PORT)).reachable
    assert reachable == NODES, f"{reachable} of {NODES} were reached"
    emit_median(f"health_10k_{label}ask_ms", asking, "ms")
    emit_median(f"health_10k_{label}answer_ms", answering, "ms")
    emit_median(f"health_10k_{label}cpu_percent", both, "%")


def timed(name: str, work: Callable[[], object]) -> None:
    samples = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        samples.append((time.perf_counter() - began) * 1000)
    emit_median(name, samples, "ms")


def resident_kb() -> int:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def main() -> None:
    """Print the figures."""
    load()
    with inside_new_netns() as netns:
        for route in ("-4 route add local 10.128.0.0/16 dev lo", "-6 route add local fd77::/64 dev lo"):
            netns.run("ip", *route.split())
        server = multiprocessing.get_context("fork").Process(target=serve)
        server.start()
        try:
            assert server.pid is not None
            time.sleep(1)
            four = prober_of((4,))
            before = resident_kb()
            asyncio.run(rounds(four, server.pid, ""))
            emit("health_10k_rss_kb_each", (resident_kb() - before) / NODES, "kB", 1)
            note(
                f"a period is {four.schedule.period:.0f} s, {NODES / four.schedule.period:.1f} nodes a second"
            )
            timed("health_10k_show_ms", lambda: json_response(health(four)))
            timed("health_10k_status_ms", lambda: summary(four, HealthServer("", [], PORT)))
            timed("health_10k_scrape_ms", lambda: list(HealthCollector(four).collect()))
            both = prober_of((4, 6))
            both.icmp = {family: granted(family) for family in (4, 6)}
            asyncio.run(rounds(both, server.pid, "all_"))
        finally:
            server.terminate()
            server.join()


if __name__ == "__main__":
    main()
