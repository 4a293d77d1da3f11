# SPDX-License-Identifier: Apache-2.0
"""Trying again, for ever, without hammering and without silence.

The loops that talk to etcd (watcher, session, election) share this: a pause with full jitter between
attempts, one registered wait (`core.waiting`) over all attempts until it works again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType

from core.backoff import Backoff
from core.waiting import Wait, waiting

# Seconds.  Half a minute at most: with full jitter 10 000 hosts make 670 attempts a second.
RETRY_BASE_S, RETRY_CAP_S = 0.2, 30.0
# Trouble that a person has to end (a missing right) is not worth quick attempts.
SLOW_BASE_S = 5.0
# What worked for this long was a success: the next trouble starts with short pauses again.
HEALTHY_AFTER_S = 10.0


class Patience:
    """Use as a context manager around the loop; `purpose` is what the wait is for."""

    def __init__(self, purpose: str, *, base: float = RETRY_BASE_S, cap: float = RETRY_CAP_S) -> None:
        self.purpose = purpose
        self.backoff = Backoff(base, cap)
        self._base = base
        self._stack = contextlib.ExitStack()
        self._wait: Wait | None = None
        self._answered_at: float | None = None  # in this attempt

    def __enter__(self) -> Patience:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.works()

    def attempt(self, note: str = "") -> None:
        """An attempt begins; unless something works already, this is a wait that others can see."""
        self._answered_at = None
        self.troubled(note)

    def troubled(self, note: str = "") -> None:
        """It does not work, for the reason in `note`."""
        if self._wait is None:
            self._wait = self._stack.enter_context(waiting("etcd", self.purpose))
        self._wait.note = note or self._wait.note

    def answered(self) -> None:
        """etcd does in this attempt what it is asked for, though what is waited for may be still to come."""
        if self._answered_at is None:
            self._answered_at = time.monotonic()

    def works(self) -> None:
        """It works: nothing is being waited for."""
        self.answered()
        self._stack.close()
        self._wait = None

    async def pause(self, *, slow: bool = False) -> None:
        """Sleep before the next attempt.  One that only waited, until its time was up, was no success."""
        if self._answered_at is not None and time.monotonic() - self._answered_at > HEALTHY_AFTER_S:
            self.backoff.reset()
        self.backoff.base = SLOW_BASE_S if slow else self._base
        await asyncio.sleep(self.backoff.next())
