# SPDX-License-Identifier: Apache-2.0
"""Loads programs: an object compiled once, opened from memory for each endpoint with its constants.

    Template(elf)                     read and checked once: constants and maps are what this version knows
      .load(constants, maps)          4–6 ms: open, write constants, give maps, verify, translate
        → Programs                    descriptors by program name; attach them, then close

Responsible for: that every map of an object is one the caller gave (none is made here) with the sizes
that the object was compiled for, and that nothing stays open when a load fails.  Blocking: call it in a
thread.  Called by: the agent.  What a program is attached to is the business of `datapath.attach`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from datapath import syscall
from datapath.constants import CONFIG, EndpointConstants
from datapath.errors import LoadError
from datapath.layouts import Layout
from datapath.libbpf import checked, explain, library, opened

# By address family: one object each for endpoints, the host's devices, and the device between hosts.
ENDPOINT_OBJECTS = {4: "endpoint.o", 6: "endpoint6.o"}
NETDEV_OBJECTS = {4: "netdev.o", 6: "netdev6.o"}
OVERLAY_OBJECTS = {4: "overlay.o", 6: "overlay6.o"}
POLICY_MAP = "cilium_policy"  # in objects; user space gives the endpoint's own cilium_policy_<id>
_CONFIG_SECTION = ".rodata.config"
_IDENTITY_SECTION = ".data.identity"
_BTF_KIND_STRUCT = 4


class _OpenOptions(ctypes.Structure):
    """The head of struct bpf_object_open_opts."""

    _fields_ = (("sz", ctypes.c_size_t), ("object_name", ctypes.c_char_p))


class _BtfType(ctypes.Structure):
    """struct btf_type; a struct's members follow it."""

    _fields_ = (("name_off", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32))


class _BtfMember(ctypes.Structure):
    """struct btf_member; `offset` in bits."""

    _fields_ = (("name_off", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32))


class IdentityCell:
    """The word that running programs read their endpoint's identity from; owns its descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def set(self, identity: int) -> None:
        """Give the endpoint another identity, from the next packet on.  Raises MapError."""
        syscall.map_update(self._fd, bytes(4), _word(identity), _IDENTITY_SECTION)

    def close(self) -> None:
        """Close the descriptor; the programs keep the word.  Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Programs:
    """Loaded programs by name; this owns the descriptors, and what they are attached to keeps them alive.

    An endpoint's programs have an identity cell, which `take_identity` hands over to the caller.
    """

    def __init__(self, fds: dict[str, int]) -> None:
        self._fds = fds
        self._identity: IdentityCell | None = None

    def take_identity(self) -> IdentityCell:
        """Return the cell, the caller's from now on.  Raises LoadError for programs without one."""
        if self._identity is None:
            raise LoadError("these programs are of no endpoint: they have no identity")
        cell, self._identity = self._identity, None
        return cell

    def __getitem__(self, name: str) -> int:
        return self._fds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor; closing twice is harmless."""
        while self._fds:
            os.close(self._fds.popitem()[1])
        if self._identity is not None:
            self.take_identity().close()


@dataclass(frozen=True)
class Template:
    """One compiled object in memory."""

    elf: bytes
    name: str

    @classmethod
    def read(cls, path: Path) -> Template:
        """Read and check an object.  Raises LoadError: absent, no object, or of another version."""
        try:
            template = cls(path.read_bytes(), path.stem)
        except OSError as error:
            raise LoadError(
                f"BPF object {path}: {error.strerror}", hint="`make -C bpf` compiles it"
            ) from error
        template.check()
        return template

    def check(self) -> None:
        """Compare the object's constants with the table.  Raises LoadError naming what differs."""
        with self._open() as handle:
            differences = [
                f"{name} is at {have}, expected {want}"
                for name, have, want in _differing(_config_offsets(handle), CONFIG)
            ]
        if differences:
            raise LoadError(
                f"BPF object {self.name}: constants differ: {'; '.join(differences)}",
                hint="object and agent are of different versions; compile the object anew",
            )

    def load(self, constants: EndpointConstants, maps: Mapping[str, int]) -> Programs:
        """Load all programs with `constants`, on `maps` (descriptors by the names the object uses).

        Raises LoadError, with the end of the verifier's log when it refused.
        """
        values = constants.pack()
        try:
            return self._load(values, constants.identity, maps)
        except OSError as error:
            owner = f" for endpoint {constants.endpoint_id}" if constants.endpoint_id else ""
            what = f"load {self.name}.o{owner}"
            raise explain(
                what, lambda: self._load(values, constants.identity, maps).close(), error
            ) from error

    def _load(self, values: bytes, identity: int, maps: Mapping[str, int]) -> Programs:
        with self._open() as handle:
            for pointer, name in _maps(handle):
                _give_map(pointer, name, maps)
            _write_section(handle, _CONFIG_SECTION, values)
            cell = _write_identity(handle, identity)
            checked(library().bpf_object__load(handle))
            return _take_programs(handle, cell)

    @contextmanager
    def _open(self) -> Iterator[int]:
        options = _OpenOptions(ctypes.sizeof(_OpenOptions), self.name.encode())
        lib = library()
        try:
            handle = opened(lib.bpf_object__open_mem(self.elf, len(self.elf), ctypes.byref(options)))
        except OSError as error:
            raise LoadError(f"BPF object {self.name}: {error.strerror}") from error
        try:
            yield handle
        finally:
            lib.bpf_object__close(handle)


def _maps(handle: int) -> Iterator[tuple[int, str]]:
    """Yield the object's own maps; constants are maps too, but libbpf's business."""
    lib = library()
    pointer = lib.bpf_object__next_map(handle, None)
    while pointer:
        if not lib.bpf_map__is_internal(pointer):
            yield pointer, lib.bpf_map__name(pointer).decode()
        pointer = lib.bpf_object__next_map(handle, pointer)


def _give_map(pointer: int, name: str, maps: Mapping[str, int]) -> None:
    lib = library()
    if name not in maps:
        raise LoadError(f"no map {name} was given to the loader")
    wanted = (lib.bpf_map__type(pointer), lib.bpf_map__key_size(pointer), lib.bpf_map__value_size(pointer))
    info = syscall.map_info(maps[name])
    found = (info.type, info.key_size, info.value_size)
    if found != wanted:
        raise LoadError(f"map {name}: type, key size, value size are {found}, the programs want {wanted}")
    checked(lib.bpf_map__reuse_fd(pointer, maps[name]))


def _write_section(handle: int, section: str, values: bytes) -> int:
    lib = library()
    pointer = opened(lib.bpf_object__find_map_by_name(handle, section.encode()))
    checked(lib.bpf_map__set_initial_value(pointer, values, len(values)))
    return int(pointer)


def _write_identity(handle: int, identity: int) -> int:
    """Write where an endpoint's programs begin; return the map, 0 for an object that has none."""
    if not library().bpf_object__find_map_by_name(handle, _IDENTITY_SECTION.encode()):
        return 0
    return _write_section(handle, _IDENTITY_SECTION, _word(identity))


def _word(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _take_programs(handle: int, cell: int) -> Programs:
    """Duplicate the descriptors: the object's own close with it."""
    lib, fds = library(), Programs({})
    if cell:
        fds._identity = IdentityCell(_duplicate(lib.bpf_map__fd(cell)))
    pointer = lib.bpf_object__next_program(handle, None)
    while pointer:
        name = lib.bpf_program__name(pointer).decode()
        fds._fds[name] = _duplicate(lib.bpf_program__fd(pointer))
        pointer = lib.bpf_object__next_program(handle, pointer)
    return fds


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def _config_offsets(handle: int) -> dict[str, int]:
    """Return name → offset of the members of `struct config`, and "" → its size, from the object's BTF."""
    lib = library()
    btf = lib.bpf_object__btf(handle)
    number = lib.btf__find_by_name_kind(btf, CONFIG.name.encode(), _BTF_KIND_STRUCT) if btf else -1
    if number < 0:
        raise LoadError("BPF object has no struct config in its BTF", hint="compile it with -g")
    address = lib.btf__type_by_id(btf, number)
    head = _BtfType.from_address(address)
    members = (_BtfMember * (head.info & 0xFFFF)).from_address(address + ctypes.sizeof(_BtfType))
    found = {lib.btf__name_by_offset(btf, member.name_off).decode(): member.offset // 8 for member in members}
    return {**found, "": head.size}


def _differing(found: dict[str, int], layout: Layout) -> Iterator[tuple[str, int | None, int | None]]:
    wanted = {**layout.offsets, "": layout.size}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            yield name or "the end", found.get(name), wanted.get(name)
