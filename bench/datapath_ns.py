# SPDX-License-Identifier: Apache-2.0
"""Nanoseconds a packet, by BPF_PROG_TEST_RUN on one CPU; the mean of a million runs, nine samples.

datapath_local_ns
    Everything between the sender's veth and the redirect into the receiver: TCP, established, policy
    enforced at both ends, verdict and counters checked.  Hop counts fall, so a frame serves 250 runs.
datapath_ingress_ns
    The receiver's half of it.
datapath_new_flow_ns
    The first packet of 25 000 flows between the same endpoints, a fresh port each (bench/next_flow.c, some
    10 ns of it); entries deleted between rounds.
datapath_new_entries_ns
    What no program can save of that: the flow's two entries written into the same map, and nothing else.
datapath_deny_ns
    A packet that the sender's policy denies.
datapath_empty_ns
    A program that does nothing: the floor of all of these.

Run: python -m bench.datapath_ns
"""

from __future__ import annotations

import contextlib
import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

from bench import harness
from datapath import testrun
from datapath.attach import install_policy
from datapath.constants import EndpointConstants
from datapath.loader import Template
from datapath.mapspec import MapCatalogue
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, OBJECTS, Lab, address, identity, lab

SAMPLES, RUNS = 9, 1_000_000
LIFE = 250  # runs that a frame with a hop count of 255 serves
FLOWS = 25_000
NEXT = 1000  # where next_flow finds the program under test
HERE = Path(__file__).parent
A, B = address(1), address(2)


def repeated(program: int, frame: bytes, verdict: int, cb: tuple[int, ...] = (0,) * 5) -> float:
    outcome = testrun.run(program, frame, repeat=RUNS, cb=cb)
    assert outcome.verdict == verdict, outcome
    return outcome.nanoseconds


def local(host: Lab) -> float:
    frame = frames.tcp(A, B, 40_000, 80, frames.ACK, ttl=255)
    total, program = 0, host.programs[1]["from_endpoint"]
    before = host.counted(0, 1).packets
    for _ in range(RUNS // LIFE):
        outcome = testrun.run(program, frame, repeat=LIFE)
        assert outcome.verdict == ACT_REDIRECT
        total += outcome.nanoseconds
    assert host.counted(0, 1).packets == before + RUNS
    return total / (RUNS // LIFE)


def handed_over(source_port: int, port: int) -> tuple[int, ...]:
    """What the sender's half leaves in skb->cb: struct flow of bpf/include/flow.h."""
    now = int(time.monotonic())
    packed = struct.pack(">HH8B", source_port, port, frames.TCP, frames.ACK, 0, 0, 34, 0, 0, 0)
    return (identity(1), now, *struct.unpack("=3I", packed))


def ingress(host: Lab) -> float:
    frame = frames.tcp(A, B, 40_000, 80, frames.ACK)
    return repeated(host.programs[2]["policy_ingress"], frame, ACT_REDIRECT, handed_over(40_000, 80))


def new_flows(host: Lab, program: int) -> float:
    outcome = testrun.run(program, frames.tcp(A, B, 10_000, 80), repeat=FLOWS)
    assert outcome.verdict == ACT_REDIRECT
    opened = [key for key, _ in host.ct["cilium_ct4_global"].items() if key.source_port < 40_000]
    assert len(opened) == 2 * FLOWS
    host.ct["cilium_ct4_global"].delete(opened)
    return outcome.nanoseconds


def deny(host: Lab) -> float:
    before = host.counted(133, 2).packets
    taken = repeated(host.programs[1]["from_endpoint"], frames.tcp(A, B, 40_000, 81), ACT_SHOT)
    assert host.counted(133, 2).packets == before + RUNS
    return taken


def empty() -> float:
    program = testrun.empty_program()
    try:
        return repeated(program, frames.tcp(A, B, 40_000, 80), ACT_OK)
    finally:
        os.close(program)


@contextlib.contextmanager
def flows(host: Lab) -> Iterator[tuple[int, int]]:
    """Yield the program that hands endpoint 1's program one new flow after the other, and the one that only
    makes their entries."""
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / "next_flow.o"
        subprocess.run(
            ["make", "-s", "-C", str(OBJECTS.parent), f"BUILD={directory}", f"SOURCES={HERE}", str(built)],
            check=True,
        )
        constants = EndpointConstants(NEXT, 0, 0, ip_address(A), "02:00:00:00:00:01")
        install_policy(host.call_policy[4], NEXT, host.programs[1]["from_endpoint"])
        with Template.read(built).load(constants, host.fds) as programs:
            yield programs["next_flow"], programs["next_entries"]


def prepare(host: Lab) -> None:
    """Policy at both ends by identity and port, and the flow opened."""
    host.allow(1, EGRESS, identity(2), 80, frames.TCP)
    host.allow(2, INGRESS, identity(1), 80, frames.TCP)
    host.send(1, frames.tcp(A, B, 40_000, 80, frames.SYN))
    host.send(2, frames.tcp(B, A, 80, 40_000, frames.SYN | frames.ACK))


def main() -> None:
    """Print the figures, all samples of one after the other's."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    harness.load()
    with lab(1, 2, catalogue=MapCatalogue()) as host, flows(host) as (next_flow, next_entries):
        prepare(host)
        figures: dict[str, Callable[[], float]] = {
            "datapath_local_ns": lambda: local(host),
            "datapath_ingress_ns": lambda: ingress(host),
            "datapath_new_flow_ns": lambda: new_flows(host, next_flow),
            "datapath_new_entries_ns": lambda: new_flows(host, next_entries),
            "datapath_deny_ns": lambda: deny(host),
            "datapath_empty_ns": empty,
        }
        for name, sample in figures.items():
            samples = [sample() for _ in range(SAMPLES)]
            harness.emit(name, statistics.median(samples), "ns", SAMPLES)
            harness.note(f"{name}: least {min(samples):.0f}, most {max(samples):.0f}")


if __name__ == "__main__":
    main()
