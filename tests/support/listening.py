# SPDX-License-Identifier: Apache-2.0
"""A server of the agent's, run on the loopback for the length of a block."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Protocol

from agent.listener import Connections
from tests.support.eventually import eventually

LOOPBACK = "127.0.0.1"


class Server(Protocol):
    """What answers strangers: agent.health_server, agent.names_server."""

    connections: Connections

    async def run(self) -> None: ...


@contextlib.asynccontextmanager
async def listening(server: Server, port: int) -> AsyncIterator[None]:
    """Run a server until the block ends; it must not end before, and leaves no connection."""
    task = asyncio.create_task(server.run())
    try:
        await eventually(lambda: can_connect(port), "the server listens")
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not server.connections.open, "a connection is left"


def can_connect(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((LOOPBACK, port)) == 0
