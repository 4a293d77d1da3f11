# SPDX-License-Identifier: Apache-2.0
"""Watches of single keys, many on one stream: etcd then sends nothing but what happens to exactly these.

Used by: kvstore.session, for its own keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from loguru import logger

from kvstore.errors import PermissionDenied
from kvstore.etcd_pb2 import WatchResponse
from kvstore.watch import WatchStream


class KeyWatches:
    """See the module's text.  Owner: the session's tasks of one stream."""

    def __init__(self, stream: WatchStream) -> None:
        self.stream = stream
        self._ids: dict[str, int] = {}
        self._spare: set[str] = set()
        self._keys: dict[int, str] = {}
        self._last_id = 0
        self._any = asyncio.Event()

    async def wait_any(self) -> None:
        """Wait for the first watch: a stream without any answers no question for progress."""
        await self._any.wait()

    async def follow(self, turned: Mapping[str, int]) -> None:
        """Have a watch for each key, from its revision, and none for those with 0; but never none at all."""
        for key, revision in turned.items():
            self._spare.discard(key)
            if revision and key not in self._ids:
                await self._add(key, revision)
            elif not revision and key in self._ids:
                self._spare.add(key)
        for key in list(self._spare):
            if len(self._ids) > 1:
                await self._remove(key)

    async def _add(self, key: str, revision: int) -> None:
        self._last_id += 1
        self._ids[key] = self._last_id
        self._keys[self._last_id] = key
        # What happened at `revision` is known; asking for it would have etcd search its history.
        await self.stream.create(key, revision + 1, watch_id=self._last_id)
        self._any.set()

    async def _remove(self, key: str) -> None:
        self._spare.discard(key)
        watch_id = self._ids.pop(key)
        del self._keys[watch_id]
        await self.stream.cancel(watch_id)

    def over(self, response: WatchResponse) -> bool:
        """True when the message only says that a watch ended; raises when it may not have.

        A denied watch is told and left: its key can still be written.
        """
        if not response.canceled:
            return False
        key = self._keys.get(response.watch_id, "")
        if key:
            try:
                self.stream.check(response, key, 0)
            except PermissionDenied as error:
                logger.error("own key is not watched: {}", error)
        return True
