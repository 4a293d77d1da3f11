# SPDX-License-Identifier: Apache-2.0
"""What a policy may say and hardly means: it opens more than it looks like, or selects nobody.

These are no errors: the policy is valid, and means what docs/policy.md says.  Called by `holdfast policy
validate` and `apply` with texts that were read without an error; pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from ipaddress import IPv6Network, ip_network
from typing import Final, NamedTuple

from core.errors import shorten
from identity.labels import ANY, CIDR, CONTAINER, GENERATED, K8S, RESERVED, UNSPEC
from policy.document import read_documents
from policy.errors import where
from policy.peers import PEER_FIELDS
from policy.reader import Place

# Where labels of workloads, machines and hosts come from.
SOURCES: Final = (ANY, CONTAINER, K8S, RESERVED, UNSPEC, CIDR, GENERATED)

_PEERS: Final = frozenset(verb + name for verb in ("from", "to") for name in PEER_FIELDS)
_SELECTORS: Final = frozenset(
    {"endpointSelector", *(f"{verb}{name}" for verb in ("from", "to") for name in ("Endpoints", "Requires"))}
)
_CIDRS: Final = frozenset({"fromCIDR", "toCIDR", "cidr"})
_OF_KUBERNETES: Final = frozenset({"metadata", "status"})
_MAPPED: Final = IPv6Network("::ffff:0:0/96")


class PolicyWarning(NamedTuple):
    """One doubt: where it stands (as an error says it) and what is doubtful there."""

    origin: str
    line: int
    path: str
    problem: str

    def __str__(self) -> str:
        return f"{where(self.origin, self.line)}: {self.path}: {self.problem}"


def find_warnings(text: str, origin: str) -> list[PolicyWarning]:
    """Return what is doubtful in a text that `parse_policies` accepts, in its order."""
    return [each for node in read_documents(text, origin) for each in _everywhere(Place(node, "", origin))]


def _everywhere(place: Place) -> Iterator[PolicyWarning]:
    if isinstance(place.node.value, list):
        for each in place.items():
            yield from _everywhere(each)
    elif isinstance(place.node.value, dict):
        members = place.members()
        yield from _forgotten_peers(members)
        for name, each in members.items():
            yield from _member(name, each)


def _member(name: str, place: Place) -> Iterator[PolicyWarning]:
    if name in _OF_KUBERNETES or place.absent:
        return
    if name in _SELECTORS:
        for each in place.items() if isinstance(place.node.value, list) else [place]:
            yield from _selector(each)
    elif name in _CIDRS:
        for each in place.items() if isinstance(place.node.value, list) else [place]:
            yield from _mapped_address(each)
    else:
        yield from _everywhere(place)


def _forgotten_peers(members: dict[str, Place]) -> Iterator[PolicyWarning]:
    """Null peers beside ports: a template whose list of peers came out empty."""
    given = [name for name in members if name in _PEERS]
    ports = any(name in members and not members[name].absent for name in ("toPorts", "icmps"))
    if given and ports and all(members[name].absent for name in given):
        yield _warning(
            members[given[0]],
            "null is the same as leaving it out, so this element is for everybody on its ports; [] is nobody",
        )


def _selector(place: Place) -> Iterator[PolicyWarning]:
    members = place.members()
    nulls = [each for each in members.values() if each.absent]
    if nulls and len(nulls) == len(members):
        yield _warning(nulls[0], "null is the same as leaving it out, so this selector selects everything")
    labels, expressions = members.get("matchLabels"), members.get("matchExpressions")
    for key, each in labels.members().items() if labels and not labels.absent else ():
        yield from _source(key, each)
    for each in expressions.items() if expressions and not expressions.absent else ():
        key_place = each.members()["key"]
        yield from _source(key_place.text(), key_place)


def _source(name: str, place: Place) -> Iterator[PolicyWarning]:
    source, colon, key = name.partition(":")
    if not colon or not source or source in SOURCES:
        return
    close = difflib.get_close_matches(source.lower(), SOURCES, n=1)
    meant = f"did you mean {close[0]}:{shorten(key)}?" if close else f"known are {', '.join(SOURCES)}"
    problem = f"{source!r} is no source of labels, so nobody has this one, unless a machine was registered so"
    yield _warning(place, f"{problem}; {meant}")


def _mapped_address(place: Place) -> Iterator[PolicyWarning]:
    network = ip_network(place.text(), strict=False)
    if not isinstance(network, IPv6Network) or not network.subnet_of(_MAPPED):
        return
    plain = ip_network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - _MAPPED.prefixlen))
    yield _warning(place, f"no packet has such an address: IPv4 is written as IPv4, {plain}")


def _warning(place: Place, problem: str) -> PolicyWarning:
    return PolicyWarning(place.origin, place.node.line, place.path, problem)
