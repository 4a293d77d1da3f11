# SPDX-License-Identifier: Apache-2.0
"""Real TCP between two endpoints of one host, against the same veths forwarded by a bare kernel.

rr_ratio
    One byte there and back on one connection, round trips a second: ours / plain.
crr_ratio
    A connection for each, closed by RST.
bulk_nogso_ratio
    Bytes a second with segmentation offload off, so that every packet meets the programs.

Both ends and everything between them run on one CPU.  Plain is the same topology with forwarding, without
BPF, netfilter or conntrack.  Ours enforces: each end allows the other by identity and port only.  Nine
rounds, by turns; the clients are bench/pingpong.c, so that no interpreter hides the difference.

Run: python -m bench.traffic_ratio
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import harness
from tests.support.bpfhost import bpf_host
from tests.support.bpflab import EGRESS, INGRESS, identity
from tests.support.frames import TCP
from tests.support.netns import Netns, inside_new_netns, new_netns

SOURCE = Path(__file__).parent / "pingpong.c"
ROUNDS, SECONDS = 9, 0.7
PORT = "7000"
CLIENT, SERVER = "10.0.0.1", "10.0.0.2"
FIGURES = ("rr", "crr", "bulk")


class Pair:
    """A client's namespace and a server's, with a server that serves."""

    def __init__(self, client: Netns, tool: str) -> None:
        self._client, self._tool = client, tool

    def rate(self, figure: str) -> float:
        """Return what a client does in a second."""
        return float(self._client.run(self._tool, figure, SERVER, PORT, str(SECONDS), timeout=30))


@contextlib.contextmanager
def served(client: Netns, server: Netns, tool: str) -> Iterator[Pair]:
    for inside in (client, server):
        inside.run(tool, "whole", "eth0")
    serving = server.popen(tool, "serve", PORT)
    try:
        assert serving.stdout is not None
        assert serving.stdout.readline() == "ready\n"
        yield Pair(client, tool)
    finally:
        serving.kill()
        serving.communicate()


@contextlib.contextmanager
def plain(tool: str) -> Iterator[Pair]:
    """Two namespaces behind veths of a third, which forwards."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(inside_new_netns())
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        inside = []
        for number, address in enumerate((CLIENT, SERVER), 1):
            other, name = stack.enter_context(new_netns()), f"lxc{number}"
            peer = ("peer", "name", "eth0", "netns", str(other.path))
            host.run("ip", "link", "add", name, "type", "veth", *peer)
            host.run("ip", "link", "set", name, "up")
            other.run("ip", "link", "set", "eth0", "up")
            other.run("ip", "addr", "add", f"{address}/32", "dev", "eth0")
            other.run("ip", "route", "add", "169.254.1.1", "dev", "eth0", "scope", "link")
            other.run("ip", "route", "add", "default", "via", "169.254.1.1")
            host.run("ip", "route", "add", address, "dev", name)
            mac = json.loads(host.run("ip", "-j", "link", "show", name))[0]["address"]
            other.run("ip", "neigh", "add", "169.254.1.1", "lladdr", mac, "dev", "eth0", "nud", "permanent")
            host.run(tool, "whole", name)
            inside.append(other)
        yield stack.enter_context(served(inside[0], inside[1], tool))


@contextlib.contextmanager
def ours(tool: str, directory: Path) -> Iterator[Pair]:
    """The same with programs and a policy at both ends."""
    with bpf_host(directory, 1, 2) as host:
        for number, other in ((1, 2), (2, 1)):
            host.allow(number, EGRESS if number == 1 else INGRESS, identity(other), int(PORT), TCP)
            host.netns.run(tool, "whole", f"lxc{number}")
        with served(host.endpoints[1], host.endpoints[2], tool) as pair:
            yield pair
        assert not host.dropped(), host.dropped()


def main() -> None:
    """Print the figures."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    harness.load()
    with tempfile.TemporaryDirectory() as directory:
        tool = f"{directory}/pingpong"
        subprocess.run(["clang", "-O2", "-Wall", "-Werror", "-o", tool, str(SOURCE)], check=True)
        with plain(tool) as bare, ours(tool, Path(directory)) as enforced:
            for figure in FIGURES:
                report(figure, [(enforced.rate(figure), bare.rate(figure)) for _ in range(ROUNDS)])


def report(figure: str, rounds: list[tuple[float, float]]) -> None:
    name = "bulk_nogso_ratio" if figure == "bulk" else f"{figure}_ratio"
    harness.emit(name, statistics.median(one / other for one, other in rounds), "ratio", ROUNDS)
    one, other = (statistics.median(each) for each in zip(*rounds, strict=True))
    harness.note(f"{figure}: {one:.0f} a second enforced, {other:.0f} plain")


if __name__ == "__main__":
    main()
