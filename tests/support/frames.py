# SPDX-License-Identifier: Apache-2.0
"""Ethernet frames for programs under test, as bytes, with nothing checked: malformed ones are wanted too."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

TCP, UDP, ICMP, SCTP = 6, 17, 1, 132
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
ECHO_REPLY, UNREACHABLE, ECHO, TIME_EXCEEDED = 0, 3, 8, 11
MORE_FRAGMENTS = 0x2000
ETH_IPV4, ETH_ARP, ETH_IPV6, ETH_VLAN = 0x0800, 0x0806, 0x86DD, 0x8100


def ethernet(payload: bytes, kind: int = ETH_IPV4) -> bytes:
    """A frame to and from the zero address, which test runs take for the host's own."""
    return bytes(12) + struct.pack(">H", kind) + payload


def ipv4(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    options: bytes = b"",
    fragment: int = 0,
    ident: int = 1,
    version: int = 4,
    header_words: int | None = None,
    total: int | None = None,
) -> bytes:
    """An IPv4 packet with a right checksum; `fragment` is flags and offset as they stand in the header."""
    words = 5 + len(options) // 4 if header_words is None else header_words
    length = 20 + len(options) + len(payload) if total is None else total
    head = struct.pack(
        ">BBHHHBBH4s4s",
        version << 4 | words,
        0,
        length,
        ident,
        fragment,
        ttl,
        protocol,
        0,
        IPv4Address(source).packed,
        IPv4Address(destination).packed,
    )
    check = checksum(head + options)
    return head[:10] + struct.pack(">H", check) + head[12:] + options + payload


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def tcp_segment(source_port: int, port: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHIIBBHHH", source_port, port, 1, 1, 5 << 4, flags, 8192, 0, 0) + data


def udp_datagram(source_port: int, port: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHHH", source_port, port, 8 + len(data), 0) + data


def icmp_message(kind: int, ident: int = 0, data: bytes = b"", code: int = 0) -> bytes:
    return struct.pack(">BBHHH", kind, code, 0, ident, 1) + data


def tcp(source: str, destination: str, source_port: int, port: int, flags: int = SYN, **ip: int) -> bytes:
    return ethernet(ipv4(source, destination, TCP, tcp_segment(source_port, port, flags), **ip))  # type: ignore[arg-type]


def udp(source: str, destination: str, source_port: int, port: int, data: bytes = b"") -> bytes:
    return ethernet(ipv4(source, destination, UDP, udp_datagram(source_port, port, data)))


def echo(source: str, destination: str, ident: int, kind: int = ECHO) -> bytes:
    return ethernet(ipv4(source, destination, ICMP, icmp_message(kind, ident)))


def icmp_error(source: str, destination: str, about: bytes, kind: int = UNREACHABLE) -> bytes:
    """An error about the frame `about`, of which it carries the IP header and eight bytes."""
    return ethernet(ipv4(source, destination, ICMP, icmp_message(kind, data=about[14 : 14 + 28])))


def arp_request(target: str, *, sender: str = "10.0.0.1", operation: int = 1) -> bytes:
    body = struct.pack(
        ">HHBBH6s4s6s4s",
        1,
        ETH_IPV4,
        6,
        4,
        operation,
        bytes.fromhex("020000000001"),
        IPv4Address(sender).packed,
        bytes(6),
        IPv4Address(target).packed,
    )
    return bytes.fromhex("ffffffffffff020000000001") + struct.pack(">H", ETH_ARP) + body
