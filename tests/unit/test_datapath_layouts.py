# SPDX-License-Identifier: Apache-2.0
"""Layouts and records against the bytes that a real agent of Cilium 1.11 wrote."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.addresses import unpack_ip
from datapath.btf import BtfBuilder
from datapath.layouts import (
    CT4_TUPLE,
    CT6_TUPLE,
    CT_ENTRY,
    ENDPOINT_INFO,
    ENDPOINT_KEY,
    LAYOUTS,
    METRICS_VALUE,
    POLICY_ENTRY,
    POLICY_KEY,
)
from datapath.maps import CtMap, IpcacheMap, LxcMap, MetricsMap, PolicyMap, TunnelMap, TypedMap
from datapath.records import (
    ENDPOINT_IS_HOST,
    CtEntry,
    CtKey,
    IpcacheEntry,
    LxcEntry,
    MetricsKey,
    MetricsValue,
    PolicyEntry,
    PolicyKey,
)

DUMPS = Path(__file__).parents[1] / "data" / "bpf-map-dumps.txt"
_HEX = re.compile(r"(?:[0-9a-f]{2} +)*[0-9a-f]{2}")


def codec(kind: type[TypedMap[object, object]] | type) -> TypedMap[object, object]:
    """Return a map without a kernel behind it: only what turns records into bytes."""
    return object.__new__(kind)


def dumped(name: str) -> list[tuple[bytes, bytes]]:
    """Return the (key, value) pairs of one map's dump; per-CPU values are joined."""
    section = DUMPS.read_text().split(f"== {name}\n")[1].split("\n== ")[0]
    pairs: list[tuple[bytearray, bytearray]] = []
    for line in section.splitlines():
        if line.startswith("key:"):
            pairs.append((bytearray(), bytearray()))
            side = 0
        elif line.startswith("value"):
            side = 1
            line = line.partition(": ")[2]
        if _HEX.fullmatch(line.strip()):
            pairs[-1][side].extend(bytes.fromhex(line))
    return [(bytes(key), bytes(value)) for key, value in pairs if value]


def test_sizes_are_those_of_the_format() -> None:
    assert {layout.name: layout.size for layout in LAYOUTS} == {
        "endpoint_key": 20,
        "endpoint_info": 48,
        "ipcache_key": 24,
        "remote_endpoint_info": 12,
        "policy_key": 8,
        "policy_entry": 24,
        "metrics_key": 8,
        "metrics_value": 16,
        "ipv4_ct_tuple": 14,
        "ipv6_ct_tuple": 38,
        "ct_entry": 56,
        "ipv4_frag_id": 12,
        "ipv6_frag_id": 40,
        "ipv4_frag_l4ports": 4,
        "ipv6_frag_l4ports": 4,
    }


def test_offsets_that_others_rely_on() -> None:
    assert ENDPOINT_INFO.offsets["mac"] == 16
    assert POLICY_KEY.offsets == {"sec_label": 0, "dport": 4, "protocol": 6, "direction": 7}
    assert POLICY_ENTRY.offsets["packets"] == 8
    assert CT_ENTRY.offsets["lifetime"] == 32
    assert CT_ENTRY.offsets["src_sec_id"] == 44


def test_bit_fields_fill_their_storage() -> None:
    for layout in LAYOUTS:
        for field in layout.fields:
            assert not field.bits or sum(width for _, width in field.bits) == field.type.size * 8


def test_endpoints_as_dumped() -> None:
    lxc = codec(LxcMap)
    found = {lxc._unpack_key(key): lxc._unpack_value(value) for key, value in dumped("cilium_lxc")}
    assert found == {
        "10.50.217.152": LxcEntry(13, 981, 0, "5a:c4:a9:04:07:84", "ae:aa:00:7d:94:a1"),
        "10.50.68.48": LxcEntry(11, 373, 0, "fe:9e:ab:1b:98:91", "3a:b0:f4:93:69:43"),
        "10.99.0.2": LxcEntry(0, 0, ENDPOINT_IS_HOST, "00:00:00:00:00:00", "00:00:00:00:00:00"),
    }
    for key, value in dumped("cilium_lxc"):
        assert lxc._pack_key(lxc._unpack_key(key)) == key
        assert lxc._pack_value(lxc._unpack_value(value)) == value


def test_tunnel_as_dumped() -> None:
    tunnel = codec(TunnelMap)
    [(key, value)] = dumped("cilium_tunnel_map")
    assert (tunnel._unpack_key(key), tunnel._unpack_value(value)) == ("10.51.0.0", "10.99.0.1")
    assert (tunnel._pack_key("10.51.0.0"), tunnel._pack_value("10.99.0.1")) == (key, value)


def test_metrics_as_dumped_are_summed_over_cpus() -> None:
    metrics = codec(MetricsMap)
    found = {
        metrics._unpack_key(key): metrics._unpack_value(value) for key, value in dumped("cilium_metrics")
    }
    assert found == {MetricsKey(0, 2): MetricsValue(4, 280), MetricsKey(0x8B, 2): MetricsValue(15, 1150)}
    assert METRICS_VALUE.size == 16


def test_policy_key_stands_in_the_order_people_dump() -> None:
    policy = codec(PolicyMap)
    key = policy._pack_key(PolicyKey(0x01020304, 0x1F90, 6, 1))
    assert key == struct.pack("=I", 0x01020304) + b"\x1f\x90" + b"\x06" + b"\x01"
    assert policy._pack_value(PolicyEntry(True, 0x3039))[:3] == b"\x30\x39\x01"


def test_conntrack_tuple_has_addresses_swapped_and_ports_as_sent() -> None:
    data = codec(CtMap)._pack_key(CtKey("10.0.0.1", "10.0.0.2", 4000, 80, 6, 1))
    daddr, saddr, dport, sport, _, flags = CT4_TUPLE.unpack(data)
    assert (daddr, saddr, flags) == (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 1)
    assert (dport, sport) == ((80).to_bytes(2), (4000).to_bytes(2))


# --- whatever goes in comes out

_u8, _u16, _u32, _u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
_ip4, _ip6 = (st.binary(min_size=size, max_size=size).map(unpack_ip) for size in (4, 16))
_mac = st.binary(min_size=6, max_size=6).map(lambda data: data.hex(":"))
_prefixes = st.one_of(st.tuples(_ip4, st.integers(0, 32)), st.tuples(_ip6, st.integers(0, 128))).map(
    lambda parts: f"{parts[0]}/{parts[1]}"
)
_ct_values = st.tuples(_u64, _u64, _u64, _u64, _u32, _u16, _u16, _u16, _u8, _u8, _u32, _u32, _u32)


@given(_prefixes, st.builds(IpcacheEntry, _u32, _ip4, _u8))
def test_ipcache_round_trip(prefix: str, entry: IpcacheEntry) -> None:
    ipcache = codec(IpcacheMap)
    assert ipcache._unpack_key(ipcache._pack_key(prefix)) == prefix
    assert ipcache._unpack_value(ipcache._pack_value(entry)) == entry


@given(st.one_of(_ip4, _ip6), st.builds(LxcEntry, _u32, _u16, _u32, _mac, _mac))
def test_lxc_round_trip(address: str, entry: LxcEntry) -> None:
    lxc = codec(LxcMap)
    assert lxc._unpack_key(lxc._pack_key(address)) == address
    assert lxc._unpack_value(lxc._pack_value(entry)) == entry


@given(
    st.builds(PolicyKey, _u32, _u16, _u8, st.integers(0, 1)),
    st.builds(PolicyEntry, st.booleans(), _u16, _u32),
)
def test_policy_round_trip(key: PolicyKey, entry: PolicyEntry) -> None:
    policy = codec(PolicyMap)
    assert policy._unpack_key(policy._pack_key(key)) == key
    assert policy._unpack_value(policy._pack_value(entry)) == entry


@given(
    st.one_of(
        st.builds(CtKey, _ip4, _ip4, _u16, _u16, _u8, _u8), st.builds(CtKey, _ip6, _ip6, _u16, _u16, _u8, _u8)
    ),
    _ct_values.map(CtEntry._make),
)
def test_conntrack_round_trip(key: CtKey, entry: CtEntry) -> None:
    connections = codec(CtMap)
    data = connections._pack_key(key)
    assert len(data) in (CT4_TUPLE.size, CT6_TUPLE.size)
    assert connections._unpack_key(data) == key
    assert connections._unpack_value(connections._pack_value(entry)) == entry


@pytest.mark.parametrize("bad", ["", "10.0.0", "10.0.0.1/33", "::/129", "10.0.0.1/x", "10.0.0.1/-1", "host"])
def test_no_prefix_is_refused(bad: str) -> None:
    with pytest.raises((OSError, ValueError)):
        codec(IpcacheMap)._pack_key(bad)


def test_btf_blob_says_its_own_lengths() -> None:
    builder = BtfBuilder()
    numbers = [builder.add(layout) for layout in LAYOUTS]
    assert len(set(numbers)) == len(LAYOUTS)
    blob = builder.blob()
    magic, version, _, header, types_at, types, strings_at, strings = struct.unpack_from("=HBBIIIII", blob)
    assert (magic, version, types_at, strings_at) == (0xEB9F, 1, 0, types)
    assert len(blob) == header + types + strings


def test_endpoint_key_is_packed() -> None:
    assert ENDPOINT_KEY.offsets == {"ip": 0, "family": 16, "key": 17, "pad5": 18}
