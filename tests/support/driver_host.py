# SPDX-License-Identifier: Apache-2.0
"""The network driver on a real plugin socket, between a fake engine and models of the rest."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import aiohttp

from agent.checkpoint import Checkpoint
from agent.driver import Driver
from agent.endpoint import Endpoint
from agent.endpoints import EndpointManager
from agent.engine import Engine
from agent.pool import Pool
from core.table import Table
from identity.filter import LabelFilter
from tests.support.agent_models import ModelAllocator, ModelKernel
from tests.support.fake_engine import FakeEngine

NETWORK = "n" * 64


class DriverHost:
    """Everything that a driver call goes through; `call` speaks the engine's protocol."""

    def __init__(self, directory: Path, fake: FakeEngine, session: aiohttp.ClientSession) -> None:
        self.fake = fake
        self.kernel = ModelKernel()
        self.allocator = ModelAllocator()
        self.checkpoint = Checkpoint(directory / "state")
        self.engine = Engine(str(fake.socket))
        self.socket = directory / "plugins" / "holdfast.sock"
        self._session = session
        self._build()

    def _build(self) -> None:
        self.table: Table[int, Endpoint] = Table("endpoints", ("agent",))
        self.manager = EndpointManager(
            self.table,
            Pool(IPv4Network("10.9.0.0/24")),
            self.checkpoint,
            self.allocator,
            LabelFilter(()),
            self.kernel,
        )
        self.kernel.wanted = self.table.source("agent").entries()  # type: ignore[assignment]
        self.driver = Driver(self.socket, self.manager, self.engine, self.checkpoint)
        self._serving: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Have the driver serve; return when the socket is there."""
        self._serving = asyncio.create_task(self.driver.serve())
        while not self.socket.exists():
            await asyncio.sleep(0.005)

    async def stop_agent(self) -> None:
        """End the agent; the engine, the kernel and the checkpoint stay."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait({self._serving})
        await self.manager.stop()

    async def restart(self) -> None:
        """End the agent and start another one from the checkpoint."""
        await self.stop_agent()
        self.allocator = ModelAllocator()
        self._build()
        self.manager.restore()
        self.driver.restore()
        await self.serve()

    async def raw(self, method: str, body: bytes) -> Any:
        async with self._session.post(f"http://plugin/{method}", data=body) as response:
            assert response.status == 200
            return await response.json(content_type=None)

    async def call(self, method: str, **arguments: Any) -> Any:
        """Call ``NetworkDriver.<method>``."""
        return await self.raw(f"NetworkDriver.{method}", json.dumps(arguments).encode())

    async def on(self, method: str, endpoint: str, **arguments: Any) -> Any:
        """Call a method about one engine endpoint."""
        return await self.call(method, NetworkID=NETWORK, EndpointID=endpoint, **arguments)

    async def start(self, name: str, **labels: str) -> Endpoint:
        """What the engine does for `docker run`; the engine endpoint is ``e-<name>``."""
        engine_id = f"e-{name}"
        await self.on("CreateEndpoint", engine_id, Interface={"Address": "", "MacAddress": ""})
        await self.on("Join", engine_id, SandboxKey=f"/run/netns/{name}")
        self.fake.add_container(
            f"c-{name}", name, network=NETWORK, endpoint=engine_id, labels=labels, state="created"
        )
        for _ in range(2):
            assert await self.on("EndpointOperInfo", engine_id) == {"Value": {}}
        self.fake.containers[f"c-{name}"]["State"] = "running"
        found = self.manager.by_engine_id(engine_id)
        assert found is not None
        return found

    async def stop(self, name: str) -> None:
        """What the engine does for `docker rm -f`."""
        for method in ("RevokeExternalConnectivity", "Leave", "DeleteEndpoint"):
            assert await self.on(method, f"e-{name}") == {}
        self.fake.remove_container(f"c-{name}")


@contextlib.asynccontextmanager
async def driver_host(directory: Path) -> AsyncIterator[DriverHost]:
    """Yield a host whose driver serves and whose engine has one network of ours."""
    socket = directory / "plugins" / "holdfast.sock"
    async with (
        FakeEngine(directory / "engine.sock") as fake,
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
    ):
        fake.add_network(NETWORK, "holdfast")
        host = DriverHost(directory, fake, session)
        try:
            await host.serve()
            yield host
        finally:
            await host.stop_agent()
            await host.engine.close()
