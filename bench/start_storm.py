# SPDX-License-Identifier: Apache-2.0
"""300 hosts that list 20 000 keys from one etcd, each in its slot of a window of 20 s, and all at once.

start_storm_put_p99_ms, start_storm_etcd_rss_mb
    In the window: the 99th percentile of a small put that comes every 20 ms, from the moment it was due (so
    that puts which wait count, too); etcd's peak (VmHWM).
start_storm_at_once_put_p99_ms, start_storm_at_once_etcd_rss_mb
    The same without a window.
start_storm_list_p99_ms, start_storm_at_once_list_p99_ms
    From the moment that a host was to ask until it had everything.
floor_start_storm_put_p99_ms, floor_start_storm_etcd_rss_mb
    The same etcd before anybody lists.
floor_start_storm_clients_put_p99_ms
    While as many processes as there are CPUs do nothing but use them, at the clients' priority: what sharing
    the machine with them does to a put.

Slots are those of the start window (`prestart.window`), by rank.  Each round has an etcd of its own.  The
clients (bench/start_storm_clients.py) share this machine's CPUs, where a fleet's have their own: they have
the lowest priority, count what comes and do not unpack it; their CPU and etcd's are printed apart.

Run: python -m bench.start_storm
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.agent_idle_cpu import cpu_seconds
from bench.harness import emit_median, load, note
from kvstore import schema
from kvstore.client import Client
from kvstore.ops import put_op
from prestart.simulation import host_names
from prestart.window import next_slot, slot_fractions
from tests.support.etcd import EtcdServer

CLIENTS, ENTRIES, WINDOW_S = 300, 20_000, 20.0
PROCESSES, ROUNDS = 4, 3
QUIET_S, PUT_EVERY_S = 5.0, 0.02
# Until the clients' processes have loaded their modules.
START_S = 3.0
PUT_TIMEOUT_S = 120.0
PROBE = "bench/probe"
RUN = ("-c", "import sys; from bench.start_storm_clients import main; main(*sys.argv[1:])")
BURN = ("-c", "import os\nos.nice(19)\nwhile True: sum(range(10_000))")


class Cpu(NamedTuple):
    """Seconds of CPU in a storm; `others` have nothing to do with it and were in its way."""

    etcd: float
    clients: float
    prober: float
    others: float


class Storm(NamedTuple):
    """What a round came to: seconds, megabytes, counts."""

    puts: list[float]
    lists: list[float]
    length: float
    failures: int
    gave_up: int
    peak_mb: float
    cpu: Cpu


class Prober:
    """Puts a small key at a steady pace, whether or not earlier puts have been answered."""

    def __init__(self, server: EtcdServer) -> None:
        self.taken: list[float] = []
        self._client = Client(server.config, timeout=PUT_TIMEOUT_S, max_in_flight=100_000)
        self._puts: set[asyncio.Task[None]] = set()

    async def until(self, done: asyncio.Future[Any]) -> list[float]:
        """Put until `done`, wait for the answers, and return how long each took."""
        await self._put(time.monotonic())  # connects
        self.taken.clear()
        due = time.monotonic()
        while not done.done():
            task = asyncio.create_task(self._put(due))
            self._puts.add(task)
            task.add_done_callback(self._puts.discard)
            due += PUT_EVERY_S
            await asyncio.sleep(due - time.monotonic())
        await asyncio.gather(*self._puts)
        await self._client.close()
        return self.taken

    async def _put(self, due: float) -> None:
        await self._client.put(PROBE, b"x")
        self.taken.append(time.monotonic() - due)


def p99(samples: Sequence[float]) -> float:
    return statistics.quantiles(samples, n=100)[98]


def peak_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def used(server: EtcdServer) -> tuple[float, float, float]:
    """Return the CPU time of etcd, of this process, and of everybody on this machine, waits not counted."""
    fields = [int(each) for each in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    everybody = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return cpu_seconds(server.pid), time.process_time(), everybody


def moments(window: float) -> list[float]:
    """Return when each host asks, unix times: its slot, or at once where there is no window."""
    at = time.time() + START_S
    slots = slot_fractions(host_names(CLIENTS))
    return [next_slot(at, window, fraction) for fraction in slots.values()]


async def fill(server: EtcdServer) -> None:
    client = Client(server.config)
    writes = []
    for number in range(ENTRIES):
        address, host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", f"172.16.0.{number % 250}"
        record = schema.ip_record(
            address, 256 + number % 5_000, host_ip=host, metadata=f"cilium-global:default:{host}:{number}"
        )
        writes.append(put_op(schema.ip_key(schema.DEFAULT_SPACE, address), schema.encode_ip(record)))
    await client.write_many(writes)
    await client.close()


@contextlib.contextmanager
def processes(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Run some Pythons; those that have not ended by then are ended."""
    started = [
        subprocess.Popen([sys.executable, *each], stdout=subprocess.PIPE, text=True) for each in commands
    ]
    try:
        yield started
    finally:
        for each in started:
            each.kill()
            each.wait()


def answers(started: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Wait for all clients; SystemExit when a process ended without saying how it went."""
    found = [each.communicate()[0] for each in started]
    if not all(found):
        raise SystemExit("a process of clients failed")
    return [json.loads(each) for each in found]


async def storm(server: EtcdServer, window: float) -> Storm:
    begin = moments(window)
    commands = [[*RUN, server.endpoint, *map(str, begin[n::PROCESSES])] for n in range(PROCESSES)]
    before = used(server)
    with processes(commands) as started:
        await asyncio.sleep(min(begin) - time.time())
        done = asyncio.ensure_future(asyncio.to_thread(answers, started))
        puts = await Prober(server).until(done)
        said = await done
    etcd, prober, everybody = (now - then for now, then in zip(used(server), before, strict=True))
    clients = sum(each["cpu"] for each in said)
    listed = sum(each["entries"] for each in said)
    gave_up = sum(each["gave_up"] for each in said)
    if listed != (CLIENTS - gave_up) * ENTRIES:
        raise SystemExit(f"{CLIENTS - gave_up} clients listed {listed} entries, not {ENTRIES} each")
    return Storm(
        puts,
        [seconds for each in said for seconds in each["seconds"]],
        max(each["ended"] for each in said) - min(begin),
        sum(each["failures"] for each in said),
        gave_up,
        peak_mb(server.pid),
        Cpu(etcd, clients, prober, everybody - etcd - clients - prober),
    )


async def quiet(server: EtcdServer) -> list[float]:
    return await Prober(server).until(asyncio.ensure_future(asyncio.sleep(QUIET_S)))


async def beside_burners(server: EtcdServer) -> list[float]:
    with processes([BURN] * (os.cpu_count() or 1)):
        return await quiet(server)


async def a_round(window: float) -> tuple[list[float], float, list[float], Storm]:
    """Return puts and peak before the storm, puts beside burners, and the storm."""
    with tempfile.TemporaryDirectory() as directory:
        server = EtcdServer(Path(directory)).start()
        try:
            await fill(server)
            idle = await quiet(server)
            peak = peak_mb(server.pid)
            burnt = await beside_burners(server)
            return idle, peak, burnt, await storm(server, window)
        finally:
            server.stop()


def report(name: str, storms: Sequence[Storm]) -> None:
    emit_median(f"start_storm{name}_put_p99_ms", [p99(each.puts) * 1e3 for each in storms], "ms")
    emit_median(f"start_storm{name}_etcd_rss_mb", [each.peak_mb for each in storms], "MB")
    emit_median(f"start_storm{name}_list_p99_ms", [p99(each.lists) * 1e3 for each in storms], "ms")


def tell(name: str, found: Storm) -> None:
    """Say at once how a round went: they take long on a busy machine."""
    cpu = ", ".join(f"{who} {seconds:.1f}" for who, seconds in found.cpu._asdict().items())
    note(
        f"start_storm{name}: {found.length:.1f} s, lists: {found.failures} failed, {found.gave_up} given up "
        f"(median {statistics.median(found.lists) * 1e3:.0f} ms); {len(found.puts)} puts, median "
        f"{statistics.median(found.puts) * 1e3:.1f}, p99 {p99(found.puts) * 1e3:.0f}, most "
        f"{max(found.puts) * 1e3:.0f} ms; etcd {found.peak_mb:.0f} MB; CPU s: {cpu}"
    )


def main() -> None:
    load()
    idle, peaks, burnt = [], [], []
    storms: dict[str, list[Storm]] = {"": [], "_at_once": []}
    for _ in range(ROUNDS):
        for name, window in (("", WINDOW_S), ("_at_once", 0.0)):
            before, peak, beside, found = asyncio.run(a_round(window))
            tell(name, found)
            idle.append(p99(before) * 1e3)
            peaks.append(peak)
            burnt.append(p99(beside) * 1e3)
            storms[name].append(found)
    for name, rounds in storms.items():
        report(name, rounds)
    emit_median("floor_start_storm_put_p99_ms", idle, "ms")
    emit_median("floor_start_storm_etcd_rss_mb", peaks, "MB")
    emit_median("floor_start_storm_clients_put_p99_ms", burnt, "ms")


if __name__ == "__main__":
    main()
