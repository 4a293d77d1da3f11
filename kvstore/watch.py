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
import contextlib
import enum
import random
import time
from collections.abc import Awaitable, Callable, Sequence
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
# After a deletion etcd is heard again within some seconds of these: an owner that works has written its key
# again by then (kvstore.sink.HOLD_S), and nobody takes a stream that is stuck for its silence.
CONFIRM_S = 15.0
# All hosts hear of a deletion in the same moment: they ask within so many seconds.
LATER_S = 2.0
# The number of the watch that is only made to see whether the server answers; callers count from 0 or 1.
PROBE_ID = 1 << 62


class Kind(enum.Enum):
    PUT = "put"
    DELETE = "delete"  # the key-value has the key and the revision of the deletion, no value


class Event(msgspec.Struct, frozen=True, gc=False):
    kind: Kind
    kv: KeyValue


class Change(msgspec.Struct, frozen=True, gc=False):
    """What became of a key at a revision; `value` None is a deletion."""

    key: str
    value: bytes | None
    revision: int


class Witness(msgspec.Struct, frozen=True, gc=False):
    """A write that a view has seen: of `key` at `revision`, and not again as far as the view goes."""

    key: str
    revision: int


class WatchBatch(msgspec.Struct, frozen=True):
    """What one message brought.  `revision` is where to resume from (+ 1).

    `changes` is empty for the message that says the watch exists (`created`) and for signs of life.
    `head` is the revision etcd itself was at; changes up to it may still be under way.
    """

    revision: int
    changes: list[Change]
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
        self._probe_key = b""
        self._peer, self._call = transport.open_stream(WATCH)
        # gRPC takes one message at a time, and the watchdog writes too.
        self._writing = asyncio.Lock()
        self._watchdog = _Watchdog(hang, (self.ask_progress, self._probe), self._call.cancel)
        self._later: asyncio.Task[None] | None = None
        self._later_at = 0.0

    async def __aenter__(self) -> WatchStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.stop()
        if self._later is not None:
            self._later.cancel()
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

    def ask_later(self, after: float) -> None:
        """Ask for progress in so many seconds, from the last time that this is called."""
        self._later_at = time.monotonic() + after
        if self._later is None or self._later.done():
            self._later = asyncio.create_task(self._ask_then())

    async def _ask_then(self) -> None:
        while (left := self._later_at - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0.0, LATER_S))
        with contextlib.suppress(KvstoreError):  # whoever reads meets the same trouble
            await self.ask_progress()

    async def read(self, idle: float | None = None) -> WatchResponse:
        """Return the next message; raises Unavailable when the stream ended or the server hangs.

        After `idle` seconds (the stream's own unless given) without one, progress is asked for.
        """
        while True:
            self._watchdog.listen(idle or self._idle)
            try:
                response = await self._receive()
            finally:
                self._watchdog.rest()
            if response.watch_id != PROBE_ID:
                return response
            if response.created and not response.canceled:
                await self.cancel(PROBE_ID)
                return WatchResponse(header=response.header, watch_id=-1)

    async def _receive(self) -> WatchResponse:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            if self._watchdog.verdict:
                raise self._lost(self._watchdog.verdict) from error
            typed = translate(error, "watch", self.subject, self._peer.target)
            raise self._transport.noted(self._peer, typed) from error
        except asyncio.CancelledError as error:
            raise self._closed_or_cancelled() from error
        if not isinstance(response, WatchResponse):
            raise self._lost(self._watchdog.verdict or "the server ended the stream")
        return response

    async def _probe(self) -> None:
        """Ask for a watch of a single key that this user may read; its events are dropped."""
        request = WatchCreateRequest(key=self._probe_key, watch_id=PROBE_ID)
        await self._write(WatchRequest(create_request=request))

    async def _write(self, request: WatchRequest) -> None:
        try:
            async with self._writing:
                await self._call.write(request)
        except grpc.aio.AioRpcError as error:
            raise self._lost(error.details() or error.code().name) from error
        except asyncio.InvalidStateError as error:
            raise self._lost("the stream has ended") from error
        except asyncio.CancelledError as error:
            raise self._closed_or_cancelled() from error

    def _closed_or_cancelled(self) -> BaseException:
        """Tell the end of the stream (by the watchdog, or with its channel) from the end of this task."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return asyncio.CancelledError()
        return self._lost(self._watchdog.verdict or "the stream was closed")

    def _lost(self, reason: str) -> KvstoreError:
        error = Unavailable(f"watch {self.subject}", self._peer.target, reason)
        return self._transport.noted(self._peer, error)

    def check(self, response: WatchResponse, key: str, start_revision: int) -> None:
        """Raise what a canceled watch means: Compacted, PermissionDenied, else Unavailable."""
        if response.compact_revision:
            raise Compacted(key, start_revision, response.compact_revision, head=response.header.revision)
        if not response.canceled:
            return
        reason = response.cancel_reason
        if "permission denied" in reason or "user name" in reason:
            raise PermissionDenied("watch", key, self._peer.target, reason)
        if "compacted" in reason:
            raise Compacted(key, start_revision, 0, reason, head=response.header.revision)
        raise self._lost(reason or "the server canceled the watch")


class _Watchdog:
    """Measures silence while somebody reads: asks, asks otherwise, then gives the stream up.

    After the patience given to `listen` the first question goes out, after half of `hang` the next, and
    after the other half `give_up` is called and `verdict` says why.  One timer for the stream's whole life,
    which looks at the clock when it fires: a message costs no timer of its own.
    Owner: the loop's thread.
    """

    def __init__(
        self, hang: float, questions: Sequence[Callable[[], Awaitable[None]]], give_up: Callable[[], object]
    ) -> None:
        self.verdict = ""
        self._hang = hang
        self._questions = questions
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._wanted = 0.0
        self._patience = 0.0
        self._since: float | None = None
        self._asked = 0

    def listen(self, patience: float) -> None:
        """Somebody waits for a message from now on."""
        self._since = self._loop.time()
        if patience != self._wanted or self._timer is None:
            self._wanted, self._patience = patience, jittered(patience)
            self._set(self._since + self._patience)

    def rest(self) -> None:
        """A message came, or nobody waits any more."""
        self._since = None
        self._asked = 0

    def stop(self) -> None:
        """The stream is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._asking is not None:
            self._asking.cancel()

    def _set(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        """The timer fired: ask if it has been quiet for long enough, else look again when it may be."""
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._patience
        if not self._asked and due > now:
            self._set(due)
        elif self._asked == len(self._questions):
            self.verdict = f"no sign of life for {self._patience + self._hang:.0f} s"
            self._give_up()
        else:
            self._asking = self._loop.create_task(self._ask(self._questions[self._asked]))
            self._asked += 1
            self._set(now + self._hang / len(self._questions))

    async def _ask(self, question: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(KvstoreError):  # whoever reads meets the same trouble
            await question()


def event_from_wire(event: PbEvent) -> Event:
    return Event(Kind.DELETE if event.type == PbEvent.DELETE else Kind.PUT, from_wire(event.kv))


def changes_after(response: WatchResponse, revision: int) -> list[Change]:
    """Return what a message says of the time after `revision`, in its order.

    No call for each part of each event: there may be tens of thousands of them a second.
    """
    deletion = PbEvent.DELETE
    return [
        Change(
            kv.key.decode("utf-8", "surrogateescape"),
            None if event.type == deletion else kv.value,
            kv.mod_revision,
        )
        for event in response.events
        if (kv := event.kv).mod_revision > revision
    ]
