# SPDX-License-Identifier: Apache-2.0
"""One watch stream: create, cancel, read; and the watchdog that notices a server that hangs.

gRPC's keepalive says that the other side's HTTP/2 layer lives, not that its watch loop does.  So after
`idle` seconds without any message the stream asks for progress itself, and gives the peer up when
nothing at all comes for `hang` more.  etcd from 3.4.25 and 3.5.8 on leaves that question unanswered while
one of the stream's watches catches up or starts in the future, so halfway through `hang` a second watch
is asked for, which every version confirms at once, and taken back.

Used by: kvstore.client (one prefix), kvstore.session (many single keys on one stream).
"""

from __future__ import annotations

import asyncio
import enum
from types import TracebackType

import grpc.aio
import msgspec

from core.backoff import jittered
from kvstore.errors import Compacted, KvstoreError, PermissionDenied, Unavailable
from kvstore.etcd_pb2 import (
    Event as PbEvent,
)
from kvstore.etcd_pb2 import (
    WatchCancelRequest,
    WatchCreateRequest,
    WatchProgressRequest,
    WatchRequest,
    WatchResponse,
)
from kvstore.ops import KeyValue, encode_key, from_wire, span
from kvstore.rpc import WATCH
from kvstore.transport import Transport, translate

IDLE_S = 30.0
HANG_S = 15.0
# The number of the watch that is only made to see whether the server answers; callers count from 0 or 1.
PROBE_ID = 1 << 62


class Kind(enum.Enum):
    PUT = "put"
    DELETE = "delete"  # the key-value has the key and the revision of the deletion, no value


class Event(msgspec.Struct, frozen=True, gc=False):
    kind: Kind
    kv: KeyValue


class WatchBatch(msgspec.Struct, frozen=True):
    """What one message brought.  `revision` is where to resume from (+ 1).

    `events` is empty for the message that says the watch exists (`created`) and for signs of life.
    `head` is the revision etcd itself was at; events up to it may still be under way.
    """

    revision: int
    events: list[Event]
    head: int = 0
    created: bool = False


class WatchStream:
    """A stream of watches to one peer.  `subject` is what errors name.  Use as a context manager."""

    def __init__(
        self, transport: Transport, subject: str, *, idle: float = IDLE_S, hang: float = HANG_S
    ) -> None:
        self.subject = subject
        self._transport = transport
        self._idle = idle
        self._hang = hang
        self._probe_key = b""
        self._peer, self._call = transport.open_stream(WATCH)

    async def __aenter__(self) -> WatchStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()

    async def create(self, key: str, start_revision: int, *, prefix: bool = False, watch_id: int = 0) -> None:
        """Ask for a watch of one key, or of all that start with it.  `watch_id` 0: the server chooses.

        Never asks for fragments: a batch that was cut inside a revision could not be resumed from.
        """
        start, end = span(key) if prefix else (encode_key(key), b"")
        self._probe_key = start
        await self._write(
            WatchRequest(
                create_request=WatchCreateRequest(
                    key=start,
                    range_end=end,
                    start_revision=start_revision,
                    progress_notify=True,
                    watch_id=watch_id,
                )
            )
        )

    async def cancel(self, watch_id: int) -> None:
        await self._write(WatchRequest(cancel_request=WatchCancelRequest(watch_id=watch_id)))

    async def ask_progress(self) -> None:
        await self._write(WatchRequest(progress_request=WatchProgressRequest()))

    async def read(self, idle: float | None = None) -> WatchResponse:
        """Return the next message; raises Unavailable when the stream ended or the server hangs.

        After `idle` seconds (the stream's own unless given) without one, progress is asked for.
        """
        while True:
            response = await self._read_or_ask(jittered(idle or self._idle))
            if response.watch_id != PROBE_ID:
                return response
            if response.created and not response.canceled:
                await self.cancel(PROBE_ID)
                return WatchResponse(header=response.header, watch_id=-1)

    async def _read_or_ask(self, idle: float) -> WatchResponse:
        """Read one message; on silence ask for progress, then for a probe, then give the peer up."""
        reading = asyncio.ensure_future(self._call.read())
        try:
            for patience, ask in (
                (idle, self.ask_progress),
                (self._hang / 2, self._probe),
                (self._hang / 2, None),
            ):
                done, _ = await asyncio.wait((reading,), timeout=patience)
                if done:
                    return self._received(reading)
                if ask is not None:
                    await ask()
            raise self._lost(f"no sign of life for {idle + self._hang:.0f} s")
        finally:
            reading.cancel()

    async def _probe(self) -> None:
        """Ask for a watch of a single key that this user may read; its events are dropped."""
        request = WatchCreateRequest(key=self._probe_key, watch_id=PROBE_ID)
        await self._write(WatchRequest(create_request=request))

    def _received(self, reading: asyncio.Future[object]) -> WatchResponse:
        try:
            response = reading.result()
        except grpc.aio.AioRpcError as error:
            typed = translate(error, "watch", self.subject, self._peer.target)
            raise self._transport.noted(self._peer, typed) from error
        except asyncio.CancelledError as error:
            raise self._lost("the stream was closed") from error
        if not isinstance(response, WatchResponse):
            raise self._lost("the server ended the stream")
        return response

    async def _write(self, request: WatchRequest) -> None:
        try:
            await self._call.write(request)
        except grpc.aio.AioRpcError as error:
            raise self._lost(error.details() or error.code().name) from error
        except asyncio.InvalidStateError as error:
            raise self._lost("the stream has ended") from error

    def _lost(self, reason: str) -> KvstoreError:
        error = Unavailable(f"watch {self.subject}", self._peer.target, reason)
        return self._transport.noted(self._peer, error)

    def check(self, response: WatchResponse, key: str, start_revision: int) -> None:
        """Raise what a canceled watch means: Compacted, PermissionDenied, else Unavailable."""
        if response.compact_revision:
            raise Compacted(key, start_revision, response.compact_revision)
        if not response.canceled:
            return
        reason = response.cancel_reason
        if "permission denied" in reason or "user name" in reason:
            raise PermissionDenied("watch", key, self._peer.target, reason)
        if "compacted" in reason:
            raise Compacted(key, start_revision, 0, reason)
        raise self._lost(reason or "the server canceled the watch")


def event_from_wire(event: PbEvent) -> Event:
    return Event(Kind.DELETE if event.type == PbEvent.DELETE else Kind.PUT, from_wire(event.kv))
