# SPDX-License-Identifier: Apache-2.0
"""Waiting until the BPF programs that run at this moment have ended.

A program reads a map several times, and of what is written between two of its readings it sees a part.
Programs run under the kernel's RCU read lock, and membarrier(2) returns after a grace period: whatever ran
when it was called has ended by then.  Called by: `datapath.maps`; the agent, between the parts of a change.
"""

from __future__ import annotations

import ctypes
import platform
import time

_GLOBAL = 1  # MEMBARRIER_CMD_GLOBAL
_SYSCALL_NUMBER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "s390x": 356, "ppc64le": 365}
# Where the call is not to be had (nohz_full, a strict seccomp profile): a program runs for a microsecond.
PATIENCE_S = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


def let_programs_end() -> None:
    """Return once every program that runs now, on any CPU, has ended: 5–50 ms, so call it in a thread."""
    if not grace_period():
        time.sleep(PATIENCE_S)


def grace_period() -> bool:
    """Wait for an RCU grace period; False if this kernel gives none to user space."""
    number = _SYSCALL_NUMBER.get(platform.machine())
    return number is not None and _libc.syscall(number, _GLOBAL, 0, 0) == 0
