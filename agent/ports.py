# SPDX-License-Identifier: Apache-2.0
"""Published ports as the engine hands them to a network driver (`com.docker.network.portmap`).

The engine gives a list of ``{"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8080,
"HostPortEnd": 8080}`` and expects the driver to choose where HostPort is 0.  A range
(``HostPort`` < ``HostPortEnd``) means: one free port out of it.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from agent.endpoint import PROTOCOL_NAMES, Port
from agent.errors import DriverError

PORTMAP = "com.docker.network.portmap"
# Where the engine leaves the choice to us: the range that Linux and the engine itself use.
EPHEMERAL = (32768, 60999)
# Host addresses that mean every address: of both families, of one.
EVERYWHERE = ("", "0.0.0.0", "::")

Taken = Collection[tuple[int, str, int]]

# Ports can not be bound to it: the kernel delivers nothing for ::1 that comes from an endpoint.
LOOPBACK6 = "::1"

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def parse_portmap(
    options: Mapping[str, Any], taken: Taken, present: Sequence[Port] = (), *, ipv6: bool = False
) -> tuple[Port, ...]:
    """Return the ports to publish; `taken` holds (protocol, host address, port) in use on this host.

    `ipv6`: the container has an IPv6 address too, and bindings to IPv6 addresses mean something.

    A call that comes again (an engine that restarted) keeps what it chose before: `present`.  Raises
    DriverError that names the binding for what can not be published.
    """
    bindings = options.get(PORTMAP) or []
    if not isinstance(bindings, list):
        raise DriverError(f"{PORTMAP} is not a list: {bindings!r}")
    used = set(taken)
    ports: list[Port] = []
    for binding in bindings:
        port = _parse_binding(binding, used, present, ipv6)
        if port is None:
            continue
        used.add((port.protocol, port.host_ip, port.host_port))
        ports.append(port)
    return tuple(ports)


def _parse_binding(
    binding: Any, used: set[tuple[int, str, int]], present: Sequence[Port], ipv6: bool
) -> Port | None:
    try:
        protocol, container_port = int(binding["Proto"]), int(binding["Port"])
        low, high = int(binding.get("HostPort") or 0), int(binding.get("HostPortEnd") or 0)
        host_ip = str(binding.get("HostIP") or "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DriverError(f"port binding {binding!r} can not be read: {error}") from error
    in_range = 0 < container_port < 65536 and 0 <= low < 65536 and 0 <= high < 65536
    if protocol not in PROTOCOL_NAMES or not in_range:
        raise DriverError(f"port binding {binding!r}: protocol or port is out of range")
    if _version(host_ip) == 6 and not ipv6:
        return None  # an engine with IPv6 sends a second binding for -p without an address
    if host_ip == LOOPBACK6:
        raise DriverError(
            f"port {low or 'any'}/{PROTOCOL_NAMES[protocol]} can not be published on {LOOPBACK6}: the kernel "
            "delivers no answers there",
            hint="publish it on 127.0.0.1 or on another address of this host",
        )
    if host_ip not in EVERYWHERE and not _is_of_this_host(host_ip):
        raise DriverError(
            f"{host_ip} is not an address of this host: port {low or 'any'}/{PROTOCOL_NAMES[protocol]} "
            "can not be published on it"
        )
    wanted = range(low, max(low, high) + 1) if low else range(EPHEMERAL[0], EPHEMERAL[1] + 1)
    for kept in present:
        same = (kept.protocol, kept.container_port, kept.host_ip) == (protocol, container_port, host_ip)
        if same and kept.host_port in wanted and (protocol, host_ip, kept.host_port) not in used:
            return kept
    chosen = _choose(protocol, host_ip, wanted, used)
    return Port(protocol, container_port, chosen, chosen, host_ip)


def _choose(protocol: int, host_ip: str, wanted: range, used: set[tuple[int, str, int]]) -> int:
    in_use = {port for number, ip, port in used if number == protocol and _meet(ip, host_ip)}
    for candidate in wanted:
        if candidate not in in_use and _is_free(protocol, host_ip, candidate):
            return candidate
    ports = f"{wanted[0]}" if len(wanted) == 1 else f"{wanted[0]}-{wanted[-1]}"
    raise DriverError(
        f"host port {ports}/{PROTOCOL_NAMES[protocol]} is in use by a container or a service of the host",
        hint="stop what uses it or choose another host port",
    )


def _is_free(protocol: int, host_ip: str, port: int) -> bool:
    """Try to bind: a service of the host (ssh!) must never lose its port to a container."""
    kind = {6: socket.SOCK_STREAM, 17: socket.SOCK_DGRAM}.get(protocol)
    if kind is None:
        return True
    versions = (_version(host_ip),) if host_ip else (4, 6)
    return all(_can_bind(_FAMILIES[version], kind, host_ip, port) for version in versions)


def _can_bind(family: socket.AddressFamily, kind: socket.SocketKind, host_ip: str, port: int) -> bool:
    try:
        probe = socket.socket(family, kind)
    except OSError:
        return True  # a host without IPv6 has no service on it
    with probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host_ip, port))
        except OSError as error:
            return error.errno == errno.EADDRNOTAVAIL and not host_ip
    return True


def _meet(one: str, other: str) -> bool:
    """Whether two host addresses of bindings have an address in common.  Pure."""
    if not one or not other or one == other:
        return True
    return _version(one) == _version(other) and (one in EVERYWHERE or other in EVERYWHERE)


def _is_of_this_host(address: str) -> bool:
    try:
        with socket.socket(_FAMILIES[_version(address)], socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _version(text: str) -> int:
    """Return 4 or 6, 0 for no address.  Raises DriverError for what is none."""
    try:
        return ip_address(text).version if text else 0
    except ValueError as error:
        raise DriverError(f"host address {text!r} of a published port is not an IP address") from error


def taken_ports(all_ports: Iterable[Port]) -> set[tuple[int, str, int]]:
    """Return (protocol, host address, host port) of every port that is published already."""
    return {
        (port.protocol, port.host_ip, number)
        for port in all_ports
        for number in range(port.host_port, port.host_port_end + 1)
    }
