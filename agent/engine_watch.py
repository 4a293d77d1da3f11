# SPDX-License-Identifier: Apache-2.0
"""The second, self-healing path from the engine to the endpoints: events, and a full list on every
(re)connection and every few minutes.

The driver is told of starts and stops; this watch repairs what the driver missed while the agent or the
engine was down: endpoints whose container is gone are collected after a grace, endpoints without an
identity get it, containers that could not start without it are started.  It also knows which running
containers are not managed at all, so that status can say it.

Events can not be replayed over an engine restart, so each connection subscribes first and lists then.

An engine without live-restore ends its containers before itself, all at once and the agent's among them:
`last_calls` then keeps the driver there until the others are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from agent.driver import Driver
from agent.endpoint import Endpoint
from agent.endpoints import EndpointManager
from agent.engine import Engine, EngineContainer
from agent.errors import AgentError, EngineError
from agent.late_starts import LateStarts
from core.backoff import Backoff, jittered
from core.waiting import waiting

# Events carry every change; the list is for what no event tells.
LIST_EVERY_S = 300.0
# Several events of one start are one list.
SETTLE_S = 0.3
# A list of hundreds costs the engine and us while they start, so the next waits ten times as long as it took.
# Not for ever: a container that the driver could not identify is denied until a list shows it.
PAUSE_OF_LISTS = 10.0
SETTLE_CAP_S = 3.0
# A container of ours that the engine does not show: it may be starting, or the engine itself may be.
COLLECT_AFTER_S = 60.0
# A socket of this host costs nothing to try, and containers wait for their identities.
RECONNECT_CAP_S = 5.0
# Endpoints compared at the same time: each asks the engine twice, and may wait for etcd.
AT_ONCE = 8
# What ends within this of the agent's own signal was ended by the same hand.
TOGETHER_S = 2.0
# The engine kills containers 10 s after it asked them to end, the agent's after the 20 s of its compose file.
LAST_CALLS_S = 15.0

RUNNING = frozenset({"running", "paused", "restarting"})
# The label of Holdfast's own containers (compose/): they belong on the host's network.
OWN_ROLE = "holdfast.role"

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
        self._list_took_s = 0.0
        self._changed = asyncio.Event()
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._late = LateStarts(engine)
        self._starting: asyncio.Task[None] | None = None
        self._asked_to_end: dict[int, float] = {}  # endpoint → when its container was, monotonic seconds

    async def run(self) -> None:
        """Connect, list, follow; reconnect with back-off for ever."""
        backoff = Backoff(base=0.2, cap=RECONNECT_CAP_S)
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
        self._late = LateStarts(self._engine)
        await self._driver.learn_networks()
        subscribed = asyncio.Event()
        reader = asyncio.create_task(self._read_events(subscribed), name="engine-events")
        # A reader that ends (with the engine's error) wakes the lister, which then has nothing to wait for.
        reader.add_done_callback(lambda _: self._changed.set())
        reader.add_done_callback(lambda _: subscribed.set())
        try:
            await subscribed.wait()
            await self._lists(backoff, reader)
            await reader
        finally:
            ending = {reader, self._starting} if self._starting else {reader}
            self._starting = None
            for each in ending:
                each.cancel()
            await asyncio.wait(ending)

    async def _read_events(self, subscribed: asyncio.Event) -> None:
        async for event in self._engine.events(subscribed):
            action = str(event.get("Action", "")).partition(":")[0]
            if action in RELEVANT:
                self._changed.set()
            elif action == "kill":
                self._ends(_container_id(event))

    def _ends(self, container_id: str) -> None:
        """Note that a container was asked to end; one of its former lives may still be there as well."""
        for _, endpoint in self._endpoints.table.items():
            if container_id == endpoint.container_id and endpoint.id not in self._gone_since:
                self._asked_to_end[endpoint.id] = time.monotonic()

    async def _lists(self, backoff: Backoff, reader: asyncio.Task[None]) -> None:
        while not reader.done():
            self._changed.clear()
            await self.refresh()
            backoff.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(jittered(self._list_pause())):
                    await self._changed.wait()
            await asyncio.sleep(min(max(SETTLE_S, PAUSE_OF_LISTS * self._list_took_s), SETTLE_CAP_S))

    def _list_pause(self) -> float:
        # Something waits for its grace to end: look again then, not in five minutes.
        return COLLECT_AFTER_S / 4 if self._gone_since else LIST_EVERY_S

    async def refresh(self) -> None:
        """List once and act on it.  Raises EngineError; nothing is deleted then."""
        asked_at = time.monotonic()
        containers = await self._engine.containers()
        self._list_took_s = time.monotonic() - asked_at
        running = {each.id: each for each in containers if each.state in RUNNING}
        self.view.containers = len(running)
        self.view.unmanaged = unmanaged(running, set(self._driver.networks))
        self.view.listed_at = time.time()
        self.view.error = ""
        # One that is starting is "created" and has its endpoint already.
        alive = {
            endpoint_id: each
            for each in containers
            if each.state in RUNNING or each.state == "created"
            for endpoint_id in each.endpoints.values()
        }
        managed = [each for _, each in self._endpoints.table.items() if each.engine_endpoint_id]
        present = {each.id for each in managed}
        self._gone_since = {number: at for number, at in self._gone_since.items() if number in present}
        self._asked_to_end = {number: at for number, at in self._asked_to_end.items() if number in present}
        self._driver.identified &= present
        self._start_late(containers)
        # Which endpoints there are is known now; identities may take as long as etcd is away.
        self.first_list.set()
        async with asyncio.TaskGroup() as checks:
            for endpoint in managed:
                checks.create_task(self._check_in_turn(endpoint, alive.get(endpoint.engine_endpoint_id)))

    def _start_late(self, containers: list[EngineContainer]) -> None:
        """Start what the engine could not, beside the lists: a start waits for the driver's calls."""
        if self._starting is not None:
            if not self._starting.done():
                return
            self._starting.result()
        late = self._late.start_again(containers, set(self._driver.networks))
        self._starting = asyncio.create_task(late, name="late starts")

    async def _check_in_turn(self, endpoint: Endpoint, container: EngineContainer | None) -> None:
        async with self._turns:
            now = self._endpoints.store.find(endpoint.id)
            if now is not None:  # it may have gone while others were looked at
                await self._check(now, container)

    async def _check(self, endpoint: Endpoint, container: EngineContainer | None) -> None:
        try:
            if container is None:
                await self._collect(endpoint)
            else:
                self._gone_since.pop(endpoint.id, None)
                await self._compare(endpoint, container)
        except AgentError as error:
            logger.warning("endpoint {}: {}", endpoint.id, error)

    async def _compare(self, endpoint: Endpoint, container: EngineContainer) -> None:
        """Give an endpoint the identity it lacks; one that nobody has joined yet is the driver's.

        Labels of a container never change, but what of them counts may have with the configuration: so
        each endpoint is compared once in the life of the agent, mostly by the driver at its start.  A name
        changes at any time.
        """
        known = endpoint.id in self._driver.identified and container.name == endpoint.container_name
        if endpoint.connected and endpoint.joined and not (endpoint.identity and known):
            await self._driver.identify(endpoint)

    async def _collect(self, endpoint: Endpoint) -> None:
        """Remove an endpoint whose container has been gone for the grace."""
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

    async def last_calls(self) -> None:
        """Return when the agent may end: soon, or once the containers are gone that were ended with it.

        The end of a container is three calls of the driver, and the engine repeats for 15 s each that nobody
        answers.  One that ends itself would be killed in the middle, and never tell which endpoints are gone.
        """
        begun = time.monotonic()
        changes = self._endpoints.table.subscribe()
        try:
            await asyncio.sleep(SETTLE_S)  # its signal and the news of theirs cross
            async with asyncio.timeout(LAST_CALLS_S):
                while self._ended_since(begun - TOGETHER_S):
                    changes.take()
                    await changes.wait()
        except TimeoutError:
            logger.warning("containers that end are not gone after {:g} s: the agent is", LAST_CALLS_S)
        finally:
            self._endpoints.table.unsubscribe(changes)

    def _ended_since(self, start: float) -> bool:
        """True while there are endpoints of containers that were asked to end since then."""
        table = self._endpoints.table
        return any(number in table for number, at in self._asked_to_end.items() if at > start)


def _container_id(event: dict[str, Any]) -> str:
    """Return whom an event is about; an id that no container has when it does not say."""
    actor = event.get("Actor")
    return str(actor.get("ID") or "?") if isinstance(actor, dict) else "?"


def unmanaged(running: Mapping[str, EngineContainer], networks: set[str]) -> dict[str, str]:
    """Return the running containers with traffic that policy does not see, with the reason.  Pure."""
    result: dict[str, str] = {}
    for container in running.values():
        if OWN_ROLE in container.labels:
            continue
        if networks.intersection(container.endpoints):
            if networks.issuperset(container.endpoints):
                continue
            result[container.name] = "is also on another network of docker's: what goes there has no policy"
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
