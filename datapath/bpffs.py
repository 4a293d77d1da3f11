# SPDX-License-Identifier: Apache-2.0
"""What bpf(2) needs around it: a mounted BPF file system, and no limit on locked memory.

Called by: the agent at start, tests, and whoever pins.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from datapath.errors import BpffsError

DEFAULT_BPFFS = Path("/sys/fs/bpf")
_BPFFS_MAGIC = 0xCAFE4A11

_libc = ctypes.CDLL(None, use_errno=True)


def raise_memlock() -> bool:
    """Lift the limit of locked memory; return False where that is not allowed, which is normal.

    Since Linux 5.11 map memory is charged to the cgroup and the limit has no effect.
    """
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        return False
    return True


def is_bpffs(path: Path) -> bool:
    """Return whether `path` exists and lies on a BPF file system."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return (ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF) == _BPFFS_MAGIC


def ensure_bpffs(path: Path = DEFAULT_BPFFS) -> bool:
    """Mount a BPF file system on `path` if none is there; return whether it was mounted now.

    Raises BpffsError with what failed.
    """
    if is_bpffs(path):
        return False
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BpffsError(f"{path} can not be made: {error.strerror}") from error
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        reason = os.strerror(ctypes.get_errno())
        raise BpffsError(
            f"no BPF file system on {path}, and it can not be mounted: {reason}",
            hint=f"mount it on the host: mount -t bpf bpf {path}",
        )
    return True
