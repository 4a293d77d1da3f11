# SPDX-License-Identifier: Apache-2.0
"""The endpoint record: one workload's network interface on this host.

Frozen; the table of endpoints holds one a number, the checkpoint one file a number.  Unknown fields in a
checkpoint are ignored and missing ones have defaults, so that two versions can follow each other.
"""

from __future__ import annotations

import enum
from ipaddress import IPv4Address

import msgspec

from datapath.addresses import host_prefix

PROTOCOL_NAMES = {6: "tcp", 17: "udp", 132: "sctp"}  # of ports that can be published
ENDPOINT_ID_MAX = 65535  # the key of cilium_call_policy; 0 is never an endpoint


class State(enum.StrEnum):
    """Where an endpoint is in its life; the names are Cilium's."""

    CREATING = "creating"  # it has its address and its interface is begun; nobody has joined it yet
    WAITING_FOR_IDENTITY = "waiting-for-identity"  # enforced as reserved:init: nothing passes
    REGENERATING = "regenerating"  # programs or policy are being written
    READY = "ready"  # identity and policy are in the kernel
    RESTORING = "restoring"  # read from the checkpoint; the kernel still enforces the last state
    NOT_READY = "not-ready"  # the last write to the kernel failed; the error says why
    DISCONNECTING = "disconnecting"  # its interface and its identity are being taken away
    DISCONNECTED = "disconnected"  # they are gone; number and address are kept until it is deleted


class Port(msgspec.Struct, frozen=True, omit_defaults=True):
    """One published port (or range): `host_ip` empty means every address of the host."""

    protocol: int  # IP protocol number: 6, 17, 132
    container_port: int
    host_port: int
    host_port_end: int
    host_ip: str = ""  # 0.0.0.0 and :: are every address of a family

    @property
    def family(self) -> int:
        """Return 4 or 6 for a port bound to addresses of one family, 0 for one of both."""
        return (6 if ":" in self.host_ip else 4) if self.host_ip else 0

    def __str__(self) -> str:
        """Return it as `docker ps` writes one."""
        spread = self.host_port_end - self.host_port
        address = f"[{self.host_ip}]" if self.family == 6 else self.host_ip or "0.0.0.0"
        host = f"{address}:{_span(self.host_port, spread)}"
        return f"{host}->{_span(self.container_port, spread)}/{PROTOCOL_NAMES[self.protocol]}"


def _span(first: int, spread: int) -> str:
    return f"{first}-{first + spread}" if spread else f"{first}"


class Endpoint(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One endpoint.  Addresses are text, MACs are aa:bb:cc:dd:ee:ff, `labels` serialized identity labels."""

    id: int
    ipv4: str
    ipv6: str = ""  # empty without IPv6
    mac: str
    node_mac: str
    interface: str  # host side of the veth pair
    peer: str = ""  # name of the container side before the engine renames it
    network_id: str = ""  # empty for an endpoint made through the API
    engine_endpoint_id: str = ""
    container_id: str = ""
    container_name: str = ""
    netns: str = ""  # path of the namespace, for endpoints made through the API
    sandbox: str = ""  # the engine's key of the container's namespace; empty before Join and after Leave
    labels: str = ""  # empty until they are known
    all_labels: str = ""  # including those that do not count for the identity
    identity: int = 0  # 0 until allocated: enforced as reserved:init
    connected: bool = False  # an interface is wanted
    handed_over: bool = False  # the other side of the interface is in the workload's namespace
    ports: tuple[Port, ...] = ()

    @property
    def joined(self) -> bool:
        """Whether the interface was made and promised to a workload, which may have it already."""
        return bool(self.sandbox) or self.handed_over

    @property
    def addresses(self) -> dict[int, str]:
        """Return the address of each family that the endpoint has one of: 4, and 6 with IPv6."""
        return {4: self.ipv4, 6: self.ipv6} if self.ipv6 else {4: self.ipv4}

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Return its addresses as the ip→identity table has them: "10.0.0.1/32", "fd00::1/128"."""
        return tuple(map(host_prefix, self.addresses.values()))

    @property
    def enforced_identity(self) -> int:
        """Return the identity that the kernel uses: reserved:init (5) as long as there is none."""
        return self.identity or 5


def macs_of(address: IPv4Address) -> tuple[str, str]:
    """Return (container MAC, host-side MAC), derived from the address so that they survive a restart.

    Both are locally administered unicast addresses; an address is unique in its cluster, so are they.
    """
    tail = ":".join(f"{byte:02x}" for byte in address.packed)
    return f"0a:58:{tail}", f"0a:59:{tail}"
