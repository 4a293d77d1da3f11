# SPDX-License-Identifier: Apache-2.0
"""Rules of policy in few words, and the document they are applied as, for tests with real packets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.support.places import PORTS, Place

Rule = Mapping[str, Any]

# Parts of an element that are written fromX in ingress and toX in egress.
_PEERS = {"endpoints": "Endpoints", "entities": "Entities", "cidr": "CIDR", "cidr_set": "CIDRSet"}


def selects(*places: Place) -> Rule:
    """A selector of these containers, by the label `app` that the site gives each."""
    return {"matchExpressions": [{"key": "app", "operator": "In", "values": [each.name for each in places]}]}


def element(direction: str, *, of: Rule | None = None, **peers: Any) -> Rule:
    """One element of a section: peers (`endpoints`, `entities`, `cidr`, `cidr_set`) and ports (`on`)."""
    prefix = "from" if direction == "ingress" else "to"
    return {f"{prefix}{_PEERS[name]}": value for name, value in peers.items()} | dict(of or {})


def on(protocol: str, port: int | str = PORTS[0]) -> Rule:
    """What an element says of a protocol: a port of TCP or UDP (its number or name), echo of ICMP(v6)."""
    if protocol == "ICMP":
        return {"icmps": [{"fields": [{"family": "IPv4", "type": 8}, {"family": "IPv6", "type": 128}]}]}
    return {"toPorts": [{"ports": [{"port": str(port), "protocol": protocol}]}]}


def rule(subject: Place, direction: str, *elements: Rule, deny: bool = False) -> Rule:
    """A rule for one container with one section."""
    return {"endpointSelector": selects(subject), f"{direction}{'Deny' if deny else ''}": list(elements)}


def document(name: str, *rules: Rule) -> str:
    """Return a policy of these rules as text (JSON is YAML)."""
    return json.dumps(
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": name},
            "specs": list(rules),
        }
    )
