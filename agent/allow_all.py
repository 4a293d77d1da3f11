# SPDX-License-Identifier: Apache-2.0
"""The agent's side of `holdfast allow-all`: what policy does not say stays in the maps while it is ordered.

The command writes the orders into the state directory and their entries into the maps, agent or not (see
`datapath.allowall`).  Here they are kept there whatever policy changes, given to new endpoints, said aloud,
and taken out when their time is over, which the kernel has acted on by then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from loguru import logger

from core import metrics
from core.backoff import jittered
from core.files import FileDamaged, set_aside
from datapath import allowall
from datapath.allowall import WHOLE_HOST, Now, Order
from datapath.policy_order import RawPolicyMap

# The command has written the maps itself: this is how soon it is also said.
LOOK_S = 2.0
REMIND_S = 600.0
_NO_FILE, _UNKNOWN = (0, 0, 0), (0, 0, 1)


class Maps(Protocol):
    """What is told that maps have to be compared: `agent.policy_maps.PolicyMaps`."""

    def compare(self, endpoint_ids: Collection[int] | None = None) -> None:
        """Have these maps, or all, compared with what they ought to hold."""
        ...


class AllowAll:
    """The orders in force on this host; `trouble` says why the file that tells them can not be used."""

    def __init__(self, directory: Path) -> None:
        self.trouble = ""
        self._directory = directory
        self._orders: tuple[Order, ...] = ()
        self._stamp = _NO_FILE
        self._told: frozenset[Order] = frozenset()
        self._reminded = 0.0

    def orders(self, now: Now | None = None) -> tuple[Order, ...]:
        """Return the orders in force; looks at the file, which costs microseconds while it is the same."""
        self._look()
        return allowall.in_force(self._orders, now or Now.read()) if self._orders else ()

    def entries(self, endpoint_id: int) -> RawPolicyMap:
        """Return what an endpoint's map has to hold beside its policy."""
        self._look()
        return allowall.entries(self._orders, endpoint_id, Now.read()) if self._orders else {}

    async def run(self, maps: Maps) -> None:
        """Have maps follow the orders, and say what is in force, until cancelled."""
        while True:
            self.follow(maps)
            await asyncio.sleep(jittered(LOOK_S))

    def follow(self, maps: Maps) -> None:
        """Compare the maps whose orders began or ended since the last call."""
        now = Now.read()
        orders = frozenset(self.orders(now))
        began, ended = orders - self._told, self._told - orders
        self._told = orders
        for each in began:
            logger.warning("ALL IS ALLOWED {}", sentence(each))
        for each in ended:
            logger.warning("no longer in force: all allowed {}", sentence(each))
        if changed := {each.endpoint for each in began | ended}:
            maps.compare(None if WHOLE_HOST in changed else changed)
        if began:
            self._reminded = now.monotonic
        elif orders and now.monotonic - self._reminded >= REMIND_S:
            self._reminded = now.monotonic
            for each in orders:
                logger.warning("ALL IS STILL ALLOWED {}", sentence(each))
        metrics.ALLOW_ALL_ORDERS.set(len(orders))
        metrics.ALLOW_ALL_SECONDS.set(max((each.left(now) for each in orders), default=0.0))

    def _look(self) -> None:
        path = self._directory / allowall.FILE
        try:
            found = path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        except FileNotFoundError:
            stamp = _NO_FILE
        except OSError as error:
            self._refuse(f"{path} can not be looked at: {error.strerror}")
            return
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp != _NO_FILE:
            self._read(path)
        elif not self.trouble:  # else it was damaged, and is set aside
            self._orders = ()

    def _read(self, path: Path) -> None:
        """Take the orders of the file; those that were known stay where it can not be used."""
        try:
            self._orders = allowall.read(self._directory)
            self.trouble = ""
        except FileDamaged as error:
            self._refuse(f"{error}; what was ordered stays until its end or `holdfast allow-all --end`")
            with contextlib.suppress(OSError):  # it is named as it is
                set_aside(path)
        except OSError as error:
            self._stamp = _UNKNOWN
            self._refuse(f"{path} can not be read: {error.strerror}")

    def _refuse(self, trouble: str) -> None:
        if trouble != self.trouble:
            logger.error("{}", trouble)
            self.trouble = trouble


def sentence(order: Order) -> str:
    """Return who is open, until when, by whose order and why."""
    where = "on this host" if order.endpoint == WHOLE_HOST else f"to and from endpoint {order.endpoint}"
    until = datetime.fromtimestamp(order.until, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{where} until {until}, by {order.by}: {order.reason}"
