# SPDX-License-Identifier: Apache-2.0
"""Ethernet frames for programs under test, as bytes, with nothing checked: malformed ones are wanted too.

`packet`, `tcp`, `udp`, `echo`, `icmp_error` and `fragments` make the family that an address is written in.
What IPv6 packets carry has a right checksum, because a receiver's stack refuses it otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple

TCP, UDP, ICMP, SCTP, ICMPV6 = 6, 17, 1, 132, 58
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
ECHO_REPLY, UNREACHABLE, ECHO, TIME_EXCEEDED, PARAMETER_PROBLEM = 0, 3, 8, 11, 12
ECHO6, ECHO_REPLY6 = 128, 129
UNREACHABLE6, PACKET_TOO_BIG, TIME_EXCEEDED6, PARAMETER_PROBLEM6 = 1, 2, 3, 4
SOLICITATION, ADVERTISEMENT = 135, 136
HOP_BY_HOP, ROUTING, FRAGMENT, AUTH, DESTINATION = 0, 43, 44, 51, 60
MORE_FRAGMENTS = 0x2000
ETH_IPV4, ETH_ARP, ETH_IPV6, ETH_VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
_CHECKSUM_AT = {TCP: 16, UDP: 6, ICMPV6: 2}


class Extension(NamedTuple):
    """An IPv6 extension header: the number that the header before has for it; all behind its first byte."""

    kind: int
    body: bytes


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


def ipv6(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    extensions: Sequence[Extension] = (),
    version: int = 6,
    total: int | None = None,
) -> bytes:
    """An IPv6 packet; `total` is what its header says of all that follows it."""
    kinds = [each.kind for each in extensions] + [protocol]
    chain = b"".join(
        bytes([following]) + each.body for each, following in zip(extensions, kinds[1:], strict=True)
    )
    return (
        struct.pack(
            ">IHBB16s16s",
            version << 28,
            len(chain) + len(payload) if total is None else total,
            kinds[0],
            ttl,
            IPv6Address(source).packed,
            IPv6Address(destination).packed,
        )
        + chain
        + payload
    )


def padding(kind: int = DESTINATION, units: int = 0) -> Extension:
    """A header of options, hop-by-hop or for the destination: 8 * (`units` + 1) bytes of padding."""
    return Extension(kind, bytes([units, 1, 4 + 8 * units]) + bytes(4 + 8 * units))


def authentication(words: int = 4) -> Extension:
    """An authentication header with 4 * (`words` + 2) bytes."""
    return Extension(AUTH, bytes([words]) + bytes(4 * words + 6))


def routing(kind: int = 0, left: int = 1) -> Extension:
    """A routing header by way of one address."""
    return Extension(ROUTING, bytes([2, kind, left]) + bytes(4) + IPv6Address("fd00::77").packed)


def fragment_header(offset: int = 0, more: bool = False, ident: int = 1) -> Extension:
    """A fragment header; `offset` in units of eight bytes."""
    return Extension(FRAGMENT, struct.pack(">BHI", 0, offset << 3 | more, ident))


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def checksum6(source: str, destination: str, protocol: int, payload: bytes) -> int:
    """The checksum of what an IPv6 packet carries (RFC 8200, 8.1), over its pseudo header too.

    Of a payload that has its checksum: 0.
    """
    pseudo = struct.pack(">II", len(payload), protocol)
    return checksum(IPv6Address(source).packed + IPv6Address(destination).packed + pseudo + payload)


def checked(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    """Fill in the checksum of what an IPv6 packet is to carry, if it has one."""
    at = _CHECKSUM_AT.get(protocol, len(payload))
    if len(payload) < at + 2:
        return payload
    check = checksum6(source, destination, protocol, payload)
    return payload[:at] + struct.pack(">H", check) + payload[at + 2 :]


def tcp_segment(source_port: int, port: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHIIBBHHH", source_port, port, 1, 1, 5 << 4, flags, 8192, 0, 0) + data


def udp_datagram(source_port: int, port: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHHH", source_port, port, 8 + len(data), 0) + data


def with_ports(protocol: int, source_port: int, port: int, flags: int = SYN) -> bytes:
    """What a packet of TCP (with these flags), UDP or SCTP (which has no chunks then) carries."""
    if protocol == SCTP:
        return struct.pack(">HHII", source_port, port, 1, 0)
    return tcp_segment(source_port, port, flags) if protocol == TCP else udp_datagram(source_port, port)


def icmp_message(kind: int, ident: int = 0, data: bytes = b"", code: int = 0) -> bytes:
    return struct.pack(">BBHHH", kind, code, 0, ident, 1) + data


def packet(source: str, destination: str, protocol: int, payload: bytes, **ip: Any) -> bytes:
    """A frame with a packet of the addresses' family; `ip` are arguments of `ipv4` or `ipv6`."""
    if ":" not in destination:
        return ethernet(ipv4(source, destination, protocol, payload, **ip))
    body = checked(source, destination, protocol, payload)
    return ethernet(ipv6(source, destination, protocol, body, **ip), ETH_IPV6)


def fragments(
    source: str, destination: str, protocol: int, payload: bytes, *, at: int = 24, ident: int = 9
) -> tuple[bytes, bytes]:
    """Two frames that carry `payload`, the first `at` bytes of it (a multiple of eight) and the rest."""
    if ":" not in destination:
        first = ipv4(source, destination, protocol, payload[:at], ident=ident, fragment=MORE_FRAGMENTS)
        later = ipv4(source, destination, protocol, payload[at:], ident=ident, fragment=at // 8)
        return ethernet(first), ethernet(later)
    body = checked(source, destination, protocol, payload)
    first, later = (
        ipv6(source, destination, protocol, part, extensions=[fragment_header(offset, more, ident)])
        for part, offset, more in ((body[:at], 0, True), (body[at:], at // 8, False))
    )
    return ethernet(first, ETH_IPV6), ethernet(later, ETH_IPV6)


def tcp(source: str, destination: str, source_port: int, port: int, flags: int = SYN, **ip: Any) -> bytes:
    return packet(source, destination, TCP, tcp_segment(source_port, port, flags), **ip)


def udp(source: str, destination: str, source_port: int, port: int, data: bytes = b"", **ip: Any) -> bytes:
    return packet(source, destination, UDP, udp_datagram(source_port, port, data), **ip)


def echo(source: str, destination: str, ident: int, *, reply: bool = False, **ip: Any) -> bytes:
    """An echo request, or the reply to one."""
    if ":" in destination:
        return packet(source, destination, ICMPV6, icmp_message(ECHO6 + reply, ident), **ip)
    return packet(source, destination, ICMP, icmp_message(ECHO_REPLY if reply else ECHO, ident), **ip)


def icmp_error(source: str, destination: str, about: bytes, kind: int | None = None) -> bytes:
    """An error (unless told: unreachable) about the frame `about`, of which it carries the beginning.

    About an IPv4 packet that is its header and eight bytes, about an IPv6 packet as much as goes into 1280.
    """
    if ":" in destination:
        message = icmp_message(kind or UNREACHABLE6, data=about[14 : 14 + 1280 - 48])
        return packet(source, destination, ICMPV6, message)
    return packet(source, destination, ICMP, icmp_message(kind or UNREACHABLE, data=about[14 : 14 + 28]))


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


SENDER_LINK = bytes.fromhex(
    "0101020000000001"
)  # option of neighbour discovery: the sender's link-layer address


def solicitation(
    target: str,
    *,
    sender: str = "fd00::1",
    to: str = "ff02::1:ff00:1",
    kind: int = SOLICITATION,
    options: bytes = SENDER_LINK,
    ttl: int = 255,
    code: int = 0,
    extensions: Sequence[Extension] = (),
) -> bytes:
    """Neighbour discovery (RFC 4861): who has `target`?"""
    message = struct.pack(">BBHI16s", kind, code, 0, 0, IPv6Address(target).packed) + options
    body = ipv6(sender, to, ICMPV6, checked(sender, to, ICMPV6, message), ttl=ttl, extensions=extensions)
    return bytes.fromhex("3333ff000001020000000001") + struct.pack(">H", ETH_IPV6) + body
