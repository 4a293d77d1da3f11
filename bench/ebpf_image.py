# SPDX-License-Identifier: Apache-2.0
"""What the kernel was given of a program, for the interpreter: instructions, maps, what the verifier left.

    Recorder(elf, name, images, stack).load(constants, maps)    as any template; `images` fills up

libbpf keeps a program's instructions as it handed them to the kernel: constants in their map, descriptors in
place, functions appended.  What the verifier removed it does not say, but its log names every instruction it
looked at.  The others can not be reached with these constants and are removed; a branch that has but one way
left becomes a jump, and a jump over nothing is removed as well: those are free.

The log also says which line of the source an instruction stands for (kernels from 6.9 on name the file).

Called by: `bench.ebpf` and `bench.instructions`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from datapath.handle import MapHandle
from datapath.libbpf import checked, library
from datapath.loader import Template

_LOG_EVERYTHING = 2  # the verifier's log level that names each instruction
_LOG_SIZE = 1 << 24
_WALKED = re.compile(rb"^(\d+): \([0-9a-f]{2}\)")
_SOURCE = re.compile(rb"^;.* @ ([\w./-]+):(\d+)$")

# Of an opcode: its class, and of jumps the operation (include/uapi/linux/bpf.h).
LD, LDX, ST, STX, ALU, JMP, JMP32, ALU64 = range(8)
JA, CALL, EXIT = 0x00, 0x80, 0x90
MAP_FD, MAP_VALUE = 1, 2  # `source` of an ld_imm64 that loads a map, or a place in its first value
_LD_IMM64 = 0x18


class Instruction(NamedTuple):
    """struct bpf_insn."""

    opcode: int
    target: int
    source: int
    offset: int
    immediate: int

    @property
    def kind(self) -> int:
        """The class."""
        return self.opcode & 0x07

    @property
    def operation(self) -> int:
        """What is computed, or what a jump depends on."""
        return self.opcode & 0xF0


@dataclass(frozen=True, eq=False)
class Image:
    """One loaded program; maps by the number that stands for them in instructions."""

    name: str
    code: tuple[Instruction, ...]
    maps: dict[int, MapHandle]
    kept: frozenset[int]  # instructions that the verifier left
    places: dict[int, tuple[str, int]]  # file and line of the source, where the kernel says
    free: frozenset[int] = field(init=False)  # kept, but jumps over nothing

    def __post_init__(self) -> None:
        object.__setattr__(self, "free", frozenset(at for at in self.kept if self._is_free(at)))

    def _is_free(self, at: int) -> bool:
        one = self.code[at]
        if one.kind not in (JMP, JMP32) or one.operation in (CALL, EXIT):
            return False
        target = at + 1 + one.offset
        if one.operation != JA and target not in self.kept:
            return True
        return target > at and self.kept.isdisjoint(range(at + 1, target))


@dataclass(frozen=True)
class Recorder(Template):
    """A template that keeps an image of all it loads, by program id; `stack` closes their maps."""

    images: dict[int, Image]
    stack: ExitStack

    @contextmanager
    def _open(self) -> Iterator[int]:
        with super()._open() as handle:
            logs = {program: _listen(program) for program in _programs(handle)}
            yield handle
            for program, log in logs.items():
                self._record(program, log.value)

    def _record(self, program: int, log: bytes) -> None:
        lib = _library()
        fd = lib.bpf_program__fd(program)
        if fd < 0:  # opened only to be checked
            return
        size = lib.bpf_program__insn_cnt(program) * 8
        code = tuple(_decoded(ctypes.string_at(lib.bpf_program__insns(program), size)))
        kept, places = _walked(log)
        name = lib.bpf_program__name(program).decode()
        self.images[program_id(fd)] = Image(name, code, self._maps(code), kept, places)

    def _maps(self, code: tuple[Instruction, ...]) -> dict[int, MapHandle]:
        """Return the maps that instructions name; their descriptors are duplicated, libbpf closes its own."""
        loads = (one for one in code if one.opcode == _LD_IMM64 and one.source in (MAP_FD, MAP_VALUE))
        return {number: self._kept(number) for number in {one.immediate for one in loads}}

    def _kept(self, number: int) -> MapHandle:
        fd = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
        return self.stack.enter_context(MapHandle(f"map {number}", fd))


def program_id(fd: int) -> int:
    """Return the kernel's number of a loaded program."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("prog_id:"))


def _library() -> ctypes.CDLL:
    """Return libbpf with the functions that only this module calls."""
    lib = library()
    lib.bpf_program__insns.restype = ctypes.c_void_p
    lib.bpf_program__insns.argtypes = [ctypes.c_void_p]
    lib.bpf_program__insn_cnt.restype = ctypes.c_size_t
    lib.bpf_program__insn_cnt.argtypes = [ctypes.c_void_p]
    lib.bpf_program__set_log_buf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_program__set_log_level.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    return lib


def _programs(handle: int) -> Iterator[int]:
    lib = library()
    program = lib.bpf_object__next_program(handle, None)
    while program:
        yield program
        program = lib.bpf_object__next_program(handle, program)


def _listen(program: int) -> ctypes.Array[ctypes.c_char]:
    """Have the verifier's words about a program written into the buffer that is returned."""
    lib, log = _library(), ctypes.create_string_buffer(_LOG_SIZE)
    checked(lib.bpf_program__set_log_buf(program, log, len(log)))
    checked(lib.bpf_program__set_log_level(program, _LOG_EVERYTHING))
    return log


def _decoded(code: bytes) -> Iterator[Instruction]:
    for opcode, registers, offset, immediate in struct.iter_unpack("=BBhi", code):
        yield Instruction(opcode, registers & 0xF, registers >> 4, offset, immediate)


def _walked(log: bytes) -> tuple[frozenset[int], dict[int, tuple[str, int]]]:
    """Return the instructions that the verifier looked at, and their places in the source."""
    place: tuple[str, int] | None = None
    kept: set[int] = set()
    places: dict[int, tuple[str, int]] = {}
    for line in log.splitlines():
        if source := _SOURCE.match(line):
            place = (os.path.basename(source[1].decode()), int(source[2]))
        elif walked := _WALKED.match(line):
            kept.add(int(walked[1]))
            if place:
                places[int(walked[1])] = place
    return frozenset(kept), places
