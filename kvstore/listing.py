# SPDX-License-Identifier: Apache-2.0
"""Listing a prefix page by page at one revision.

The next page is asked for as soon as one has come, so that etcd reads it while this one is worked on.  A list
whose revision is compacted meanwhile begins anew; pages that are too large for one message are made smaller.

Used by: kvstore.client.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from core.backoff import Backoff
from kvstore import rpc
from kvstore.errors import Compacted, RequestRefused
from kvstore.etcd_pb2 import KeyValue, RangeRequest, RangeResponse
from kvstore.ops import span
from kvstore.transport import Transport

PAGE = 10_000
# A list that loses its pinned revision to compaction starts again this often before it gives up.
LIST_ATTEMPTS = 3
# Seconds between them: a compaction breaks the lists of a whole fleet at one moment.
RETRY_BASE_S, RETRY_CAP_S = 1.0, 5.0
# A page of a large prefix has so many times a request's time: what is given up is read by etcd to its end
# all the same, and asked for once more, which is how a loaded etcd gets more load.
PATIENCE = 6.0


class Part(NamedTuple):
    """One page: the revision of the whole list, and whether a list begins with it."""

    revision: int
    first: bool
    kvs: Sequence[KeyValue]


async def whole_list(
    transport: Transport, prefix: str, page: int, *, keys_only: bool = False, patience: float = 1.0
) -> AsyncGenerator[Part, None]:
    """Yield the pages of one whole list; after a first page that is not the first, forget what came before.

    Each page has `patience` times the time of a request.

    Raises Compacted when it had to begin anew too often.  Close it when leaving early.
    """
    backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
    for attempt in range(1, LIST_ATTEMPTS + 1):
        revision = 0
        try:
            parts = pages(transport, prefix, page, keys_only=keys_only, patience=patience)
            async with contextlib.aclosing(parts) as answers:
                async for answer in answers:
                    first, revision = not revision, revision or answer.header.revision
                    yield Part(revision, first, answer.kvs)
            return
        except Compacted:
            if attempt == LIST_ATTEMPTS:
                raise
            await asyncio.sleep(backoff.next())


async def pages(
    transport: Transport, prefix: str, page: int, *, keys_only: bool = False, patience: float = 1.0
) -> AsyncGenerator[RangeResponse, None]:
    """Yield the answers of one list, all at the revision of the first.  Close it when leaving early."""
    start, end = span(prefix)
    request = RangeRequest(key=start, range_end=end, limit=page, keys_only=keys_only)
    coming = _ask(transport, prefix, request, patience)
    try:
        while True:
            try:
                answer = await coming
            except RequestRefused as error:
                if "larger than max" not in error.reason or request.limit == 1:
                    raise
                request.limit = max(request.limit // 8, 1)  # values of a megabyte: fewer fit into a message
                coming = _ask(transport, prefix, request, patience)
                continue
            more = answer.more and len(answer.kvs) > 0
            if more:
                request.revision = request.revision or answer.header.revision
                request.key = answer.kvs[-1].key + b"\0"
                coming = _ask(transport, prefix, request, patience)
                # Two rounds of the loop, and the request has left, whatever is done with this page.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            yield answer
            if not more:
                return
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


def _ask(
    transport: Transport, prefix: str, request: RangeRequest, patience: float
) -> asyncio.Task[RangeResponse]:
    wanted = RangeRequest()
    wanted.CopyFrom(request)  # it goes on changing
    call = transport.call(
        rpc.RANGE, wanted, prefix, timeout=patience * transport.timeout, wanted=request.revision
    )
    return asyncio.create_task(call)
