# SPDX-License-Identifier: Apache-2.0
"""Identities of address prefixes: labels as Cilium writes them, numbers that stay."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.table import Table
from identity.errors import NumberError, PrefixError, RangeExhausted
from identity.labels import Labels
from identity.local import FIRST, LocalIdentities, cidr_label, normalize, prefix_labels
from identity.numbers import LOCAL_MAX, allocation_range, cluster_of, is_global, is_local, is_reserved


def test_labels_of_a_prefix_are_all_its_shorter_ones_and_world() -> None:
    texts = prefix_labels("10.0.0.0/8").texts()
    assert len(texts) == 10
    assert {"cidr:10.0.0.0/8", "cidr:10.0.0.0/7", "cidr:8.0.0.0/6", "cidr:0.0.0.0/0"} <= set(texts)
    assert "reserved:world" in texts


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("::/0", "cidr:0--0/0="),
        ("2001:db8::/32", "cidr:2001-db8--0/32="),
        ("::1/128", "cidr:0--1/128="),
        ("fe80::1:2/128", "cidr:fe80--1-2/128="),
        ("10.1.2.3/32", "cidr:10.1.2.3/32="),
    ],
)
def test_ipv6_is_written_with_dashes(prefix: str, expected: str) -> None:
    assert str(cidr_label(ip_network(prefix))) == expected


@given(st.ip_addresses(), st.integers(0, 128))
def test_prefix_labels_parse_back_and_cover_exactly_the_supernets(address: object, length: int) -> None:
    bits = ip_address(str(address)).max_prefixlen
    network = ip_network(f"{address}/{min(length, bits)}", strict=False)
    labels = prefix_labels(str(network))
    assert Labels.parse(labels.serialized) == labels
    assert len(labels) == network.prefixlen + 2
    for shorter in range(network.prefixlen + 1):
        assert cidr_label(network.supernet(new_prefix=shorter)) in labels


@given(st.ip_addresses(), st.integers(0, 128), st.integers(0, (1 << 128) - 1))
@example(ip_address("::ffff:192.0.2.1"), 128, (1 << 128) - 1)
@example(ip_address("::192.0.2.1"), 128, (1 << 128) - 1)
@example(ip_address("2001:db8::1:0:0:1"), 128, (1 << 128) - 1)
def test_a_label_has_the_address_as_python_writes_it(address: Any, length: int, holes: int) -> None:
    """Also with runs of zeros, and where the C library writes IPv4 inside IPv6."""
    bits = int(address) & (holes if address.version == 6 else 0xFFFFFFFF)
    network = ip_network((bits, address.max_prefixlen)).supernet(
        new_prefix=min(length, address.max_prefixlen)
    )
    text = str(network.network_address).replace(":", "-")
    text = f"0{text}" if text.startswith("-") else text
    text = f"{text}0" if text.endswith("-") else text
    assert cidr_label(network).key == f"{text}/{network.prefixlen}"


def test_numbers_are_counted_by_use_and_feed_the_table() -> None:
    table: Table[int, Labels] = Table("identities", ("local",))
    local = LocalIdentities(table.source("local"))
    number = local.acquire("10.0.0.0/8")
    assert number == local.acquire("10.1.2.3/8") == FIRST
    assert is_local(number)
    assert table.get(number) == prefix_labels("10.0.0.0/8")
    assert local.release("10.0.0.0/8") is None
    assert local.count("10.0.0.0/8") == 1
    assert local.release("10.0.0.0/8") == number
    assert table.get(number) is None
    with pytest.raises(KeyError):
        local.release("10.0.0.0/8")


def test_a_released_number_is_not_handed_out_next() -> None:
    local = LocalIdentities()
    first = local.acquire("10.0.0.0/8")
    local.release("10.0.0.0/8")
    assert local.acquire("11.0.0.0/8") != first


def test_restored_numbers_stay_with_their_prefix() -> None:
    before = LocalIdentities()
    numbers = {prefix: before.acquire(prefix) for prefix in ("10.0.0.0/8", "192.0.2.0/24", "::/0")}
    after = LocalIdentities()
    after.restore(before.numbers())
    assert after.acquire("198.51.100.0/24") not in numbers.values()
    assert after.acquire("192.0.2.0/24") == numbers["192.0.2.0/24"]
    assert after.numbers().items() >= numbers.items()
    assert after.forget_restored() == 2
    assert set(after.numbers()) == {"192.0.2.0/24", "198.51.100.0/24"}


def test_a_damaged_checkpoint_restores_what_is_usable() -> None:
    local = LocalIdentities()
    local.restore({"garbage": FIRST, "10.0.0.0/8": 5, "11.0.0.0/8": FIRST + 3, "12.0.0.0/8": FIRST + 3})
    assert local.numbers() == {"11.0.0.0/8": FIRST + 3}


def test_exhausted_range_says_so_and_recovers() -> None:
    local = LocalIdentities()
    # Fill through the checkpoint: the same bookkeeping, without 65 535 label sets.
    local.restore({f"10.{number >> 8}.{number & 255}.0/24": FIRST + number for number in range(65_535)})
    assert len(local.numbers()) == LOCAL_MAX - FIRST + 1
    with pytest.raises(RangeExhausted, match=r"203\.0\.113\.0/24"):
        local.acquire("203.0.113.0/24")
    assert local.number("203.0.113.0/24") is None
    local.forget_restored()
    assert is_local(local.acquire("203.0.113.0/24"))


@pytest.mark.parametrize("bad", ["", "10.0.0.0/33", "300.1.1.1", "cidr:10.0.0.0/8", "10.0.0.0/8;"])
def test_prefixes_that_are_none(bad: str) -> None:
    with pytest.raises(PrefixError):
        normalize(bad)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_any_order_of_acquire_and_release_keeps_numbers_unique(steps: list[tuple[bool, int]]) -> None:
    local, counts = LocalIdentities(), dict.fromkeys(range(6), 0)
    for acquire, which in steps:
        prefix = f"10.{which}.0.0/16"
        if acquire:
            local.acquire(prefix)
            counts[which] += 1
        elif counts[which]:
            local.release(prefix)
            counts[which] -= 1
        assert {each: local.count(f"10.{each}.0.0/16") for each in counts} == counts
        assert len(set(local.numbers().values())) == sum(1 for count in counts.values() if count)


def test_number_ranges() -> None:
    assert allocation_range(0) == range(256, 65_536)
    assert allocation_range(8) == range(8 << 16, 9 << 16)
    assert 543_547 in allocation_range(8)
    assert cluster_of(543_547) == 8
    for bad in (-1, 256):
        with pytest.raises(NumberError):
            allocation_range(bad)
    assert is_reserved(255)
    assert not is_reserved(256)
    assert is_global(allocation_range(255)[-1])
    assert not is_global(FIRST)
