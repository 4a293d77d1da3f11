# SPDX-License-Identifier: Apache-2.0
"""BTF for maps: turns layouts into the blob that makes `bpftool map dump` print field names.

Responsible for: the encoding of integers, arrays and structs of include/uapi/linux/btf.h, no more.
Called by: `datapath.mapspec` when it creates a map.
"""

from __future__ import annotations

import struct

from datapath.layouts import Field, Layout, Scalar

Shape = Layout | Scalar

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, header size, types at, long, strings at, long
_TYPE = struct.Struct("=III")  # name, info (kind << 24 | members), size or type
_INT, _ARRAY, _STRUCT = 1, 3, 4
_HAS_BITFIELDS = 1 << 31  # info: offsets of members are width << 24 | bit offset


class BtfBuilder:
    """Collects types; `add` returns a type's number, `blob` the finished bytes."""

    def __init__(self) -> None:
        self._types: list[bytes] = []
        self._strings = bytearray(b"\0")
        self._integers: dict[int, int] = {}

    def add(self, shape: Shape) -> int:
        """Append the type of `shape` and what it is made of; return its number."""
        return self._struct(shape) if isinstance(shape, Layout) else self._scalar(shape)

    def blob(self) -> bytes:
        """Return header, types and strings."""
        types = b"".join(self._types)
        header = _HEADER.pack(_MAGIC, 1, 0, _HEADER.size, 0, len(types), len(types), len(self._strings))
        return header + types + bytes(self._strings)

    def _struct(self, layout: Layout) -> int:
        members = b"".join(self._member(field, layout.offsets[field.name] * 8) for field in layout.fields)
        count = len(members) // _TYPE.size
        return self._append(layout.name, _STRUCT << 24 | _HAS_BITFIELDS | count, layout.size, members)

    def _member(self, field: Field, position: int) -> bytes:
        number = self._scalar(field.type)
        if not field.bits:
            return _TYPE.pack(self._string(field.name), number, position)
        parts = bytearray()
        for name, width in field.bits:
            parts += _TYPE.pack(self._string(name), number, width << 24 | position)
            position += width
        return bytes(parts)

    def _scalar(self, scalar: Scalar) -> int:
        if not scalar.is_array:
            return self._integer(scalar.size)
        element = self._integer(1)
        return self._append("", _ARRAY << 24, 0, struct.pack("=III", element, self._integer(4), scalar.size))

    def _integer(self, size: int) -> int:
        if size not in self._integers:
            bits = struct.pack("=I", size * 8)
            self._integers[size] = self._append(f"u{size * 8}", _INT << 24, size, bits)
        return self._integers[size]

    def _append(self, name: str, info: int, size: int, rest: bytes) -> int:
        self._types.append(_TYPE.pack(self._string(name), info, size) + rest)
        return len(self._types)

    def _string(self, text: str) -> int:
        if not text:
            return 0
        position = len(self._strings)
        self._strings += text.encode() + b"\0"
        return position
