# SPDX-License-Identifier: Apache-2.0
"""Listening on this host's addresses where strangers reach it: patiently, and with an end to everything.

    Listening     binds; an address that can not be had is said in status and tried again
    Connections   takes TCP connections: bounded in number and a second, one more ends the oldest

A flood costs this process a bounded part of a CPU, at the price of the others who ask the same server.
Called by: agent.health_server, agent.names_server.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine

from loguru import logger

from core.allowance import Allowance
from core.backoff import Backoff

BACKLOG = 128
ACCEPT_PAUSE_S = 1.0


class Listening:
    """Binds the sockets of one server.  `errors` says of an address why nobody can be served there yet."""

    def __init__(self, what: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self.port = port
        self.errors: dict[str, str] = {}
        self._what = what  # in the plural, for the log: "health probes"
        self._kind = kind

    async def at(self, address: str) -> socket.socket:
        """Return a socket that is bound to an address, and listens if it can; however long that takes."""
        backoff = Backoff(base=1.0, cap=30.0)
        while True:
            try:
                sock = _bind(address, self.port, self._kind)
            except OSError as error:
                self._failed(address, f"{error.strerror or error}")
            else:
                self.errors.pop(address, None)
                logger.info("{} are answered at {} port {}", self._what, address, self.port)
                return sock
            await asyncio.sleep(backoff.next())

    def _failed(self, address: str, reason: str) -> None:
        if self.errors.get(address) != reason:
            where = f"{address} port {self.port}"
            logger.warning("{} can not be answered at {}: {}", self._what, where, reason)
        self.errors[address] = reason


class Connections:
    """Takes connections and has each answered by `answer`, which need not close.  Owner of its tasks."""

    def __init__(
        self, answer: Callable[[socket.socket], Coroutine[None, None, None]], most: int, allowance: Allowance
    ) -> None:
        self.open: dict[asyncio.Task[None], None] = {}
        self._answer = answer
        self._most = most
        self._allowance = allowance

    async def accept(self, sock: socket.socket) -> None:
        """Take connections of a listening socket until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(sock)
            except OSError as error:  # no descriptor is free, or it was gone before it was taken
                logger.warning("a connection can not be taken: {}", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            self._take(connection)
            await asyncio.sleep(self._allowance.spend(time.monotonic()))

    async def end(self) -> None:
        """End all that are open."""
        for answering in list(self.open):
            answering.cancel()
        await asyncio.gather(*self.open, return_exceptions=True)

    def _take(self, connection: socket.socket) -> None:
        if len(self.open) >= self._most:
            next(iter(self.open)).cancel()  # silent ones keep nobody out
        answering = asyncio.create_task(self._answer(connection))
        self.open[answering] = None

        def done(task: asyncio.Task[None]) -> None:
            self.open.pop(task, None)
            connection.close()

        answering.add_done_callback(done)


def _bind(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    try:
        made.setblocking(False)
        if kind == socket.SOCK_STREAM:  # of UDP it would let two agents share a port, and each get a part
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
        if kind == socket.SOCK_STREAM:
            made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    return made
