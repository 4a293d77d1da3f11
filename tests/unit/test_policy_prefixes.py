# SPDX-License-Identifier: Apache-2.0
"""CIDRs with exceptions: the addresses that the obvious reference leaves, in few prefixes, within limits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import collapse_addresses, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from identity.local import Network
from policy.errors import FieldError
from policy.language import parse_policies
from policy.model import Rule
from policy.prefixes import MAX_DIFFERENT, MAX_IN_SET, MAX_NAMED, without

# Small enough to look at every address.
WHOLE = {4: ip_network("10.1.2.0/24"), 6: ip_network("fd00::ff00/120")}


@st.composite
def inside(draw: st.DrawFn, whole: Network) -> Network:
    address = int(whole.network_address) + draw(st.integers(0, whole.num_addresses - 1))
    length = draw(st.integers(whole.prefixlen, whole.max_prefixlen))
    return ip_network(f"{ip_address(address)}/{length}", strict=False)


sets = st.sampled_from((4, 6)).flatmap(
    lambda family: st.tuples(st.just(WHOLE[family]), st.lists(inside(WHOLE[family]), max_size=12))
)


def collapsed(networks: Iterable[Network]) -> list[Network]:
    """Return the fewest prefixes that hold the same addresses, in order."""
    return list(collapse_addresses(networks))  # type: ignore[type-var]


@settings(deadline=None)
@given(sets)
@example((WHOLE[4], [WHOLE[4]]))
@example((WHOLE[4], [ip_network("10.1.2.0/25"), ip_network("10.1.2.0/32"), ip_network("10.1.2.128/25")]))
@example((WHOLE[6], [ip_network("fd00::ffff/128")] * 3))
def test_the_same_addresses_as_the_reference_in_the_fewest_prefixes(
    case: tuple[Network, list[Network]],
) -> None:
    whole, excluded = case
    found = list(without(whole, excluded))
    wanted = [each for each in whole if not any(each in out for out in excluded)]
    assert [each for network in found for each in network] == wanted
    assert found == collapsed(found)


@settings(deadline=None)
@given(st.lists(inside(ip_network("fd00::/8")), max_size=6))
def test_of_large_networks_none_is_lost_and_none_is_kept(excluded: list[Network]) -> None:
    whole = ip_network("fd00::/8")
    found = list(without(whole, excluded))
    out = collapsed(excluded)
    assert sum(each.num_addresses for each in [*found, *out]) == whole.num_addresses
    assert collapsed([*found, *out]) == ([whole] if found or out else [])


def parse(*elements: dict[str, Any]) -> Rule:
    text = json.dumps([{"endpointSelector": {}, "egress": list(elements)}])
    return parse_policies(text, "test", name="p")[0].rules[0]


def cidr_set(cidr: str, *excluded: str) -> dict[str, Any]:
    return {"toCIDRSet": [{"cidr": cidr, "except": list(excluded)}]}


def scattered(count: int) -> list[str]:
    """Return addresses of fd00::/8 far from each other."""
    return [f"fd00:{number * 7919 % 65_536:x}::{number:x}/128" for number in range(1, count + 1)]


def test_exceptions_that_are_repeated_or_inside_another_cost_and_change_nothing() -> None:
    seven = scattered(7)
    once = parse(cidr_set("fd00::/8", *seven))
    assert 700 < len(once.cidrs) <= MAX_IN_SET
    assert parse(cidr_set("fd00::/8", *seven, *seven[:1] * 60_000)).cidrs == once.cidrs
    wide = [f"{address.removesuffix('/128')}/64" for address in seven]
    assert parse(cidr_set("fd00::/8", *seven, *wide)).cidrs == parse(cidr_set("fd00::/8", *wide)).cidrs


def test_a_set_that_is_split_too_often_is_refused_by_name() -> None:
    with pytest.raises(
        FieldError, match=rf"toCIDRSet\[0\]: the exceptions split fd00::/8 into more than {MAX_IN_SET}"
    ):
        parse(cidr_set("fd00::/8", *scattered(20)))


# What names too many prefixes together → which element is one too many, the number in the message
TOO_MANY: dict[str, tuple[list[dict[str, Any]], str, int]] = {
    "addresses": (
        [{"toCIDR": [f"10.{n >> 8}.{n & 255}.1" for n in range(MAX_DIFFERENT + 1)]}],
        "[16384]",
        MAX_DIFFERENT,
    ),
    "IPv6 addresses": ([{"toCIDR": [f"fd00::{n:x}" for n in range(5000)]}], "[4096]", MAX_DIFFERENT),
    "sets": ([cidr_set("fd00::/8", each) for each in scattered(200)], "egress[", MAX_DIFFERENT),
    "one set in every rule": ([cidr_set("fd00::/8", "fd00::1")] * 1000, "egress[546]", MAX_NAMED),
    "one address in every rule": ([{"toCIDR": ["10.0.0.1"] * (MAX_NAMED + 1)}], f"[{MAX_NAMED}]", MAX_NAMED),
}


@pytest.mark.parametrize("what", TOO_MANY)
def test_a_text_that_names_too_many_is_refused_by_name(what: str) -> None:
    elements, where, number = TOO_MANY[what]
    with pytest.raises(FieldError) as caught:
        parse(*elements)
    assert where in caught.value.path
    assert str(number) in caught.value.message
    assert caught.value.hint


def test_what_rules_repeat_is_counted_once() -> None:
    """The world without the own networks, in every one of a thousand rules."""
    own = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16")
    rule = parse(*[cidr_set("0.0.0.0/0", *own)] * 1000)
    assert len(rule.clauses) == 1000
    assert 20 < len(rule.cidrs) < 60
    assert "10.0.0.0/8" not in rule.cidrs


def test_many_policies_of_one_text_are_counted_together() -> None:
    policy = {
        "kind": "CiliumNetworkPolicy",
        "spec": {"endpointSelector": {}, "egress": [cidr_set("fd00::/8", "fd00::1")]},
    }
    items = [{**policy, "metadata": {"name": f"p{number}"}} for number in range(600)]
    with pytest.raises(FieldError, match=r"items\[546\]"):
        parse_policies(json.dumps({"kind": "List", "items": items}), "test")
