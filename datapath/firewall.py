# SPDX-License-Identifier: Apache-2.0
"""The host's own firewall rules for endpoints: masquerading, published ports, and who stays out of 127/8.

Responsible for: one nft table `holdfast`, written as one atomic script from a value (`FirewallState`),
compared with what the kernel lists, repaired, removed.  Published ports are map elements, so a packet
costs the same with ten thousand of them.  Established connections live in the kernel's conntrack and
survive a rewrite.  Called by: the agent's reconciler of firewall state.

Chains, in the order a packet meets them:

    guard        raw prerouting    nothing that comes from an endpoint is for 127/8, or from it
    prerouting   nat, before docker's   published ports for what arrives; never for 127/8 from a wire
    output       nat, before docker's   published ports for the host's own connections, 127.0.0.1 too
    publish      -                 host address and port, else port on every address → container
    postrouting  nat, before docker's   127/8 and hairpin get the router's address; pools are masqueraded
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address
from typing import Any

from core.errors import shorten
from datapath import command
from datapath.devices import DEVICE_PATTERN
from datapath.errors import FirewallError
from datapath.nftlist import Listing, parse_listing

TABLE = "holdfast"
# The programs' mark (bpf/include/base.h): the first half of this flow never met the host's netfilter.
MARK_NO_MASQUERADE = 0x00080000
PROTOCOLS = {6: "tcp", 17: "udp", 33: "dccp", 132: "sctp"}
_ELEMENTS_A_LINE = 64


@dataclass(frozen=True)
class Family:
    """What differs between IPv4 and IPv6; everything else is one path."""

    name: str  # the table's family and the name of its header in expressions
    type: str
    loopback: str
    version: int
    # Whether the host reaches ports by its loopback.  The kernel takes a packet for ::1 from lo alone, and so
    # never the answer of an endpoint: without translation a client is refused at once, and tries 127.0.0.1.
    from_loopback: bool


IPV4 = Family("ip", "ipv4_addr", "127.0.0.0/8", 4, from_loopback=True)
IPV6 = Family("ip6", "ipv6_addr", "::1/128", 6, from_loopback=False)


@dataclass(frozen=True, order=True)
class PublishedPort:
    """Ports of the host that lead to a container; both ranges are inclusive and of one length.

    `host_address` empty means every address of the host; `protocol` is a number of `PROTOCOLS`.
    """

    protocol: int
    host_address: str
    host_port: int
    host_port_end: int
    container_address: str
    container_port: int
    container_port_end: int

    def __str__(self) -> str:
        host = f"{self.host_address or '*'}:{self.host_port}-{self.host_port_end}"
        target = f"{self.container_address}:{self.container_port}-{self.container_port_end}"
        return f"{host} → {target} protocol {self.protocol}"

    def check(self) -> None:
        """Raise FirewallError when this can not be published."""
        spread = self.host_port_end - self.host_port
        if self.protocol not in PROTOCOLS:
            raise FirewallError(f"published port {self}: protocol is not one of {sorted(PROTOCOLS)}")
        if not (0 < self.host_port <= self.host_port_end < 65536 and self.container_port > 0):
            raise FirewallError(f"published port {self}: ports must be 1…65535 and in order")
        if self.container_port_end - self.container_port != spread or self.container_port_end > 65535:
            raise FirewallError(f"published port {self}: the ranges differ in length")

    def elements(self) -> Iterator[tuple[str, str]]:
        """Yield (key, target) per port, in nft's words."""
        protocol = PROTOCOLS[self.protocol]
        address = f"{self.host_address} . " if self.host_address else ""
        for offset in range(self.host_port_end - self.host_port + 1):
            key = f"{address}{protocol} . {self.host_port + offset}"
            yield key, f"{self.container_address} . {self.container_port + offset}"


@dataclass(frozen=True)
class FirewallState:
    """What the table shall say, of one family.

    `router` is the host's address as containers see it, `pools` the prefixes endpoints live in, `direct`
    the prefixes that are reached without masquerading (the pools always are).
    """

    router: str
    pools: frozenset[str]
    direct: frozenset[str] = frozenset()
    ports: frozenset[PublishedPort] = frozenset()
    masquerade: bool = True


@dataclass(frozen=True)
class Plan:
    """A state in nft's words: rules by chain (each with its name), elements by set or map."""

    family: Family
    chains: dict[str, str]  # name → its "type … hook …" line, empty for a jump target
    rules: dict[str, list[tuple[str, str]]]  # chain → [(name, rule)]
    types: dict[str, str]  # set or map → its declaration
    elements: dict[str, dict[str, str]] = field(default_factory=dict)  # set or map → key → target or ""

    def script(self) -> str:
        """Return the script that replaces the whole table at once."""
        head = f"table {self.family.name} {TABLE} {{}}\ndelete table {self.family.name} {TABLE}\n"
        body = [*self._sets(), *self._chains()]
        return f"{head}table {self.family.name} {TABLE} {{\n" + "\n".join(body) + "\n}\n"

    def missing(self, listing: Listing) -> list[str]:
        """Return what the kernel's listing lacks or holds beyond the plan, one phrase each."""
        return [*self._missing_rules(listing), *self._missing_elements(listing)]

    def _sets(self) -> Iterator[str]:
        for name, declaration in self.types.items():
            yield declaration.replace("%", _wrapped(self.elements[name]))

    def _chains(self) -> Iterator[str]:
        for name, hook in self.chains.items():
            rules = [f'  {rule} comment "{label}"' for label, rule in self.rules[name]]
            yield "\n".join([f"chain {name} {{", *([f"  {hook}"] if hook else []), *rules, "}"])

    def _missing_rules(self, listing: Listing) -> Iterator[str]:
        for chain in self.chains:
            if chain not in listing.chains:
                yield f"chain {chain}"
                continue
            wanted = [label for label, _ in self.rules[chain]]
            present = listing.rules.get(chain, [])
            yield from (f"rule {label} in {chain}" for label in wanted if label not in present)
            if set(wanted) <= set(present) and wanted != present:
                yield f"order of rules in {chain}: {shorten(present)}"

    def _missing_elements(self, listing: Listing) -> Iterator[str]:
        for name, wanted in self.elements.items():
            present = listing.elements.get(name)
            if present is None:
                yield f"set {name}"
            elif present != wanted:
                yield from (f"{key} in {name}" for key in wanted if present.get(key) != wanted[key])
                yield from (f"nothing for {key} in {name}" for key in present if key not in wanted)


def plan(state: FirewallState, family: Family = IPV4) -> Plan:
    """Return what the table must hold.  Pure.  Raises FirewallError that names what can not be."""
    return Plan(family, _chains(), _rules(state, family), _types(family), _elements(state, family))


def _chains() -> dict[str, str]:
    # One before dstnat and srcnat, where docker's rules are: the first to translate a flow decides.
    return {
        "guard": "type filter hook prerouting priority raw; policy accept;",
        "prerouting": "type nat hook prerouting priority dstnat - 1; policy accept;",
        "output": "type nat hook output priority -101; policy accept;",
        "publish": "",
        "postrouting": "type nat hook postrouting priority srcnat - 1; policy accept;",
    }


def _rules(state: FirewallState, family: Family) -> dict[str, list[tuple[str, str]]]:
    ip, loopback = family.name, family.loopback
    inward, outward = f'iifname "{DEVICE_PATTERN}"', f'oifname "{DEVICE_PATTERN}"'
    published = [("published on every address", "fib daddr type local jump publish")]
    return {
        "guard": [
            ("endpoints do not reach the host's loopback", f"{inward} {ip} daddr {loopback} drop"),
            ("endpoints do not claim a loopback address", f"{inward} {ip} saddr {loopback} drop"),
        ],
        "prerouting": [
            ("loopback is not published to the wire", f"{ip} daddr {loopback} return"),
            *published,
        ],
        "output": [
            *(
                []
                if family.from_loopback
                else [("loopback is not published", f"{ip} daddr {loopback} return")]
            ),
            *published,
        ],
        "publish": [
            ("bound to one address", f"dnat {ip} to {ip} daddr . meta l4proto . th dport map @bound"),
            ("bound to every address", f"dnat {ip} to meta l4proto . th dport map @published"),
        ],
        "postrouting": [
            ("the host's loopback to an endpoint", f"{outward} {ip} saddr {loopback} snat to {state.router}"),
            (
                "an endpoint to itself by a published port",
                f"{outward} {ip} saddr . {ip} daddr @hairpin snat to {state.router}",
            ),
            ("replies that the programs marked", f"meta mark & {MARK_NO_MASQUERADE:#x} != 0 return"),
            *_masquerade(state, ip),
        ],
    }


def _masquerade(state: FirewallState, ip: str) -> list[tuple[str, str]]:
    if not state.masquerade:
        return []
    rule = f'oifname != "{DEVICE_PATTERN}" {ip} saddr @pools {ip} daddr != @direct masquerade'
    return [("endpoints to the world", rule)]


def _types(family: Family) -> dict[str, str]:
    address = family.type
    port, target = "inet_proto . inet_service", f"{address} . inet_service"
    return {
        "pools": f"set pools {{ type {address}; flags interval;% }}",
        "direct": f"set direct {{ type {address}; flags interval;% }}",
        "hairpin": f"set hairpin {{ type {address} . {address};% }}",
        "bound": f"map bound {{ type {address} . {port} : {target};% }}",
        "published": f"map published {{ type {port} : {target};% }}",
    }


def _elements(state: FirewallState, family: Family) -> dict[str, dict[str, str]]:
    _check_address(state.router, family, "router address")
    return {
        "pools": _prefixes(state.pools, family),
        "direct": _prefixes(state.pools | state.direct, family),
        "hairpin": {f"{one.container_address} . {one.container_address}": "" for one in state.ports},
        **_port_elements(state, family),
    }


def _port_elements(state: FirewallState, family: Family) -> dict[str, dict[str, str]]:
    elements: dict[str, dict[str, str]] = {"bound": {}, "published": {}}
    for one in sorted(state.ports):
        one.check()
        _check_address(one.container_address, family, f"published port {one}")
        if one.host_address:
            _check_address(one.host_address, family, f"published port {one}")
        into = elements["bound" if one.host_address else "published"]
        for key, target in one.elements():
            if into.setdefault(key, target) != target:
                raise FirewallError(f"host port {key} is published twice: {into[key]} and {target}")
    return elements


def _check_address(text: str, family: Family, what: str) -> None:
    try:
        fits = ip_address(text).version == family.version
    except ValueError:
        fits = False
    if not fits:
        raise FirewallError(f"{what}: {shorten(text)} is not an IPv{family.version} address")


def _prefixes(texts: frozenset[str], family: Family) -> dict[str, str]:
    """Return prefixes merged (nft refuses overlaps) and as nft lists them: one address has no length."""
    kind: type[Any] = IPv4Network if family.version == 4 else IPv6Network
    try:
        merged = list(collapse_addresses([kind(text) for text in texts]))
    except ValueError as error:
        raise FirewallError(f"prefix for the firewall: {error}") from error
    return {str(net.network_address if net.num_addresses == 1 else net): "" for net in merged}


def _wrapped(elements: dict[str, str]) -> str:
    if not elements:
        return ""
    words = [f"{key} : {target}" if target else key for key, target in elements.items()]
    lines = [", ".join(words[at : at + _ELEMENTS_A_LINE]) for at in range(0, len(words), _ELEMENTS_A_LINE)]
    return " elements = {\n" + ",\n".join(lines) + "\n}"


class Firewall:
    """The table of one family in the namespace of this process; one caller at a time is let in."""

    def __init__(self, family: Family = IPV4) -> None:
        self.family = family
        self._turn = asyncio.Lock()

    async def apply(self, state: FirewallState) -> None:
        """Replace the table by `state`, all or nothing.  Raises FirewallError; the old table then stays."""
        script = plan(state, self.family).script()
        async with self._turn:
            await command.run(["nft", "-f", "-"], script)

    async def verify(self, state: FirewallState) -> list[str]:
        """Return what is missing or too much, one phrase each; empty when all is as wanted."""
        wanted = plan(state, self.family)
        return wanted.missing(await self._listing())

    async def ensure(self, state: FirewallState) -> list[str]:
        """Repair the table if anything is amiss; return what was.  Raises FirewallError."""
        amiss = await self.verify(state)
        if amiss:
            await self.apply(state)
        return amiss

    async def remove(self) -> None:
        """Remove the table, whether it is there or not.  Raises FirewallError."""
        name = f"{self.family.name} {TABLE}"
        async with self._turn:
            await command.run(["nft", "-f", "-"], f"table {name} {{}}\ndelete table {name}\n")

    async def _listing(self) -> Listing:
        tables = await command.run(["nft", "-j", "list", "tables", self.family.name])
        if TABLE not in parse_listing(tables).tables:
            return Listing()
        return parse_listing(await command.run(["nft", "-j", "list", "table", self.family.name, TABLE]))
