# SPDX-License-Identifier: Apache-2.0
"""500 endpoints on one host, through the agent's API, eight at a time; what they take, and that they obey.

endpoints_500_start_s
    First request → last answer; an endpoint's answer means that its programs and policy are in the kernel.
endpoints_500_agent_rss_mb, endpoints_500_agent_rss_kb_each
    VmRSS of the agent ten seconds later; what it grew by, for each endpoint.
endpoints_500_agent_cpu_ms_each
    The agent's CPU time for an endpoint, system time included.
endpoints_500_maps_mb, endpoints_500_policy_map_kb_each
    Kernel memory of all pinned maps, and of an endpoint's own, as the kernel accounts it.
endpoint_list_500_s
    All of `holdfast endpoint list`, interpreter included.

Network namespaces stand for containers (`containers_500` has those, and an engine takes longer than the
agent).  They are a ring of 50 applications (bench.ring): every endpoint has an identity of its own, the
entries of every policy map are compared with what labels and rules say, and real connections are tried,
allowed and denied.  Of one start there is one sample; the list is run five times.

Run: python -m bench.endpoints_500
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.harness import emit, load, note
from bench.ring import AgentUse, Member, Ring, api, list_s
from tests.support.agent import AgentHost
from tests.support.host import Hub

ENDPOINTS, AT_ONCE = 500, 8
FIRST = 1000  # endpoint number
SETTLE_S = 10.0
LISTS = 5
RING = Ring(ENDPOINTS)


def start(host: AgentHost, number: int) -> Member:
    body = {
        "netns": f"/run/netns/e{number}",
        "labels": [f"{key}={value}" for key, value in RING.labels(number).items()],
        "name": f"e{number}",
    }
    shown = api(host).request("PUT", f"/v1/endpoint/{number}", body)
    return Member.of(shown, number, Path(f"/proc/{host.pid}/root/run/netns/e{number}"))


def start_all(host: AgentHost) -> list[Member]:
    """Start all; note how long the first and the last hundred took, which should not differ."""
    ready: list[float] = [time.monotonic()]

    def one(number: int) -> Member:
        made = start(host, number)
        ready.append(time.monotonic())
        return made

    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(one, range(FIRST, FIRST + ENDPOINTS)))
    note(f"the first hundred took {ready[100] - ready[0]:.1f} s, the last {ready[-1] - ready[-101]:.1f} s")
    return made


def measure(host: AgentHost) -> None:
    host.exec("sh", "-c", f"for n in $(seq {FIRST} {FIRST + ENDPOINTS - 1}); do ip netns add e$n; done")
    (host.policies / "ring.json").write_text(RING.rules())
    agent = host.start_agent(debug="false")
    use, began = AgentUse(agent.pid), time.monotonic()
    members = start_all(host)
    taken, used = time.monotonic() - began, use.cpu_ms()
    time.sleep(SETTLE_S)
    emit("endpoints_500_start_s", taken, "s", 1)
    use.emit_rss("endpoints_500", ENDPOINTS)
    emit("endpoints_500_agent_cpu_ms_each", used / ENDPOINTS, "ms", 1)
    maps = api(host).get("map")
    own = [each["memory"] for each in maps if each["name"].startswith("cilium_policy_")]
    emit("endpoints_500_maps_mb", sum(each["memory"] for each in maps) / 1e6, "MB", len(maps))
    emit("endpoints_500_policy_map_kb_each", statistics.mean(own) / 1e3, "kB", len(own))
    samples = [list_s(host, ENDPOINTS) for _ in range(LISTS)]
    emit("endpoint_list_500_s", statistics.median(samples), "s", LISTS)
    note(f"{RING.check_maps(host, members)} entries in {len(own)} policy maps, all as labels and rules say")
    note(f"{RING.check_flows(members)} connections allowed and as many denied")
    note(f"agent idle afterwards: {use.idle_share(SETTLE_S):.2%} of a CPU")


def main() -> None:
    """Print the figures."""
    load()
    with Hub() as hub, AgentHost("hfb5") as host:
        host.address = hub.join(host)
        host.start_etcd()
        measure(host)


if __name__ == "__main__":
    main()
