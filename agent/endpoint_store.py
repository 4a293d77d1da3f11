# SPDX-License-Identifier: Apache-2.0
"""The records of this host's endpoints: in the table that everything follows, and in the checkpoint.

A change is one call without a pause: file first, then table.  A file that can not be written (a full disk)
must neither keep a container from being enforced nor from ending, so only a new endpoint is refused for
it; everything else is remembered and written later.

Owner: the endpoint manager.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from agent.checkpoint import Checkpoint
from agent.endpoint import ENDPOINT_ID_MAX, Endpoint
from agent.errors import EndpointNotFound, EndpointRefused, PoolExhausted
from core.table import Table


class EndpointStore:
    """Endpoints by number and by the engine's id."""

    def __init__(self, table: Table[int, Endpoint], checkpoint: Checkpoint) -> None:
        self.table = table
        self.last_id = 0
        self._source = table.source("agent")
        self._checkpoint = checkpoint
        self._by_engine_id: dict[str, int] = {}

    def find(self, endpoint_id: int) -> Endpoint | None:
        return self.table.get(endpoint_id)

    def get(self, endpoint_id: int) -> Endpoint:
        """Return an endpoint; EndpointNotFound for a number that this host does not have."""
        endpoint = self.table.get(endpoint_id)
        if endpoint is None:
            raise EndpointNotFound(f"endpoint {endpoint_id} does not exist on this host")
        return endpoint

    def by_engine_id(self, engine_id: str) -> Endpoint | None:
        endpoint_id = self._by_engine_id.get(engine_id)
        return None if endpoint_id is None else self.table.get(endpoint_id)

    def restored(self) -> Iterator[Endpoint]:
        """Take the endpoints of the checkpoint and yield each."""
        for endpoint in self._checkpoint.endpoints():
            if not endpoint.engine_endpoint_id and not endpoint.handed_over:
                # The agent died while somebody asked the API for it: nobody was told that it exists.
                self._checkpoint.drop_endpoint(endpoint.id)
                continue
            self.last_id = max(self.last_id, endpoint.id)
            self._put(endpoint)
            yield endpoint

    def complete(self) -> None:
        """Say that the table holds every endpoint of this host."""
        self._source.mark_in_sync()

    def free_id(self, wanted: int = 0) -> int:
        """Return `wanted`, or the next number in rotation.  Raises EndpointRefused, PoolExhausted."""
        if wanted:
            if not 0 < wanted <= ENDPOINT_ID_MAX or wanted in self.table:
                raise EndpointRefused(f"endpoint number {wanted} is taken or not in 1..{ENDPOINT_ID_MAX}")
            return wanted
        for _ in range(ENDPOINT_ID_MAX):
            self.last_id = self.last_id % ENDPOINT_ID_MAX + 1
            if self.last_id not in self.table:
                return self.last_id
        raise PoolExhausted(f"all {ENDPOINT_ID_MAX} endpoint numbers of this host are in use")

    def add(self, endpoint: Endpoint) -> None:
        """Take a new endpoint.  Raises OSError when it can not be checkpointed."""
        self._checkpoint.save_endpoint(endpoint)
        self._put(endpoint)

    def change(self, endpoint_id: int, **fields: object) -> Endpoint:
        """Replace fields of an endpoint and return it; an equal record is no change."""
        known = self.get(endpoint_id)
        endpoint = msgspec.structs.replace(known, **fields)
        if endpoint == known:
            return known
        # 50 µs into the page cache: cheaper here than by way of a thread.
        self._checkpoint.save_endpoint(endpoint, may_wait=True)
        self._source.upsert(endpoint_id, endpoint)
        return endpoint

    def unwant(self, endpoint_id: int) -> None:
        """Take an endpoint out of the table; its checkpoint stays until `forget`."""
        self._source.delete(endpoint_id)

    def forget(self, endpoint: Endpoint) -> None:
        """Remove what is left of an endpoint that is gone from the kernel."""
        self._by_engine_id.pop(endpoint.engine_endpoint_id, None)
        self._checkpoint.drop_endpoint(endpoint.id)

    def _put(self, endpoint: Endpoint) -> None:
        if endpoint.engine_endpoint_id:
            self._by_engine_id[endpoint.engine_endpoint_id] = endpoint.id
        self._source.upsert(endpoint.id, endpoint)
