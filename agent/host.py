# SPDX-License-Identifier: Apache-2.0
"""What this host is: its name, its address, its addresses, the interfaces that face other machines.

Read from rtnetlink, once at the start and then every few seconds: the addresses of a host are identity
`host` in the ip→identity table.  All functions block for a millisecond or two; call them in a thread.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from datapath import noderoutes, routes
from datapath.routemessages import UNICAST, RouteSocket
from datapath.rtnetlink import IPRoute, NetlinkError

DEFAULT_MTU = 1500
IF_INET6 = Path("/proc/net/if_inet6")
# Routes to this host's endpoints, and to the pools of other hosts.
OURS = frozenset({routes.PROTOCOL, noderoutes.PROTOCOL})
PASSING = 0x21  # IFA_F_TEMPORARY, IFA_F_DEPRECATED: addresses of IPv6 that a node is not known by
# Interfaces that never face another machine; `veth` may be a container's, so a route decides.
OWN_PREFIXES = ("lo", "lxc0", "hf0", "cilium_", "docker", "br-", "ifb")


@dataclass(frozen=True)
class HostView:
    """The host at one moment.  `devices` maps name → interface index of what faces other machines."""

    node_ip: IPv4Address
    addresses: frozenset[IPv4Address | IPv6Address]
    devices: dict[str, int]
    mtu: int
    networks: tuple[IPv4Network, ...]
    node_ip6: IPv6Address | None = None

    @property
    def node_ips(self) -> tuple[str, ...]:
        """Return where other nodes reach this one, an address of each family that it has one of."""
        return tuple(str(each) for each in (self.node_ip, self.node_ip6) if each is not None)


def has_ipv6() -> bool:
    """True when this host's kernel speaks IPv6; one booted with ipv6.disable=1 does not."""
    return IF_INET6.exists()


def node_name(configured: str = "") -> str:
    """Return the node's name: configured, else the host name."""
    return configured or socket.gethostname()


def look(node_ip: IPv4Address | None = None, devices: tuple[str, ...] = ()) -> HostView:
    """Return the present view; `node_ip` and `devices` fix what would be found out otherwise.

    Raises AgentError when the host has no address to be known by, or lacks a named device.
    """
    with IPRoute() as ipr, RouteSocket() as table:
        addresses = [each for each in ipr.get_addr() if each["family"] in (socket.AF_INET, socket.AF_INET6)]
        addressed = [(each["index"], _address(each)) for each in addresses]
        passing = {_address(each) for each in addresses if (each.get_attr("IFA_FLAGS") or 0) & PASSING}
        found = [each for each in table.dump(socket.AF_INET, without=OURS) if each.type == UNICAST]
        ways = {each.oif for each in found if each.oif}
        links = _configured(ipr, devices) if devices else _routed(ipr, ways)
    facing = {each.name: each.index for each in links}
    outward = [
        each
        for index, each in addressed
        if index in facing.values() and isinstance(each, IPv4Address) and not each.is_loopback
    ]
    outward6 = [
        each
        for index, each in addressed
        if index in facing.values()
        and isinstance(each, IPv6Address)
        and not each.is_link_local
        and each not in passing
    ]
    return HostView(
        node_ip=node_ip or _node_ip(outward),
        addresses=frozenset(each for _, each in addressed),
        devices=facing,
        mtu=min((each.mtu for each in links if each.mtu), default=DEFAULT_MTU),
        node_ip6=min(outward6, default=None),
        networks=tuple(IPv4Network(each.prefix) for each in found),
    )


def _address(message: Any) -> IPv4Address | IPv6Address:
    return ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))


@dataclass(frozen=True)
class _Link:
    index: int
    name: str
    mtu: int


def _link(ipr: IPRoute, **which: str | int) -> _Link | None:
    """Return a device by ifname or index, None when there is none.

    One is asked for at a time: a dump describes every endpoint's too, for 0.2 ms each.
    """
    try:
        (link,) = ipr.link("get", **which)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    return _Link(link["index"], str(link.get_attr("IFLA_IFNAME")), int(link.get_attr("IFLA_MTU") or 0))


def _configured(ipr: IPRoute, names: tuple[str, ...]) -> list[_Link]:
    found = {name: _link(ipr, ifname=name) for name in names}
    unknown = [name for name, link in found.items() if link is None]
    if unknown:
        there = sorted(str(link.get_attr("IFLA_IFNAME")) for link in ipr.get_links())
        raise AgentError(
            f"option devices names {', '.join(unknown)}, which this host does not have",
            hint=f"it has {', '.join(there)}",
        )
    return [link for link in found.values() if link is not None]


def _routed(ipr: IPRoute, indexes: set[int]) -> list[_Link]:
    """Return the devices of routes that can face another machine; one may be gone since."""
    links = (_link(ipr, index=index) for index in sorted(indexes))
    return [link for link in links if link is not None and not link.name.startswith(OWN_PREFIXES)]


def _node_ip(outward: list[IPv4Address]) -> IPv4Address:
    if not outward:
        raise AgentError(
            "this host has no IPv4 address on an interface with a route",
            hint="give it one or set the option ipv4-node",
        )
    return outward[0]
