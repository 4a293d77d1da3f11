# SPDX-License-Identifier: Apache-2.0
"""Answers questions for names at port 53 of the host's addresses in its pools, by UDP and TCP.

Whoever asks is a stranger, as in agent.health_server: what is read is bounded, a connection has an end, and a
flood costs a bounded part of a CPU.  The endpoints of this host are served, and the host itself, each with a
share of its own; anybody else is refused, in a packet that is no longer than theirs.  An address that can not
be listened on (port 53 is another server's) is said in status and tried again.  Run as a supervised task.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network

from agent.listener import Connections, Listening
from agent.names_zone import Outcome, Reply, Zone
from core import metrics
from core.allowance import Allowance

PORT = 53
# A query is a name of at most 255 bytes and some 30 more; EDNS may pad it.
QUERY_MAX = 1024
# Packets that are read before anybody else may run: a millisecond or two of answers.
READ_AT_ONCE = 32
# Packets a second that are looked at; one that is not answered costs about 10 µs, an answer about 40 µs.
RATE, BURST = 10_000.0, 2_000.0
# Questions a second of one address that are answered: 2 % of a CPU, and an application that asks for each of
# 400 connections a second.
SHARE, SHARE_BURST = 400.0, 800.0
# Addresses of which the share is kept; when there are more, all begin anew.
SHARES_MAX = 4096
# Connections open at once, and a second; each ends after so many seconds and so many pieces.
CONNECTIONS_MAX = 64
CONNECTIONS_RATE, CONNECTIONS_BURST = 200.0, 200.0
CONNECTION_S = 5.0
PIECES_MAX = 64
# After an error of the socket that is not one of the packet.
PAUSE_S = 1.0
LIMITED = "limited"  # in the metric: beyond its sender's share, and not looked at

Peer = tuple[str, int] | tuple[str, int, int, int]


class Shares:
    """How much each address may ask.  Pure: times are handed in."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._of: dict[str, Allowance] = {}

    def __len__(self) -> int:
        return len(self._of)

    def grants(self, address: str, now: float) -> bool:
        """Whether one more question of an address is answered."""
        share = self._of.get(address)
        if share is None:
            if len(self._of) >= SHARES_MAX:
                self._of.clear()
            share = self._of[address] = Allowance(self._rate, self._burst)
        return share.grants(now)


class NamesServer:
    """Serves a zone until cancelled, at `addresses`, to who is in `networks`."""

    def __init__(self, zone: Zone, addresses: Sequence[str], networks: Sequence[str]) -> None:
        self.zone = zone
        self.addresses = tuple(addresses)
        self.connections = Connections(
            self._converse, CONNECTIONS_MAX, Allowance(CONNECTIONS_RATE, CONNECTIONS_BURST)
        )
        self._udp = Listening("questions for names by UDP", PORT, socket.SOCK_DGRAM)
        self._tcp = Listening("questions for names by TCP", PORT)
        self._reads = Allowance(RATE, BURST)
        self._shares = Shares(SHARE, SHARE_BURST)
        parsed = [ip_network(each) for each in networks]
        self._serves = lru_cache(maxsize=SHARES_MAX)(
            lambda text: any(ip_address(text) in network for network in parsed)
        )

    @property
    def errors(self) -> dict[str, str]:
        """Return of each place where nobody is answered yet why."""
        found = (("UDP", self._udp.errors), ("TCP", self._tcp.errors))
        return {
            f"{address} port {PORT}/{protocol}": reason
            for protocol, errors in found
            for address, reason in errors.items()
        }

    async def run(self) -> None:
        """Listen on every address, and go on trying where that is refused."""
        try:
            async with asyncio.TaskGroup() as group:
                for address in self.addresses:
                    group.create_task(self._serve_udp(address))
                    group.create_task(self._serve_tcp(address))
        finally:
            await self.connections.end()

    async def _serve_tcp(self, address: str) -> None:
        with await self._tcp.at(address) as sock:
            await self.connections.accept(sock)

    async def _serve_udp(self, address: str) -> None:
        loop = asyncio.get_running_loop()
        with await self._udp.at(address) as sock:
            while True:
                try:
                    first = await loop.sock_recvfrom(sock, QUERY_MAX + 1)
                except OSError:  # the kernel has no memory to spare
                    await asyncio.sleep(PAUSE_S)
                    continue
                read = [first, *_waiting(sock, READ_AT_ONCE - 1)]
                for packet, peer in read:
                    self._answer(sock, packet, peer)
                await asyncio.sleep(self._reads.spend(time.monotonic(), len(read)))

    def _answer(self, sock: socket.socket, packet: bytes, peer: Peer) -> None:
        reply = self._reply(packet, peer[0], stream=False)
        if reply:
            # What finds no room, or nobody, is lost as any datagram may be: the client asks again.
            with contextlib.suppress(OSError):
                sock.sendto(reply, peer)

    async def _converse(self, connection: socket.socket) -> None:
        """Answer the questions of one connection; the caller closes."""
        loop = asyncio.get_running_loop()
        received = b""
        with contextlib.suppress(OSError):
            peer = connection.getpeername()[0]
            async with asyncio.timeout(CONNECTION_S):
                for _ in range(PIECES_MAX):
                    piece = await loop.sock_recv(connection, QUERY_MAX)
                    if not piece:
                        return
                    queries, received = split(received + piece)
                    for query in queries:
                        reply = self._reply(query, peer, stream=True)
                        if not reply:
                            return
                        await loop.sock_sendall(connection, len(reply).to_bytes(2) + reply)
                    await asyncio.sleep(0)  # what is there already is read without a pause

    def _reply(self, packet: bytes, peer: str, *, stream: bool) -> bytes:
        """Return the answer to one query, empty for none."""
        if not self._shares.grants(peer, time.monotonic()):
            metrics.DNS_QUERIES.labels(LIMITED).inc()
            return b""
        if len(packet) > QUERY_MAX:
            reply = Reply(b"", Outcome.IGNORED)
        else:
            reply = self.zone.reply(packet, stream=stream, served=self._serves(peer))
        metrics.DNS_QUERIES.labels(reply.outcome.value).inc()
        return reply.packet


def _waiting(sock: socket.socket, most: int) -> Iterator[tuple[bytes, Peer]]:
    """Yield the packets that are there already."""
    with contextlib.suppress(OSError):
        for _ in range(most):
            yield sock.recvfrom(QUERY_MAX + 1)


def split(received: bytes) -> tuple[list[bytes], bytes]:
    """Return the messages of a stream, each behind its length, and the rest.  Pure."""
    messages = []
    while len(received) >= 2 and len(received) >= 2 + (length := int.from_bytes(received[:2])):
        messages.append(received[2 : 2 + length])
        received = received[2 + length :]
    return messages, received
