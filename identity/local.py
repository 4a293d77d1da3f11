# SPDX-License-Identifier: Apache-2.0
"""Identities of address prefixes: numbers that only this host knows.

Each prefix that a policy names gets a number with the local flag, and as labels the prefix and every
shorter one, so that a rule for 10.0.0.0/8 selects 10.1.0.0/16 too::

    cidr:10.0.0.0/8=;cidr:10.0.0.0/7=;…cidr:0.0.0.0/0=;reserved:world=;

Numbers are counted by use and stay the same over a restart: pinned maps and conntrack hold them.

Called by the agent, owned by its one task that follows `PolicyEngine.cidrs()`; pure.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network

from core.errors import shorten
from core.table import Source
from identity.errors import PrefixError, RangeExhausted
from identity.labels import CIDR, RESERVED, Label, Labels
from identity.numbers import LOCAL_FLAG, LOCAL_MAX

Network = IPv4Network | IPv6Network
FIRST = LOCAL_FLAG | 1


@dataclass
class _Use:
    number: int
    count: int


class LocalIdentities:
    """Prefix → number, counted by use.  `source` (of the identity table) is kept equal to what is used.

    Restored numbers stay reserved for their prefixes until `forget_restored`.
    """

    def __init__(self, source: Source[int, Labels] | None = None) -> None:
        self._source = source
        self._uses: dict[str, _Use] = {}
        self._restored: dict[str, int] = {}
        self._taken: set[int] = set()
        self._next = FIRST

    def restore(self, numbers: Mapping[str, int]) -> None:
        """Reserve the numbers of a checkpoint; unusable or contradicting entries are left out."""
        for text, number in numbers.items():
            try:
                prefix = normalize(text)
            except PrefixError:
                continue
            known = prefix in self._uses or prefix in self._restored
            if FIRST <= number <= LOCAL_MAX and number not in self._taken and not known:
                self._restored[prefix] = number
                self._taken.add(number)

    def forget_restored(self) -> int:
        """Free the restored numbers that nobody asked for; return how many.

        Call it when policy is in sync and nothing in the kernel bears them: until then a rule may still want
        its number, and packets of its prefix may have it.
        """
        count = len(self._restored)
        self._taken.difference_update(self._restored.values())
        self._restored.clear()
        return count

    def acquire(self, prefix: str) -> int:
        """Count one use of a prefix and return its number.  Raises PrefixError, RangeExhausted."""
        text = normalize(prefix)
        use = self._uses.get(text)
        if use is None:
            use = self._uses[text] = _Use(self._number_for(text), 0)
            if self._source is not None:
                self._source.upsert(use.number, prefix_labels(text))
        use.count += 1
        return use.number

    def release(self, prefix: str) -> int | None:
        """Count one use less; return the number when that was the last one.

        Releasing what was not acquired is a mistake of the caller: KeyError.
        """
        text = normalize(prefix)
        use = self._uses[text]
        use.count -= 1
        if use.count:
            return None
        del self._uses[text]
        self._taken.discard(use.number)
        if self._source is not None:
            self._source.delete(use.number)
        return use.number

    def number(self, prefix: str) -> int | None:
        """Return the number of a prefix in use."""
        use = self._uses.get(normalize(prefix))
        return use.number if use else None

    def numbers(self) -> dict[str, int]:
        """Return prefix → number of all in use and all still reserved: what a checkpoint keeps."""
        return {**self._restored, **{prefix: use.number for prefix, use in self._uses.items()}}

    def count(self, prefix: str) -> int:
        """Return how many uses a prefix has."""
        use = self._uses.get(normalize(prefix))
        return use.count if use else 0

    def _number_for(self, text: str) -> int:
        restored = self._restored.pop(text, None)
        return self._free_number(text) if restored is None else restored

    def _free_number(self, text: str) -> int:
        # Round the ring instead of lowest first: a number that was just released may still stand in
        # conntrack entries and policy maps of the prefix that had it.
        if len(self._taken) >= LOCAL_MAX - FIRST + 1:
            raise RangeExhausted(
                f"no number is left for {text}: {len(self._taken)} address prefixes are in use on this host",
                hint="use fewer or wider prefixes in policies",
            )
        while self._next in self._taken:
            self._advance()
        number = self._next
        self._advance()
        self._taken.add(number)
        return number

    def _advance(self) -> None:
        self._next = self._next + 1 if self._next < LOCAL_MAX else FIRST


def normalize(prefix: str) -> str:
    """Return ``network/length`` of an address or prefix, host bits cleared; PrefixError for other text."""
    return str(_network(prefix))


@functools.lru_cache(maxsize=1024)
def prefix_labels(prefix: str) -> Labels:
    """Return the labels of a prefix: itself, every shorter one down to /0, and ``reserved:world``.

    Whoever gives a prefix its identity asks twice, for the table and for the engine: both have one copy.
    """
    network = _network(prefix)
    version, width, bits = network.version, network.max_prefixlen, int(network.network_address)
    labels = [
        _label(version, bits >> width - length << width - length, length)
        for length in range(network.prefixlen + 1)
    ]
    return Labels([*labels, Label(RESERVED, "world")])


def cidr_label(network: Network) -> Label:
    """Return the label of one prefix.

    ``:`` separates source and key in a label, so Cilium writes IPv6 with ``-``, and a ``0`` where the
    address would begin or end with one: ``::/0`` is ``cidr:0--0/0``, ``2001:db8::/32`` is
    ``cidr:2001-db8--0/32``.
    """
    return _label(network.version, int(network.network_address), network.prefixlen)


# Prefixes of one policy share most of the shorter ones.
@functools.lru_cache(maxsize=16_384)
def _label(version: int, bits: int, length: int) -> Label:
    address = _text(version, bits).replace(":", "-")
    address = f"{'0' if address.startswith('-') else ''}{address}{'0' if address.endswith('-') else ''}"
    return Label(CIDR, f"{address}/{length}")


def _text(version: int, bits: int) -> str:
    """Return an address as `ipaddress` writes it, which takes ten times as long for IPv6."""
    if version == 4:
        return socket.inet_ntop(socket.AF_INET, bits.to_bytes(4, "big"))
    text = socket.inet_ntop(socket.AF_INET6, bits.to_bytes(16, "big"))
    return str(IPv6Address(bits)) if "." in text else text


@functools.lru_cache(maxsize=1024)
def _network(prefix: str) -> Network:
    try:
        return ip_network(prefix, strict=False)
    except ValueError as error:
        raise PrefixError(f"{shorten(prefix)} is no address prefix: {error}") from error
