# SPDX-License-Identifier: Apache-2.0
"""Probes and answers over real sockets of the loopback: hostile servers, hostile clients, a taken port."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from agent import health_server, probes
from agent.health_server import HealthServer
from agent.probes import hello
from tests.support.etcd import free_ports
from tests.support.eventually import eventually
from tests.support.listening import LOOPBACK, listening

OWN = "default/a"
HELLO = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
YES = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
NO = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


# --- probing

Speaker = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def speaking(speak: Speaker) -> AsyncIterator[int]:
    """Serve one way of speaking on a port; whatever it raises when its client goes is nobody's business."""
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            with contextlib.suppress(OSError):
                await speak(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, LOOPBACK, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for each in handlers:
            each.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


def saying(*pieces: bytes) -> Speaker:
    """Return a server that says these one after the other and closes."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)

    return speak


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def endless_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await writer.drain()


async def endless_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(bytes(65536))
        await writer.drain()


@pytest.mark.parametrize(
    "server",
    [
        saying(YES),
        saying(b"HTTP/1.0 200\r\n\r\n"),
        saying(b"HTTP/1.", b"1 20", b"0 OK\r", b"\n"),
        endless_body,
    ],
    ids=["200", "HTTP/1.0", "in pieces", "endless body"],
)
async def test_an_answer_has_a_latency(server: Speaker) -> None:
    async with speaking(server) as port:
        tcp, http = await hello(LOOPBACK, port)
    assert (tcp.error, http.error) == ("", "")
    assert 0 < tcp.latency <= http.latency


@pytest.mark.parametrize(
    ("server", "error"),
    [
        (saying(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"), "HTTP status 503"),
        (saying(b"HTTP/1.1 301 Moved Permanently\r\nLocation: http://192.0.2.1/\r\n\r\n"), "HTTP status 301"),
        (saying(b"SSH-2.0-x\x1b[31m\r\n"), r"not an answer of HTTP: SSH-2.0-x\x1b[31m"),
        (saying(), "connection closed without an answer"),
        (endless_line, "not an answer of HTTP"),
        (silent, "no answer within 0.3 s"),
    ],
    ids=["503", "redirect", "SSH", "closes", "endless line", "silent"],
)
async def test_a_wrong_answer_and_none_are_said(
    server: Speaker, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "TIMEOUT_S", 0.3)
    async with speaking(server) as port:
        tcp, http = await hello(LOOPBACK, port)
    assert tcp.error == ""
    assert http.error.startswith(error), http.error
    assert len(http.error) < 120


async def test_nobody_there() -> None:
    (port,) = free_ports(1)
    tcp, http = await hello(LOOPBACK, port)
    assert tcp.error == http.error == "Connection refused"


# --- answering


class Answering:
    """A running server and what speaks to it."""

    def __init__(self, server: HealthServer) -> None:
        self.server = server

    async def connect(self, *pieces: bytes) -> Streams:
        reader, writer = await asyncio.open_connection(LOOPBACK, self.server.port)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(0.01)
        return reader, writer

    async def ask(self, *pieces: bytes) -> bytes:
        """Return everything that comes back until the server closes, but for the date."""
        try:
            reader, writer = await self.connect(*pieces)
            answer = await reader.read()
        except ConnectionError:
            return b""
        writer.transport.abort()
        return re.sub(rb"Date: [^\r]+ GMT\r\n", b"", answer)


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[Answering]:
    (port,) = free_ports(1)
    server = HealthServer(OWN, [LOOPBACK, "::1"], port)
    async with listening(server, port):
        yield Answering(server)


async def test_hello_is_answered_to_our_prober_and_to_any_client() -> None:
    async with answering() as there:
        for address in (LOOPBACK, "::1"):
            tcp, http = await hello(address, there.server.port)
            assert (tcp.error, http.error) == ("", "")
        assert await there.ask(HELLO) == YES
        assert await there.ask(HELLO[:20], HELLO[20:]) == YES
        assert await there.ask(HELLO.replace(b"1.1", b"1.0")) == YES


@pytest.mark.parametrize("name", ["default/a b", "default/\r\nX: 1", "default/ä%", "default/" + "x" * 300])
async def test_who_is_looked_for_answers_and_another_says_that_it_is_not_him(name: str) -> None:
    (port,) = free_ports(1)
    server = HealthServer(name, [LOOPBACK], port)
    async with listening(server, port):
        for asked, other in ((name, False), ("", False), ("default/b", True), (name + "x", True)):
            _, http = await hello(LOOPBACK, port, asked)
            assert (http.error, http.other) == ("", other), asked
            assert http.latency > 0


async def test_421_is_no_answer_to_who_looks_for_nobody() -> None:
    async with speaking(saying(b"HTTP/1.1 421 Misdirected Request\r\n\r\n")) as port:
        _, http = await hello(LOOPBACK, port)
        assert (http.error, http.other) == ("HTTP status 421", False)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"DELETE /hello HTTP/1.1\r\n\r\n",
        bytes(health_server.REQUEST_MAX),
    ],
)
async def test_anything_else_gets_404_and_no_word_more(request_: bytes) -> None:
    async with answering() as there:
        assert await there.ask(request_) == NO


async def test_a_request_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_server, "REQUEST_TIMEOUT_S", 0.2)
    async with answering() as there:
        assert await there.ask(HELLO[:-2]) == b""
        assert await there.ask() == b""
        assert await there.ask(*(bytes([byte]) for byte in HELLO)) in (NO, b""), "byte by byte"
        assert await there.ask(HELLO[:-2] + b"X: " + b"x" * 100_000) in (NO, b""), "headers without end"
        assert await there.ask(HELLO) == YES


async def test_silent_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_server, "CONNECTIONS_MAX", 8)
    async with answering() as there:
        silent_ones = [await there.connect() for _ in range(30)]
        assert await there.ask(HELLO) == YES
        assert len(there.server.connections.open) <= 8
        for _, writer in silent_ones:
            writer.transport.abort()


async def test_a_client_that_resets_does_no_harm() -> None:
    async with answering() as there:
        for pieces in ((), (HELLO[:9],), (HELLO,)):
            _, writer = await there.connect(*pieces)
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )
            writer.transport.abort()
        assert await there.ask(HELLO) == YES


async def test_a_taken_port_is_said_and_taken_when_it_is_free() -> None:
    with socket.create_server((LOOPBACK, 0)) as holder:
        server = HealthServer(OWN, [LOOPBACK, "::1"], holder.getsockname()[1])
        task = asyncio.create_task(server.run())
        await eventually(lambda: bool(server.errors), "the error is known")
        assert server.errors == {LOOPBACK: "Address already in use"}
        assert (await hello("::1", server.port))[1].error == "", "the other address is served meanwhile"
    await eventually(lambda: not server.errors, "it listens")
    assert (await hello(LOOPBACK, server.port))[1].error == ""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_address_that_is_not_this_hosts_is_said() -> None:
    server = HealthServer(OWN, ["192.0.2.1"], free_ports(1)[0])
    task = asyncio.create_task(server.run())
    await eventually(lambda: bool(server.errors), "the error is known")
    assert server.errors == {"192.0.2.1": "Cannot assign requested address"}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
