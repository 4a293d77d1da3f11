# SPDX-License-Identifier: Apache-2.0
"""A host boots after a power cut, and its slot is 50 minutes away; etcd is there and must not be asked.

reboot_running_s
    Engine and agent are started → all containers run again, and one reaches the other as policy allows.

The cut is made as hard as one machine allows: engine, agent and every process of the containers are killed,
and what the kernel held of ours (pinned maps, interfaces) is deleted.  A container without a right to the
other is tried as well, and gets nowhere.

Run: python -m bench.reboot
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench import harness
from kvstore import schema
from prestart import handover
from prestart.handover import boot_time
from tests.support.agent import ETCD_PORT, AgentHost
from tests.support.host import Hub, wait_for
from tests.support.saved import Saved
from tests.support.stream import POLICY

ROUNDS = 3
SLOT_S = 50 * 60.0
CONTAINERS = ("server", "client", "stranger")
# Before our devices' names: of endpoints, of the tunnel, of the host's own end.
OURS = ("lxc", "cilium_", "holdfast")


def inspected(host: AgentHost, name: str) -> dict[str, Any]:
    return dict(host.engine.inspect(name))


def running(host: AgentHost) -> bool:
    return all(inspected(host, name)["State"]["Running"] for name in CONTAINERS)


def reaches(host: AgentHost, name: str) -> bool:
    address = inspected(host, "server")["NetworkSettings"]["Networks"]["holdfast"]["IPAddress"]
    return bool(address) and host.inside(name, "ping", "-c1", "-W1", address, check=False).returncode == 0


def cut_power(host: AgentHost) -> None:
    """Have nothing of all that is alive or in the kernel; the disk stays."""
    pids = [str(inspected(host, name)["State"]["Pid"]) for name in CONTAINERS]
    host.kill_agent()
    host.engine.kill()
    host.exec("kill", "-9", *pids)
    host.exec("find", "/sys/fs/bpf/tc", "-type", "f", "-delete")
    links = [each["ifname"] for each in json.loads(host.exec("ip", "-j", "link", "show").stdout)]
    for name in links:
        if name.startswith(OURS):
            host.exec("ip", "link", "delete", name, check=False)  # it went with its other end


def boots(host: AgentHost) -> float:
    """Return the seconds from the start of engine and agent until containers reach each other."""
    now = boot_time()
    slot = {handover.CONNECT: str(time.time() + SLOT_S), handover.CONNECT_BOOT: str(now + SLOT_S)}
    host.handed_over = slot | {handover.KIND: "resume"}
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(host.engine.start)
        host.launch_agent()
        engine.result()
    wait_for(lambda: running(host), "containers that run", seconds=120)
    wait_for(lambda: reaches(host, "client"), "answer of the server", seconds=120)
    seconds = time.perf_counter() - began
    if reaches(host, "stranger"):
        raise RuntimeError("what is denied has passed")
    asked = host.exec("ss", "-Htnp", "state", "established", "dport", "=", f":{ETCD_PORT}").stdout
    if "python" in asked:
        raise RuntimeError(f"etcd was asked before the slot: {asked}")
    return seconds


def main() -> None:
    """Print the figure."""
    harness.load()
    with Hub() as hub, AgentHost("hfr") as host:
        host.address = hub.join(host)
        host.start_etcd()
        host.etcdctl("put", f"{schema.POLICIES}server", stdin=POLICY)
        host.start_agent()
        host.network()
        for name in CONTAINERS:
            host.container(name, "sleep", "infinity", labels={"app": name}, options=("--restart", "always"))
        wait_for(lambda: reaches(host, "client"), "answer of the server")
        saved = Saved(host.state)
        wait_for(lambda: len(saved.keys("identities")) >= len(CONTAINERS), "checkpoint", seconds=60)
        samples = []
        for _ in range(ROUNDS):
            cut_power(host)
            samples.append(boots(host))
        harness.emit_median("reboot_running_s", samples, "s")


if __name__ == "__main__":
    main()
