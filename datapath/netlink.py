# SPDX-License-Identifier: Apache-2.0
"""rtnetlink on the running event loop: one socket, pyroute2's errors turned into ours.

Responsible for: naming what was attempted in every error, flattening pyroute2's messages, and one request
at a time: the kernel answers EBUSY to a second dump on the same socket.
Measured (2 cores): 0.2–0.4 ms a request on the loop, twice that through a thread.
Called by: `datapath.devices`, `datapath.routes`, `datapath.attach`.
"""

from __future__ import annotations

import asyncio
import inspect
from types import TracebackType
from typing import Any, Self

from datapath.errors import DatapathError
from datapath.routemessages import RouteSocket
from datapath.rtnetlink import AsyncIPRoute, NetlinkError

Message = Any  # pyroute2's: fields by [], attributes by .get("name")


class Netlink:
    """A socket in the network namespace that the opening task was in; use as an async context manager."""

    def __init__(self) -> None:
        self._socket = AsyncIPRoute()
        self._turn = asyncio.Lock()
        self.routes = RouteSocket()  # for many at once; blocking

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the sockets."""
        self.routes.close()
        closing = self._socket.close()
        if inspect.isawaitable(closing):
            await closing

    async def request(
        self, what: str, error: type[DatapathError], kind: str, command: str, /, **arguments: Any
    ) -> list[Message]:
        """Run one request (`kind` link, addr, route, neigh) and return the answer's messages.

        Several tasks may call it at once: each waits for its turn.  Raises `error` with `what` and the
        kernel's words; its __cause__ is the NetlinkError.
        """
        try:
            async with self._turn:
                answer = await getattr(self._socket, kind)(command, **arguments)
                if command.startswith("dump"):
                    return [message async for message in answer]
                return list(answer or ())
        except NetlinkError as refused:
            raise error(f"{what}: {refused.args[1]}") from refused


def errno_of(error: BaseException) -> int:
    """Return the kernel's errno behind an error that `Netlink.request` raised, or 0."""
    cause = error.__cause__
    return int(cause.code) if isinstance(cause, NetlinkError) else 0
