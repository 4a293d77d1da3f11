# SPDX-License-Identifier: Apache-2.0
"""BPF_PROG_TEST_RUN: hands one packet to a loaded program without any device.

Responsible for: the packet and its context (mark, control block) going in and coming out, and the time a
run takes.  Maps change as they would for a real packet; redirects are decided but not carried out.
Called by: tests, benches and `bugtool`'s self-test.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from datapath.errors import LoadError
from datapath.libbpf import checked, library

ACT_OK, ACT_SHOT, ACT_REDIRECT = 0, 2, 7  # include/uapi/linux/pkt_cls.h
_ROOM = 256  # bytes a program may add to a packet
_CONTEXT_SIZE = 192  # struct __sk_buff; the kernel takes a shorter or longer one if the rest is zero
_MARK, _INGRESS_IFINDEX, _CB = 8, 36, 48  # offsets in it
CB_WORDS = 5
_SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS
_RETURN_ZERO = bytes.fromhex("b7000000000000009500000000000000")  # r0 = 0; exit


class _Options(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_char_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_char_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Outcome:
    """What a program did: its return value, the packet and context afterwards, nanoseconds a run."""

    verdict: int
    packet: bytes
    mark: int
    cb: tuple[int, ...]
    nanoseconds: int


def run(
    program: int,
    packet: bytes,
    *,
    repeat: int = 1,
    mark: int = 0,
    cb: tuple[int, ...] = (0,) * CB_WORDS,
    ifindex: int = 0,
) -> Outcome:
    """Run `program` (a descriptor) on an Ethernet frame `repeat` times; time is the mean of the runs.

    The frame is the same at every run, changed by the ones before.  It is at least 14 bytes.  A device
    number counts as the frame's ingress.  Raises LoadError when the kernel refuses the frame.
    """
    packet_out = ctypes.create_string_buffer(len(packet) + _ROOM)
    context_out = ctypes.create_string_buffer(_CONTEXT_SIZE)
    context = _context(mark, cb, ifindex)
    options = _Options(
        sz=ctypes.sizeof(_Options),
        data_in=packet,
        data_out=ctypes.addressof(packet_out),
        data_size_in=len(packet),
        data_size_out=len(packet_out),
        ctx_in=context,
        ctx_out=ctypes.addressof(context_out),
        ctx_size_in=len(context),
        ctx_size_out=len(context_out),
        repeat=repeat,
    )
    try:
        checked(library().bpf_prog_test_run_opts(program, ctypes.byref(options)))
    except OSError as error:
        raise LoadError(f"test run on a frame of {len(packet)} bytes: {error.strerror}") from error
    after = context_out.raw
    return Outcome(
        verdict=int(options.retval),
        packet=packet_out.raw[: options.data_size_out],
        mark=struct.unpack_from("=I", after, _MARK)[0],
        cb=struct.unpack_from(f"={CB_WORDS}I", after, _CB),
        nanoseconds=int(options.duration),
    )


def empty_program() -> int:
    """Load a program that does nothing but return TC_ACT_OK: what a run costs by itself.

    Returns a descriptor that the caller closes.
    """
    return checked(
        library().bpf_prog_load(_SCHED_CLS, b"empty", b"GPL", _RETURN_ZERO, len(_RETURN_ZERO) // 8, None)
    )


def _context(mark: int, cb: tuple[int, ...], ifindex: int) -> bytes:
    context = bytearray(_CONTEXT_SIZE)
    struct.pack_into("=I", context, _MARK, mark)
    struct.pack_into("=I", context, _INGRESS_IFINDEX, ifindex)
    struct.pack_into(f"={CB_WORDS}I", context, _CB, *cb)
    return bytes(context)
