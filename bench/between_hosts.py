# SPDX-License-Identifier: Apache-2.0
"""Real TCP between endpoints of two hosts, against the same path with no program on it.

between_tunnel_bulk_ratio, between_direct_bulk_ratio
    Bytes a second, ours / plain, with the kernel's segmentation offload as it is by default.
between_tunnel_nogso_ratio, between_direct_nogso_ratio
    The same with it off at the endpoints' devices, so that every packet meets the programs.
between_tunnel_rr_ratio, between_direct_rr_ratio
    One byte there and back, round trips a second: ours / plain.

Two hosts are two namespaces with a wire between; plain is the same devices and routes without programs: by
the tunnel, the kernel's own encapsulation by the same VXLAN device.  Ours enforces at both ends.  Everything
runs on one CPU; 27 rounds, by turns.

Run: python -m bench.between_hosts
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import harness
from tests.support.frames import TCP
from tests.support.netns import Netns
from tests.support.twohosts import Side, address, identity, two_hosts

SOURCE = Path(__file__).parent / "pingpong.c"
ROUNDS, SECONDS = 27, 0.5
PORT = "7000"
SERVER = address(2)
INGRESS, EGRESS = 0, 1


def rate(client: Netns, tool: str, figure: str) -> float:
    """Return what a client does in a second."""
    return float(client.run(tool, figure, SERVER, PORT, str(SECONDS), timeout=30))


@contextlib.contextmanager
def served(sides: tuple[Side, Side], tool: str) -> Iterator[Side]:
    """Serve at endpoint 2; yield host 1."""
    serving = sides[1].endpoint.popen(tool, "serve", PORT)
    try:
        assert serving.stdout is not None
        assert serving.stdout.readline() == "ready\n"
        yield sides[0]
    finally:
        serving.kill()
        serving.communicate()


@contextlib.contextmanager
def path(tool: str, *, tunnel: bool, enforced: bool) -> Iterator[tuple[Side, Side]]:
    with two_hosts(tunnel=tunnel, enforced=enforced) as sides, served(sides, tool):
        if enforced:
            sides[0].allow(EGRESS, identity(2), int(PORT), TCP)
            sides[1].allow(INGRESS, identity(1), int(PORT), TCP)
        yield sides
        for side in sides if enforced else ():
            assert not side.dropped(), side.dropped()


def measure(tool: str, mode: str) -> None:
    tunnel = mode == "tunnel"
    with path(tool, tunnel=tunnel, enforced=True) as ours, path(tool, tunnel=tunnel, enforced=False) as bare:
        for figure, name in (("rr", "rr"), ("bulk", "bulk")):
            report(f"between_{mode}_{name}_ratio", tool, figure, ours[0].endpoint, bare[0].endpoint)
        for side in (*ours, *bare):
            side.endpoint.run(tool, "whole", "eth0")
        report(f"between_{mode}_nogso_ratio", tool, "bulk", ours[0].endpoint, bare[0].endpoint)


def report(name: str, tool: str, figure: str, ours: Netns, bare: Netns) -> None:
    rounds = [(rate(ours, tool, figure), rate(bare, tool, figure)) for _ in range(ROUNDS)]
    harness.emit(name, statistics.median(one / other for one, other in rounds), "ratio", ROUNDS)
    one, other = (statistics.median(each) for each in zip(*rounds, strict=True))
    harness.note(f"{name}: {one:.0f} a second enforced, {other:.0f} plain")


def main() -> None:
    """Print the figures."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    harness.load()
    with tempfile.TemporaryDirectory() as directory:
        tool = f"{directory}/pingpong"
        subprocess.run(["clang", "-O2", "-Wall", "-Werror", "-o", tool, str(SOURCE)], check=True)
        for mode in ("tunnel", "direct"):
            measure(tool, mode)


if __name__ == "__main__":
    main()
