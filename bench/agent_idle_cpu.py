# SPDX-License-Identifier: Apache-2.0
"""`agent_idle_cpu_percent`: CPU of an agent with which nothing happens, its child processes included.

Three endpoints, etcd and engine present, 15 s after the last change; 100 is one core.
"""

from __future__ import annotations

import os
import time

from bench.harness import emit_median
from tests.support.agent import AgentHost
from tests.support.host import Hub

RUNS = 3
SETTLE_S = 15.0
LOOK_S = 20.0  # longer than everything that the agent does at intervals, but for its look at the firewall
ENDPOINTS = 3


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended: fields 14 to 17 of its stat."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return sum(int(each) for each in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print the figure."""
    samples = []
    with Hub() as hub, AgentHost("hfbench") as host:
        host.address = hub.join(host)
        host.start_etcd()
        agent = host.start_agent(debug="false")
        host.network()
        for number in range(ENDPOINTS):
            host.container(f"idle{number}", "sleep", "infinity", labels={"app": "idle"})
        time.sleep(SETTLE_S)
        for _ in range(RUNS):
            before, begun = cpu_seconds(agent.pid), time.monotonic()
            time.sleep(LOOK_S)
            samples.append(100 * (cpu_seconds(agent.pid) - before) / (time.monotonic() - begun))
    emit_median("agent_idle_cpu_percent", samples, "%")


if __name__ == "__main__":
    main()
