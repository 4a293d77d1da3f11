# SPDX-License-Identifier: Apache-2.0
"""The address pool: never one address twice, in rotation, under limits that are said."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.errors import AddressTaken, PoolExhausted
from agent.pool import REST_S, Pool, automatic_network

NETWORK = IPv4Network("10.9.0.0/28")
ASSIGNABLE = {IPv4Address("10.9.0.0") + number for number in range(2, 15)}


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a dict: whatever is asked for, both agree on who has which address."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(NETWORK)
        self.held: dict[IPv4Address, str] = {}
        self.excluded: set[IPv4Network] = set()
        self.users = 0

    def _user(self) -> str:
        self.users += 1
        return f"user {self.users}"

    def _free(self) -> set[IPv4Address]:
        return {
            each
            for each in ASSIGNABLE - self.held.keys()
            if not any(each in subnet for subnet in self.excluded)
        }

    @rule()
    def allocate(self) -> None:
        user, free = self._user(), self._free()
        if not free:
            with pytest.raises(PoolExhausted):
                self.pool.allocate(user)
            return
        address = self.pool.allocate(user)
        assert address in free
        self.held[address] = user

    @rule(address=st.sampled_from(sorted(ASSIGNABLE)))
    def reserve(self, address: IPv4Address) -> None:
        user = self._user()
        if address in self.held:
            with pytest.raises(AddressTaken, match=self.held[address]):
                self.pool.reserve(address, user)
            return
        self.pool.reserve(address, user)
        self.held[address] = user

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(address, "somebody else")
        assert self.pool.holder(address) == self.held[address]
        self.pool.release(address, self.held.pop(address))

    @rule(part=st.sampled_from(list(NETWORK.subnets(new_prefix=30))), out=st.booleans())
    def exclude(self, part: IPv4Network, out: bool) -> None:
        if out:
            self.pool.exclude(part)
            self.excluded.add(part)
        else:
            self.pool.include(part)
            self.excluded.discard(part)

    @invariant()
    def the_same_holders(self) -> None:
        assert self.pool.used == len(self.held)
        assert all(self.pool.holder(address) == user for address, user in self.held.items())


TestPool = PoolMachine.TestCase


def test_an_address_that_was_given_back_rests() -> None:
    pool = Pool(NETWORK)
    first = pool.allocate("a")
    pool.release(first, "a")
    following = [pool.allocate(str(number)) for number in range(pool.capacity - 1)]
    assert first not in following
    assert pool.allocate("last") == first


def test_an_address_that_rotation_comes_upon_rests_too_where_another_is_free() -> None:
    now = 1000.0
    pool = Pool(NETWORK, clock=lambda: now)
    mine = [pool.allocate(str(number)) for number in range(pool.capacity - 1)]
    coming = mine[0] + pool.capacity - 1  # the only free one is where rotation goes on
    pool.release(mine[1], "1")
    assert pool.allocate("x") == coming
    assert pool.allocate("y") == mine[1], "nothing else is free"
    pool.release(mine[1], "y")
    pool.release(mine[4], "4")
    now += REST_S - 1
    pool.release(mine[2], "2")
    now += 1
    assert pool.allocate("z") == mine[4], "mine[2] comes first in rotation"


def test_rotation_goes_on_after_a_restart() -> None:
    pool = Pool(NETWORK)
    handed_out = [pool.allocate(str(number)) for number in range(5)]
    again = Pool(NETWORK)
    again.resume_after(pool.last)
    assert again.allocate("after") == handed_out[-1] + 1
    again.resume_after(IPv4Address("192.0.2.1"))
    assert again.allocate("foreign is ignored") == handed_out[-1] + 2


def test_last_after_a_whole_round() -> None:
    pool = Pool(NETWORK)
    for number in range(pool.capacity):
        pool.allocate(str(number))
    assert pool.last == IPv4Address("10.9.0.14")
    pool.resume_after(pool.last)
    pool.release(IPv4Address("10.9.0.2"), "0")
    assert pool.allocate("next") == IPv4Address("10.9.0.2")


@pytest.mark.parametrize("address", ["10.9.0.0", "10.9.0.1", "10.9.0.15", "192.0.2.1"])
def test_what_can_not_be_assigned(address: str) -> None:
    with pytest.raises(AddressTaken, match=address):
        Pool(NETWORK).reserve(IPv4Address(address), "a")


def test_a_pool_that_is_too_small() -> None:
    with pytest.raises(PoolExhausted, match="/30"):
        Pool(IPv4Network("10.0.0.0/30"))


def test_exhaustion_names_what_the_engine_assigns() -> None:
    pool = Pool(NETWORK)
    pool.exclude(NETWORK)
    with pytest.raises(PoolExhausted, match=r"0 of 13 .* assigns those of 10\.9\.0\.0/28"):
        pool.allocate("a")


@given(
    st.ip_addresses(v=4),
    st.lists(st.integers(0, 255).map(lambda second: IPv4Network(f"10.{second}.128.0/20")), max_size=40),
)
def test_automatic_network_overlaps_nothing(node: IPv4Address, taken: list[IPv4Network]) -> None:
    network = automatic_network(node, [*taken, IPv4Network("0.0.0.0/0")])
    assert network.prefixlen == 16
    assert not any(network.overlaps(each) for each in taken)


def test_automatic_network_on_a_host_that_uses_all() -> None:
    with pytest.raises(PoolExhausted, match="ipv4-range"):
        automatic_network(IPv4Address("192.0.2.7"), [IPv4Network("10.0.0.0/8")])
