# SPDX-License-Identifier: Apache-2.0
"""Netlink work inside another network namespace, without moving the event loop there.

Responsible for: a thread of its own per visit, which enters the namespace, works and ends — a pooled
thread that failed to come back would do the next job in a stranger's namespace.  About 2 ms a visit.
Called by: `datapath.devices`.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from datapath.errors import DeviceError
from datapath.netlink import Netlink

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def enter(netns: int) -> None:
    """Move the calling thread into the namespace of descriptor `netns`.  Raises DeviceError."""
    if _libc.setns(netns, CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise DeviceError(f"network namespace can not be entered: {reason}")


def is_namespace(path: Path) -> bool:
    """True when a namespace is at `path`: all of them are in one file system of the kernel's own."""
    try:
        return path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False


def open_namespace(path: Path) -> int:
    """Return a descriptor of the namespace at `path`.  Raises DeviceError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"network namespace {path} can not be opened: {error.strerror}") from error


async def inside(netns: int, work: Callable[[Netlink], Awaitable[T]]) -> T:
    """Run `work` with a socket in the namespace of descriptor `netns`; return what it returns."""
    with ThreadPoolExecutor(1, thread_name_prefix="netns") as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, _visit, netns, work)


def _visit(netns: int, work: Callable[[Netlink], Awaitable[T]]) -> T:
    enter(netns)

    async def visit() -> T:
        async with Netlink() as netlink:
            return await work(netlink)

    return asyncio.run(visit())
