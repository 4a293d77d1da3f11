# SPDX-License-Identifier: Apache-2.0
"""The register of what this process is waiting for.

Patience must never look like a hang: every wait that may last says what it waits for in the log (at a
growing interval), in `holdfast status` and in the metric `holdfast_waiting_seconds`.  Use::

    with waiting("etcd 10.0.0.1:2379", "first connection"):
        await ...
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from loguru import logger

# First message after 2 s (shorter waits are not news), then each pause doubles up to 10 minutes.
FIRST_REPORT_S = 2.0
LONGEST_PAUSE_S = 600.0


@dataclass(eq=False)
class Wait:
    """One thing being waited for: `subject` (who) and `purpose` (what for); `note` may be updated."""

    subject: str
    purpose: str
    note: str = ""
    since: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def sentence(self) -> str:
        tail = f": {self.note}" if self.note else ""
        return f"waiting {self.seconds:.0f} s for {self.subject} ({self.purpose}){tail}"


_current: list[Wait] = []


def current() -> list[Wait]:
    """Return the waits under way, longest first."""
    return sorted(_current, key=lambda wait: wait.since)


@contextlib.contextmanager
def waiting(subject: str, purpose: str) -> Iterator[Wait]:
    """Register a wait for the length of the block and report it at a growing interval."""
    wait = Wait(subject, purpose)
    _current.append(wait)
    reporter = _start_reporter(wait)
    try:
        yield wait
    finally:
        _current.remove(wait)
        if reporter is not None:
            reporter.cancel()
        if wait.seconds >= FIRST_REPORT_S:
            logger.info("waited {:.1f} s for {} ({})", wait.seconds, subject, purpose)


def _start_reporter(wait: Wait) -> asyncio.Task[None] | None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    return loop.create_task(_report(wait), name=f"waiting:{wait.subject}")


async def _report(wait: Wait) -> None:
    pause = FIRST_REPORT_S
    while True:
        await asyncio.sleep(pause)
        logger.warning("{}", wait.sentence())
        pause = min(pause * 2, LONGEST_PAUSE_S)
