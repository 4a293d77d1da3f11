# SPDX-License-Identifier: Apache-2.0
"""What is written into programs before they are loaded: `struct config` of bpf/include/config.h.

Responsible for: the table of its members, their values from addresses and options, and the probe for what
the running kernel offers.  The loader compares the table with the object's BTF.
Called by: the agent, which fills in the values, and `datapath.loader`.
"""

from __future__ import annotations

import enum
import functools
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from datapath.errors import LoadError
from datapath.layouts import ADDRESS, U8, U32, Field, Layout, Scalar
from datapath.libbpf import has_helper

EVENT_PAYLOAD = 128  # most bytes of a packet in an event; EVENT_PAYLOAD of bpf/include/events.h
_SCHED_CLS, _KTIME_GET_COARSE_NS = 3, 160  # include/uapi/linux/bpf.h

_MAC6 = Scalar("u8[6]", "6s", 6, 1)
CONFIG = Layout(
    "config",
    (
        Field("address", ADDRESS),
        Field("gateway", ADDRESS),
        Field("endpoint_id", U32),
        Field("ifindex", U32),
        Field("aggregation", U32),
        Field("payload_length", U32),
        Field("report_interval", U32),
        Field("timeout_tcp", U32),
        Field("timeout_any", U32),
        Field("timeout_tcp_syn", U32),
        Field("timeout_tcp_fin", U32),
        Field("tunnel_ifindex", U32),
        Field("host_mac", _MAC6),
        Field("coarse_clock", U8),
        Field("track_fragments", U8),
    ),
)


# Of every endpoint; they exist only in the programs.
GATEWAY = IPv4Address("169.254.1.1")
GATEWAY6 = IPv6Address("fe80::1")


class Aggregation(enum.IntEnum):
    """How many packets of a connection are traced."""

    NONE = 0  # every packet, at every point
    LOW = 1  # every packet, where it goes: not where it arrives
    MEDIUM = 2  # new connections, the first sight of a TCP flag, one packet per interval
    MAXIMUM = 3  # new connections, the first sight of a TCP flag


@dataclass(frozen=True)
class DatapathOptions:
    """What all programs of a host have in common; times in seconds, defaults are Cilium 1.11's."""

    aggregation: Aggregation = Aggregation.MEDIUM
    payload_length: int = EVENT_PAYLOAD  # bytes of a packet in an event
    report_interval: int = 5
    timeout_tcp: int = 21_600
    timeout_any: int = 60
    timeout_tcp_syn: int = 60
    timeout_tcp_fin: int = 10
    track_fragments: bool = True
    tunnel_ifindex: int = 0  # of the VXLAN device; 0: other hosts are reached by the stack


@dataclass(frozen=True)
class EndpointConstants:
    """What the programs of one endpoint know; `ifindex` and `host_mac` are the host-side veth's.

    `address` says the family: an endpoint has one set of programs, and one of its addresses, for each.

    `identity` is only where they begin: `datapath.loader.IdentityCell` changes it while they run.
    """

    endpoint_id: int
    identity: int
    ifindex: int
    address: IPv4Address | IPv6Address
    host_mac: str
    options: DatapathOptions = field(default_factory=DatapathOptions)

    def pack(self) -> bytes:
        """Return the bytes of `struct config`.  Raises LoadError for a value that does not fit."""
        try:
            return _pack(self)
        except struct.error as error:
            raise LoadError(f"a constant of endpoint {self.endpoint_id} does not fit: {error}") from error


def netdev_constants(options: DatapathOptions) -> EndpointConstants:
    """Return what the programs on the host's own devices know: the options only."""
    return EndpointConstants(0, 0, 0, IPv4Address(0), "00:00:00:00:00:00", options=options)


def mac_bytes(mac: str) -> bytes:
    """Return the six bytes of "aa:bb:cc:dd:ee:ff".  Raises LoadError for anything else."""
    try:
        parts = bytes(int(part, 16) for part in mac.split(":"))
    except ValueError:
        parts = b""
    if len(parts) != 6:
        raise LoadError(f"MAC address {mac!r} is not six hexadecimal bytes")
    return parts


def _pack(constants: EndpointConstants) -> bytes:
    options = constants.options
    if not 0 <= options.payload_length <= EVENT_PAYLOAD:
        raise LoadError(f"trace payload of {options.payload_length} bytes is not in 0…{EVENT_PAYLOAD}")
    return CONFIG.pack(
        _address(constants.address),
        _address(GATEWAY if constants.address.version == 4 else GATEWAY6),
        constants.endpoint_id,
        constants.ifindex,
        int(options.aggregation),
        options.payload_length,
        options.report_interval,
        options.timeout_tcp,
        options.timeout_any,
        options.timeout_tcp_syn,
        options.timeout_tcp_fin,
        options.tunnel_ifindex,
        mac_bytes(constants.host_mac),
        int(_has_coarse_clock()),
        int(options.track_fragments),
    )


def _address(address: IPv4Address | IPv6Address) -> bytes:
    return address.packed.ljust(16, b"\0")


@functools.cache
def _has_coarse_clock() -> bool:
    return has_helper(_SCHED_CLS, _KTIME_GET_COARSE_NS)
