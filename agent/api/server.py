# SPDX-License-Identifier: Apache-2.0
"""The listening side of the API: a unix socket for `holdfast`, and a TCP port for Prometheus if asked for.

The socket appears under its name only once it accepts connections, replaces what a dead agent left, and is
refused when a living agent has it.  Called by the composition root, as a supervised child::

    await ApiServer(view, socket_path, prometheus_address, limits).run()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web
from loguru import logger

from agent.api.errors import Conflict
from agent.api.handlers import Handlers
from agent.api.view import AgentView
from agent.api.wire import MAX_BODY, errors_as_json, timed
from agent.limits import Limits

SOCKET_MODE = 0o660  # root and whoever the socket's group is given to
BACKLOG = 128
# How long requests under way are waited for when the agent ends; monitors are told before.
SHUTDOWN_S = 2.0


def build_app(view: AgentView, limits: Limits) -> web.Application:
    """Return the application with every route."""
    app = web.Application(middlewares=[timed, errors_as_json], client_max_size=MAX_BODY)
    app.add_routes(Handlers(view, limits).routes())
    return app


def build_metrics_app(view: AgentView, limits: Limits) -> web.Application:
    """Return the application of the TCP port: it shows metrics and nothing else."""
    app = web.Application(middlewares=[errors_as_json], client_max_size=1)
    app.add_routes([web.get("/metrics", Handlers(view, limits).metrics)])
    return app


class ApiServer:
    """Serves one view until cancelled.  `prometheus` is host:port, :port or empty; `limits` else built-in."""

    def __init__(
        self, view: AgentView, path: Path, prometheus: str = "", limits: Limits | None = None
    ) -> None:
        self.view = view
        self.path = path
        self.prometheus = prometheus
        self.limits = limits or Limits()
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Serve; Conflict when another agent has the socket, OSError when an address can not be bound."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(_on_socket(build_app(self.view, self.limits), self.path))
            if self.prometheus:
                await stack.enter_async_context(
                    _on_port(build_metrics_app(self.view, self.limits), self.prometheus)
                )
            stack.callback(
                self.view.monitor.close
            )  # first of all when this ends: streams never do by themselves
            self.ready.set()
            await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _running(app: web.Application) -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S, handle_signals=False)
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _on_socket(app: web.Application, path: Path) -> AsyncIterator[None]:
    refuse_if_alive(path)
    async with _running(app) as runner:
        listening = _bind(path)
        inode = os.stat(path).st_ino
        try:
            await web.SockSite(runner, listening, backlog=BACKLOG).start()
            logger.info("API on {}", path)
            yield
        finally:
            _remove(path, inode)


@contextlib.asynccontextmanager
async def _on_port(app: web.Application, address: str) -> AsyncIterator[None]:
    host, _, port = address.rpartition(":")
    async with _running(app) as runner:
        await web.TCPSite(runner, host.strip("[]") or None, int(port)).start()
        logger.info("metrics on {}", address)
        yield


def refuse_if_alive(path: Path) -> None:
    """Raise Conflict when a living agent has the socket."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(os.fspath(path))
        raise Conflict(f"another agent serves {path}", hint="stop it, or give this one its own socket-path")


def _bind(path: Path) -> socket.socket:
    """Return a listening socket that has its mode before anybody can see its name."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listening.bind(os.fspath(temporary))
    temporary.chmod(SOCKET_MODE)
    listening.listen(BACKLOG)
    temporary.rename(path)
    return listening


def _remove(path: Path, inode: int) -> None:
    """Remove the socket unless a successor has replaced it."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == inode:
            path.unlink()
