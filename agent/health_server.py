# SPDX-License-Identifier: Apache-2.0
"""Answers the health probes of other nodes: `GET /hello` at cluster-health-port of the node's addresses.

A real cilium-health asks the same.  Whoever reaches the port is a stranger, so it gets nothing else: 200 or
404, no body, no header that says who answers; a bounded request in a bounded time; and a flood costs this
process a bounded part of a CPU, at the price of the others' probes.  An HTTP server for applications has no
limit for the time that headers take, hence this one.  An address that can not be listened on is said in
status and tried again.  Run as a supervised task.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence

from loguru import logger

from core.backoff import Backoff

REQUEST_MAX = 4096
REQUEST_TIMEOUT_S = 5.0
# A request comes in one piece, or in a few; one that comes byte by byte costs a wake each.
PIECES_MAX = 8
BACKLOG = 128
# Open at once; one more ends the oldest, so that silent ones keep nobody out.
CONNECTIONS_MAX = 128
# Connections a second in the long run, and at once.  Of 10 000 nodes about 20 a second come, 40 with IPv6;
# one costs 0.2 to 0.4 ms, so that a flood costs 4 % of a CPU.
RATE = 100.0
BURST = 200.0
ACCEPT_PAUSE_S = 1.0

_END = b"\r\n\r\n"
_WANTED = b"GET /hello HTTP/1."
_YES = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_NO = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class HealthServer:
    """Listens until cancelled.  `errors` says of an address why nobody can be answered there yet."""

    def __init__(self, addresses: Sequence[str], port: int) -> None:
        self.port = port
        self.errors: dict[str, str] = {}
        self._addresses = tuple(addresses)
        self._open: dict[asyncio.Task[None], None] = {}
        self._allowance = Allowance(RATE, BURST)

    async def run(self) -> None:
        """Listen on every address, and go on trying where that is refused."""
        try:
            async with asyncio.TaskGroup() as group:
                for address in self._addresses:
                    group.create_task(self._serve(address))
        finally:
            for answering in list(self._open):
                answering.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, address: str) -> None:
        with await self._listening(address) as sock:
            loop = asyncio.get_running_loop()
            while True:
                try:
                    connection, _ = await loop.sock_accept(sock)
                except OSError as error:  # no descriptor is free, or it was gone before it was taken
                    logger.warning("a health probe can not be taken: {}", error.strerror)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                self._take(connection)
                await asyncio.sleep(self._allowance.spend(time.monotonic()))

    async def _listening(self, address: str) -> socket.socket:
        backoff = Backoff(base=1.0, cap=30.0)
        while True:
            try:
                sock = _bind(address, self.port)
            except OSError as error:
                self._failed(address, f"{error.strerror or error}")
            else:
                self.errors.pop(address, None)
                logger.info("health probes are answered at {} port {}", address, self.port)
                return sock
            await asyncio.sleep(backoff.next())

    def _failed(self, address: str, reason: str) -> None:
        if self.errors.get(address) != reason:
            logger.warning("health probes can not be answered at {} port {}: {}", address, self.port, reason)
        self.errors[address] = reason

    def _take(self, connection: socket.socket) -> None:
        if len(self._open) >= CONNECTIONS_MAX:
            next(iter(self._open)).cancel()
        answering = asyncio.create_task(_answer(connection))
        self._open[answering] = None

        def done(task: asyncio.Task[None]) -> None:
            self._open.pop(task, None)
            connection.close()

        answering.add_done_callback(done)


async def _answer(connection: socket.socket) -> None:
    """Read one request and answer it; the caller closes."""
    loop = asyncio.get_running_loop()
    request = b""
    with contextlib.suppress(OSError):
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            for _ in range(PIECES_MAX):
                request += await loop.sock_recv(connection, REQUEST_MAX - len(request))
                if _END in request or len(request) in (0, REQUEST_MAX):
                    break
            await loop.sock_sendall(connection, answer_to(request))


def answer_to(request: bytes) -> bytes:
    """Return the answer to a request's head.  Pure."""
    return _YES if request.startswith(_WANTED) and _END in request else _NO


def _bind(address: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
        made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    return made


class Allowance:
    """So many things at once, and so many a second in the long run.  Pure: times are handed in."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = 0.0

    def spend(self, now: float) -> float:
        """Take one; return the seconds to pause before the next."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - 1.0
        self._at = now
        return max(0.0, -self._left / self._rate)
