# SPDX-License-Identifier: Apache-2.0
"""Questions for names over real sockets of the loopback: both protocols, hostile clients, a taken port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import dns.asyncquery
import dns.message
import dns.rcode
import pytest

from agent import names_server
from agent.names import Names
from agent.names_server import LIMITED, NamesServer, Shares, split
from agent.names_zone import Outcome, Zone
from core import metrics
from identity.labels import Labels
from tests.support.etcd import free_ports
from tests.support.eventually import eventually
from tests.support.listening import LOOPBACK, listening

LOOPBACK6 = "::1"
NAME = "web.shop.holdfast."
MANY = 60


class Index(Names):
    """An index of plain calls."""

    complete = True
    serial = 1


def zone() -> Zone:
    index = Index()
    texts = ["com.docker.compose.service=web", "com.docker.compose.project=shop"]
    index.set_labels(300, Labels.of(texts, source="container"))
    for number in range(MANY):
        index.set_identity(f"10.0.0.{number}/32", 300)
    return Zone("holdfast", index)


def outcomes(outcome: str) -> float:
    return float(metrics.DNS_QUERIES.labels(outcome)._value.get())


class Answering:
    """A running server and what asks it."""

    def __init__(self, server: NamesServer, port: int) -> None:
        self.server = server
        self.port = port

    async def udp(self, name: str = NAME, *, address: str = LOOPBACK) -> dns.message.Message:
        return await dns.asyncquery.udp(dns.message.make_query(name, "A"), address, 5, self.port)

    async def tcp(self, name: str = NAME, *, address: str = LOOPBACK) -> dns.message.Message:
        return await dns.asyncquery.tcp(dns.message.make_query(name, "A"), address, 5, self.port)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(LOOPBACK, self.port)

    async def say(self, *pieces: bytes) -> bytes:
        """Send pieces by TCP; return everything that comes back until the server closes."""
        with contextlib.suppress(ConnectionError):
            reader, writer = await self.connect()
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            answer = await reader.read()
            writer.transport.abort()
            return answer
        return b""

    def throw(self, *packets: bytes) -> None:
        """Send packets by UDP and wait for nothing."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for packet in packets:
                sock.sendto(packet, (LOOPBACK, self.port))


@contextlib.asynccontextmanager
async def answering(
    monkeypatch: pytest.MonkeyPatch, *networks: str, port: int = 0
) -> AsyncIterator[Answering]:
    port = port or free_ports(1)[0]
    monkeypatch.setattr(names_server, "PORT", port)
    server = NamesServer(zone(), [LOOPBACK, LOOPBACK6], networks or ("127.0.0.0/8", "::1/128"))
    async with listening(server, port):
        yield Answering(server, port)


def framed(packet: bytes) -> bytes:
    return len(packet).to_bytes(2) + packet


# --- answers


@pytest.mark.parametrize("address", [LOOPBACK, LOOPBACK6])
async def test_both_protocols_and_families(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    async with answering(monkeypatch) as there:
        truncated = await there.udp(address=address)
        assert truncated.flags & dns.flags.TC
        assert len((await there.tcp(address=address)).answer[0]) == MANY
        assert (await there.udp("db.shop.holdfast.", address=address)).rcode() == dns.rcode.NXDOMAIN


async def test_who_is_not_served_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with answering(monkeypatch, "10.0.0.0/8", "fd00::/96") as there:
        for address in (LOOPBACK, LOOPBACK6):
            assert (await there.udp(address=address)).rcode() == dns.rcode.REFUSED
            assert (await there.tcp(address=address)).rcode() == dns.rcode.REFUSED


async def test_several_questions_on_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [dns.message.make_query(f"x{number}.holdfast.", "A").to_wire() for number in range(20)]
    async with answering(monkeypatch) as there:
        reader, writer = await there.connect()
        stream = b"".join(map(framed, queries))
        for at in range(0, len(stream), 100):
            writer.write(stream[at : at + 100])
            await writer.drain()
        for query in queries:
            answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            assert answer[:2] == query[:2]
        writer.transport.abort()


# --- hostile clients


async def test_packets_of_any_kind_are_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    good = dns.message.make_query(NAME, "A").to_wire()
    before = outcomes(Outcome.IGNORED.value)
    async with answering(monkeypatch) as there:
        there.throw(b"", b"x", bytes(60_000), good[:-1], good + bytes(names_server.QUERY_MAX))
        assert (await there.udp()).answer
        assert outcomes(Outcome.IGNORED.value) == before + 4, "none, one byte, and two that are too long"


@pytest.mark.parametrize(
    "pieces",
    [
        (b"\xff\xff" + bytes(70_000),),
        (b"\0\0",),
        (b"\0\5abcde",),
        (framed(bytes(2000)),),
        tuple(bytes([each]) for each in framed(bytes(names_server.PIECES_MAX + 50))),
    ],
    ids=["endless", "empty", "crumb", "too long", "byte by byte"],
)
async def test_a_connection_that_makes_no_sense_is_ended(
    monkeypatch: pytest.MonkeyPatch, pieces: tuple[bytes, ...]
) -> None:
    async with answering(monkeypatch) as there:
        assert await there.say(*pieces) == b""
        assert (await there.tcp()).answer


async def test_a_silent_connection_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_server, "CONNECTION_S", 0.2)
    good = framed(dns.message.make_query("x.holdfast.", "A").to_wire())
    async with answering(monkeypatch) as there:
        for pieces in ((), (b"\0",), (b"\0\x20" + bytes(9),)):
            assert await there.say(*pieces) == b""
        assert await there.say(good), "one that asked and then is silent was answered"


async def test_a_client_that_reads_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_server, "CONNECTION_S", 0.3)
    monkeypatch.setattr(names_server, "SHARE_BURST", 1e9)
    good = framed(dns.message.make_query(NAME, "A").to_wire())
    async with answering(monkeypatch) as there:
        _, writer = await there.connect()
        writer.write(good * 5000)
        await eventually(lambda: not there.server.connections.open, "it is ended")
        assert (await there.tcp()).answer
        writer.transport.abort()


async def test_silent_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_server, "CONNECTIONS_MAX", 8)
    async with answering(monkeypatch) as there:
        silent_ones = [await there.connect() for _ in range(30)]
        assert (await there.tcp()).answer
        assert len(there.server.connections.open) <= 8
        for _, writer in silent_ones:
            writer.transport.abort()


async def test_a_flood_gets_its_share_and_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_server, "SHARE", 1.0)
    monkeypatch.setattr(names_server, "SHARE_BURST", 20.0)
    query = dns.message.make_query("x.holdfast.", "A").to_wire()
    answered, limited = outcomes(Outcome.NO_SUCH_NAME.value), outcomes(LIMITED)
    async with answering(monkeypatch) as there:
        there.throw(*[query] * 100)
        await eventually(lambda: outcomes(LIMITED) > limited, "beyond its share")
        assert (await there.udp(address=LOOPBACK6)).answer
        assert await there.say(framed(query)) == b"", "its share is one, whatever the protocol"
    assert 20 <= outcomes(Outcome.NO_SUCH_NAME.value) - answered <= 25


def test_shares_are_kept_of_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_server, "SHARES_MAX", 10)
    shares = Shares(rate=1.0, burst=2.0)
    assert [shares.grants("a", 1.0) for _ in range(3)] == [True, True, False]
    assert not shares.grants("a", 1.5)
    assert shares.grants("a", 2.6), "an attempt that is not granted costs nothing"
    assert all(shares.grants(f"b{number}", 2.6) for number in range(100))
    assert len(shares) <= 10


def test_messages_of_a_stream() -> None:
    assert split(b"") == ([], b"")
    assert split(b"\0") == ([], b"\0")
    assert split(b"\0\2ab\0\0\0\3a") == ([b"ab", b""], b"\0\3a")


# --- ports


async def test_a_taken_port_is_said_and_taken_when_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind((LOOPBACK, 0))
        port = holder.getsockname()[1]
        async with answering(monkeypatch, port=port) as there:
            assert there.server.errors == {f"{LOOPBACK} port {port}/UDP": "Address already in use"}
            assert (await there.tcp()).answer, "all else is served meanwhile"
            assert (await there.udp(address=LOOPBACK6)).answer
            holder.close()
            await eventually(lambda: not there.server.errors, "it listens")
            assert (await there.udp()).answer


async def test_an_address_that_is_not_there_yet_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_server, "PORT", free_ports(1)[0])
    server = NamesServer(zone(), ["192.0.2.1"], ["192.0.2.0/24"])
    task = asyncio.create_task(server.run())
    await eventually(lambda: len(server.errors) == 2, "both are known")
    assert set(server.errors.values()) == {"Cannot assign requested address"}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
