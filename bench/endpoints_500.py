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

Network namespaces stand for containers: an engine takes longer than the agent.  Every endpoint has an
identity of its own; there are 50 applications in a ring, each may speak to the next on one port, both
directions are enforced.  The entries of every policy map are compared with what labels and rules say, and
real connections are tried, allowed and denied.  Of one start there is one sample; the list is run five times.

Run: python -m bench.endpoints_500
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.agent_memory import resident_mb
from bench.harness import emit, load, note
from cli.client import UnixConnection
from tests.support.agent import AgentHost
from tests.support.host import Hub
from tests.support.netns import Netns
from tests.support.places import opened

ENDPOINTS, AT_ONCE, APPS = 500, 8, 50
FIRST = 1000  # endpoint number
PORT = 8000
SETTLE_S = 10.0
FLOWS = 20
LIMIT_S, DENIED_S = 5.0, 0.3
LISTS = 5
INGRESS, EGRESS = 0, 1


@dataclass(frozen=True)
class Started:
    """One endpoint as the agent answered."""

    number: int
    identity: int
    address: str

    @property
    def app(self) -> int:
        return app_of(self.number)


def app_of(number: int) -> int:
    return number % APPS


def rules() -> str:
    """Each application may be spoken to by the one before it, and speak to the one behind it."""

    def peers(app: int) -> list[dict[str, Any]]:
        return [{"matchLabels": {"app": f"app-{app % APPS}"}}]

    port = [{"ports": [{"port": str(PORT), "protocol": "TCP"}]}]
    return json.dumps(
        [
            {
                "endpointSelector": {"matchLabels": {"app": f"app-{app}"}},
                "ingress": [{"fromEndpoints": peers(app - 1), "toPorts": port}],
                "egress": [{"toEndpoints": peers(app + 1), "toPorts": port}],
            }
            for app in range(APPS)
        ]
    )


def call(host: AgentHost, method: str, path: str, body: Any = None) -> Any:
    """Ask the agent's API; SystemExit with its words when it refuses."""
    connection = UnixConnection(host.socket, timeout=120)
    try:
        connection.request(method, path, body=None if body is None else json.dumps(body))
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status >= 300:
        raise SystemExit(f"{method} {path}: {answer.status} {text.decode()}")
    return json.loads(text)


def start(host: AgentHost, number: int) -> Started:
    body = {
        "netns": f"/run/netns/e{number}",
        "labels": [f"app=app-{app_of(number)}", f"copy={number}"],
        "name": f"e{number}",
    }
    status = call(host, "PUT", f"/v1/endpoint/{number}", body)["status"]
    if status["state"] != "ready":
        raise SystemExit(f"endpoint {number} is {status['state']}")
    return Started(number, status["identity"]["id"], status["networking"]["addressing"][0]["ipv4"])


def start_all(host: AgentHost) -> list[Started]:
    """Start all; note how long the first and the last hundred took, which should not differ."""
    ready: list[float] = [time.monotonic()]

    def one(number: int) -> Started:
        made = start(host, number)
        ready.append(time.monotonic())
        return made

    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(one, range(FIRST, FIRST + ENDPOINTS)))
    note(f"the first hundred took {ready[100] - ready[0]:.1f} s, the last {ready[-1] - ready[-101]:.1f} s")
    return made


def check_maps(host: AgentHost, started: list[Started]) -> int:
    """Compare every policy map with labels and rules; return the number of entries."""
    of_app: dict[int, set[int]] = {}
    for each in started:
        of_app.setdefault(each.app, set()).add(each.identity)
    checked = 0
    for each in started:
        dump = call(host, "GET", f"/v1/map/cilium_policy_{each.number:05d}")
        found = {entry["key"] for entry in dump["entries"] if "identity=1 " not in entry["key"]}
        expected = {
            f"identity={peer} dport={PORT} protocol=6 direction={direction}"
            for direction, app in ((INGRESS, each.app - 1), (EGRESS, each.app + 1))
            for peer in of_app[app % APPS]
        }
        if found != expected:
            raise SystemExit(f"endpoint {each.number}: {sorted(found)[:3]} …, not {sorted(expected)[:3]} …")
        checked += len(found)
    return checked


def namespace(host: AgentHost, endpoint: Started) -> Netns:
    return opened(Path(f"/proc/{host.pid}/root/run/netns/e{endpoint.number}"))


def connects(host: AgentHost, client: Started, server: Started, limit: float) -> bool:
    """Tell whether a connection comes about within `limit` seconds."""
    with (
        namespace(host, server).socket(socket.SOCK_STREAM) as listening,
        namespace(host, client).socket(socket.SOCK_STREAM) as calling,
    ):
        listening.bind((server.address, PORT))
        listening.listen()
        calling.settimeout(limit)
        try:
            calling.connect((server.address, PORT))
        except TimeoutError:
            return False
        return True


def check_flows(host: AgentHost, started: list[Started]) -> None:
    """Each of a sample may speak to the next application, and to none other."""
    step = ENDPOINTS // FLOWS
    for client in started[::step]:
        right = next(each for each in started if each.app == (client.app + 1) % APPS)
        wrong = next(each for each in started if each.app == (client.app + 2) % APPS)
        if not connects(host, client, right, LIMIT_S):
            raise SystemExit(f"endpoint {client.number} does not reach {right.number}, which policy allows")
        if connects(host, client, wrong, DENIED_S):
            raise SystemExit(f"endpoint {client.number} reaches {wrong.number}, which policy denies")


def cpu_s(pid: int) -> float:
    """Return the seconds of CPU that a process has used, its own and the kernel's for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def list_s(host: AgentHost) -> float:
    """Return the seconds of `holdfast endpoint list`; SystemExit when an endpoint is not in it."""
    command = [str(Path(sys.executable).with_name("holdfast")), "-H", str(host.socket), "endpoint", "list"]
    began = time.monotonic()
    done = host.exec(*command, environment={"COLUMNS": "200"})
    taken = time.monotonic() - began
    if sum(line.rstrip().endswith("ready") for line in done.stdout.splitlines()) != ENDPOINTS:
        raise SystemExit(f"endpoint list does not show {ENDPOINTS} ready: {done.stdout[:2000]}")
    return taken


def measure(host: AgentHost) -> None:
    host.exec("sh", "-c", f"for n in $(seq {FIRST} {FIRST + ENDPOINTS - 1}); do ip netns add e$n; done")
    (host.policies / "ring.json").write_text(rules())
    agent = host.start_agent(debug="false")
    rss, cpu, began = resident_mb(agent.pid), cpu_s(agent.pid), time.monotonic()
    started = start_all(host)
    taken = time.monotonic() - began
    used = cpu_s(agent.pid) - cpu
    time.sleep(SETTLE_S)
    grown = resident_mb(agent.pid)
    emit("endpoints_500_start_s", taken, "s", 1)
    emit("endpoints_500_agent_rss_mb", grown, "MB", 1)
    emit("endpoints_500_agent_rss_kb_each", (grown - rss) * 1e3 / ENDPOINTS, "kB", 1)
    emit("endpoints_500_agent_cpu_ms_each", used * 1e3 / ENDPOINTS, "ms", 1)
    maps = call(host, "GET", "/v1/map")
    own = [each["memory"] for each in maps if each["name"].startswith("cilium_policy_")]
    emit("endpoints_500_maps_mb", sum(each["memory"] for each in maps) / 1e6, "MB", len(maps))
    emit("endpoints_500_policy_map_kb_each", statistics.mean(own) / 1e3, "kB", len(own))
    samples = [list_s(host) for _ in range(LISTS)]
    emit("endpoint_list_500_s", statistics.median(samples), "s", LISTS)
    note(f"{check_maps(host, started)} entries in {len(own)} policy maps, all as labels and rules say")
    check_flows(host, started)
    note(f"{FLOWS} connections allowed and {FLOWS} denied")
    idle = cpu_s(agent.pid)
    time.sleep(SETTLE_S)
    note(f"agent idle afterwards: {(cpu_s(agent.pid) - idle) / SETTLE_S:.2%} of a CPU")


def main() -> None:
    """Print the figures."""
    load()
    with Hub() as hub, AgentHost("hfb5") as host:
        host.address = hub.join(host)
        host.start_etcd()
        measure(host)


if __name__ == "__main__":
    main()
