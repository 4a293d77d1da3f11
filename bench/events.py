# SPDX-License-Identifier: Apache-2.0
"""Events of the data path on one CPU: from the ring through the agent's pump to a reader of the monitor.

events_decoded_per_s
    For a reader with a filter (`monitor -t drop --related-to 2`, one event in ten): every record is read,
    decoded and compared with the filter, what matches becomes a line of JSON.
events_shown_per_s
    For a reader who wants everything: every record becomes a line.

The records are what the programs wrote on BPF_PROG_TEST_RUN without aggregation: traces, verdicts and drops
of IPv4 and IPv6 packets, as many as a ring of the agent's size holds, again and again.  Time is the
process's CPU time from the ring's becoming readable to the reader's having the last line, the packets'
excluded.  Nothing may be lost in it; afterwards the ring is overrun on purpose, and what was read and what
was counted as lost must be what was written.

Run: python -m bench.events [--profile]
"""

from __future__ import annotations

import asyncio
import cProfile
import os
import pstats
import statistics
import sys
import time

from loguru import logger

from agent.api.monitor import Listener, MonitorFilter
from agent.events import EventPump
from bench import harness
from datapath import testrun
from datapath.constants import Aggregation
from datapath.ring import EventRing
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, Lab, address, identity, lab

SAMPLES, ROUNDS = 9, 40
REPEAT = 250  # runs that a frame with a hop count of 255 serves
QUEUE = 1 << 14
ALLOWED, DENIED = 80, 81
EVENTS = {ALLOWED: 2, DENIED: 3}  # from the endpoint, to the endpoint; from the endpoint, verdict, drop
A_ROUND = 2 * REPEAT * sum(EVENTS.values())
FILTERED = MonitorFilter(types=frozenset({"drop"}), related=frozenset({2}))
MATCHING = REPEAT  # a round


def write(host: Lab, sender: int, receiver: int, family: int, port: int) -> int:
    """Let the programs write events about one frame; return how many they tell of."""
    program = host.programs_of(family)[sender]["from_endpoint"]
    source, destination = address(sender, family), address(receiver, family)
    frame = frames.tcp(source, destination, 40_000, port, frames.ACK, ttl=255)
    testrun.run(program, frame, repeat=REPEAT)
    return REPEAT * EVENTS[port]


def write_round(host: Lab) -> int:
    """IPv4 from endpoint 1 to 2 and IPv6 from 2 to 1, allowed and denied."""
    return sum(
        write(host, sender, receiver, family, port)
        for sender, receiver, family in ((1, 2, 4), (2, 1, 6))
        for port in (ALLOWED, DENIED)
    )


def prepare(host: Lab, ring: EventRing) -> None:
    """Two endpoints whose programs write into `ring`, port 80 open between them, a flow of each family."""
    host.fds |= ring.descriptors
    for number, other in ((1, 2), (2, 1)):
        host.add_endpoint(number)
        host.allow(number, EGRESS, identity(other), ALLOWED, frames.TCP)
        host.allow(number, INGRESS, identity(other), ALLOWED, frames.TCP)
    write_round(host)
    host.monitor.set(1)


class Reader:
    """A client of the monitor: takes lines as the API's handler does, and counts them."""

    def __init__(self, listener: Listener) -> None:
        self.lines = 0
        self._listener = listener

    async def read(self) -> None:
        while True:
            self.lines += (await self._listener.take()).count(b"\n")


async def settle(done: int, pump: EventPump) -> None:
    while pump.hub.seen < done:
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # the reader's turn


async def sample(host: Lab, pump: EventPump, wanted: MonitorFilter, expected: int) -> float:
    """Return events a second over many rounds; SystemExit when one is missing."""
    written, taken, before = 0, 0.0, pump.hub.seen
    with pump.hub.listen(wanted) as listener:
        reader = Reader(listener)
        task = asyncio.create_task(reader.read())
        for _ in range(ROUNDS):
            written += write_round(host)
            started = time.process_time()
            await settle(before + written, pump)
            taken += time.process_time() - started
        task.cancel()
        await asyncio.wait([task])
    seen = pump.hub.seen - before
    if (seen, reader.lines) != (written, expected * ROUNDS) or host.lost.total() or pump.hub.lost:
        raise SystemExit(f"{written} written, {seen} seen, {reader.lines} lines, {host.lost.total()} lost")
    return written / taken


async def overrun(host: Lab, pump: EventPump) -> None:
    """Write more than the ring holds; SystemExit when what was read and lost is not what was written."""
    before = pump.hub.seen
    with pump.hub.listen(MonitorFilter(related=frozenset({9}))) as listener:
        written = sum(write_round(host) for _ in range(8))
        lost = host.lost.total()
        await settle(before + written - lost, pump)
        told = (await listener.take()).decode()
    # The line about the loss counts as seen.
    read = pump.hub.seen - before - 1
    if not lost or read + lost != written or f"Lost {lost} events" not in told:
        raise SystemExit(f"{written} written, {read} read, {lost} lost; the reader was told: {told}")
    harness.note(f"overrun: {written} events written, {read} read, {lost} lost, counted and told")


async def measure(host: Lab, ring: EventRing, profiler: cProfile.Profile | None) -> None:
    pump = EventPump(QUEUE)
    pump.attach(ring, host.monitor, host.lost)
    figures = {
        "events_decoded_per_s": (FILTERED, MATCHING),
        "events_shown_per_s": (MonitorFilter(), A_ROUND),
    }
    for name, (wanted, expected) in figures.items():
        if profiler:
            profiler.enable()
        samples = [await sample(host, pump, wanted, expected) for _ in range(SAMPLES)]
        if profiler:
            profiler.disable()
        harness.emit(name, statistics.median(samples), "1/s", SAMPLES)
        harness.note(f"{name}: least {min(samples):.0f}, most {max(samples):.0f}")
    await overrun(host, pump)
    pump.detach()


def main() -> None:
    """Print both figures, and with --profile where the time went."""
    logger.remove()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    harness.load()
    profiler = cProfile.Profile() if "--profile" in sys.argv else None
    with lab(aggregation=Aggregation.NONE) as host, EventRing.create() as ring:
        prepare(host, ring)
        asyncio.run(measure(host, ring, profiler))
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
