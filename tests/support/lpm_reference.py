# SPDX-License-Identifier: Apache-2.0
"""Longest prefix match, written as plainly as possible: the yardstick for cilium_ipcache.

A list of prefixes that is read from one end to the other at every question, with no order, tree or index.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Network, IPv6Network

Network = IPv4Network | IPv6Network


class Prefixes:
    """Prefix → identity.  An address is asked for as the prefix that holds it alone."""

    def __init__(self) -> None:
        self.entries: list[tuple[Network, int]] = []

    def upsert(self, network: Network, identity: int) -> None:
        self.delete(network)
        self.entries.append((network, identity))

    def delete(self, network: Network) -> bool:
        """Forget one prefix, not those inside it; return whether it was there."""
        before = len(self.entries)
        self.entries = [entry for entry in self.entries if entry[0] != network]
        return len(self.entries) < before

    def keep(self, wanted: Collection[Network]) -> int:
        """Forget all prefixes but these; return how many went."""
        return sum([self.delete(network) for network, _ in list(self.entries) if network not in wanted])

    def lookup(self, asked: Network) -> int | None:
        """Return the identity of the longest prefix that holds all of `asked`, None if no one does."""
        found = [(network.prefixlen, identity) for network, identity in self.entries if holds(network, asked)]
        return max(found)[1] if found else None


def holds(outer: Network, inner: Network) -> bool:
    """True if every address of `inner` is one of `outer`."""
    first, last = int(outer[0]), int(outer[-1])
    return outer.version == inner.version and first <= int(inner[0]) and int(inner[-1]) <= last
