# SPDX-License-Identifier: Apache-2.0
"""Where flows of engine tests begin and end: containers, the host itself, machines behind its network card.

Each place serves TCP and UDP on `PORTS` and answers with the address it sees, so that a test can say what
became of a packet.  Sockets are made inside a place's namespace by the test itself: a flow costs
microseconds, not a process.  Used by `tests.support.site`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from datapath.addresses import host_prefix
from tests.support.host import Hub, hub_ipv6, run, unique_name
from tests.support.netns import Netns
from tests.support.traffic import TCP, UDP, seen_by_server, serving

PORTS = (8000, 8001)
PING_S = "0.4"
ETH_P_IP = {4: 0x0800, 6: 0x86DD}


@dataclass(frozen=True)
class Place:
    """Somewhere flows begin and end: `address` is what a test uses, `other` that of the other family."""

    name: str
    address: str
    netns: Netns
    other: str = ""

    @property
    def family(self) -> int:
        return 6 if ":" in self.address else 4

    @property
    def literal(self) -> str:
        """Return its address as it stands before a colon and a port."""
        return f"[{self.address}]" if self.family == 6 else self.address

    @property
    def prefix(self) -> str:
        """Return the prefix that is its address alone."""
        return host_prefix(self.address)

    def of(self, family: int) -> Place:
        """Return the same place by its address of a family."""
        if family == self.family:
            return self
        assert self.other, f"{self.name} has no address of IPv{family}"
        return replace(self, address=self.other, other=self.address)

    def serve(self, stack: contextlib.ExitStack) -> Place:
        """Serve on all `PORTS` for the life of the stack."""
        for port in PORTS:
            stack.enter_context(serving(self.netns, port))
            stack.enter_context(serving(self.netns, port, UDP))
        return self

    def asks(self, protocol: str, address: str, port: int = PORTS[0]) -> str | None:
        """Return the address that the server at `address` saw of us, None when nothing came back.

        ICMP has no such answer: an echo reply returns `address` itself.
        """
        if protocol == "ICMP":
            return address if self.pings(address) else None
        return seen_by_server(self.netns, address, port, TCP if protocol == "TCP" else UDP)

    def pings(self, address: str) -> bool:
        command = self.netns.command(["ping", "-n", "-c", "1", "-W", PING_S, address])
        return subprocess.run(command, capture_output=True).returncode == 0


def passes(subject: Place, peer: Place, direction: str, protocol: str) -> bool:
    """True when a flow passes: from `peer` to `subject` for ingress, the other way for egress."""
    sender, receiver = (peer, subject) if direction == "ingress" else (subject, peer)
    return sender.asks(protocol, receiver.address) is not None


def passing(
    subject: Place, peers: Iterable[Place], direction: str, protocols: Iterable[str]
) -> set[tuple[str, str]]:
    """Return which of these flows pass, by peer's name and protocol; all are tried at the same time."""
    flows = list(itertools.product(peers, protocols))
    with ThreadPoolExecutor(len(flows)) as pool:
        answers = pool.map(lambda flow: passes(subject, flow[0], direction, flow[1]), flows)
        return {
            (peer.name, protocol) for (peer, protocol), passed in zip(flows, answers, strict=True) if passed
        }


class Neighbour:
    """A machine without an agent on the hub: a namespace, nothing else."""

    def __init__(self, hub: Hub) -> None:
        self.netns = unique_name("nb")
        run(["ip", "netns", "add", self.netns])
        run(["ip", "-n", self.netns, "link", "set", "lo", "up"])
        self.address = hub.join(self)
        self._inside = opened(Path(f"/run/netns/{self.netns}"))

    def place(self, name: str) -> Place:
        return Place(name, self.address, self._inside, hub_ipv6(self.address))

    def stop(self) -> None:
        self._inside.close()
        run(["ip", "netns", "del", self.netns], check=False)


def opened(path: Path) -> Netns:
    """Return the namespace that a file stands for."""
    return Netns(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


class PacketTap:
    """Sees every packet of a place's family that reaches it, before any firewall or socket of its own."""

    def __init__(self, place: Place) -> None:
        self._socket = place.netns.socket(
            socket.SOCK_DGRAM, socket.AF_PACKET, socket.htons(ETH_P_IP[place.family])
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.setblocking(False)

    def packets(self) -> list[bytes]:
        """Return, once, the packets (from their IP header on) that arrived since the last call."""
        return list(self._drain())

    def close(self) -> None:
        self._socket.close()

    def _drain(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, sender = self._socket.recvfrom(2048)
                if sender[2] == socket.PACKET_HOST:
                    yield packet
