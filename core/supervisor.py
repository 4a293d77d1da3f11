# SPDX-License-Identifier: Apache-2.0
"""Supervision: what happens when a long-running task dies.

The composition root registers every child here with the answer to that question.  It is almost never
"exit": a network agent that ends itself takes the business down.  A child is a coroutine function; it
runs until cancelled, and one that returns or raises is restarted with back-off.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from loguru import logger

from core import metrics
from core.backoff import Backoff

# A child that lived this long before it died starts again with a fresh back-off.
HEALTHY_AFTER_S = 60.0


class OnDeath(enum.Enum):
    RESTART = "restart"  # start it again with back-off, for ever
    DEGRADE = "degrade"  # leave it dead, show it in status; everything else goes on
    EXIT = "exit"  # end the process in order: only where running on would do harm


@dataclass
class Child:
    """One supervised task.  Owner of every field: the supervisor."""

    name: str
    main: Callable[[], Awaitable[None]]
    on_death: OnDeath
    state: str = "starting"
    error: str = ""
    restarts: int = 0
    since: float = field(default_factory=time.time)


class Supervisor:
    """Runs children until `stop`; `children` is what status shows."""

    def __init__(self) -> None:
        self.children: dict[str, Child] = {}
        self.failed = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(
        self, name: str, main: Callable[[], Awaitable[None]], on_death: OnDeath = OnDeath.RESTART
    ) -> None:
        """Start a child; names are unique among the living."""
        if name in self._tasks and not self._tasks[name].done():
            raise ValueError(f"child {name} is already running")
        child = self.children[name] = Child(name, main, on_death)
        self._tasks[name] = asyncio.create_task(self._supervise(child), name=name)

    async def cancel(self, name: str) -> None:
        """End one child and forget it."""
        task = self._tasks.pop(name, None)
        self.children.pop(name, None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def stop(self) -> None:
        """Cancel every child, last started first, and wait for them."""
        for name in reversed(list(self._tasks)):
            await self.cancel(name)

    async def _supervise(self, child: Child) -> None:
        backoff = Backoff(base=0.5, cap=60.0)
        while True:
            started = time.monotonic()
            child.state, child.since = "running", time.time()
            try:
                await child.main()
                child.error = "returned"
            except Exception as error:  # noqa: BLE001 - the supervisor is where everything ends up
                child.error = f"{type(error).__name__}: {error}"
                logger.opt(exception=error).error("{} died: {}", child.name, child.error)
            child.restarts += 1
            child.state, child.since = "dead", time.time()
            metrics.TASK_DEATHS.labels(child.name).inc()
            if child.on_death is not OnDeath.RESTART:
                if child.on_death is OnDeath.EXIT:
                    self.failed.set()
                return
            if time.monotonic() - started > HEALTHY_AFTER_S:
                backoff.reset()
            await asyncio.sleep(backoff.next())
