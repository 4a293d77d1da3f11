# SPDX-License-Identifier: Apache-2.0
"""Routes in bulk: messages of rtnetlink written and read here.

A host has a route to each of 10 000 others.  By pyroute2 each takes a millisecond to write and 0.2 to be
looked at, whosever it is; here it is some microseconds.  What is done one at a time stays with
`datapath.netlink`.

Blocking: call in a thread.  Called by: `datapath.noderoutes`, `datapath.routes`, `agent.host`.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from datapath.addresses import pack_ip, unpack_ip
from datapath.errors import RouteError

MAIN_TABLE = 254
UNICAST = 1  # RTN_UNICAST
# Messages sent at once: the kernel's answers to them have to fit into the socket's buffer.
SENT_AT_ONCE = 64
_READ_AT_ONCE = 1 << 18  # bytes; a dump's messages come in parts of up to 32 KiB
_PATIENCE_S = 10.0

_NEWROUTE, _GETROUTE = 24, 26
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _REPLACE = 0x1, 0x4, 0x300, 0x500  # NLM_F_…; a replacement may be new
_DST, _OIF, _PRIORITY, _PREFSRC, _METRICS, _ENCAP_TYPE, _ENCAP = 1, 4, 6, 7, 8, 21, 22  # RTA_…
_MTU = 2  # RTAX_MTU
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_INT = struct.Struct("=i")
_ANYWHERE = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class Row(NamedTuple):
    """One route of the kernel's; `oif` 0: no device."""

    prefix: str
    protocol: int
    type: int
    oif: int


class Wanted(NamedTuple):
    """A route to write: by a device, with the attributes of a lightweight tunnel; `mtu` bytes at most."""

    prefix: str
    protocol: int
    scope: int
    oif: int
    source: str
    metric: int
    encap_type: int
    encap: bytes
    mtu: int = 0  # 0: the device's


class RouteSocket:
    """A socket in the network namespace of the thread that makes it; one request at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(_PATIENCE_S)
        self._number = 0
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def replace(self, routes: Sequence[Wanted]) -> dict[str, int]:
        """Write routes; return the kernel's errno for each prefix that it refused.

        Raises RouteError when the kernel does not answer, OSError or ValueError for what is no address.
        """
        bodies = [_encoded(route) for route in routes]
        refused: dict[str, int] = {}
        with self._turn:
            for start in range(0, len(routes), SENT_AT_ONCE):
                first = self._send(_NEWROUTE, _ACK | _REPLACE, bodies[start : start + SENT_AT_ONCE])
                for number, code in self._answers(first).items():
                    if code:
                        refused[routes[start + number - first].prefix] = code
        return refused

    def dump(self, family: int = socket.AF_UNSPEC, *, without: frozenset[int] = frozenset()) -> list[Row]:
        """Return the routes of the main table, but for those of some protocols.  Raises RouteError."""
        with self._turn:
            first = self._send(_GETROUTE, _DUMP, [_RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)])
            return [row for data in self._parts(first) for row in _rows(data, without)]

    def _send(self, kind: int, flags: int, bodies: Sequence[bytes]) -> int:
        """Send requests; return the number of the first."""
        first, self._number = self._number + 1, self._number + len(bodies)
        self._socket.send(
            b"".join(
                _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, first + index, 0) + body
                for index, body in enumerate(bodies)
            )
        )
        return first

    def _answers(self, first: int) -> dict[int, int]:
        """Return errno, 0 for success, of all requests from `first` to the last."""
        found: dict[int, int] = {}
        while len(found) <= self._number - first:
            for kind, number, body in _messages(self._receive("write routes")):
                if kind == _ERROR and number >= first:
                    found[number] = -_INT.unpack_from(body)[0]
        return found

    def _parts(self, first: int) -> Iterator[bytes]:
        """Yield what a dump answers; RouteError when the kernel refuses it."""
        while True:
            data = self._receive("list routes")
            yield data
            for kind, number, body in _messages(data):
                if number == first and kind == _ERROR:
                    raise RouteError(f"list routes: {os.strerror(-_INT.unpack_from(body)[0])}")
                if number == first and kind == _DONE:
                    return

    def _receive(self, what: str) -> bytes:
        try:
            return self._socket.recv(_READ_AT_ONCE)
        except OSError as error:
            reason = "the kernel does not answer" if isinstance(error, TimeoutError) else error.strerror
            raise RouteError(f"{what}: {reason}") from error


def _messages(data: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """Yield type, sequence number and body of each message."""
    view, at = memoryview(data), 0
    while at + _HEADER.size <= len(data):
        length, kind, _, number, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, number, view[at + _HEADER.size : at + length]
        at += _aligned(length)


def _rows(data: bytes, without: frozenset[int]) -> Iterator[Row]:
    for kind, _, body in _messages(data):
        if kind != _NEWROUTE:
            continue
        family, length, _, _, table, protocol, _, its_type, _ = _RTMSG.unpack_from(body)
        if table == MAIN_TABLE and protocol not in without and family in _ANYWHERE:
            destination, oif = _destination(body[_RTMSG.size :])
            text = unpack_ip(destination) if destination else _ANYWHERE[family]
            yield Row(f"{text}/{length}", protocol, its_type, oif)


def _destination(attributes: memoryview) -> tuple[bytes, int]:
    """Return address and device among a route's attributes."""
    destination, oif, at = b"", 0, 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == _DST:
            destination = bytes(attributes[at + _ATTRIBUTE.size : at + length])
        elif kind == _OIF:
            (oif,) = _INT.unpack_from(attributes, at + _ATTRIBUTE.size)
        at += _aligned(length)
    return destination, oif


def _encoded(route: Wanted) -> bytes:
    address, _, length = route.prefix.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    head = _RTMSG.pack(family, int(length), 0, 0, MAIN_TABLE, route.protocol, route.scope, UNICAST, 0)
    parts = [head, _attribute(_DST, pack_ip(address)), _attribute(_OIF, _INT.pack(route.oif))]
    if route.source:
        parts.append(_attribute(_PREFSRC, pack_ip(route.source)))
    if route.mtu:
        parts.append(_attribute(_METRICS, _attribute(_MTU, _INT.pack(route.mtu))))
    parts += [
        _attribute(_PRIORITY, _INT.pack(route.metric)),
        _attribute(_ENCAP_TYPE, route.encap_type.to_bytes(2, sys.byteorder)),
        _attribute(_ENCAP, route.encap),
    ]
    return b"".join(parts)


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
