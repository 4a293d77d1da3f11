# SPDX-License-Identifier: Apache-2.0
"""Why a packet from endpoint 1 (of `bpflab`) is dropped before policy is asked: the programs' checks again,
slowly and plainly, for `tests/kernel/test_datapath_fuzz.py` to compare."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network, ip_address

from tests.support import frames
from tests.support.families import NET4, NET6

INVALID_SOURCE, INVALID, CUT, UNKNOWN_L4 = 132, 134, 135, 137
UNROUTABLE, EXTENSION, NO_FRAGMENT = 151, 156, 175
UNCOUNTED = -1  # dropped without a word: for the link alone
L4_NEEDED = {frames.TCP: 14, frames.UDP: 8, frames.SCTP: 8, frames.ICMP: 8, frames.ICMPV6: 8}
MOST_EXTENSIONS, L4_FARTHEST = 4, 200  # of a frame
_NOWHERE = [IPv6Network(each) for each in ("ff00::/8", "fe80::/10", "::/32")]
_FRAME_HEADER = 14


def why_dropped(frame: bytes) -> int:
    """Return the drop reason, 0 or UNCOUNTED; a later fragment counts as one whose first was never seen."""
    packet = frame[_FRAME_HEADER:]
    return _of_ipv6(packet) if frame[12:14] == b"\x86\xdd" else _of_ipv4(packet)


def _of_ipv4(packet: bytes) -> int:
    words, total = packet[0] & 0xF, int.from_bytes(packet[2:4], "big")
    header = words * 4
    if packet[0] >> 4 != 4 or header < 20 or total < header or total > len(packet):
        return INVALID
    if packet[12:16] != ip_address(NET4.a).packed:
        return INVALID_SOURCE
    if packet[16] == 127:
        return UNROUTABLE
    if int.from_bytes(packet[6:8], "big") & 0x1FFF:
        return NO_FRAGMENT
    return _of_l4(packet[9], total - header, frames.ICMP)


def _of_l4(protocol: int, length: int, icmp: int) -> int:
    if protocol not in L4_NEEDED or (protocol in (frames.ICMP, frames.ICMPV6) and protocol != icmp):
        return UNKNOWN_L4
    return CUT if length < L4_NEEDED[protocol] else 0


def _of_ipv6(packet: bytes) -> int:
    if _for_the_link(packet):
        return UNCOUNTED
    payload = int.from_bytes(packet[4:6], "big")
    if packet[0] >> 4 != 6 or 40 + payload > len(packet):
        return INVALID
    if packet[8:24] != ip_address(NET6.a).packed:
        return INVALID_SOURCE
    destination = IPv6Address(packet[24:40])
    if any(destination in network for network in _NOWHERE):
        return UNROUTABLE
    return _of_chain(packet, 40 + payload)


def _for_the_link(packet: bytes) -> bool:
    """Whether a message is of neighbour, router or listener discovery; the last has options before it."""
    message, following = packet[40:], packet[6]
    if following == frames.HOP_BY_HOP and len(message) >= 8 and not message[1]:
        message, following = message[8:], message[0]
    return following == frames.ICMPV6 and message[:1] in _LINK_TYPES


def _of_chain(packet: bytes, end: int) -> int:
    """Follow the headers; `end` is where the packet does by its own account."""
    following, at = packet[6], 40
    for _ in range(MOST_EXTENSIONS):
        if following not in _LENGTHS and following != frames.ROUTING:
            break
        if at + 8 > len(packet):
            return INVALID
        if following == frames.ROUTING:
            return EXTENSION
        place = packet[at + 2 : at + 4] if following == frames.FRAGMENT else b"\0\0"
        at, following = at + _LENGTHS[following](packet[at + 1]), packet[at]
        if _FRAME_HEADER + at > L4_FARTHEST:
            return EXTENSION
        offset, more = int.from_bytes(place, "big") >> 3, place[1] & 1
        if offset or more:
            return _of_fragment(following, end - at, later=bool(offset))
    if following in _LENGTHS or following == frames.ROUTING:
        return EXTENSION
    return INVALID if at > end else _of_l4(following, end - at, frames.ICMPV6)


def _of_fragment(following: int, length: int, *, later: bool) -> int:
    if following in _LENGTHS or following == frames.ROUTING:
        return EXTENSION
    if length < 0:
        return INVALID
    return NO_FRAGMENT if later else _of_l4(following, length, frames.ICMPV6)


_LINK_TYPES = [bytes([kind]) for kind in (*range(130, 138), 143)]
# How many bytes a header has, by its second one.
_LENGTHS: dict[int, Callable[[int], int]] = {
    frames.HOP_BY_HOP: lambda length: 8 * (length + 1),
    frames.DESTINATION: lambda length: 8 * (length + 1),
    frames.AUTH: lambda length: 4 * (length + 2),
    frames.FRAGMENT: lambda length: 8,
}
