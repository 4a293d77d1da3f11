# SPDX-License-Identifier: Apache-2.0
"""One probe of one address: TCP and `GET /hello` as Cilium's prober asks, and an ICMP echo where that may be.

Also `arrives`: whether a packet of a given length does.

Sockets are used by hand: a probe costs a third of what an HTTP client takes, and never reads more of an
answer than its head, whatever the other side sends.  Nothing here raises for what the network or the
other side does: an `Outcome` says it.  Called by `agent.health`.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
import time
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote_to_bytes

import msgspec

from core.errors import shorten

# The kernel sends a lost SYN again after one and after three seconds: two may be lost.
TIMEOUT_S = 5.0
# A lost echo request is nobody's fault; three are an answer.
ECHO_TRIES = 3
ECHO_WAIT_S = 1.0
# Of an answer its head is read, and no more of it than this.
HEAD_MAX = 1024
# A packet of full length counts as lost after this time: the kernel has sent it four or five times by then.
ARRIVES_S = 2.0

# Whom the question is for, cluster/name: at the address of a host that left another one may answer.
NODE_HEADER = "Holdfast-Node"

_DATE = re.compile(rb"\r\nDate:[ \t]*([^\r\n]{1,40})\r\n", re.IGNORECASE)
_NODE = re.compile(rb"\r\n" + NODE_HEADER.encode() + rb":([^\r\n]*)\r\n", re.IGNORECASE)
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})\b")
_MISDIRECTED = re.compile(rb"HTTP/1\.[01] 421\b")
_HEAD_END = b"\r\n\r\n"
# IP and TCP header without options, and TCP's time stamps.
_HEADERS = {4: 40, 6: 60}
_TIMESTAMPS = 12
# Of struct tcp_info (linux/tcp.h): the options in use, and the bytes of a segment behind all headers.
_TCP_INFO = struct.Struct("=5xB10xI")
_TCPI_OPT_TIMESTAMPS = 1
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_ICMP = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}
_ECHO_REQUEST = {4: 8, 6: 128}
_ECHO_REPLY = {4: 0, 6: 129}
_ECHO = struct.Struct("!BBHHH8s")  # type, code, checksum, id, sequence number, what the reply repeats


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What became of a probe: seconds there and back, or why there was no way back.

    `ahead`: by how many seconds the clock of who answered is ahead of this host's, where the answer says it.
    `other`: the agent that answered is another node's.
    """

    latency: float = 0.0
    error: str = ""
    ahead: float | None = None
    other: bool = False


def family_of(ip: str) -> int:
    return 6 if ":" in ip else 4


# --- TCP and HTTP


async def hello(ip: str, port: int, node: str = "") -> tuple[Outcome, Outcome]:
    """Connect and ask for /hello; return (connection, answer), both counted from the beginning.

    `node` is whom the question is for, cluster/name.  Real cilium-agents, and versions that do not know it,
    answer in any case.
    """
    began, connected, head, asked_at, other = time.perf_counter(), 0.0, b"", 0.0, False
    try:
        with _socket(ip, socket.SOCK_STREAM) as sock:
            async with asyncio.timeout(TIMEOUT_S):
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, (ip, port))
                connected = time.perf_counter() - began
                asked_at = time.time()
                await loop.sock_sendall(sock, _request(ip, port, node=node))
                head = await _head(loop, sock)
        status = head.partition(b"\r\n")[0]
        other = bool(node) and _MISDIRECTED.match(status) is not None
        error = "" if other else _refusal(status)
    except TimeoutError:
        error = f"no {'answer' if connected else 'connection'} within {TIMEOUT_S:g} s"
    except OSError as failure:
        error = _reason(failure)
    if error:
        answer = Outcome(error=error)
    else:
        ahead = clock_ahead(head, asked_at, time.time())
        answer = Outcome(time.perf_counter() - began, ahead=ahead, other=other)
    return Outcome(connected) if connected else answer, answer


def _socket(ip: str, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
    made = socket.socket(_FAMILIES[family_of(ip)], kind, protocol)
    made.setblocking(False)
    return made


def _request(ip: str, port: int, length: int = 0, node: str = "") -> bytes:
    """Return the question, filled up to `length` bytes at least."""
    host = f"[{ip}]" if ":" in ip else ip
    asked = f"GET /hello HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    whom = f"{NODE_HEADER}: {quote(node)}\r\n" if node else ""  # a record is another one's word
    fill = f"X-Fill: {'x' * length}\r\n" if length else ""
    return f"{asked}{whom}{fill}\r\n".encode()


def asked_for(request: bytes) -> str | None:
    """Return the node that a question is for; None where it does not say.  Pure."""
    match = _NODE.search(request)
    return unquote_to_bytes(match[1].strip(b" \t")).decode(errors="replace") if match else None


async def _head(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    """Return the answer up to its head's end at least, if that comes before HEAD_MAX bytes."""
    data = b""
    while _HEAD_END not in data and len(data) < HEAD_MAX:
        more = await loop.sock_recv(sock, HEAD_MAX - len(data))
        if not more:
            break
        data += more
    return data


def _refusal(line: bytes) -> str:
    """Return what is wrong with the first line of an answer; nothing is for 200."""
    if not line:
        return "connection closed without an answer"
    match = _STATUS.match(line)
    if match is None:
        return f"not an answer of HTTP: {shorten(line.decode('latin-1'), 40)}"
    return "" if match[1] == b"200" else f"HTTP status {match[1].decode()}"


def clock_ahead(head: bytes, asked_at: float, answered_at: float) -> float | None:
    """Return by how many seconds the clock that wrote an answer's date is ahead; None without a date.  Pure.

    A date has no fraction of a second: half of one is what it lacks in the middle.
    """
    match = _DATE.search(head)
    if match is None:
        return None
    try:
        there = parsedate_to_datetime(match[1].decode("latin-1")).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return there + 0.5 - (asked_at + answered_at) / 2


def _reason(failure: OSError) -> str:
    return os.strerror(failure.errno) if failure.errno else type(failure).__name__


# --- the length of packets


async def arrives(ip: str, port: int, length: int) -> bool:
    """Return whether a packet of `length` bytes, from the IP header on, gets to an address uncut.

    A question longer than a segment is asked, and segments are as long as that.  Where less is sent after
    all, because the other side or the way there is known to take less, the connection says so.
    """
    family = family_of(ip)
    try:
        with _socket(ip, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, length - _HEADERS[family])
            async with asyncio.timeout(ARRIVES_S):
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, (ip, port))
                await loop.sock_sendall(sock, _request(ip, port, length))
                return bool(await _head(loop, sock)) and _sent_length(sock, family) >= length
    except (TimeoutError, OSError):
        return False


def _sent_length(sock: socket.socket, family: int) -> int:
    """Return the length of the full packets of a connection."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    options, segment = _TCP_INFO.unpack(info)
    stamps = _TIMESTAMPS if options & _TCPI_OPT_TIMESTAMPS else 0
    return int(segment) + stamps + _HEADERS[family]


# --- ICMP


def granted(family: int) -> socket.SocketKind | None:
    """Return the kind of socket that this process may send echo requests of a family with, None for none.

    Found by trying: a datagram one is allowed by the sysctl `ping_group_range`, a raw one by CAP_NET_RAW.
    """
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(_FAMILIES[family], kind, _ICMP[family]).close()
        except OSError:
            continue
        return kind
    return None


async def echo(ip: str, kind: socket.SocketKind) -> Outcome:
    """Send echo requests until one is replied to."""
    token = os.urandom(8)
    sent: list[float] = []
    try:
        with _socket(ip, kind, _ICMP[family_of(ip)]) as sock:
            sock.connect((ip, 0))
            for sequence in range(ECHO_TRIES):
                sent.append(time.perf_counter())
                sock.send(echo_request(family_of(ip), sequence, token))
                number = await _reply(sock, family_of(ip), token)
                if number is not None:
                    return Outcome(time.perf_counter() - sent[number])
    except OSError as failure:
        return Outcome(error=_reason(failure))
    return Outcome(error=f"no echo reply within {ECHO_TRIES * ECHO_WAIT_S:g} s")


async def _reply(sock: socket.socket, family: int, token: bytes) -> int | None:
    """Return the number of the request that was replied to within a second, None when none was."""
    loop = asyncio.get_running_loop()
    headed = family == 4 and sock.type == socket.SOCK_RAW
    try:
        async with asyncio.timeout(ECHO_WAIT_S):
            while True:
                packet = await loop.sock_recv(sock, 256)
                number = replied(packet[(packet[0] & 15) * 4 :] if headed else packet, family, token)
                if number is not None:
                    return number
    except TimeoutError:
        return None


def echo_request(family: int, sequence: int, token: bytes) -> bytes:
    """Return an echo request.  A datagram socket writes its own id; the kernel sums ICMPv6."""
    kind, number = _ECHO_REQUEST[family], int.from_bytes(token[:2])
    packet = _ECHO.pack(kind, 0, 0, number, sequence, token)
    return _ECHO.pack(kind, 0, checksum(packet), number, sequence, token)


def replied(message: bytes, family: int, token: bytes) -> int | None:
    """Return which request an ICMP message replies to, None when it is about something else.  Pure."""
    if len(message) < _ECHO.size:
        return None
    kind, code, _, _, sequence, repeated = _ECHO.unpack_from(message)
    ours = (kind, code, repeated) == (_ECHO_REPLY[family], 0, token)
    return int(sequence) if ours and sequence < ECHO_TRIES else None


def checksum(message: bytes) -> int:
    """Return the Internet checksum of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(message) // 2}H", message))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
