# SPDX-License-Identifier: Apache-2.0
"""Answers the health probes of other nodes: `GET /hello` at cluster-health-port of the node's addresses.

A real cilium-health asks the same.  Whoever reaches the port is a stranger, so it gets nothing else: 200 or
404 and what time it is, no body, no header that says who answers; a bounded request in a bounded time; and a
flood costs this process a bounded part of a CPU, at the price of the others' probes.  Who says whom he looks
for (`agent.probes.NODE_HEADER`) hears 421 where that is somebody else.  An HTTP server for applications has
no limit for the time that headers take, hence this one.  An address that can not be listened on is said in
status and tried again.  Run as a supervised task.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from functools import partial

from agent.listener import Connections, Listening
from agent.probes import asked_for
from core.allowance import Allowance

# Questions come as long as the longest packet that anybody tries (agent.path_mtu).
REQUEST_MAX = 10_240
REQUEST_TIMEOUT_S = 5.0
# A request comes in one piece, or in a few; one that comes byte by byte costs a wake each.
PIECES_MAX = 8
# Open at once.
CONNECTIONS_MAX = 128
# Connections a second in the long run, and at once.  Of 10 000 nodes about 40 a second come, 80 with IPv6: a
# probe and one packet of full length each; one costs 0.2 to 0.4 ms, so that a flood costs 6 % of a CPU.
RATE = 150.0
BURST = 300.0

_END = b"\r\n\r\n"
_WANTED = b"GET /hello HTTP/1."
_YES, _NO = b"HTTP/1.1 200 OK", b"HTTP/1.1 404 Not Found"
_NOT_ME = b"HTTP/1.1 421 Misdirected Request"
_REST = b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class HealthServer:
    """Listens until cancelled; `own` is this node's name, cluster/name."""

    def __init__(
        self,
        own: str,
        addresses: Sequence[str],
        port: int,
        *,
        rate: float = RATE,
        burst: float = BURST,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.port = port
        answer = partial(_answer, own=own, clock=clock)
        self.connections = Connections(answer, CONNECTIONS_MAX, Allowance(rate, burst))
        self._addresses = tuple(addresses)
        self._listening = Listening("health probes", port)

    @property
    def errors(self) -> dict[str, str]:
        """Return of each address that is not listened on yet why."""
        return self._listening.errors

    async def run(self) -> None:
        """Listen on every address, and go on trying where that is refused."""
        try:
            async with asyncio.TaskGroup() as group:
                for address in self._addresses:
                    group.create_task(self._serve(address))
        finally:
            await self.connections.end()

    async def _serve(self, address: str) -> None:
        with await self._listening.at(address) as sock:
            await self.connections.accept(sock)


async def _answer(connection: socket.socket, own: str, clock: Callable[[], float]) -> None:
    """Read one request and answer it; the caller closes."""
    loop = asyncio.get_running_loop()
    request = b""
    with contextlib.suppress(OSError):
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            for _ in range(PIECES_MAX):
                request += await loop.sock_recv(connection, REQUEST_MAX - len(request))
                if _END in request or len(request) in (0, REQUEST_MAX):
                    break
            await loop.sock_sendall(connection, answer_to(request, own, clock()))


def answer_to(request: bytes, own: str, now: float) -> bytes:
    """Return the answer to a request's head; others compare their clocks with its date.  Pure."""
    verdict = _YES if request.startswith(_WANTED) and _END in request else _NO
    if verdict is _YES and asked_for(request) not in (None, own):
        verdict = _NOT_ME
    return verdict + b"\r\nDate: " + formatdate(now, usegmt=True).encode() + _REST
