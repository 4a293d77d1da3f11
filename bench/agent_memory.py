# SPDX-License-Identifier: Apache-2.0
"""`agent_idle_rss_mb`: VmRSS of a running agent with no endpoints and an empty store, 30 s after in sync."""

from __future__ import annotations

import time

from bench.harness import emit_median
from tests.support.agent import AgentHost
from tests.support.host import Hub

RUNS = 3
SETTLE_S = 30.0


def resident_mb(pid: int) -> float:
    """Return VmRSS of a process in MB (10⁶ bytes are 976.56 kB)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        line = next(each for each in status if each.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    """Print the figure."""
    samples = []
    with Hub() as hub, AgentHost("hfbench") as host:
        host.address = hub.join(host)
        host.start_etcd()
        for _ in range(RUNS):
            agent = host.start_agent(debug="false")
            time.sleep(SETTLE_S)
            samples.append(resident_mb(agent.pid))
            host.stop_agent()
    emit_median("agent_idle_rss_mb", samples, "MB")


if __name__ == "__main__":
    main()
