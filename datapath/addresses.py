# SPDX-License-Identifier: Apache-2.0
"""Addresses between the text people read and the bytes maps hold; IPv4 and IPv6 by one path.

Called by: `datapath.maps`, `datapath.events`.  Written on `socket`, not `ipaddress`: a hundred thousand
entries pass through here at a start, and this is fifteen times faster.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

FAMILY4 = 1  # Cilium's ENDPOINT_KEY_IPV4
FAMILY6 = 2  # and ENDPOINT_KEY_IPV6
_PADDING = bytes(12)


def pack_address(text: str) -> tuple[int, bytes]:
    """Return (family, sixteen bytes) of an address.  Raises OSError when it is none."""
    if ":" in text:
        return FAMILY6, inet_pton(AF_INET6, text)
    return FAMILY4, inet_pton(AF_INET, text) + _PADDING


def unpack_address(family: int, data: bytes) -> str:
    """Return the text of an address of either family from its sixteen bytes."""
    if family == FAMILY6:
        return inet_ntop(AF_INET6, data)
    return inet_ntop(AF_INET, data[:4])


def pack_ip(text: str) -> bytes:
    """Return the four or sixteen bytes of an address.  Raises OSError when it is none."""
    return inet_pton(AF_INET6 if ":" in text else AF_INET, text)


def unpack_ip(data: bytes) -> str:
    """Return the text of an address from its four or sixteen bytes."""
    return inet_ntop(AF_INET if len(data) == 4 else AF_INET6, data)


def split_prefix(prefix: str) -> tuple[int, bytes, int]:
    """Return (family, sixteen bytes, length) of "address/length"; without a length it is one address.

    Raises OSError or ValueError when it is no prefix.
    """
    address, _, length = prefix.partition("/")
    family, data = pack_address(address)
    longest = 32 if family == FAMILY4 else 128
    bits = int(length) if length else longest
    if not 0 <= bits <= longest:
        raise ValueError(f"prefix length {bits} is not in 0…{longest}")
    return family, data, bits


def host_prefix(address: str) -> str:
    """Return the prefix that is one address: "10.0.0.1/32", "fd00::1/128"."""
    return f"{address}/{128 if ':' in address else 32}"


def pack_mac(text: str) -> bytes:
    """Return a MAC address as the eight bytes maps hold.  Raises ValueError when it is none."""
    data = bytes.fromhex(text.replace(":", ""))
    if len(data) != 6:
        raise ValueError(f"{text!r} is not a MAC address")
    return data + b"\0\0"


def unpack_mac(data: bytes) -> str:
    return data[:6].hex(":")
