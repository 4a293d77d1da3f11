# SPDX-License-Identifier: Apache-2.0
"""The part of DNS that answering for one zone takes: a query read, an answer written.  Pure.

Only what a resolver asks: one question, perhaps EDNS (RFC 6891) for a longer answer by UDP.  Nothing in a
query needs a pointer, so there is none to follow; an answer's pointers lead into its own question, which is
sent back as it came.  A library that knows all of DNS takes thirty times as long
(docs/decisions/dependencies.md); the tests read every answer with it.

Called by: agent.names, agent.names_zone; agent.configuration, about the domain.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

A, SOA, AAAA, OPT, IXFR, AXFR, ANY = 1, 6, 28, 41, 251, 252, 255  # types
IN = 1  # class; ANY is one too

# What fits into a datagram: without EDNS, and what no path on the way cuts up (DNS flag day 2020).
PLAIN_SIZE, EDNS_SIZE = 512, 1232
STREAM_SIZE = 0xFFFF  # the length before a message of TCP has two bytes

_RESPONSE, _AUTHORITATIVE, _TRUNCATED, _RECURSION_DESIRED = 0x8000, 0x0400, 0x0200, 0x0100
_OPCODE = 0x7800
_HEADER = struct.Struct(">6H")
_TYPE_AND_CLASS = struct.Struct(">HH")
_RECORD = struct.Struct(">HHHLH")  # pointer to the name, type, class, TTL, length
_OPT_RECORD = struct.Struct(">xHHBBHH")  # root, type, size, upper bits of the code, version, flags, length
_SOA_NUMBERS = struct.Struct(">5L")
_POINTER = 0xC000
_QUESTION_AT = _HEADER.size
QUESTION_NAME = _POINTER | _QUESTION_AT  # a pointer to the name that was asked for
_NAME_MAX = 255
_DOMAIN = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")
_DOMAIN_MAX = 253 - 2 * 64  # what the longest service and the longest project leave
_HOSTMASTER = b"\x0ahostmaster"


def why_no_domain(text: str) -> str:
    """Return why a text can not be the domain, empty when it can."""
    if not _DOMAIN.fullmatch(text):
        return "it must be labels of a-z, 0-9 and '-', joined by dots, such as holdfast or hosts.example"
    return f"it must have at most {_DOMAIN_MAX} characters" if len(text) > _DOMAIN_MAX else ""


class Code(enum.IntEnum):
    """The answer in a number (RCODE)."""

    OK = 0
    MALFORMED = 1
    NOT_READY = 2  # SERVFAIL: a resolver asks the next server, and remembers nothing
    NO_SUCH_NAME = 3
    NOT_IMPLEMENTED = 4
    REFUSED = 5
    BAD_VERSION = 16  # of EDNS


class Query(NamedTuple):
    """What was asked.  `labels` are in lower case, `question` is as it came; `size` is EDNS', 0 without."""

    id: int
    flags: int
    question: bytes
    labels: tuple[bytes, ...]
    type: int
    cls: int
    size: int

    @property
    def room(self) -> int:
        """Return the bytes that an answer by UDP may have."""
        return min(max(self.size, PLAIN_SIZE), EDNS_SIZE)

    def pointer(self, label: int) -> int:
        """Return a pointer to the question's name from its `label`th label on."""
        return QUESTION_NAME + sum(len(each) + 1 for each in self.labels[:label])


class BadQuery(Exception):
    """Raised for a query that can only be answered with its header and a code."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


def is_answerable(packet: bytes) -> bool:
    """Whether something may be said to a packet at all: two servers that answer answers never end."""
    return len(packet) >= _HEADER.size and not packet[2] & _RESPONSE >> 8


def parse(packet: bytes) -> Query:
    """Read a query that `is_answerable`.  Raises BadQuery."""
    number, flags, questions, answers, authorities, extras = _HEADER.unpack_from(packet)
    if flags & _OPCODE:
        raise BadQuery(Code.NOT_IMPLEMENTED)
    if questions != 1 or answers or authorities:
        raise BadQuery(Code.MALFORMED)
    labels, end = _name(packet, _QUESTION_AT)
    if end + _TYPE_AND_CLASS.size > len(packet):
        raise BadQuery(Code.MALFORMED)
    kind, cls = _TYPE_AND_CLASS.unpack_from(packet, end)
    end += _TYPE_AND_CLASS.size
    size = _extras(packet, end, extras)
    return Query(number, flags, packet[_QUESTION_AT:end], labels, kind, cls, size)


def _name(packet: bytes, at: int) -> tuple[tuple[bytes, ...], int]:
    """Return the labels of a name, in lower case, and where it ends."""
    labels: list[bytes] = []
    start, end = at, len(packet)
    while at < end:
        length = packet[at]
        at += 1
        if not length:
            if at - start > _NAME_MAX:
                break
            return tuple(labels), at
        if length > 63 or at + length >= end:
            break
        labels.append(packet[at : at + length].lower())
        at += length
    raise BadQuery(Code.MALFORMED)


def _extras(packet: bytes, at: int, records: int) -> int:
    """Return the size that EDNS gives, 0 without EDNS; no other record has a place in a query."""
    if not records:
        if at != len(packet):
            raise BadQuery(Code.MALFORMED)
        return 0
    if records > 1 or at + _OPT_RECORD.size > len(packet) or packet[at]:
        raise BadQuery(Code.MALFORMED)
    kind, size, _, version, _, length = _OPT_RECORD.unpack_from(packet, at)
    if kind != OPT or at + _OPT_RECORD.size + length != len(packet):
        raise BadQuery(Code.MALFORMED)
    if version:
        raise BadQuery(Code.BAD_VERSION)
    return max(int(size), PLAIN_SIZE)


def refusal(packet: bytes, code: Code) -> bytes:
    """Return the answer to a query that was not understood: its header and a code."""
    number, flags = struct.unpack_from(">HH", packet)
    extra = b"" if code < Code.BAD_VERSION else _OPT_RECORD.pack(OPT, EDNS_SIZE, code >> 4, 0, 0, 0)
    kept = flags & (_OPCODE | _RECURSION_DESIRED)
    return _HEADER.pack(number, _RESPONSE | kept | code & 15, 0, 0, 0, bool(extra)) + extra


def answer(
    query: Query,
    code: Code,
    *,
    records: Sequence[bytes] = (),
    authority: bytes = b"",
    authoritative: bool = True,
    room: int = STREAM_SIZE,
) -> bytes:
    """Return an answer with as many records as there is room for; it is marked when that is not all."""
    extra = _OPT_RECORD.pack(OPT, EDNS_SIZE, 0, 0, 0, 0) if query.size else b""
    left = room - _HEADER.size - len(query.question) - len(authority) - len(extra)
    fitting: list[bytes] = []
    for record in records:
        left -= len(record)
        if left < 0:
            break
        fitting.append(record)
    flags = _RESPONSE | query.flags & _RECURSION_DESIRED | code
    flags |= _AUTHORITATIVE if authoritative else 0
    flags |= _TRUNCATED if len(fitting) < len(records) and room < STREAM_SIZE else 0
    header = _HEADER.pack(query.id, flags, 1, len(fitting), bool(authority), bool(extra))
    return b"".join((header, query.question, *fitting, authority, extra))


def is_truncated(packet: bytes) -> bool:
    """Whether an answer says that it is not whole."""
    return bool(packet[2] & _TRUNCATED >> 8)


def record(pointer: int, kind: int, ttl: int, data: bytes) -> bytes:
    """Return a record of the name that `pointer` leads to."""
    return _RECORD.pack(pointer, kind, IN, ttl, len(data)) + data


def soa(pointer: int, ttl: int, serial: int) -> bytes:
    """Return the record of the zone that `pointer` leads to; a no may be remembered for `ttl` seconds."""
    server = struct.pack(">H", pointer)
    data = server + _HOSTMASTER + server + _SOA_NUMBERS.pack(serial & 0xFFFFFFFF, ttl, ttl, ttl, ttl)
    return record(pointer, SOA, ttl, data)
