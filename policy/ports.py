# SPDX-License-Identifier: Apache-2.0
"""toPorts and icmps: from documents to transports.

The policy map is flat: it knows one port, or all ports of all protocols.  So ranges are expanded, up
to `MAX_RANGE` ports, ``ANY`` becomes TCP, UDP and SCTP, and port 0 (every port of one protocol, in
Cilium) is refused because no entry can say it.  Names stay names: whose port it is decides which number
(`policy.narrowing`).  Called by `policy.rules`; pure.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from core.errors import shorten
from policy.model import ICMP, ICMPV6, MAX_PORT, SCTP, TCP, UDP, NamedPort, Transport
from policy.names import MAX_NAME, is_name
from policy.reader import Place

MAX_RANGE: Final = 64
MAX_ICMP_TYPE: Final = 255

PROTOCOLS: Final[dict[str, tuple[int, ...]]] = {
    "TCP": (TCP,),
    "UDP": (UDP,),
    "SCTP": (SCTP,),
    "ANY": (TCP, UDP, SCTP),
}
FAMILIES: Final = {"IPv4": ICMP, "IPv6": ICMPV6}


class Ports(NamedTuple):
    """The ports and ICMP types of one element (None: all), and those that it names."""

    transports: tuple[Transport, ...] | None
    names: tuple[NamedPort, ...] = ()


def read_transports(element: dict[str, Place]) -> Ports | None:
    """Return the ports and types of one ingress or egress element; None if it has none.

    Raises FieldError.
    """
    ports, icmps = element.get("toPorts"), element.get("icmps")
    port_rules = ports.items() if ports else []
    icmp_rules = icmps.items() if icmps else []
    if icmps and port_rules and icmp_rules:
        raise icmps.error("icmps and toPorts in one element", hint="write two elements")
    if not port_rules and not icmp_rules:
        return None
    found: dict[Transport | NamedPort, None] = {}
    found |= dict.fromkeys(each for place in port_rules for each in _port_rule(place))
    found |= dict.fromkeys(each for place in icmp_rules for each in _icmp_rule(place))
    numbers = tuple(each for each in found if isinstance(each, Transport))
    return Ports(numbers, tuple(each for each in found if isinstance(each, NamedPort)))


def _port_rule(place: Place) -> Iterator[Transport | NamedPort]:
    ports = place.fields("toPorts").get("ports")
    listed = ports.items() if ports else []
    if not listed:
        raise place.error("it names no ports", hint="list ports, or leave toPorts out to allow every port")
    for each in listed:
        yield from _port(each)


def _port(place: Place) -> Sequence[Transport | NamedPort]:
    given = place.fields("ports")
    if "port" not in given:
        raise place.error("port is missing", hint="a number from 1 to 65535")
    protocols = _protocol(given["protocol"]) if "protocol" in given else PROTOCOLS["ANY"]
    name = _port_name(given["port"])
    if name and "endPort" in given:
        raise given["endPort"].error(f"a range can not begin at the name {name!r}", hint="write its number")
    if name:
        return [NamedPort(name, protocol) for protocol in protocols]
    first = _port_number(given["port"])
    last = _end_port(given["endPort"], first) if "endPort" in given else first
    return _range(first, last, protocols)


# A text that names ranges by the thousand has each of its ports in memory once.
@functools.lru_cache(maxsize=1024)
def _range(first: int, last: int, protocols: tuple[int, ...]) -> tuple[Transport, ...]:
    return tuple(_transport(port, protocol) for port in range(first, last + 1) for protocol in protocols)


@functools.lru_cache(maxsize=65_536)
def _transport(port: int, protocol: int) -> Transport:
    return Transport(port, protocol)


def _port_name(place: Place) -> str:
    """Return the name in lower case (they are equal without regard to case); empty for a number."""
    value = place.node.value
    if not isinstance(value, str) or not any(each.isalpha() for each in value):
        return ""
    name = value.lower()
    if not is_name(name):
        raise place.error(
            f"{shorten(value)!r} is no port and can not be the name of one",
            hint=f"a number, or a name of at most {MAX_NAME} letters, digits and inner hyphens",
        )
    return name


def _port_number(place: Place) -> int:
    value = place.node.value
    if value in (0, "0") and value is not False:
        raise place.unsupported(
            "port 0 (every port) is not supported", hint="leave toPorts out to allow every port"
        )
    return place.number(1, MAX_PORT, "port")


def _end_port(place: Place, first: int) -> int:
    last = place.number(first, MAX_PORT, "end of a range that starts at `port`")
    if last - first >= MAX_RANGE:
        raise place.unsupported(
            f"a range of {last - first + 1} ports is not supported, the most is {MAX_RANGE}",
            hint="leave toPorts out to allow every port, or name fewer",
        )
    return last


def _protocol(place: Place) -> tuple[int, ...]:
    name = place.text().upper()
    if name in ("ICMP", "ICMPV6"):
        raise place.error(f"{name} has no ports", hint="use icmps")
    return PROTOCOLS[name] if name in PROTOCOLS else PROTOCOLS[place.choice(PROTOCOLS, "protocol")]


def _icmp_rule(place: Place) -> list[Transport]:
    fields = place.fields("icmps").get("fields")
    listed = fields.items() if fields else []
    if not listed:
        raise place.error("it names no types", hint="list `fields`, each with family and type")
    return [_icmp(each) for each in listed]


def _icmp(place: Place) -> Transport:
    given = place.fields("fields")
    if "type" not in given:
        raise place.error("type is missing", hint="a number from 0 to 255, as 8 for echo requests")
    number = given["type"].number(0, MAX_ICMP_TYPE, "ICMP type")
    family = given["family"].choice(FAMILIES, "family") if "family" in given else "IPv4"
    return Transport(number, FAMILIES[family])
