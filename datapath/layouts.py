# SPDX-License-Identifier: Apache-2.0
"""Binary layouts of BPF map keys and values, as tables: the Python half of what bpf/include declares in C.

Responsible for: offsets, sizes and alignment of Cilium 1.11's structs, and packing them.  Fields in
network byte order ("be16", "be32") and addresses are bytes here; `datapath.codecs` turns them into what
people read.  A test compares every table with the BTF of the compiled objects.
Called by: `datapath.codecs`, `datapath.btf`, `datapath.mapspec`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Scalar:
    """One C type: its name, its `struct` code, its size and alignment in bytes."""

    name: str
    code: str
    size: int
    align: int

    @property
    def is_array(self) -> bool:
        return self.size != self.align


U8 = Scalar("u8", "B", 1, 1)
U16 = Scalar("u16", "H", 2, 2)
U32 = Scalar("u32", "I", 4, 4)
U64 = Scalar("u64", "Q", 8, 8)
BE16 = Scalar("be16", "2s", 2, 2)
BE32 = Scalar("be32", "4s", 4, 4)
U8X3 = Scalar("u8[3]", "3s", 3, 1)
MAC = Scalar("u8[8]", "8s", 8, 1)  # a u64 of which the first six bytes are the address
ADDRESS = Scalar("u8[16]", "16s", 16, 1)  # an IPv6 address, or an IPv4 address and twelve zeros


@dataclass(frozen=True)
class Field:
    """One member; `bits` names the bit fields that share its storage, lowest first: (name, width)."""

    name: str
    type: Scalar
    bits: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """A C struct: members in order, each at its natural alignment unless `packed`."""

    name: str
    fields: tuple[Field, ...]
    packed: bool = False

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each member by its name."""
        return {field.name: offset for field, offset in self._placed()}

    @cached_property
    def size(self) -> int:
        """Size in bytes, with the padding at the end."""
        end = 0
        for field, offset in self._placed():
            end = offset + field.type.size
        widest = 1 if self.packed else max(field.type.align for field in self.fields)
        return _aligned(end, widest)

    @cached_property
    def codec(self) -> struct.Struct:
        """The `struct.Struct` that packs the members in order; padding is zero."""
        code, end = "=", 0
        for field, offset in self._placed():
            code += "x" * (offset - end) + field.type.code
            end = offset + field.type.size
        return struct.Struct(code + "x" * (self.size - end))

    def pack(self, *values: Any) -> bytes:
        """Return the bytes of one struct; values in the order of `fields`."""
        return self.codec.pack(*values)

    def unpack(self, data: bytes) -> tuple[Any, ...]:
        """Return the values of one struct, in the order of `fields`."""
        return self.codec.unpack(data)

    def _placed(self) -> Iterator[tuple[Field, int]]:
        end = 0
        for field in self.fields:
            offset = end if self.packed else _aligned(end, field.type.align)
            yield field, offset
            end = offset + field.type.size


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _layout(name: str, *members: tuple[str, Scalar], packed: bool = False) -> Layout:
    return Layout(name, tuple(Field(*member) for member in members), packed)


def _ct_tuple(name: str, address: Scalar) -> Layout:
    """One tuple for both families; addresses are those of the packet swapped, ports are as sent."""
    return _layout(
        name,
        ("daddr", address),
        ("saddr", address),
        ("dport", BE16),
        ("sport", BE16),
        ("nexthdr", U8),
        ("flags", U8),
        packed=True,
    )


ENDPOINT_KEY = _layout(
    "endpoint_key", ("ip", ADDRESS), ("family", U8), ("key", U8), ("pad5", U16), packed=True
)
ENDPOINT_INFO = _layout(
    "endpoint_info",
    ("ifindex", U32),
    ("unused", U16),
    ("lxc_id", U16),
    ("flags", U32),
    ("pad_align", U32),  # C leaves this gap by itself, because `mac` is a u64 there
    ("mac", MAC),
    ("node_mac", MAC),
    ("pad", ADDRESS),
)
IPCACHE_KEY = _layout(
    "ipcache_key",
    ("prefixlen", U32),
    ("pad1", U16),
    ("pad2", U8),
    ("family", U8),
    ("ip", ADDRESS),
    packed=True,
)
REMOTE_ENDPOINT_INFO = _layout(
    "remote_endpoint_info", ("sec_label", U32), ("tunnel_endpoint", BE32), ("key", U8), ("pad", U8X3)
)
POLICY_KEY = Layout(
    "policy_key",
    (
        Field("sec_label", U32),
        Field("dport", BE16),
        Field("protocol", U8),
        Field("direction", U8, (("egress", 1), ("pad", 7))),
    ),
)
POLICY_ENTRY = Layout(
    "policy_entry",
    (
        Field("proxy_port", BE16),
        Field("verdict", U8, (("deny", 1), ("pad", 7))),
        Field("pad0", U8),
        Field("pad1", U16),
        Field("pad2", U16),
        Field("packets", U64),
        Field("bytes", U64),
    ),
)
METRICS_KEY = Layout(
    "metrics_key",
    (
        Field("reason", U8),
        Field("direction", U8, (("dir", 2), ("pad", 6))),
        Field("reserved0", U16),
        Field("reserved1", U16),
        Field("reserved2", U16),
    ),
)
METRICS_VALUE = _layout("metrics_value", ("count", U64), ("bytes", U64))
CT4_TUPLE = _ct_tuple("ipv4_ct_tuple", BE32)
CT6_TUPLE = _ct_tuple("ipv6_ct_tuple", ADDRESS)
# Bits of ct_entry in order.  `from_stack` is the first of eight that Cilium 1.11 leaves unused: the flow
# came to the endpoint through the host's stack, and its replies must go back there.
CT_BITS = (
    "rx_closing",
    "tx_closing",
    "nat46",
    "lb_loopback",
    "seen_non_syn",
    "node_port",
    "proxy_redirect",
    "dsr",
    "from_stack",
)
CT_ENTRY = Layout(
    "ct_entry",
    (
        Field("rx_packets", U64),
        Field("rx_bytes", U64),  # for a service: the backend's id
        Field("tx_packets", U64),
        Field("tx_bytes", U64),
        Field("lifetime", U32),
        Field("bits", U16, (*((name, 1) for name in CT_BITS), ("reserved", 16 - len(CT_BITS)))),
        Field("rev_nat_index", BE16),
        Field("ifindex", U16),
        Field("tx_flags_seen", U8),
        Field("rx_flags_seen", U8),
        Field("src_sec_id", U32),
        Field("last_tx_report", U32),
        Field("last_rx_report", U32),
    ),
)
FRAG4_KEY = _layout(
    "ipv4_frag_id",
    ("daddr", BE32),
    ("saddr", BE32),
    ("id", BE16),
    ("proto", U8),
    ("pad", U8),
    packed=True,
)
FRAG6_KEY = _layout(
    "ipv6_frag_id",
    ("daddr", ADDRESS),
    ("saddr", ADDRESS),
    ("id", BE32),
    ("proto", U8),
    ("pad", U8X3),
    packed=True,
)
FRAG4_PORTS = _layout("ipv4_frag_l4ports", ("sport", BE16), ("dport", BE16), packed=True)
FRAG6_PORTS = _layout("ipv6_frag_l4ports", ("sport", BE16), ("dport", BE16), packed=True)

LAYOUTS = (
    ENDPOINT_KEY,
    ENDPOINT_INFO,
    IPCACHE_KEY,
    REMOTE_ENDPOINT_INFO,
    POLICY_KEY,
    POLICY_ENTRY,
    METRICS_KEY,
    METRICS_VALUE,
    CT4_TUPLE,
    CT6_TUPLE,
    CT_ENTRY,
    FRAG4_KEY,
    FRAG4_PORTS,
    FRAG6_KEY,
    FRAG6_PORTS,
)
