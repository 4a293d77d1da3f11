# SPDX-License-Identifier: Apache-2.0
"""What BPF programs ask of the kernel, for the interpreter: memory, copies of maps' values, helpers.

Helpers do what include/uapi/linux/bpf.h says of them, as far as the programs of this project ask.  None
emits events: programs ask for room in the ring only while somebody reads it.

Called by: `bench.ebpf`.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datapath.errors import MapError
from datapath.handle import MapHandle
from datapath.testrun import ACT_REDIRECT

if TYPE_CHECKING:
    from bench.ebpf import Machine

_OFFSET = (1 << 32) - 1
_PACKET_TYPE = 4  # in struct __sk_buff
_BAD_ADDRESS, _FAILED = -14, -1


class Fault(Exception):
    """A program did what the verifier would not let it do, or what the interpreter does not know."""


class Memory:
    """Regions of bytes; an address is a region's number << 32 | offset, and 0 is nobody's."""

    def __init__(self) -> None:
        self._regions = [bytearray()]

    def add(self, region: bytearray) -> int:
        """Give a region an address."""
        self._regions.append(region)
        return (len(self._regions) - 1) << 32

    def region(self, address: int) -> bytearray:
        """Return the whole region that an address is in."""
        number = address >> 32
        if not 0 < number < len(self._regions):
            raise Fault(f"{address:#x} is no address")
        return self._regions[number]

    def _within(self, address: int, size: int) -> tuple[bytearray, int]:
        region, offset = self.region(address), address & _OFFSET
        if offset + size > len(region):
            raise Fault(f"{size} bytes at {address:#x} reach over the end")
        return region, offset

    def read(self, address: int, size: int) -> bytes:
        region, offset = self._within(address, size)
        return bytes(region[offset : offset + size])

    def write(self, address: int, data: bytes) -> None:
        region, offset = self._within(address, len(data))
        region[offset : offset + len(data)] = data

    def load(self, address: int, size: int) -> int:
        return int.from_bytes(self.read(address, size), sys.byteorder)

    def store(self, address: int, size: int, value: int) -> None:
        self.write(address, (value & ((1 << size * 8) - 1)).to_bytes(size, sys.byteorder))


@dataclass
class _Copy:
    """A value in memory, and as the map had it; of a per-CPU map the first CPU's is the one in memory."""

    handle: MapHandle
    address: int
    value: bytes


class Copies:
    """Values of maps as programs point to them."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._addresses: dict[int, int] = {}  # by the kernel's number of a map: programs share some
        self._handles: dict[int, MapHandle] = {}  # by address
        self._copies: dict[tuple[int, bytes], _Copy] = {}

    def address_of(self, handle: MapHandle) -> int:
        """Return what stands for the map itself in a register."""
        if handle.info.id not in self._addresses:
            self._addresses[handle.info.id] = address = self._memory.add(bytearray())
            self._handles[address] = handle
        return self._addresses[handle.info.id]

    def at(self, address: int) -> MapHandle:
        """Return the map that a register stands for."""
        if address not in self._handles:
            raise Fault(f"{address:#x} is no map")
        return self._handles[address]

    def lookup(self, handle: MapHandle, key: bytes) -> int:
        """Return the address of a value, 0 when there is none."""
        if (handle.info.id, key) not in self._copies:
            value = handle.lookup(key)
            if value is None:
                return 0
            address = self._memory.add(bytearray(value[: handle.info.value_size]))
            self._copies[handle.info.id, key] = _Copy(handle, address, value)
        return self._copies[handle.info.id, key].address

    def update(self, handle: MapHandle, key: bytes, value: bytes) -> int:
        """Write an entry that the program made; return 0, or less than 0 when the map refuses."""
        self._copies.pop((handle.info.id, key), None)
        try:
            handle.update(key, value.ljust(handle.value_size, b"\0"))
        except MapError:
            return _FAILED
        return 0

    def write_back(self) -> None:
        """Write every value that the program changed where it lies."""
        for (_, key), copy in self._copies.items():
            value = bytes(self._memory.region(copy.address))
            if value != copy.value[: len(value)]:
                copy.handle.update(key, value + copy.value[len(value) :])


# --- helpers: each takes the machine and the five argument registers


def _map_lookup(machine: Machine, table: int, key: int, *_: int) -> int:
    handle = machine.copies.at(table)
    return machine.copies.lookup(handle, machine.memory.read(key, handle.info.key_size))


def _map_update(machine: Machine, table: int, key: int, value: int, *_: int) -> int:
    handle = machine.copies.at(table)
    info, read = handle.info, machine.memory.read
    return machine.copies.update(handle, read(key, info.key_size), read(value, info.value_size))


def _clock(machine: Machine, *_: int) -> int:
    return machine.clock


def _tail_call(machine: Machine, context: int, table: int, index: int, *_: int) -> int | None:
    """Asked from user space, an array of programs answers with their ids."""
    entry = machine.copies.at(table).lookup(struct.pack("=I", index & _OFFSET))
    if entry is None:
        return _FAILED
    machine.enter(machine.images[int.from_bytes(entry, sys.byteorder)])
    machine.registers[1] = context
    return None


def _load_bytes(machine: Machine, context: int, offset: int, to: int, size: int, *_: int) -> int:
    packet = machine.memory.region(machine.packet)
    if offset + size > len(packet):
        return _BAD_ADDRESS
    machine.memory.write(to, bytes(packet[offset : offset + size]))
    return 0


def _pull_data(machine: Machine, *_: int) -> int:
    return 0  # frames of test runs lie in one piece


def _change_type(machine: Machine, context: int, kind: int, *_: int) -> int:
    machine.memory.store(context + _PACKET_TYPE, 4, kind)
    return 0


def _redirect_peer(machine: Machine, device: int, flags: int, *_: int) -> int:
    return ACT_REDIRECT


def _checksum(machine: Machine, old: int, old_size: int, new: int, new_size: int, seed: int) -> int:
    """One's complement sum of `new`; nobody here takes anything away."""
    if old_size:
        raise Fault("bpf_csum_diff: taking away is not known here")
    words = struct.iter_unpack("=H", machine.memory.read(new, new_size))
    total: int = seed + sum(word for (word,) in words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


MAP_LOOKUP, MAP_UPDATE, TAIL_CALL = "map_lookup_elem", "map_update_elem", "tail_call"
Helper = Callable[..., int | None]
HELPERS: dict[int, tuple[str, Helper]] = {
    1: (MAP_LOOKUP, _map_lookup),
    2: (MAP_UPDATE, _map_update),
    5: ("ktime_get_ns", _clock),
    12: (TAIL_CALL, _tail_call),
    26: ("skb_load_bytes", _load_bytes),
    28: ("csum_diff", _checksum),
    32: ("skb_change_type", _change_type),
    39: ("skb_pull_data", _pull_data),
    155: ("redirect_peer", _redirect_peer),
    160: ("ktime_get_coarse_ns", _clock),
}
