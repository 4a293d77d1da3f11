# SPDX-License-Identifier: Apache-2.0
"""Reads the first bytes of a packet as far as a person wants them: addresses, ports, flags.

Responsible for: a result for any bytes at all — what containers send is not to be trusted, and an event
may carry less than the headers.  Called by: `datapath.format`.
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from typing import NamedTuple

from datapath.addresses import unpack_ip

_ETHERNET_SIZE = 14
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_PORTS = struct.Struct("!HH")
_FRAGMENT = struct.Struct("!BBH")  # next header, reserved, offset and flags
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV4_TYPE, _ARP_TYPE, _IPV6_TYPE = 0x0800, 0x0806, 0x86DD
_ETHERTYPES = {_IPV4_TYPE: "IPv4", _ARP_TYPE: "ARP", _IPV6_TYPE: "IPv6", 0x8100: "VLAN"}
_TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
_TCP, _ICMP, _ICMPV6 = 6, 1, 58
_PROTOCOLS = {_ICMP: "icmp", _TCP: "tcp", 17: "udp", _ICMPV6: "icmpv6", 132: "sctp"}
_WITH_PORTS = frozenset({_TCP, 17, 132})
_FRAGMENT_OFFSET, _FRAGMENT6_OFFSET = 0x1FFF, 0xFFF8
# The headers that the programs skip between IPv6 and transport, and the bytes a unit of their length is.
_FRAGMENT_HEADER = 44
_EXTENSIONS = {0: 8, 43: 8, _FRAGMENT_HEADER: 0, 51: 4, 60: 8}
_ICMP_TYPES = {
    (1, 0): "EchoReply",
    (1, 3): "DestinationUnreachable",
    (1, 4): "SourceQuench",
    (1, 5): "Redirect",
    (1, 8): "EchoRequest",
    (1, 9): "RouterAdvertisement",
    (1, 10): "RouterSolicitation",
    (1, 11): "TimeExceeded",
    (1, 12): "ParameterProblem",
    (1, 13): "TimestampRequest",
    (1, 14): "TimestampReply",
    (58, 1): "DestinationUnreachable",
    (58, 2): "PacketTooBig",
    (58, 3): "TimeExceeded",
    (58, 4): "ParameterProblem",
    (58, 128): "EchoRequest",
    (58, 129): "EchoReply",
    (58, 130): "MulticastListenerQuery",
    (58, 131): "MulticastListenerReport",
    (58, 132): "MulticastListenerDone",
    (58, 133): "RouterSolicitation",
    (58, 134): "RouterAdvertisement",
    (58, 135): "NeighborSolicitation",
    (58, 136): "NeighborAdvertisement",
    (58, 137): "Redirect",
    (58, 143): "MulticastListenerReportV2",
}

_LATER_FRAGMENT = (0, 0, "fragment")  # ports and note

# Few addresses speak at a time; 4096 of them are 0.6 MB.
_address = lru_cache(4096)(unpack_ip)


class Packet(NamedTuple):
    """What was found; empty and zero where the bytes end before it."""

    ethertype: int = 0
    source_mac: str = ""
    destination_mac: str = ""
    source: str = ""
    destination: str = ""
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0
    note: str = ""  # TCP flags, the ICMP type, "fragment", or what ARP asks

    @property
    def summary(self) -> str:
        """One phrase, as "10.0.0.1:4000 -> 10.0.0.2:80 tcp SYN"."""
        if not self.source:
            kind = _ETHERTYPES.get(self.ethertype, f"ethertype {self.ethertype:#06x}")
            return " ".join(filter(None, (f"{self.source_mac} -> {self.destination_mac}", kind, self.note)))
        name = _PROTOCOLS.get(self.protocol) or f"protocol {self.protocol}"
        source = self._end(self.source, self.source_port)
        words = f"{source} -> {self._end(self.destination, self.destination_port)} {name}"
        return f"{words} {self.note}" if self.note else words

    @staticmethod
    def _end(address: str, port: int) -> str:
        if not port:
            return address
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def dissect(data: bytes) -> Packet:
    """Return what the first bytes of an Ethernet frame say.  Never raises."""
    if len(data) < _ETHERNET_SIZE:
        return Packet()
    ethertype = data[12] << 8 | data[13]
    macs = (data[6:12].hex(":"), data[:6].hex(":"))
    rest = len(data) - _ETHERNET_SIZE
    if ethertype == _IPV4_TYPE and rest >= _IPV4.size:
        return _ipv4(data, macs)
    if ethertype == _IPV6_TYPE and rest >= _IPV6.size:
        return _ipv6(data, macs)
    note = _arp(data) if ethertype == _ARP_TYPE and rest >= _ARP.size else ""
    return Packet(ethertype, *macs, note=note)


def _ipv4(data: bytes, macs: tuple[str, str]) -> Packet:
    first, _, _, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(data, _ETHERNET_SIZE)
    behind = _ETHERNET_SIZE + max((first & 15) * 4, _IPV4.size)
    ends = _LATER_FRAGMENT if fragment & _FRAGMENT_OFFSET else _transport(protocol, data, behind)
    return Packet(_IPV4_TYPE, macs[0], macs[1], _address(source), _address(destination), protocol, *ends)


def _ipv6(data: bytes, macs: tuple[str, str]) -> Packet:
    _, _, protocol, _, source, destination = _IPV6.unpack_from(data, _ETHERNET_SIZE)
    protocol, behind = _extensions(protocol, data, _ETHERNET_SIZE + _IPV6.size)
    ends = _transport(protocol, data, behind) if behind else _LATER_FRAGMENT
    return Packet(_IPV6_TYPE, macs[0], macs[1], _address(source), _address(destination), protocol, *ends)


def _extensions(protocol: int, data: bytes, at: int) -> tuple[int, int]:
    """Return what follows IPv6's extension headers and where; 0 when this is a later fragment of it."""
    # Each of them takes eight bytes at least, so the end of the bytes ends this.
    while protocol in _EXTENSIONS and at + _FRAGMENT.size <= len(data):
        header, unit = protocol, _EXTENSIONS[protocol]
        protocol, length, offset = _FRAGMENT.unpack_from(data, at)
        if header == _FRAGMENT_HEADER and offset & _FRAGMENT6_OFFSET:
            return protocol, 0
        at += 8 + length * unit
    return protocol, at


def _transport(protocol: int, data: bytes, at: int) -> tuple[int, int, str]:
    """Return the ports and the note of the header at `at`, which may lie behind the end."""
    room = len(data) - at
    if protocol in _WITH_PORTS:
        if room < _PORTS.size:
            return (0, 0, "")
        note = _tcp_flags(data[at + 13]) if protocol == _TCP and room > 13 else ""
        return (*_PORTS.unpack_from(data, at), note)
    if protocol in (_ICMP, _ICMPV6) and room > 0:
        return (0, 0, _ICMP_TYPES.get((protocol, data[at])) or f"type {data[at]}")
    return (0, 0, "")


@cache
def _tcp_flags(bits: int) -> str:
    return ", ".join(name for bit, name in enumerate(_TCP_FLAGS) if bits >> bit & 1)


def _arp(data: bytes) -> str:
    *_, operation, _, sender, _, target = _ARP.unpack_from(data, _ETHERNET_SIZE)
    verb = {1: "who has", 2: "answer to"}.get(operation, f"operation {operation} to")
    return f"{verb} {unpack_ip(target)} from {unpack_ip(sender)}"
