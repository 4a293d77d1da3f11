# SPDX-License-Identifier: Apache-2.0
"""Every error of the data path.

DatapathError
├── SyscallError          bpf(2) said no; carries `errno`
│   └── MapError          … about one map, named in `map_name`
│       ├── KeyAbsent     the map has no such key
│       ├── KeyExists     a create-only write met an existing key
│       └── MapFull       no room for another entry
├── BpffsError            no BPF file system where pins belong, and none could be mounted
├── LayoutMismatch        a pinned map is not what this version expects; lists the differences
├── DeviceError           a network device, address or sysctl could not be made as wanted
├── RouteError            a route or neighbour could not be made as wanted
├── FirewallError         nft or iptables refused; carries their words
├── LoadError             libbpf or the verifier refused an object; carries their words
├── AttachError           a program could not be attached to a device
└── EventError            bytes from the event ring that are no event
"""

from __future__ import annotations

import errno as errno_module
import os
from collections.abc import Sequence

from core.errors import HoldfastError


class DatapathError(HoldfastError):
    """Raised for anything between this process and the kernel; the root of this package's tree."""


class SyscallError(DatapathError):
    """Raised when bpf(2) fails: `what` names the command and its object, `errno` says why."""

    def __init__(self, what: str, errno: int, *, hint: str = "") -> None:
        super().__init__(f"{what}: {os.strerror(errno)}", hint=hint or _HINTS.get(errno, ""))
        self.errno = errno


class MapError(SyscallError):
    """Raised when an operation on one map fails; `done` entries came through."""

    def __init__(self, map_name: str, operation: str, errno: int, *, done: int = 0) -> None:
        super().__init__(f"map {map_name}: {operation}", errno)
        self.map_name = map_name
        self.operation = operation
        self.done = done


class KeyAbsent(MapError):
    """Raised when a lookup or a deletion meets no entry."""


class KeyExists(MapError):
    """Raised when a create-only write meets an entry."""


class MapFull(MapError):
    """Raised when a map has no room; nothing of the entry was written."""


class BpffsError(DatapathError):
    """Raised when a directory for pins is not on a BPF file system."""


class LayoutMismatch(DatapathError):
    """Raised when a pinned map differs from its specification; `differences` lists each as one sentence."""

    def __init__(self, path: str, differences: Sequence[str]) -> None:
        super().__init__(
            f"pinned map {path} has another layout: {'; '.join(differences)}",
            hint="another version or program made it; `holdfast cleanup --bpf` removes it, enforcement "
            "pauses until the agent has made it anew",
        )
        self.path = path
        self.differences = tuple(differences)


class DeviceError(DatapathError):
    """Raised when a device, an address or a sysctl can not be made as wanted."""


class RouteError(DatapathError):
    """Raised when a route or a neighbour entry can not be made as wanted."""


class FirewallError(DatapathError):
    """Raised when nft or iptables refuses a rule; the message holds the rule and their words."""


class LoadError(DatapathError):
    """Raised when an object can not be opened or loaded; the message holds the verifier's last lines."""


class AttachError(DatapathError):
    """Raised when a program can not be attached to, or detached from, a device."""


class EventError(DatapathError):
    """Raised when bytes from the event ring are not an event of a known version."""


_MAP_ERRORS: dict[int, type[MapError]] = {
    errno_module.ENOENT: KeyAbsent,
    errno_module.EEXIST: KeyExists,
    errno_module.E2BIG: MapFull,
    errno_module.ENOSPC: MapFull,
}

_HINTS = {
    errno_module.EPERM: "the agent needs CAP_BPF or CAP_SYS_ADMIN, and CAP_NET_ADMIN",
    errno_module.ENOMEM: "the host or its cgroup has no memory left for BPF maps",
    errno_module.ENOSYS: "this kernel has no bpf(2)",
}


def map_error(map_name: str, operation: str, errno: int, *, done: int = 0) -> MapError:
    """Return the typed error for `errno` of an operation on a map."""
    return _MAP_ERRORS.get(errno, MapError)(map_name, operation, errno, done=done)
