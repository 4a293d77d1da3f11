# SPDX-License-Identifier: Apache-2.0
"""Which pool a node gets, and who is told no: decided from what etcd holds, without etcd."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import NodeConflict
from kvstore.pools import Claim, Known, Registered, Wish, decide, other_self

RANGE = IPv4Network("10.50.0.0/16")
A, B = IPv4Network("10.50.1.0/24"), IPv4Network("10.50.2.0/24")


def known(*claims: tuple[IPv4Network, str], nodes: tuple[Registered, ...] = ()) -> Known:
    return Known(9, tuple(Claim(pool, node, 5) for pool, node in claims), {node.name: node for node in nodes})


def node(name: str, address: str, pool: IPv4Network | None = None, lease: int = 0) -> Registered:
    return Registered(name, address, pool, lease)


def block(name: str, *, length: int = 24, avoid: tuple[IPv4Network, ...] = ()) -> Wish:
    return Wish(name, "10.9.0.1", cluster_range=RANGE, length=length, avoid=avoid)


def test_a_fixed_pool_is_claimed_and_later_confirmed() -> None:
    wish = Wish("a", "10.9.0.1", fixed=A)
    assert decide(wish, known()) == (A, None)
    assert decide(wish, known((A, "a"))) == (A, Claim(A, "a", 5))


@pytest.mark.parametrize("other", ["10.50.1.0/24", "10.50.1.128/25", "10.50.0.0/20", "10.0.0.0/8"])
@pytest.mark.parametrize("registered", [False, True])
def test_a_pool_that_overlaps_anothers_is_refused_with_its_name(other: str, registered: bool) -> None:
    """Also one of a node that never claimed it: a Cilium agent, say."""
    pool = IPv4Network(other)
    found = known(nodes=(node("b", "10.9.0.2", pool),)) if registered else known((pool, "b"))
    with pytest.raises(NodeConflict, match=rf"pool {A} .*node b") as refused:
        decide(Wish("a", "10.9.0.1", fixed=A), found)
    assert "holdfast node release b" in refused.value.hint


def test_a_name_that_is_taken_is_refused_with_its_holder() -> None:
    there = node("a", "10.9.0.7", B)
    with pytest.raises(NodeConflict, match=r"name a belongs to the node at 10\.9\.0\.7 \(pool 10\.50\.2"):
        decide(Wish("a", "10.9.0.1", fixed=A), known(nodes=(there,)))


def test_a_node_that_was_installed_again_is_itself() -> None:
    """Same name and address, no checkpoint: it finds its pool again."""
    there = node("a", "10.9.0.1", B, lease=7)
    assert decide(block("a"), known((B, "a"), nodes=(there,))) == (B, Claim(B, "a", 5))


def test_a_node_with_another_name_takes_its_own_claim_along() -> None:
    wish = Wish("new", "10.9.0.1", fixed=A, former="old", lease=7)
    there = node("old", "10.9.0.1", A, lease=7)
    assert decide(wish, known((A, "old"), nodes=(there,))) == (A, Claim(A, "old", 5))


def test_the_other_self_is_who_has_our_lease_elsewhere() -> None:
    moved = Wish("a", "10.9.0.1", fixed=A, lease=7)
    there = node("a", "10.9.0.9", A, lease=7)
    assert other_self(moved, known(nodes=(there,))) == there
    assert other_self(moved, known(nodes=(node("a", "10.9.0.9", A, lease=8),))) is None
    assert other_self(moved, known(nodes=(node("a", "10.9.0.1", A, lease=7),))) is None
    renamed = Wish("new", "10.9.0.1", fixed=A, former="a", lease=7)
    assert other_self(renamed, known(nodes=(there,))) == there


def test_a_full_range_says_so() -> None:
    claims = [(each, f"n{at}") for at, each in enumerate(RANGE.subnets(new_prefix=18))]
    with pytest.raises(NodeConflict, match=r"no block of /18 is free in 10\.50\.0\.0/16: 4 are claimed"):
        decide(block("late", length=18), known(*claims))


def test_a_node_that_may_choose_nothing_is_told_what_to_set() -> None:
    with pytest.raises(NodeConflict, match="may choose none") as refused:
        decide(Wish("a", "10.9.0.1"), known())
    assert "holdfast node add" in refused.value.hint


networks = st.builds(
    lambda number, length: IPv4Network((number >> (32 - length) << (32 - length), length)),
    st.integers(int(RANGE.network_address), int(RANGE.broadcast_address)),
    st.integers(10, 30),
)


@given(taken=st.lists(networks, max_size=12), length=st.integers(18, 26), name=st.text(min_size=1))
def test_a_block_overlaps_nothing_that_is_known(taken: list[IPv4Network], length: int, name: str) -> None:
    claims, routes = taken[::2], tuple(taken[1::2])
    found = known(*((pool, f"other {at}") for at, pool in enumerate(claims)))
    try:
        pool, _ = decide(block(name, length=length, avoid=routes), found)
    except NodeConflict:
        assert all(
            any(each.overlaps(candidate) for each in taken) for candidate in RANGE.subnets(new_prefix=length)
        )
        return
    assert pool.subnet_of(RANGE)
    assert pool.prefixlen == length
    assert not any(pool.overlaps(each) for each in taken)
