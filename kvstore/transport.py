# SPDX-License-Identifier: Apache-2.0
"""The rim: connections to etcd's endpoints, failover between them, and wire errors made into typed ones.

Endpoints are shuffled once, so that a fleet spreads itself.  All requests go to one current peer; when
it fails (no connection, no answer in time, no leader) the next request goes to the following one.  A
read is repeated there at once; a write only if it surely never left this process, because a repeated
conditional write would see its own first half.  Waiting and trying again is the caller's work.

Used by: kvstore.client, kvstore.watch.  Nobody else sees gRPC.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from core import metrics
from kvstore.config import EtcdConfig
from kvstore.errors import (
    Compacted,
    KvstoreError,
    LeaseNotFound,
    NoSpace,
    PermissionDenied,
    RequestRefused,
    Unavailable,
)
from kvstore.pace import Pace
from kvstore.rpc import Method, Request, Response
from kvstore.schema.keys import scope_of

if TYPE_CHECKING:
    from grpc.aio import AioRpcError, Channel, StreamStreamCall, UnaryUnaryMultiCallable

MAX_IN_FLIGHT = 64
TIMEOUT_S = 10.0
RECEIVE_LIMIT = 64 << 20

# Milliseconds.  The pings notice a dead network, not a hung server: that is the watchdog's work.
_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", RECEIVE_LIMIT),
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 25_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # also how long one attempt to connect may last
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # a proxy for downloads must never come between a host and etcd
    ("grpc.use_local_subchannel_pool", 1),
]
# A member that lost its leader refuses instead of answering late.
_REQUIRE_LEADER = (("hasleader", "true"),)

_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_TRANSIENT_TEXTS = ("too many requests", "auth store is old", "revision in header is old")
_DENIED_TEXTS = ("permission denied", "user name", "authentication failed", "invalid auth token")
_QUORUM_TEXTS = ("no leader", "request timed out", "leader changed")


class Peer:
    """One endpoint and its channel.  Owner: the transport."""

    def __init__(self, config: EtcdConfig, target: str) -> None:
        self.target = target
        self._config = config
        self._channel: Channel | None = None
        self._stubs: dict[str, UnaryUnaryMultiCallable[Any, Any]] = {}
        self._fingerprint: tuple[int, ...] = ()
        self._closing: set[asyncio.Task[None]] = set()

    def channel(self) -> Channel:
        """Return the channel, made on first use; raises ConfigError when a certificate can not be read."""
        if self._channel is None:
            self._fingerprint = self._config.fingerprint()
            self._channel = self._open()
            self._stubs.clear()
        return self._channel

    def stub(self, method: Method[Request, Response]) -> UnaryUnaryMultiCallable[Request, Response]:
        """Return how to call `method` on the channel."""
        channel = self.channel()
        stub = self._stubs.get(method.path)
        if stub is None:
            stub = self._stubs[method.path] = channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
        return stub

    def _open(self) -> Channel:
        if not self._config.secure:
            return grpc.aio.insecure_channel(self.target, options=_CHANNEL_OPTIONS)
        ca, key, certificate = self._config.read_tls()
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        return grpc.aio.secure_channel(self.target, credentials, options=_CHANNEL_OPTIONS)

    def failed(self) -> None:
        """After a failure: when the certificates were rotated meanwhile, connect with the new ones."""
        if self._channel is not None and self._fingerprint != self._config.fingerprint():
            task = asyncio.create_task(_close(self._channel))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._channel = None

    async def close(self) -> None:
        for task in list(self._closing):
            task.cancel()
        if self._channel is not None:
            await self._channel.close(grace=None)
            self._channel = None


async def _close(channel: Channel) -> None:
    # With a grace, because closing at once would cancel the tasks that wait for an answer.
    await channel.close(grace=2 * TIMEOUT_S)


class Transport:
    """Sends requests to the current peer; at most `max_in_flight` at once, each at most `timeout` s.

    `gate` holds back everything, `pace` what is neither a lease nor a watch.
    """

    def __init__(
        self,
        config: EtcdConfig,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        timeout: float = TIMEOUT_S,
        gate: Callable[[], Awaitable[None]] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.timeout = timeout
        self._gate = gate
        self._pace = pace
        self.cluster_id = 0
        self.peers = [Peer(config, target) for target in config.targets()]
        random.shuffle(self.peers)
        self._current = 0
        self._slots = asyncio.Semaphore(max_in_flight)

    @property
    def current(self) -> Peer:
        return self.peers[self._current]

    async def close(self) -> None:
        for peer in self.peers:
            await peer.close()

    async def call(
        self,
        method: Method[Request, Response],
        request: Request,
        key: str,
        *,
        timeout: float | None = None,
        lease: int = 0,
        wanted: int = 0,
    ) -> Response:
        """Send one request and return the answer; raises the types of `kvstore.errors`.

        `key`, `lease` and `wanted` (a revision) are what an error names.
        """
        if self._gate is not None:
            await self._gate()
        # Not for leases: with its lease a host would lose all of its keys.
        if self._pace is not None and method.kind != "lease":
            await self._pace.turn()
        async with self._slots:
            started = time.perf_counter()
            outcome = "fail"
            try:
                response = await self._failing_over(
                    method, request, key, timeout or self.timeout, lease, wanted
                )
                outcome = "success"
            finally:
                metrics.KVSTORE_OPERATION_SECONDS.labels(
                    scope_of(key), method.kind, method.action, outcome
                ).observe(time.perf_counter() - started)
        self.cluster_id = response.header.cluster_id  # type: ignore[attr-defined]
        return response

    async def _failing_over(
        self,
        method: Method[Request, Response],
        request: Request,
        key: str,
        timeout: float,
        lease: int,
        wanted: int,
    ) -> Response:
        for left in reversed(range(len(self.peers))):
            peer = self.current
            try:
                return await self.call_peer(peer, method, request, timeout)
            except grpc.aio.AioRpcError as error:
                typed = translate(error, method.action, key, peer.target, lease=lease, wanted=wanted)
                if not isinstance(typed, Unavailable):
                    raise typed from error
                self.failed(peer, typed)
                if not left or not (method.repeatable or _never_sent(error)):
                    raise typed from error
        raise AssertionError("the loop above returns or raises")

    async def call_peer(
        self, peer: Peer, method: Method[Request, Response], request: Request, timeout: float
    ) -> Response:
        """Send one request to one peer; raises grpc.aio.AioRpcError."""
        metadata = _REQUIRE_LEADER if method.action != "status" else ()
        response: Response = await peer.stub(method)(request, timeout=timeout, metadata=metadata)
        return response

    def open_stream(
        self, method: Method[Request, Response], timeout: float | None = None
    ) -> tuple[Peer, StreamStreamCall[Request, Response]]:
        """Start a bidirectional stream to the current peer."""
        peer = self.current
        stub = peer.channel().stream_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        return peer, stub(None, timeout=timeout, metadata=_REQUIRE_LEADER)

    async def ask(self, method: Method[Request, Response], request: Request, *, lease: int) -> Response:
        """Send one request on a stream of its own and return the first answer."""
        if self._gate is not None:
            await self._gate()
        peer, call = self.open_stream(method, timeout=self.timeout)
        try:
            await call.write(request)
            answer = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self.noted(peer, translate(error, method.action, "", peer.target, lease=lease)) from error
        except asyncio.InvalidStateError as error:
            raise self.noted(peer, Unavailable(method.action, peer.target, "the stream has ended")) from error
        finally:
            call.cancel()
        if not isinstance(answer, method.response):
            raise self.noted(peer, Unavailable(method.action, peer.target, "the server ended the stream"))
        return answer

    def noted(self, peer: Peer, error: KvstoreError) -> KvstoreError:
        """Return the error of a stream to `peer`; leave the peer if it is the trouble."""
        if isinstance(error, Unavailable):
            self.failed(peer, error)
        return error

    def failed(self, peer: Peer, error: Unavailable) -> None:
        """Go on to the next peer, unless somebody who failed on the same one already did."""
        for text in _QUORUM_TEXTS:
            if text in error.reason:
                metrics.KVSTORE_QUORUM_ERRORS.labels(text).inc()
        peer.failed()
        if self.current is peer:
            self._current = (self._current + 1) % len(self.peers)


def translate(
    error: AioRpcError, what: str, key: str, peer: str, *, lease: int = 0, wanted: int = 0
) -> KvstoreError:
    """Turn an error of the wire into a typed one that names the key and the peer."""
    code, text = error.code(), error.details() or ""
    if "lease not found" in text:
        return LeaseNotFound(lease, f"{what} {key}".strip())
    if "has been compacted" in text:
        return Compacted(key, wanted, 0, "compacted meanwhile")
    if "future revision" in text:
        return Compacted(key, wanted, 0, "etcd's history is younger: it was wiped or restored")
    if code in _TRANSIENT or any(each in text for each in _TRANSIENT_TEXTS):
        return Unavailable(f"{what} {key}".strip(), peer, text or code.name)
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED) or _is_denial(text):
        return PermissionDenied(what, key, peer, text)
    refusal = NoSpace if "space exceeded" in text else RequestRefused
    return refusal(what, key, peer, text or code.name)


def _is_denial(text: str) -> bool:
    return any(each in text for each in _DENIED_TEXTS)


def _never_sent(error: AioRpcError) -> bool:
    return "failed to connect" in (error.details() or "")
