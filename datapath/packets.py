# SPDX-License-Identifier: Apache-2.0
"""Reads the first bytes of a packet as far as a person wants them: addresses, ports, flags.

Responsible for: a result for any bytes at all — what containers send is not to be trusted, and an event
may carry less than the headers.  Called by: `datapath.format`.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

from datapath.addresses import unpack_ip

_ETHERNET = struct.Struct("!6s6sH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_PORTS = struct.Struct("!HH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ETHERTYPES = {0x0800: "IPv4", 0x0806: "ARP", 0x86DD: "IPv6", 0x8100: "VLAN"}
_TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
_WITH_PORTS = frozenset({6, 17, 132})
_FRAGMENT_OFFSET = 0x1FFF
_ICMP_TYPES = {
    (1, 0): "EchoReply",
    (1, 3): "DestinationUnreachable",
    (1, 5): "Redirect",
    (1, 8): "EchoRequest",
    (1, 11): "TimeExceeded",
    (58, 1): "DestinationUnreachable",
    (58, 2): "PacketTooBig",
    (58, 3): "TimeExceeded",
    (58, 128): "EchoRequest",
    (58, 129): "EchoReply",
    (58, 135): "NeighborSolicitation",
    (58, 136): "NeighborAdvertisement",
}


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
        name = _PROTOCOLS.get(self.protocol, f"protocol {self.protocol}")
        words = f"{self._end(self.source, self.source_port)} -> "
        words += f"{self._end(self.destination, self.destination_port)} {name}"
        return f"{words} {self.note}".rstrip()

    @staticmethod
    def _end(address: str, port: int) -> str:
        if not port:
            return address
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def dissect(data: bytes) -> Packet:
    """Return what the first bytes of an Ethernet frame say.  Never raises."""
    if len(data) < _ETHERNET.size:
        return Packet()
    destination, source, ethertype = _ETHERNET.unpack_from(data)
    packet = Packet(ethertype, source.hex(":"), destination.hex(":"))
    rest = data[_ETHERNET.size :]
    if ethertype == 0x0800 and len(rest) >= _IPV4.size:
        return _ipv4(packet, rest)
    if ethertype == 0x86DD and len(rest) >= _IPV6.size:
        return _ipv6(packet, rest)
    if ethertype == 0x0806 and len(rest) >= _ARP.size:
        return _arp(packet, rest)
    return packet


def _ipv4(packet: Packet, data: bytes) -> Packet:
    first, _, _, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(data)
    packet = packet._replace(source=unpack_ip(source), destination=unpack_ip(destination), protocol=protocol)
    if fragment & _FRAGMENT_OFFSET:
        return packet._replace(note="fragment")
    return _transport(packet, data[max((first & 15) * 4, _IPV4.size) :])


def _ipv6(packet: Packet, data: bytes) -> Packet:
    _, _, protocol, _, source, destination = _IPV6.unpack_from(data)
    packet = packet._replace(source=unpack_ip(source), destination=unpack_ip(destination), protocol=protocol)
    return _transport(packet, data[_IPV6.size :])


def _transport(packet: Packet, data: bytes) -> Packet:
    if packet.protocol in (1, 58) and data:
        return packet._replace(note=_ICMP_TYPES.get((packet.protocol, data[0]), f"type {data[0]}"))
    if packet.protocol not in _WITH_PORTS or len(data) < _PORTS.size:
        return packet
    source_port, destination_port = _PORTS.unpack_from(data)
    note = _tcp_flags(data[13]) if packet.protocol == 6 and len(data) > 13 else ""
    return packet._replace(source_port=source_port, destination_port=destination_port, note=note)


@cache
def _tcp_flags(bits: int) -> str:
    return ", ".join(name for bit, name in enumerate(_TCP_FLAGS) if bits >> bit & 1)


def _arp(packet: Packet, data: bytes) -> Packet:
    *_, operation, _, sender, _, target = _ARP.unpack_from(data)
    verb = {1: "who has", 2: "answer to"}.get(operation, f"operation {operation} to")
    return packet._replace(note=f"{verb} {unpack_ip(target)} from {unpack_ip(sender)}")
