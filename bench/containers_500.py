# SPDX-License-Identifier: Apache-2.0
"""500 containers of a real engine on one host, started and stopped as fast as the engine can.

containers_500_start_s, containers_500_bridge_start_s
    First request to start → last answer, on our network and on docker's own bridge network.  On ours an
    answer means that policy is in the kernel.
containers_500_cpu_ms_each, containers_500_bridge_cpu_ms_each
    CPU time of all processes of the host for a start: engine, shims, etcd, and the agent on ours.
containers_500_stop_s, containers_500_bridge_stop_s
    First request to stop → last answer, and on ours until the agent has nothing left of them.
containers_500_agent_rss_mb, containers_500_agent_rss_kb_each
    VmRSS of the agent ten seconds after the start; what it grew by, for each container.
containers_500_agent_cpu_ms_each
    The agent's CPU time for a container until the last answer, system time included.

The containers are made before; a request goes to the engine's socket, four at a time (with two at a time and
with eight an engine on two CPUs is no faster).  Their process sleeps.  The bridge comes first, when no agent
runs yet.  They are the ring of bench.ring, with its checks.  Everything that an agent changes on a host is
compared with what it was before the first container.

Run: python -m bench.containers_500 [CONTAINERS [AT_ONCE]]
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.harness import emit, load, note
from bench.ring import ANSWER_S, AgentUse, Member, Ring, api, cpu_s
from cli.client import HttpClient
from tests.support.agent import AgentHost
from tests.support.engine import WORKLOAD_IMAGE
from tests.support.host import Hub, wait_for
from tests.support.snapshot import differences, taken

CONTAINERS, AT_ONCE = 500, 4
WARM = 8
BRIDGE, BRIDGE_SUBNET = "plain", "10.60.0.0/16"
SETTLE_S = 10.0
GONE_S = 60.0
OF_THE_ENGINE = ("dockerd", "containerd-shim", "containerd")
NODE_KEYS = ("cilium/state/ip/", "cilium/state/identities/v1/value/")
ENDPOINT_MAPS = ("cilium_lxc", "cilium_ipcache")


@dataclass(frozen=True)
class Fleet:
    """Containers that are made, started, stopped and removed together."""

    engine: HttpClient
    ring: Ring
    network: str
    at_once: int

    def make(self) -> None:
        self._each(self._create)

    def start(self) -> float:
        """Start all and return the seconds; note how long the first and the last fifth took."""
        began = time.monotonic()
        answered = self._each(lambda copy: self._post(copy, "start"))
        fifth = len(answered) // 5
        note(
            f"{self.network}: started in {answered[-1] - began:.1f} s, the first fifth in "
            f"{answered[fifth - 1] - began:.1f}, the last in {answered[-1] - answered[-fifth - 1]:.1f}"
        )
        return answered[-1] - began

    def stop(self) -> float:
        """Stop all and return the seconds."""
        began = time.monotonic()
        return self._each(lambda copy: self._post(copy, "stop"))[-1] - began

    def remove(self) -> None:
        self._each(lambda copy: self.engine.request("DELETE", f"/containers/{name_of(copy)}?force=1"))

    def _create(self, copy: int) -> None:
        body = {
            "Image": WORKLOAD_IMAGE,
            "Cmd": ["sleep", "infinity"],
            "StopSignal": "SIGKILL",  # the first process of a namespace does not hear the polite one
            "Labels": self.ring.labels(copy),
            "HostConfig": {"NetworkMode": self.network},
        }
        self.engine.request("POST", f"/containers/create?name={name_of(copy)}", body)

    def _post(self, copy: int, verb: str) -> None:
        self.engine.request("POST", f"/containers/{name_of(copy)}/{verb}")

    def _each(self, do: Callable[[int], object]) -> list[float]:
        """Do something with each container; return when each was done, in order of time."""
        done: list[float] = []

        def one(copy: int) -> None:
            do(copy)
            done.append(time.monotonic())

        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(one, range(self.ring.size)))
        return done


def name_of(copy: int) -> str:
    return f"c{copy}"


def members(host: AgentHost, fleet: Fleet) -> list[Member]:
    """Return the containers as the agent and the engine have them; SystemExit unless all are enforced."""
    shown = {
        each["status"]["external-identifiers"]["container-name"]: each for each in api(host).get("endpoint")
    }
    found = []
    for copy in range(fleet.ring.size):
        state = fleet.engine.request("GET", f"/containers/{name_of(copy)}/json")["State"]
        netns = Path(f"/proc/{host.pid}/root/proc/{state['Pid']}/ns/net")
        found.append(Member.of(shown[name_of(copy)], copy, netns))
    return found


def processes(host: AgentHost) -> Iterator[Path]:
    """Yield the directories in /proc of all processes of the host."""
    return Path(f"/proc/{host.pid}/root/proc").glob("[0-9]*")


def host_cpu_s(host: AgentHost) -> float:
    """Return the CPU time of the host's processes, and of those that have ended under them."""
    spent = 0.0
    for process in processes(host):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            spent += cpu_s(process, children=True)
    return spent


def emit_start(host: AgentHost, fleet: Fleet, prefix: str) -> None:
    """Start a fleet and print how long it took, and how much CPU."""
    before = host_cpu_s(host)
    emit(f"{prefix}_start_s", fleet.start(), "s", 1)
    emit(f"{prefix}_cpu_ms_each", (host_cpu_s(host) - before) * 1e3 / fleet.ring.size, "ms", 1)


def note_engine_memory(host: AgentHost) -> None:
    """Print what the engine's own processes hold, shared pages divided among those who share them."""
    held: Counter[str] = Counter()
    for process in processes(host):
        name = Path((process / "cmdline").read_bytes().partition(b"\0")[0].decode()).name
        kind = next((each for each in OF_THE_ENGINE if name.startswith(each)), "")
        if kind:
            lines = (process / "smaps_rollup").read_text().splitlines()
            held[kind] += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    note("engine: " + ", ".join(f"{kind} {kb * 1024 / 1e6:.0f} MB" for kind, kb in held.items()))


def traces(host: AgentHost) -> dict[str, str]:
    """Return everything that stands for an endpoint somewhere, name → lines in no order of time."""
    found = {name: "\n".join(sorted(text.splitlines())) for name, text in taken(host).items()}
    found["endpoints"] = "\n".join(str(each["id"]) for each in api(host).get("endpoint"))
    found["checkpoint"] = "\n".join(each.name for each in (host.state / "endpoints").iterdir())
    for prefix in NODE_KEYS:
        found[f"etcd {prefix}"] = "\n".join(host.keys(prefix))
    for name in ENDPOINT_MAPS:
        found[f"map {name}"] = "\n".join(each["key"] for each in api(host).get("map", name)["entries"])
    return found


def wait_until_gone(host: AgentHost, before: dict[str, str]) -> None:
    """Return once nothing is left of the endpoints; SystemExit with what is after `GONE_S`."""
    deadline = time.monotonic() + GONE_S
    while left := differences(before, traces(host)):
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(left)} traces are left after {GONE_S:g} s: {left[:20]}")
        time.sleep(1)


def measure_bridge(host: AgentHost, fleet: Fleet) -> None:
    """Start and stop all on docker's own network, after a few that warm the engine."""
    first = Fleet(fleet.engine, Ring(WARM), fleet.network, fleet.at_once)
    first.make()
    first.start()
    first.remove()
    fleet.make()
    emit_start(host, fleet, "containers_500_bridge")
    emit("containers_500_bridge_stop_s", fleet.stop(), "s", 1)
    fleet.remove()


def measure(host: AgentHost, fleet: Fleet) -> None:
    """Start all on our network, check them, stop them and look for what is left."""
    (host.policies / "ring.json").write_text(fleet.ring.rules())
    agent = host.start_agent(debug="false", labels="container:copy$")
    host.network()
    before = traces(host)
    fleet.make()
    use = AgentUse(agent.pid)
    emit_start(host, fleet, "containers_500")
    used = use.cpu_ms()
    started = members(host, fleet)
    note(f"all {len(started)} ready when the last was answered")
    time.sleep(SETTLE_S)
    use.emit_rss("containers_500", fleet.ring.size)
    emit("containers_500_agent_cpu_ms_each", used / fleet.ring.size, "ms", 1)
    note_engine_memory(host)
    note(f"{fleet.ring.check_maps(host, started)} entries in {len(started)} policy maps, all as rules say")
    note(f"{fleet.ring.check_flows(started)} connections allowed and as many denied")
    note(f"agent idle: {use.idle_share(SETTLE_S):.2%} of a CPU")
    check_stop(host, fleet, before)


def check_stop(host: AgentHost, fleet: Fleet, before: dict[str, str]) -> None:
    """Stop all; SystemExit when something is left of them."""
    began = time.monotonic()
    note(f"{fleet.network}: stopped in {fleet.stop():.1f} s")
    wait_for(lambda: not api(host).get("endpoint"), "empty table of endpoints", seconds=GONE_S)
    emit("containers_500_stop_s", time.monotonic() - began, "s", 1)
    wait_until_gone(host, before)
    note(f"nothing is left of them {time.monotonic() - began:.1f} s after the first request to stop")
    fleet.remove()


def main(arguments: Sequence[str]) -> None:
    """Print the figures."""
    size, at_once = [*map(int, arguments), *(CONTAINERS, AT_ONCE)[len(arguments) :]]
    load()
    with Hub() as hub, AgentHost("hfb5c") as host:
        host.address = hub.join(host)
        host.start_etcd()
        engine = HttpClient(host.engine.socket, name="the engine", hint="", timeout=ANSWER_S)
        host.engine.docker("network", "create", "--subnet", BRIDGE_SUBNET, BRIDGE)
        measure_bridge(host, Fleet(engine, Ring(size), BRIDGE, at_once))
        measure(host, Fleet(engine, Ring(size), "holdfast", at_once))


if __name__ == "__main__":
    main(sys.argv[1:])
