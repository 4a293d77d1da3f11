# SPDX-License-Identifier: Apache-2.0
"""bpf(2) by ctypes: the commands on maps, pins and object information, one function each.

Responsible for: argument blocks, and errno turned into typed errors that name the map, once, here.
Keys and values are bytes; what is in them is the business of `datapath.layouts`.  Every call releases
the interpreter's lock.  Called by: `datapath.handle` and the loader.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from datapath.errors import SyscallError, map_error
from datapath.uapi import (
    NAME_LENGTH,
    BatchBlock,
    BtfLoadBlock,
    Command,
    CreateBlock,
    ElementBlock,
    InfoBlock,
    MapInfoBlock,
    PathBlock,
    Update,
)

NO_BATCHES = errno.EOPNOTSUPP
_UNKNOWN_COMMAND = frozenset({errno.EINVAL, errno.EOPNOTSUPP, 524})  # 524: the kernel's internal ENOTSUPP
_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}


@dataclass(frozen=True)
class MapInfo:
    """What the kernel says of one map; sizes in bytes, `name` cut to 15 characters by the kernel."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str
    btf_id: int


_libc = ctypes.CDLL(None, use_errno=True)


def _call(command: Command, block: ctypes.Structure) -> int:
    """Run one command; return what it returned, or the negative errno."""
    number = _SYSCALL_NUMBER.get(platform.machine())
    if number is None:
        raise SyscallError(f"bpf({command.name}) on {platform.machine()}", errno.ENOSYS)
    result = int(_libc.syscall(number, int(command), ctypes.byref(block), ctypes.sizeof(block)))
    return result if result >= 0 else -ctypes.get_errno()


# --- maps


def map_create(
    name: str,
    type: int,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: int = 0,
    *,
    btf: tuple[int, int, int] = (0, 0, 0),
) -> int:
    """Create a map and return its descriptor; `btf` is descriptor, key type and value type of its BTF.

    Raises MapError.  The kernel keeps only the first 15 characters of `name`.
    """
    block = CreateBlock(
        map_type=type,
        key_size=key_size,
        value_size=value_size,
        max_entries=max_entries,
        map_flags=flags,
        map_name=name.encode()[:NAME_LENGTH],
        btf_fd=btf[0],
        btf_key_type_id=btf[1],
        btf_value_type_id=btf[2],
    )
    fd = _call(Command.MAP_CREATE, block)
    if fd < 0:
        raise map_error(name, "create", -fd)
    return fd


def map_lookup(fd: int, key: bytes, size: int, name: str) -> bytes:
    """Return the value of `key`: `size` bytes (for a per-CPU map: of all CPUs).  Raises KeyAbsent."""
    value = ctypes.create_string_buffer(size)
    block = ElementBlock(map_fd=fd, key=_address(key), value=ctypes.addressof(value))
    result = _call(Command.MAP_LOOKUP, block)
    if result < 0:
        raise map_error(name, "lookup", -result)
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, name: str, how: Update = Update.ANY) -> None:
    """Write one entry.  Raises KeyExists, KeyAbsent, MapFull or MapError."""
    block = ElementBlock(map_fd=fd, key=_address(key), value=_address(value), flags=int(how))
    result = _call(Command.MAP_UPDATE, block)
    if result < 0:
        raise map_error(name, "update", -result)


def map_delete(fd: int, key: bytes, name: str) -> None:
    """Delete one entry.  Raises KeyAbsent or MapError."""
    result = _call(Command.MAP_DELETE, ElementBlock(map_fd=fd, key=_address(key)))
    if result < 0:
        raise map_error(name, "delete", -result)


def map_next_key(fd: int, key: bytes | None, key_size: int, name: str) -> bytes | None:
    """Return the key after `key` (None: the first), or None after the last."""
    following = ctypes.create_string_buffer(key_size)
    block = ElementBlock(map_fd=fd, key=_address(key), value=ctypes.addressof(following))
    result = _call(Command.MAP_GET_NEXT_KEY, block)
    if result == -errno.ENOENT:
        return None
    if result < 0:
        raise map_error(name, "next key", -result)
    return following.raw


# --- batches: the count that came through and errno (0: all), because what a partial batch means is the
# caller's to say


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> tuple[int, int]:
    """Write `count` entries from packed `keys` and `values`; return (entries written, errno)."""
    block = BatchBlock(keys=_address(keys), values=_address(values), count=count, map_fd=fd)
    return _batch_outcome(Command.MAP_UPDATE_BATCH, block, count)


def map_delete_batch(fd: int, keys: bytes, count: int) -> tuple[int, int]:
    """Delete `count` packed keys; return (entries deleted, errno); ENOENT stops at the absent key."""
    block = BatchBlock(keys=_address(keys), count=count, map_fd=fd)
    return _batch_outcome(Command.MAP_DELETE_BATCH, block, count)


def _batch_outcome(command: Command, block: BatchBlock, count: int) -> tuple[int, int]:
    error = _run_batch(command, block)
    if not error:
        return count, 0
    return (0 if block.count == count else int(block.count)), error


def _run_batch(command: Command, block: BatchBlock) -> int:
    """Return errno; NO_BATCHES where the kernel, or this type of map, has no such command.

    A kernel that begins a batch sets the count anew: one left as it was says that nothing was begun.
    """
    asked = block.count
    result = _call(command, block)
    error = -result if result < 0 else 0
    return NO_BATCHES if error in _UNKNOWN_COMMAND and block.count == asked else error


def map_lookup_batch(
    fd: int, position: bytes | None, key_size: int, value_size: int, count: int
) -> tuple[bytes, bytes, bytes, int, int]:
    """Read up to `count` entries from `position` (None: the start).

    Returns (next position, packed keys, packed values, entries, errno); ENOENT says that these were the
    last, ENOSPC that one bucket holds more than `count`.  A position is as long as a key for a trie and
    four bytes for a hash: the kernel gets room for either.
    """
    room = max(key_size, 8)
    following = ctypes.create_string_buffer(room)
    keys = ctypes.create_string_buffer(count * key_size)
    values = ctypes.create_string_buffer(count * value_size)
    block = BatchBlock(
        in_batch=_address(position),
        out_batch=ctypes.addressof(following),
        keys=ctypes.addressof(keys),
        values=ctypes.addressof(values),
        count=count,
        map_fd=fd,
    )
    error = _run_batch(Command.MAP_LOOKUP_BATCH, block)
    found = int(block.count) if error in (0, errno.ENOENT) else 0
    return following.raw, keys.raw[: found * key_size], values.raw[: found * value_size], found, error


def _address(data: bytes | None) -> int | None:
    """Return the address of `data`'s bytes; the caller keeps `data` alive over the call."""
    return None if data is None else ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value


# --- pins, information, BTF


def obj_pin(fd: int, path: Path) -> None:
    """Pin a map or program.  Raises SyscallError: EEXIST when the name is taken, EPERM off bpffs."""
    result = _call(Command.OBJ_PIN, PathBlock(pathname=os.fsencode(path), bpf_fd=fd))
    if result < 0:
        raise SyscallError(f"pin {path}", -result)


def obj_get(path: Path) -> int:
    """Open a pinned object and return its descriptor.  Raises SyscallError (ENOENT: no such pin)."""
    fd = _call(Command.OBJ_GET, PathBlock(pathname=os.fsencode(path)))
    if fd < 0:
        raise SyscallError(f"open pin {path}", -fd)
    return fd


def map_info(fd: int) -> MapInfo:
    """Return what the kernel says of a map."""
    info = MapInfoBlock()
    block = InfoBlock(bpf_fd=fd, info_len=ctypes.sizeof(info), info=ctypes.addressof(info))
    result = _call(Command.OBJ_GET_INFO_BY_FD, block)
    if result < 0:
        raise SyscallError("map information", -result)
    return MapInfo(
        type=info.type,
        id=info.id,
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
        name=info.name.decode(errors="replace"),
        btf_id=info.btf_id,
    )


def btf_load(blob: bytes) -> int:
    """Load a BTF blob and return its descriptor.  Raises SyscallError when the kernel refuses it."""
    fd = _call(Command.BTF_LOAD, BtfLoadBlock(btf=blob, btf_size=len(blob)))
    if fd < 0:
        raise SyscallError("load BTF", -fd)
    return fd
