# SPDX-License-Identifier: Apache-2.0
"""Waiting for something to become true, without a fixed sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

DEADLINE_S = 30.0


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], what: str, *, deadline: float = DEADLINE_S
) -> None:
    """Return when `condition()` is true; AssertionError that names `what` after `deadline` seconds."""
    end = time.monotonic() + deadline
    while True:
        result = condition()
        if await result if isinstance(result, Awaitable) else result:
            return
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        await asyncio.sleep(0.02)
