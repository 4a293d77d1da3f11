# SPDX-License-Identifier: Apache-2.0
"""What tests of the data path ask of an address family, so that each scenario is written once."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support import frames


@dataclass(frozen=True)
class Net:
    """Addresses and numbers of one family; endpoints are those of `bpflab`."""

    family: int
    header: int  # bytes of an IP header without options or extensions
    counted: int  # bytes of it that the packet's length field counts
    hops_at: int  # where in a frame the hop count is
    endpoints: str  # pattern of their addresses
    pool: str
    gateway: str  # of endpoints
    wire: str  # the host's address on the VM's network
    vm: str
    outside: str
    beyond: str  # neither the host's nor an endpoint's: only forwarded
    beyond_router: str
    node: str
    router: str
    unspecified: str
    loopback: str
    wide: tuple[str, str]  # a prefix, and an address in it but not in `narrow`
    narrow: tuple[str, str]
    icmp: int
    echo: int
    echo_reply: int
    errors: tuple[int, ...]  # ICMP types

    def endpoint(self, number: int) -> str:
        return self.endpoints.format(number)

    @property
    def a(self) -> str:
        """Endpoint 1."""
        return self.endpoint(1)

    @property
    def b(self) -> str:
        """Endpoint 2."""
        return self.endpoint(2)

    def alone(self, address: str) -> str:
        """The prefix that holds one address only."""
        return f"{address}/{32 if self.family == 4 else 128}"

    def on_link(self, address: str) -> str:
        """An address with the length of its network's prefix."""
        return f"{address}/{24 if self.family == 4 else 64}"


NET4 = Net(
    family=4,
    header=20,
    counted=20,
    hops_at=14 + 8,
    endpoints="10.0.0.{}",
    pool="10.0.0.0/24",
    gateway="169.254.1.1",
    wire="10.9.0.1",
    vm="10.9.0.5",
    outside="192.0.2.7",
    beyond="10.77.0.1",
    beyond_router="10.77.0.254",
    node="10.8.0.1",
    router="203.0.113.1",
    unspecified="0.0.0.0",
    loopback="127.0.0.1",
    wide=("192.0.0.0/8", "192.9.2.9"),
    narrow=("192.0.2.0/24", "192.0.2.9"),
    icmp=frames.ICMP,
    echo=frames.ECHO,
    echo_reply=frames.ECHO_REPLY,
    errors=(frames.UNREACHABLE, frames.TIME_EXCEEDED, frames.PARAMETER_PROBLEM),
)
NET6 = Net(
    family=6,
    header=40,
    counted=0,
    hops_at=14 + 7,
    endpoints="fd00::{}",
    pool="fd00::/64",
    gateway="fe80::1",
    wire="fd09::1",
    vm="fd09::5",
    outside="2001:db8::7",
    beyond="fd77::1",
    beyond_router="fd77::fe",
    node="fd08::1",
    router="2001:db8:1::1",
    unspecified="::",
    loopback="::1",
    wide=("2001::/16", "2001:9::9"),
    narrow=("2001:db8::/32", "2001:db8::9"),
    icmp=frames.ICMPV6,
    echo=frames.ECHO6,
    echo_reply=frames.ECHO_REPLY6,
    errors=(
        frames.UNREACHABLE6,
        frames.PACKET_TOO_BIG,
        frames.TIME_EXCEEDED6,
        frames.PARAMETER_PROBLEM6,
    ),
)
NETS = (NET4, NET6)
