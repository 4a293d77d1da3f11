# SPDX-License-Identifier: Apache-2.0
"""The state of a large fleet into one agent: at its start, and as it changes.

sync100k_start_s, sync300k_start_s
    exec of the agent → last entry in cilium_ipcache: 100 000 ip entries, 5 000 identities, 1 000 nodes;
    300 000, 64 000 and 10 000.
sync100k_map_s, sync300k_map_s
    First → last of the ip entries readable in the map.
sync100k_rss_mb, sync300k_rss_mb, sync100k_cpu_s, sync300k_cpu_s
    VmHWM, and CPU with children, 6 s after the last entry.
sync300k_longest_pause_ms
    The longest time for which the agent's loop ran without looking at its sockets, as its metric says.
sync300k_restart_…
    The same agent killed and started again: it reads the pinned map, and lists once more.
update20k_s, update20k_cpu_s, update20k_vs_bare
    20 000 of the 100 000 entries rewritten in transactions of 500, 4 in flight: first write → all in the
    map; and against a client that only counts events, on keys that the agent does not follow, in turns.
floor_list100k_s, floor_map100k_s
    The least there is to do: list the entries and drop them; write ready bytes into such a map.

Everything is real: etcd, the agent's process, its map.  That is read from outside every 4 ms, by the count
that the kernel accounts and by looking up a sample of keys; afterwards all of it is compared with what was
written.
The agent is one of many hosts, so another one holds the elected role; the hosts are not there to be probed.

Run: python -m bench.sync_state [100k] [300k]
"""

from __future__ import annotations

import compileall
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.agent_idle_cpu import cpu_seconds
from bench.fleet_state import Fleet
from bench.harness import emit_median, load, note
from bench.ring import api
from datapath import layouts
from datapath.errors import DatapathError
from datapath.maps import IpcacheMap
from datapath.mapspec import MapCatalogue, create
from kvstore import schema
from tests.support.agent import ETCD_PORT, AgentHost
from tests.support.host import REPO, Hub, Process, wait_for
from tests.support.saved import Saved

SMALL, LARGE = Fleet(100_000, 5_000, 1_000), Fleet(300_000, 64_000, 10_000)
RUNS, UPDATES = 3, 9
POLL_S, SETTLE_S, LIMIT_S = 0.004, 6.0, 120.0
SAMPLE = 64  # keys looked up until the first is there
STEP = 5  # every fifth address is rewritten
SAMPLED = 10  # and every tenth of these looked up
BARE_PREFIX = "bench/ip/v1/default/"
PAUSE_METRIC = "holdfast_loop_longest_pause_seconds"
PARTS = ("agent", "core", "datapath", "identity", "kvstore", "policy", "prestart")
WRITER = ("-c", "from bench.fleet_state import main; main()")


class SyncHost(AgentHost):
    """A host without an engine, with an etcd that takes transactions of more than 128 operations."""

    def start_large_etcd(self) -> None:
        url = f"http://127.0.0.1:{ETCD_PORT}"
        self._etcd = self.popen(
            "etcd",
            *("--data-dir", str(self.directory / "etcd-data")),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync", "--logger", "zap"),
            *("--max-txn-ops", "1000", "--quota-backend-bytes", str(4 << 30)),
        )
        wait_for(self._etcd_answers, "etcd's answer")

    def writer(self, *arguments: object) -> Process:
        """Start a command of `fleet_state` in the host."""
        environment = {"PYTHONPATH": str(REPO)}
        return self.popen(sys.executable, *WRITER, *map(str, arguments), environment=environment)

    def written(self, process: Process) -> dict[str, float]:
        """Wait for a command's end and return what it said."""
        if process.wait(LIMIT_S):
            raise SystemExit(process.output()[-2000:])
        return said(process)

    @property
    def ipcache(self) -> Path:
        return Path(f"/proc/{self.pid}/root{self.bpffs}/tc/globals")

    def forget_agent(self) -> None:
        """Take what an agent left: its pins and its state."""
        self.exec("sh", "-c", f"rm -rf {self.bpffs}/tc/globals {self.state}/*")


def said(process: Process) -> dict[str, float]:
    """Return all that a command has said so far."""
    found: dict[str, float] = {}
    for line in process.output().splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    return found


class Seen:
    """cilium_ipcache from outside."""

    def __init__(self, root: Path) -> None:
        self.map = IpcacheMap.reader("cilium_ipcache", root)
        self._entry = entry_bytes()

    def count(self) -> int:
        """Return the number of entries by the memory that they are accounted for."""
        return self.map.handle.memory() // self._entry

    def has_any(self, wanted: Iterable[tuple[str, int]]) -> bool:
        """True if any of these addresses has its identity: a lookup finds 0.0.0.0/0 as well."""
        return any(self.identity(address) == number for address, number in wanted)

    def identity(self, address: str) -> int:
        entry = self.map.get(f"{address}/32")
        return 0 if entry is None else entry.identity

    def identities(self) -> dict[str, int]:
        return {prefix: entry.identity for prefix, entry in self.map.items()}


def scratch_map() -> IpcacheMap:
    """Return a map like cilium_ipcache that nobody else sees."""
    return IpcacheMap(create(MapCatalogue().ipcache))


def entry_bytes() -> int:
    """Return what one entry is accounted for."""
    scratch = scratch_map()
    try:
        scratch.handle.update(*packed("10.0.0.1", 1))
        return scratch.handle.memory()
    finally:
        scratch.close()


def packed(address: str, identity: int) -> tuple[bytes, bytes]:
    parts = bytes(map(int, address.split("."))) + bytes(12)
    key = layouts.IPCACHE_KEY.pack(64, 0, 0, 1, parts)
    return key, layouts.REMOTE_ENDPOINT_INFO.pack(identity, bytes(4), 0, b"\0\0\0")


def poll(condition: Callable[[], Any], what: str) -> float:
    """Return when `condition` held, looking every 4 ms."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} within {LIMIT_S:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic()


def started_at(pid: int) -> float:
    """Return when a process was made, on the monotonic clock (to 10 ms)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100)


@dataclass(frozen=True)
class Sync:
    """One start."""

    start_s: float
    map_s: float
    rss_mb: float
    cpu_s: float
    pause_ms: float


def start(host: SyncHost, fleet: Fleet, own: int) -> tuple[Process, Sync]:
    """Start the agent on an empty map; return when everything was there and what it took."""
    agent = launch(host)
    pin = host.ipcache / "cilium_ipcache"
    poll(pin.exists, "map")
    seen = Seen(host.ipcache)
    picked = range(0, fleet.addresses, fleet.addresses // SAMPLE)
    sample = [(fleet.address(index), fleet.identity(index)) for index in picked]
    first = poll(lambda: seen.has_any(sample), "first entry")
    wanted = fleet.addresses + 2 * fleet.nodes + own
    last = poll(lambda: seen.count() >= wanted, "last entry")
    began = started_at(agent.pid)
    time.sleep(SETTLE_S)
    verify(seen, fleet)
    return agent, Sync(last - began, last - first, peak_mb(agent.pid), cpu_seconds(agent.pid), pause_ms(host))


def launch(host: SyncHost) -> Process:
    return host.launch_agent(debug="false", docker_endpoint="", cluster_health_port="0")


def restart(host: SyncHost, fleet: Fleet) -> Sync:
    """Kill the agent and start it again over its own map and checkpoint; return what that took until all is
    in sync."""
    saved = Saved(host.state)
    poll(lambda: saved.revision("addresses") > 0, "checkpoint with every address")
    host.kill_agent()
    agent = launch(host)
    began = started_at(agent.pid)
    in_sync = poll(lambda: all_in_sync(host), "table in sync")
    time.sleep(SETTLE_S)
    verify(Seen(host.ipcache), fleet)
    return Sync(in_sync - began, 0.0, peak_mb(agent.pid), cpu_seconds(agent.pid), pause_ms(host))


def all_in_sync(host: SyncHost) -> bool:
    try:
        status = api(host).get("healthz")
    except Exception:  # noqa: BLE001 - not there yet
        time.sleep(0.05)
        return False
    time.sleep(0.1)  # an answer costs the agent more than a look at its map
    return bool(status["tables"]) and all(each["in-sync"] for each in status["tables"])


def verify(seen: Seen, fleet: Fleet, turn: int = 0) -> None:
    """Compare the whole map with what was written."""
    found = seen.identities()
    for index in range(fleet.addresses):
        wanted = fleet.identity(index, turn if index % STEP == 0 else 0)
        if found.get(f"{fleet.address(index)}/32") != wanted:
            raise SystemExit(f"{fleet.address(index)} has not the identity {wanted} in the map")


def peak_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def pause_ms(host: SyncHost) -> float:
    for line in api(host).text("/v1/metrics").splitlines():
        if line.startswith(PAUSE_METRIC):
            return float(line.split()[1]) * 1e3
    return float("nan")


@contextmanager
def filled(hub: Hub, fleet: Fleet) -> Iterator[tuple[SyncHost, int]]:
    """A host whose etcd holds the fleet, and how many entries an agent has of its own."""
    with SyncHost("hfsync") as host:
        host.address = hub.join(host)
        host.start_large_etcd()
        host.writer("lead")
        wait_for(lambda: bool(host.keys(schema.ELECTIONS)), "leader")
        own = own_entries(host)
        taken = host.written(host.writer("fill", fleet.addresses, fleet.identities, fleet.nodes))
        note(f"{fleet.addresses} addresses written in {taken['seconds']:.1f} s")
        yield host, own


def own_entries(host: SyncHost) -> int:
    """Return how many entries the map has with an empty etcd."""
    launch(host)
    poll(lambda: all_in_sync(host), "table in sync")
    time.sleep(1)
    count = Seen(host.ipcache).count()
    host.stop_agent()
    host.forget_agent()
    return count


def report(name: str, runs: Sequence[Sync]) -> None:
    emit_median(f"{name}_start_s", [each.start_s for each in runs], "s")
    if runs[0].map_s:
        emit_median(f"{name}_map_s", [each.map_s for each in runs], "s")
    emit_median(f"{name}_rss_mb", [each.rss_mb for each in runs], "MB")
    emit_median(f"{name}_cpu_s", [each.cpu_s for each in runs], "s")
    emit_median(f"{name}_longest_pause_ms", [each.pause_ms for each in runs], "ms")


def syncs(host: SyncHost, fleet: Fleet, own: int) -> list[Sync]:
    """Start on nothing three times; the last agent stays."""
    runs = []
    for number in range(RUNS):
        if number:
            host.stop_agent()
            host.forget_agent()
        runs.append(start(host, fleet, own)[1])
    return runs


@dataclass(frozen=True)
class Update:
    seconds: float
    cpu_s: float


def update(host: SyncHost, fleet: Fleet, turn: int) -> Update:
    """Rewrite a fifth of the entries; return how long until all are in the map."""
    assert host.agent is not None
    seen, used = Seen(host.ipcache), cpu_seconds(host.agent.pid)
    pending = list(range(0, fleet.addresses, STEP * SAMPLED))
    pending.append((fleet.addresses - 1) // STEP * STEP)
    pending.reverse()

    def none_pending() -> bool:
        while pending:
            if seen.identity(fleet.address(pending[-1])) != fleet.identity(pending[-1], turn):
                return False
            pending.pop()
        return True

    writer = rewriting(host, fleet, turn, schema.ip_space_prefix(schema.DEFAULT_SPACE))
    ended = poll(none_pending, "rewritten entry")
    began = host.written(writer)["began"]
    time.sleep(0.3)
    used = cpu_seconds(host.agent.pid) - used
    verify(seen, fleet, turn)
    return Update(ended - began, used)


def rewriting(host: SyncHost, fleet: Fleet, turn: int, prefix: str) -> Process:
    return host.writer("rewrite", fleet.addresses, fleet.identities, fleet.nodes, STEP, turn, prefix)


def bare_update(host: SyncHost, fleet: Fleet, turn: int) -> Update:
    """The same beside the agent's prefix, for a client that counts events."""
    watcher = host.writer("watch", fleet.addresses // STEP, BARE_PREFIX)
    wait_for(lambda: "ready" in said(watcher), "watch")
    began = host.written(rewriting(host, fleet, turn, BARE_PREFIX))["began"]
    done = host.written(watcher)
    return Update(done["ended"] - began, done["cpu"])


def updates(host: SyncHost, fleet: Fleet) -> None:
    bare_update(host, fleet, 0)  # makes the keys
    ours, bare = [], []
    for turn in range(1, UPDATES + 1):
        ours.append(update(host, fleet, turn))
        bare.append(bare_update(host, fleet, turn))
    emit_median("update20k_s", [each.seconds for each in ours], "s")
    emit_median("update20k_cpu_s", [each.cpu_s for each in ours], "s")
    ratios = [each.seconds / other.seconds for each, other in zip(ours, bare, strict=True)]
    emit_median("update20k_vs_bare", ratios, "ratio")
    emit_median("floor_update20k_s", [each.seconds for each in bare], "s")
    emit_median("floor_update20k_cpu_s", [each.cpu_s for each in bare], "s")


def floors(host: SyncHost, fleet: Fleet) -> None:
    lists = [host.written(host.writer("list")) for _ in range(RUNS)]
    emit_median("floor_list100k_s", [each["seconds"] for each in lists], "s")
    emit_median("floor_list100k_cpu_s", [each["cpu"] for each in lists], "s")
    emit_median("floor_map100k_s", [bare_map_s(fleet) for _ in range(RUNS)], "s")


def bare_map_s(fleet: Fleet) -> float:
    """Return how long ready bytes take into such a map."""
    entries = sorted(packed(fleet.address(each), fleet.identity(each)) for each in range(fleet.addresses))
    keys, values = zip(*entries, strict=True)
    scratch = scratch_map()
    began = time.monotonic()
    failed = scratch.handle.update_many(keys, values)
    taken = time.monotonic() - began
    scratch.close()
    if failed:
        raise DatapathError(f"{len(failed)} entries were refused")
    return taken


def small(hub: Hub) -> None:
    with filled(hub, SMALL) as (host, own):
        report("sync100k", syncs(host, SMALL, own))
        floors(host, SMALL)
        updates(host, SMALL)


def large(hub: Hub) -> None:
    with filled(hub, LARGE) as (host, own):
        report("sync300k", syncs(host, LARGE, own))
        report("sync300k_restart", [restart(host, LARGE) for _ in range(RUNS)])


def main() -> None:
    """Print the figures."""
    load()
    for part in PARTS:  # as installed: nobody compiles sources at a start
        compileall.compile_dir(REPO / part, quiet=1)
    with Hub() as hub:
        for name, measure in (("100k", small), ("300k", large)):
            if name in (sys.argv[1:] or ("100k", "300k")):
                measure(hub)


if __name__ == "__main__":
    main()
