# SPDX-License-Identifier: Apache-2.0
"""An interpreter of BPF instructions, slow and exact: it runs what the kernel was given, and counts.

    Machine(images, clock).run(image, frame) → Outcome

It knows version 3 of the instruction set and what a tc program sees: the packet, its context, a stack a call,
maps.  Maps are the real ones: a value that is looked up is copied into the machine's memory, and written back
at the end if the program changed it.  A tail call goes through the real array of programs, into the image of
the one that stands there.

An address is a region's number and an offset, so that everything outside of what a program was given is a
Fault.  So is an instruction that the verifier removed, and a helper that is not in bench/ebpf_helpers.py.

Called by: `bench.instructions`.  Images are made by `bench.ebpf_image`.
"""

from __future__ import annotations

import operator
import struct
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.ebpf_helpers import HELPERS, Copies, Fault, Memory
from bench.ebpf_image import (
    ALU,
    ALU64,
    CALL,
    EXIT,
    JA,
    JMP,
    JMP32,
    LD,
    LDX,
    MAP_FD,
    MAP_VALUE,
    STX,
    Image,
    Instruction,
)

CONTEXT_SIZE = 192  # struct __sk_buff
LEN, MARK, PROTOCOL, IFINDEX, CB, DATA, DATA_END = 0, 8, 16, 40, 48, 76, 80  # in it
_STACK = 512
_LOOPBACK = 1  # the device of test runs
_FRAME_POINTER = 10
_SAVED = 6  # a call keeps registers from here on
_WORDS, _LONGS = (1 << 32) - 1, (1 << 64) - 1

# What else is in an opcode: include/uapi/linux/bpf.h.
_FROM_REGISTER = 0x08
_SIZES = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}
_ATOMIC = 0xC0
_PSEUDO_CALL = 1  # `source` of a call that stays in the program
_MOVE, _SHIFT_ARITHMETIC, _BYTES = 0xB0, 0xC0, 0xD0

_ARITHMETIC: dict[int, Callable[[int, int], int]] = {
    0x00: operator.add,
    0x10: operator.sub,
    0x20: operator.mul,
    0x30: lambda one, other: one // other if other else 0,
    0x40: operator.or_,
    0x50: operator.and_,
    0x80: lambda one, other: -one,
    0x90: lambda one, other: one % other if other else one,
    0xA0: operator.xor,
    _MOVE: lambda one, other: other,
}
_SHIFTS: dict[int, Callable[[int, int], int]] = {0x60: operator.lshift, 0x70: operator.rshift}
_COMPARISONS: dict[int, Callable[[int, int], bool]] = {
    0x10: operator.eq,
    0x20: operator.gt,
    0x30: operator.ge,
    0x40: lambda one, other: bool(one & other),
    0x50: operator.ne,
    0xA0: operator.lt,
    0xB0: operator.le,
}
_SIGNED_COMPARISONS: dict[int, Callable[[int, int], bool]] = {
    0x60: operator.gt,
    0x70: operator.ge,
    0xC0: operator.lt,
    0xD0: operator.le,
}


def signed(value: int, bits: int) -> int:
    """Return a register's value as the signed number it stands for."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


@dataclass
class Outcome:
    """What a program did: its return value, packet and context afterwards, and how often it did what."""

    verdict: int = 0
    packet: bytes = b""
    mark: int = 0
    cb: tuple[int, ...] = ()
    executed: Counter[tuple[Image, int]] = field(default_factory=Counter)  # (program, instruction)
    helpers: Counter[str] = field(default_factory=Counter)

    @property
    def instructions(self) -> int:
        """All that were executed of those which the verifier left."""
        return sum(times for (image, at), times in self.executed.items() if at not in image.free)


@dataclass
class _Frame:
    """What a call comes back to: the instruction behind it, and registers."""

    back: int
    saved: list[int]


class Machine:
    """One run of programs on one packet."""

    def __init__(self, images: Mapping[int, Image], clock: int) -> None:
        """`images`: where tail calls may lead, by program id; `clock`: nanoseconds, it stands still."""
        self.images = images
        self.clock = clock
        self.memory = Memory()
        self.copies = Copies(self.memory)
        self.outcome = Outcome()
        self.packet = self.context = 0
        self.registers = [0] * 11
        self._frames: list[_Frame] = []
        self._image: Image
        self._at = 0

    def run(self, image: Image, frame: bytes) -> Outcome:
        """Run a program on a frame, as BPF_PROG_TEST_RUN does.  Raises Fault."""
        self.packet = self.memory.add(bytearray(frame))
        self.context = self.memory.add(_context(frame))
        self.registers[1] = self.context
        self.registers[_FRAME_POINTER] = self.memory.add(bytearray(_STACK)) + _STACK
        self.enter(image)
        while self._step():
            pass
        self.copies.write_back()
        return self._concluded()

    def enter(self, image: Image) -> None:
        """Go on at the beginning of a program, as a tail call does."""
        self._image, self._at = image, 0

    def _concluded(self) -> Outcome:
        context = bytes(self.memory.region(self.context))
        self.outcome.verdict = self.registers[0] & _WORDS
        self.outcome.packet = bytes(self.memory.region(self.packet))
        self.outcome.mark = struct.unpack_from("=I", context, MARK)[0]
        self.outcome.cb = struct.unpack_from("=5I", context, CB)
        return self.outcome

    # --- one instruction

    def _step(self) -> bool:
        """Execute one instruction; return whether another follows."""
        image, at = self._image, self._at
        if at not in image.kept:
            raise Fault(f"{image.name}: instruction {at} is not there for the verifier")
        one = image.code[at]
        self.outcome.executed[image, at] += 1
        self._at += 1
        bits = 32 if one.kind in (ALU, JMP32) else 64
        if one.kind in (JMP, JMP32):
            return self._jump(one, bits)
        if one.kind in (ALU, ALU64):
            self._compute(one, bits)
        elif one.kind == LD:
            self._load_constant(one)
        else:
            self._access(one)
        return True

    def _operand(self, one: Instruction) -> int:
        return self.registers[one.source] if one.opcode & _FROM_REGISTER else one.immediate

    def _compute(self, one: Instruction, bits: int) -> None:
        operation, mask = one.operation, (1 << bits) - 1
        value, other = self.registers[one.target] & mask, self._operand(one) & mask
        if operation == _BYTES:
            value, mask = self._ordered(one), _LONGS
        elif operation == _SHIFT_ARITHMETIC:
            value = signed(value, bits) >> (other & (bits - 1))
        elif operation in _SHIFTS:
            value = _SHIFTS[operation](value, other & (bits - 1))
        else:
            value = _ARITHMETIC[operation](value, other)
        self.registers[one.target] = value & mask

    def _ordered(self, one: Instruction) -> int:
        """Return a register cut to the immediate's bits, in the byte order that the instruction names."""
        value = self.registers[one.target] & ((1 << one.immediate) - 1)
        order = "big" if one.opcode & _FROM_REGISTER else "little"
        if order == sys.byteorder:
            return value
        return int.from_bytes(value.to_bytes(one.immediate // 8, "little"), "big")

    def _jump(self, one: Instruction, bits: int) -> bool:
        if one.operation == EXIT:
            return self._return()
        if one.operation == CALL:
            self._call(one)
        elif one.operation == JA or self._holds(one, bits):
            self._at += one.offset
        return True

    def _holds(self, one: Instruction, bits: int) -> bool:
        value, other = self.registers[one.target], self._operand(one)
        if one.operation in _SIGNED_COMPARISONS:
            return _SIGNED_COMPARISONS[one.operation](signed(value, bits), signed(other, bits))
        mask = (1 << bits) - 1
        return _COMPARISONS[one.operation](value & mask, other & mask)

    def _call(self, one: Instruction) -> None:
        if one.source == _PSEUDO_CALL:
            self._frames.append(_Frame(self._at, self.registers[_SAVED:]))
            self.registers[_FRAME_POINTER] = self.memory.add(bytearray(_STACK)) + _STACK
            self._at += one.immediate
            return
        if one.immediate not in HELPERS:
            raise Fault(f"{self._image.name}: helper {one.immediate} is not known here")
        name, helper = HELPERS[one.immediate]
        self.outcome.helpers[name] += 1
        result = helper(self, *self.registers[1:6])
        if result is not None:  # none: a tail call that went through
            self.registers[0] = result & _LONGS

    def _return(self) -> bool:
        if not self._frames:
            return False
        frame = self._frames.pop()
        self._at, self.registers[_SAVED:] = frame.back, frame.saved
        return True

    def _load_constant(self, one: Instruction) -> None:
        """ld_imm64, which takes two places: a number, a map, or a place in a map of constants or data."""
        above = self._image.code[self._at].immediate
        self._at += 1
        if one.source == MAP_FD:
            value = self.copies.address_of(self._image.maps[one.immediate])
        elif one.source == MAP_VALUE:
            value = self.copies.lookup(self._image.maps[one.immediate], bytes(4)) + above
        else:
            value = (one.immediate & _WORDS) | above << 32
        self.registers[one.target] = value & _LONGS

    def _access(self, one: Instruction) -> None:
        size = _SIZES[one.opcode & 0x18]
        if one.kind == LDX:
            self.registers[one.target] = self._load(self.registers[one.source] + one.offset, size)
            return
        address = self.registers[one.target] + one.offset
        value = self.registers[one.source] if one.kind == STX else one.immediate
        if one.opcode & 0xE0 == _ATOMIC:
            if one.immediate:
                raise Fault(f"{self._image.name}: atomic operation {one.immediate:#x} is not known here")
            value += self.memory.load(address, size)
        self.memory.store(address, size, value)

    def _load(self, address: int, size: int) -> int:
        """Read memory; two members of the context are where the packet begins and ends."""
        if address == self.context + DATA:
            return self.packet
        if address == self.context + DATA_END:
            return self.packet + len(self.memory.region(self.packet))
        return self.memory.load(address, size)


def _context(frame: bytes) -> bytearray:
    """What a test run fills in of struct __sk_buff; a frame's type is that of one for the host."""
    context = bytearray(CONTEXT_SIZE)
    struct.pack_into("=I", context, LEN, len(frame))
    struct.pack_into("=I", context, PROTOCOL, int.from_bytes(frame[12:14], sys.byteorder))
    struct.pack_into("=I", context, IFINDEX, _LOOPBACK)
    return context
