# SPDX-License-Identifier: Apache-2.0
"""A container engine of a test's own, on a real unix socket: what the agent asks, and how it can go wrong.

`FakeEngine` answers `/version`, `/networks`, `/containers/json` and `/events` from its own state; `broken`
replaces the answer of a path by any bytes, `cut` ends a connection in the middle of an answer, and nobody
gets any while `serving` is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from aiohttp import web


class FakeEngine:
    """An engine with containers on networks; use as an async context manager."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.version: Any = {"Version": "20.10.24", "ApiVersion": "1.41", "MinAPIVersion": "1.12"}
        self.networks: dict[str, dict[str, Any]] = {}
        self.containers: dict[str, dict[str, Any]] = {}
        self.broken: dict[str, tuple[int, bytes]] = {}  # path → (status, body)
        self._ends: dict[str, dict[str, Any]] = {}  # container → its inspection while it does not run
        self.cut: set[str] = set()  # paths whose answer ends in the middle
        self.asked: list[str] = []
        self.started: list[str] = []
        self.refusal = ""  # of every start
        self.serving = asyncio.Event()
        self.serving.set()
        self.listeners = 0
        self._streams: set[asyncio.Queue[bytes]] = set()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> FakeEngine:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        app.router.add_post("/v1.40/containers/{id}/start", self._start)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end_streams()
        assert self._runner is not None
        await self._runner.cleanup()

    # --- what there is

    def add_network(self, network_id: str, name: str, driver: str = "holdfast", subnet: str = "") -> None:
        config = [{"Subnet": subnet}] if subnet else []
        self.networks[network_id] = {
            "Id": network_id,
            "Name": name,
            "Driver": driver,
            "IPAM": {"Config": config},
            "Containers": {},
        }

    def add_container(
        self,
        container_id: str,
        name: str,
        *,
        network: str = "",
        endpoint: str = "",
        state: str = "running",
        mode: str = "default",
        labels: dict[str, str] | None = None,
    ) -> None:
        """Add one; with a network it is a member with this engine endpoint."""
        attached = {"n": {"NetworkID": network, "EndpointID": endpoint}} if network else {}
        self.containers[container_id] = {
            "Id": container_id,
            "Names": [f"/{name}"],
            "State": state,
            "Labels": labels or {},
            "NetworkSettings": {"Networks": attached},
            "HostConfig": {"NetworkMode": network or mode},
        }
        if network:
            self.networks[network]["Containers"][container_id] = {"EndpointID": endpoint, "Name": name}

    def end(self, container_id: str, error: str = "", restart_policy: str = "always") -> None:
        """Have a container be exited; with an error it could not be started."""
        self.containers[container_id]["State"] = "exited"
        self._ends[container_id] = {
            "Id": container_id,
            "State": {"Status": "exited", "Error": error},
            "HostConfig": {"RestartPolicy": {"Name": restart_policy}},
        }

    def remove_container(self, container_id: str) -> None:
        self.containers.pop(container_id, None)
        for network in self.networks.values():
            network["Containers"].pop(container_id, None)

    def emit(self, line: bytes) -> None:
        """Send a line to everybody who listens to events."""
        for stream in self._streams:
            stream.put_nowait(line)

    def end_streams(self) -> None:
        for stream in self._streams:
            stream.put_nowait(b"")

    # --- answering

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = "/" + request.match_info["path"].removeprefix("v1.40/")
        self.asked.append(request.path)
        await self.serving.wait()
        if path in self.broken:
            status, body = self.broken[path]
            return web.Response(status=status, body=body)
        if path == "/events":
            return await self._events(request)
        found = self._find(path, request)
        if found is None:
            return web.json_response({"message": "no such thing"}, status=404)
        if path in self.cut:
            return await self._half(request, json.dumps(found).encode())
        return web.json_response(found)

    async def _start(self, request: web.Request) -> web.Response:
        container_id = request.match_info["id"]
        self.started.append(container_id)
        if self.refusal:
            return web.json_response({"message": self.refusal}, status=500)
        self.containers[container_id]["State"] = "running"
        return web.Response(status=204)

    def _find(self, path: str, request: web.Request) -> Any:
        filters = json.loads(request.query.get("filters", "{}"))
        if path == "/version":
            return self.version
        if path == "/networks":
            drivers = filters.get("driver")
            return [
                {**each, "Containers": {}}
                for each in self.networks.values()
                if drivers is None or each["Driver"] in drivers
            ]
        if path.startswith("/networks/"):
            return self.networks.get(path.removeprefix("/networks/"))
        if path.startswith("/containers/") and path.endswith("/json") and path.count("/") == 3:
            return self._ends.get(path.split("/")[2])
        if path == "/containers/json":
            wanted = filters.get("id")
            return [each for key, each in self.containers.items() if wanted is None or key in wanted]
        return None

    @staticmethod
    async def _half(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        lines: asyncio.Queue[bytes] = asyncio.Queue()
        self._streams.add(lines)
        self.listeners += 1
        try:
            with contextlib.suppress(ConnectionError):
                while line := await lines.get():
                    await response.write(line)
        finally:
            self._streams.discard(lines)
        return response
