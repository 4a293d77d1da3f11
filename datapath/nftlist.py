# SPDX-License-Identifier: Apache-2.0
"""Reads `nft -j list …`: which tables, chains, rules (by their comments) and elements the kernel has.

Called by: `datapath.firewall`, to compare with what should be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from core.errors import shorten
from datapath.errors import FirewallError


@dataclass
class Listing:
    """What was listed; elements are in the words of a script: "tcp . 80" → "10.0.0.1 . 8080"."""

    tables: set[str] = field(default_factory=set)
    chains: set[str] = field(default_factory=set)
    rules: dict[str, list[str]] = field(default_factory=dict)  # chain → comments in order
    elements: dict[str, dict[str, str]] = field(default_factory=dict)  # set or map → key → target


def parse_listing(text: str) -> Listing:
    """Return the listing of nft's JSON.  Raises FirewallError when it is none."""
    listing = Listing()
    try:
        for item in json.loads(text)["nftables"]:
            for kind, body in item.items():
                _take(listing, kind, body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FirewallError(f"nft's listing can not be read: {error!r} in {shorten(text)}") from error
    return listing


def _take(listing: Listing, kind: str, body: dict[str, Any]) -> None:
    if kind == "table":
        listing.tables.add(body["name"])
    elif kind == "chain":
        listing.chains.add(body["name"])
    elif kind == "rule":
        listing.rules.setdefault(body["chain"], []).append(body.get("comment", ""))
    elif kind in ("set", "map"):
        listing.elements[body["name"]] = dict(_pair(element) for element in body.get("elem", ()))


def _pair(element: Any) -> tuple[str, str]:
    if isinstance(element, list):
        return _words(element[0]), _words(element[1])
    return _words(element), ""


def _words(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "prefix" in value:
        return f"{value['prefix']['addr']}/{value['prefix']['len']}"
    if "concat" in value:
        return " . ".join(_words(part) for part in value["concat"])
    if "range" in value:
        return "-".join(_words(part) for part in value["range"])
    return shorten(value)
