# SPDX-License-Identifier: Apache-2.0
"""From `docker start` until a waiting peer connects under policy.

connect_ready_p99_ms
    The peer is on another host, by the tunnel; what it lacks at first is the new container's identity.
connect_ready_same_host_p99_ms
    It is on the same host.
connect_ready_bridge_p99_ms
    The same on docker's own bridge network, for comparison.

Fifty starts of each kind by turns, in one engine.  The clock begins when the request to start goes out and
ends when the peer's connection is established; it tries every few milliseconds.  The address is known before:
the pool's next one, or a fixed one on the bridge, where the neighbour knows the MAC too, so that docker's
figure holds no wait for ARP.
"""

from __future__ import annotations

import http.client
import math
import socket
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from bench.harness import emit, load, note
from tests.support.agent import AgentHost
from tests.support.engine import WORKLOAD_IMAGE
from tests.support.fleet import Fleet, new_fleet
from tests.support.host import wait_for
from tests.support.netns import Netns
from tests.support.places import opened

STARTS = 50
PORT = 8000
TRY_S = 0.005
LIMIT_S = 20.0
BRIDGE = "plain"
BRIDGE_SUBNET = "10.60.0.0/24"
BRIDGE_ADDRESS, BRIDGE_MAC = "10.60.0.9", "02:42:0a:3c:00:09"
LISTEN = ("socat", "-u", f"TCP-LISTEN:{PORT},fork,reuseaddr", "/dev/null")
POLICY = """
- endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "8000", protocol: TCP}]}]
"""


class EngineSocket(http.client.HTTPConnection):
    """The engine's API without a process in between."""

    def __init__(self, path: Path) -> None:
        super().__init__("docker")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))

    def start(self, container: str) -> None:
        """Start a container; returns when the engine says that it runs."""
        self.request("POST", f"/containers/{container}/start")
        answer = self.getresponse()
        body = answer.read()
        assert answer.status == 204, body


@dataclass(frozen=True)
class Neighbour:
    """A running container that connects to new ones."""

    netns: Netns

    def connected(self, address: str) -> float:
        """Return the time at which a connection to a container that does not exist yet came about."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            with self.netns.socket(socket.SOCK_STREAM) as attempt:
                attempt.settimeout(TRY_S)
                try:
                    attempt.connect((address, PORT))
                except OSError:
                    time.sleep(TRY_S / 5)
                    continue
                return time.monotonic()
        raise TimeoutError(f"no connection to {address} within {LIMIT_S:g} s")


def neighbour(host: AgentHost, name: str, *options: str) -> Neighbour:
    """Run a container that waits for others."""
    host.engine.docker("run", "-d", "--init", "--name", name, *options, WORKLOAD_IMAGE, "sleep", "infinity")
    state = host.engine.inspect(name)["State"]
    assert isinstance(state, dict)
    return Neighbour(opened(Path(f"/proc/{host.pid}/root/proc/{state['Pid']}/ns/net")))


def start(host: AgentHost, waiting: Neighbour, address: str, *options: str) -> float:
    """Create a container, start it, remove it; return the ms until the neighbour had connected."""
    engine = host.engine
    created = engine.docker("create", "--init", *options, "-l", "app=web", WORKLOAD_IMAGE, *LISTEN)
    container = created.stdout.strip()
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(waiting.connected, address)
        begun = time.monotonic()
        EngineSocket(engine.socket).start(container)
        took = (met.result() - begun) * 1000
    engine.docker("rm", "-f", container)
    return took


def p99(samples: Sequence[float]) -> float:
    """Return the value that 99 of 100 do not exceed."""
    return sorted(samples)[math.ceil(0.99 * len(samples)) - 1]


def measure(fleet: Fleet) -> dict[str, list[float]]:
    """Return the ms of all starts by figure; the first of each is not counted."""
    host, other = fleet.hosts
    host.engine.docker("network", "create", "--subnet", BRIDGE_SUBNET, BRIDGE)
    ours = neighbour(host, "client", "--network", "holdfast", "-l", "app=client")
    afar = neighbour(other, "client", "--network", "holdfast", "-l", "app=client")
    theirs = neighbour(host, "plain-client", "--network", BRIDGE)
    theirs.netns.run(
        *("ip", "neigh", "replace", BRIDGE_ADDRESS, "lladdr", BRIDGE_MAC, "dev", "eth0", "nud", "permanent")
    )
    last = host.endpoint_of("client")["status"]["networking"]["addressing"][0]["ipv4"]
    taken: dict[str, list[float]] = {"": [], "_same_host": [], "_bridge": []}
    for _ in range(STARTS + 1):
        for figure, waiting in (("", afar), ("_same_host", ours)):
            last = str(IPv4Address(last) + 1)
            taken[figure].append(start(host, waiting, last, "--network", "holdfast"))
        on_bridge = ("--network", BRIDGE, "--ip", BRIDGE_ADDRESS)
        taken["_bridge"].append(start(host, theirs, BRIDGE_ADDRESS, *on_bridge))
    return {figure: each[1:] for figure, each in taken.items()}


def main() -> None:
    """Print the figures."""
    with new_fleet(2) as fleet:
        for host in fleet.hosts:
            (host.policies / "rules.yaml").write_text(POLICY)
        fleet.start(debug="false")
        for host in fleet.hosts:
            wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 1, "policy in force")  # noqa: B023
        load()
        taken = measure(fleet)
    bridge = p99(taken["_bridge"])
    for figure, samples in taken.items():
        emit(f"connect_ready{figure}_p99_ms", p99(samples), "ms", len(samples))
        beyond = f", {p99(samples) - bridge:.0f} beyond the bridge" if figure != "_bridge" else ""
        note(f"connect_ready{figure}: median {statistics.median(samples):.0f} ms{beyond}")


if __name__ == "__main__":
    main()
