# SPDX-License-Identifier: Apache-2.0
"""The second, self-healing path from the engine to the endpoints: events, and a full list on every
(re)connection and every few minutes.

The driver is told of starts and stops; this watch repairs what the driver missed while the agent or the
engine was down: endpoints whose container is gone are collected after a grace, endpoints without an
identity get it.  It also knows which running containers are not managed at all, so that status can say it.

Events can not be replayed over an engine restart, so each connection subscribes first and lists then.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from loguru import logger

from agent.driver import Driver
from agent.endpoint import Endpoint
from agent.endpoints import EndpointManager
from agent.engine import Engine, EngineContainer
from agent.errors import AgentError, EngineError
from core.backoff import Backoff, jittered
from core.waiting import waiting

# Events carry every change; the list is for what no event tells.
LIST_EVERY_S = 300.0
# Several events of one start are one list.
SETTLE_S = 0.3
# A container of ours that the engine does not show: it may be starting, or the engine itself may be.
COLLECT_AFTER_S = 60.0

RELEVANT = frozenset({"start", "die", "destroy", "connect", "disconnect", "rename", "create", "unpause"})


@dataclass
class EngineView:
    """What the engine said last; `error` is empty while it answers."""

    version: str = ""
    error: str = "not asked yet"
    containers: int = 0
    unmanaged: dict[str, str] = field(default_factory=dict)  # container name → why
    listed_at: float = 0.0


class EngineWatch:
    """Follows one engine; owner of `view`."""

    def __init__(self, engine: Engine, endpoints: EndpointManager, driver: Driver) -> None:
        self.view = EngineView()
        self.first_list = asyncio.Event()
        self._engine = engine
        self._endpoints = endpoints
        self._driver = driver
        self._gone_since: dict[int, float] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Connect, list, follow; reconnect with back-off for ever."""
        backoff = Backoff(base=0.2, cap=30.0)
        while True:
            try:
                await self._connect(backoff)
            except EngineError as error:
                self.view.error = str(error)
                with waiting(f"engine {self._engine.socket_path}", "connection") as wait:
                    wait.note = error.message
                    await asyncio.sleep(backoff.next())

    async def _connect(self, backoff: Backoff) -> None:
        self.view.version = await self._engine.version()
        reader = asyncio.create_task(self._read_events(), name="engine-events")
        # A reader that ends (with the engine's error) wakes the lister, which then has nothing to wait for.
        reader.add_done_callback(lambda _: self._changed.set())
        try:
            await self._lists(backoff, reader)
            await reader
        finally:
            reader.cancel()
            await asyncio.wait({reader})

    async def _read_events(self) -> None:
        async for event in self._engine.events():
            if str(event.get("Action", "")).partition(":")[0] in RELEVANT:
                self._changed.set()

    async def _lists(self, backoff: Backoff, reader: asyncio.Task[None]) -> None:
        while not reader.done():
            self._changed.clear()
            await self.refresh()
            backoff.reset()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), jittered(self._list_pause()))
            await asyncio.sleep(SETTLE_S)

    def _list_pause(self) -> float:
        # Something waits for its grace to end: look again then, not in five minutes.
        return COLLECT_AFTER_S / 4 if self._gone_since else LIST_EVERY_S

    async def refresh(self) -> None:
        """List once and act on it.  Raises EngineError; nothing is deleted then."""
        containers = await self._engine.containers()
        running = {each.id: each for each in containers if each.state in ("running", "paused", "restarting")}
        self.view.containers = len(running)
        self.view.unmanaged = unmanaged(running, set(self._driver.networks))
        self.view.listed_at = time.time()
        self.view.error = ""
        alive = {endpoint_id for each in running.values() for endpoint_id in each.endpoints.values()}
        for _, endpoint in list(self._endpoints.table.items()):
            if endpoint.engine_endpoint_id:
                await self._check(endpoint, endpoint.engine_endpoint_id in alive)
        self.first_list.set()

    async def _check(self, endpoint: Endpoint, alive: bool) -> None:
        if alive:
            self._gone_since.pop(endpoint.id, None)
            if endpoint.connected and not endpoint.identity:
                await self._identify(endpoint)
            return
        since = self._gone_since.setdefault(endpoint.id, time.monotonic())
        if time.monotonic() - since < COLLECT_AFTER_S:
            return
        logger.warning(
            "endpoint {} ({}) has no running container for {:g} s: collected",
            endpoint.id,
            endpoint.container_name or endpoint.engine_endpoint_id[:12],
            COLLECT_AFTER_S,
        )
        await self._endpoints.delete(endpoint.id)
        self._gone_since.pop(endpoint.id, None)

    async def _identify(self, endpoint: Endpoint) -> None:
        try:
            await self._driver.identify(endpoint)
        except AgentError as error:
            logger.warning("endpoint {} has still no identity: {}", endpoint.id, error)


def unmanaged(running: Mapping[str, EngineContainer], networks: set[str]) -> dict[str, str]:
    """Return the running containers that no network of ours reaches, with the reason.  Pure."""
    result: dict[str, str] = {}
    for container in running.values():
        if networks.intersection(container.endpoints):
            continue
        mode = container.network_mode
        if mode == "host":
            result[container.name] = "uses the host's network: its traffic is identity host"
        elif mode == "none":
            continue
        elif mode.startswith("container:"):
            owner = running.get(mode.partition(":")[2])
            if owner is not None and networks.intersection(owner.endpoints):
                continue
            result[container.name] = f"shares the network of {owner.name if owner else 'another container'}"
        else:
            network = "bridge" if mode == "default" else mode
            result[container.name] = f"is on docker's network {network}: no identity, no policy"
    return result
