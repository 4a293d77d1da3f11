# SPDX-License-Identifier: Apache-2.0
"""Address prefixes that rules name: CIDRs, and sets of them with exceptions cut out, within limits.

A few lines can stand for many prefixes: one address taken out of an IPv6 network leaves up to 128.  Each of
them costs every host of the cluster an identity, an entry of its ip→identity map and one of each policy map
that it is in, hence the limits.  Called by `policy.peers`; pure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network, summarize_address_range
from itertools import islice
from typing import Final

from core.errors import shorten
from identity.local import Network
from policy.reader import Place

# One excluded address leaves 32 prefixes of an IPv4 network, 128 of an IPv6 one.
MAX_IN_SET: Final = 1024
# Different ones in a text.  A policy map holds 16 384 entries and a host has 65 535 identities for prefixes.
# One of IPv6 counts fourfold, because it has four times the labels: 1.5 ms and 40 KB of each agent.
MAX_DIFFERENT: Final = 16_384
_WEIGHTS: Final = {4: 1, 6: 4}
# And all together, each as often as a rule names it: a selector of an element each.
MAX_NAMED: Final = 65_536

_PREFIX = re.compile(r"[0-9a-fA-F:.]{2,45}(/[0-9]{1,3})?\Z")


class Prefixes:
    """Reads the prefixes of one text and counts them; FieldError where there are too many."""

    def __init__(self) -> None:
        self._different: set[Network] = set()
        self._weight = 0  # of the different ones
        self._named = 0
        # Rules often repeat a set: "the world without our own networks".
        self._sets: dict[tuple[Network, frozenset[Network]], Sequence[Network]] = {}

    def of_cidr(self, place: Place) -> Sequence[Network]:
        """Return what an element of fromCIDR or toCIDR names.  Raises FieldError."""
        return self._counted(place, (_network(place),))

    def of_set(self, place: Place) -> Sequence[Network]:
        """Return what is left of an element of fromCIDRSet or toCIDRSet, in order.  Raises FieldError."""
        given = place.fields("CIDRSet")
        if "cidr" not in given:
            raise place.error("cidr is missing")
        whole = _network(given["cidr"])
        excluded = frozenset(_exceptions(whole, given["except"]) if "except" in given else ())
        found = self._sets.get((whole, excluded))
        if found is None:
            found = self._sets[whole, excluded] = _split(place, whole, excluded)
        return self._counted(place, found)

    def _counted(self, place: Place, found: Sequence[Network]) -> Sequence[Network]:
        before = len(self._different)
        self._different.update(found)
        self._weight += (len(self._different) - before) * _WEIGHTS[found[0].version] if found else 0
        self._named += len(found)
        if self._weight > MAX_DIFFERENT:
            raise place.error(
                f"with it the text names more than {MAX_DIFFERENT} different address prefixes "
                f"(one of IPv6 counts as {_WEIGHTS[6]})",
                hint="each is an identity of every host: use fewer or wider ones, or fewer exceptions",
            )
        if self._named > MAX_NAMED:
            raise place.error(
                f"with it the rules of the text name prefixes more than {MAX_NAMED} times",
                hint="name the ports of the same peers in one element, or split the text",
            )
        return found


def without(whole: Network, excluded: Iterable[Network]) -> Iterator[Network]:
    """Yield, in order, the fewest prefixes that hold what is in `whole` and in none of `excluded`.

    All of `excluded` lie inside `whole`.  Sorts them, and then costs what it yields.
    """
    begin, end = int(whole.network_address), int(whole.broadcast_address)
    for each in sorted(excluded, key=_first_address):
        first = int(each.network_address)
        if first > begin:
            yield from _between(whole, begin, first - 1)
        begin = max(begin, int(each.broadcast_address) + 1)
    if begin <= end:
        yield from _between(whole, begin, end)


def _between(whole: Network, first: int, last: int) -> Iterator[Network]:
    if whole.version == 4:
        return summarize_address_range(IPv4Address(first), IPv4Address(last))
    return summarize_address_range(IPv6Address(first), IPv6Address(last))


def _first_address(network: Network) -> int:
    return int(network.network_address)


def _split(place: Place, whole: Network, excluded: Iterable[Network]) -> Sequence[Network]:
    found = tuple(islice(without(whole, excluded), MAX_IN_SET + 1))
    if len(found) > MAX_IN_SET:
        raise place.error(
            f"the exceptions split {whole} into more than {MAX_IN_SET} prefixes",
            hint="use wider exceptions, or deny them in a rule of their own",
        )
    return found


def _exceptions(whole: Network, place: Place) -> Iterator[Network]:
    for each in place.items():
        excluded = _network(each)
        if not _inside(excluded, whole):
            raise each.error(f"{excluded} is not inside {whole}", hint="leave it out")
        yield excluded


def _inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def _network(place: Place) -> Network:
    text = place.text()
    try:
        return _parsed(text)
    except ValueError as error:
        raise place.error(
            f"{shorten(text)!r} is no address prefix: {error}", hint="for example 10.0.0.0/8 or fd00::/8"
        ) from error


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Network:
    if not _PREFIX.match(text):
        raise ValueError("not an address with an optional prefix length")
    return ip_network(text, strict=False)
