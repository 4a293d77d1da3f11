# SPDX-License-Identifier: Apache-2.0
"""Writes to /proc/sys, which is read-only in an unprivileged container unless it is bound in.

Responsible for: not writing what is right already, and an error that says what to bind.
Called by: `datapath.devices`, and the agent at start (forwarding).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from datapath.errors import DeviceError

PROC_SYS = Path("/proc/sys")
# Where compose binds the host's /proc/sys/net writable: an engine mounts nothing inside /proc itself.
BOUND_PROC_SYS = Path("/host/proc/sys")
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class Sysctls:
    """Settings below `root`; keys are paths ("net/ipv4/ip_forward"), so that device names may hold dots.

    `root` None: what is bound into the container, else /proc/sys.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or (BOUND_PROC_SYS if BOUND_PROC_SYS.is_dir() else PROC_SYS)

    def read(self, key: str) -> str:
        """Return a setting.  Raises DeviceError when there is none."""
        try:
            return (self.root / key).read_text().strip()
        except OSError as error:
            raise DeviceError(f"sysctl {key} can not be read: {error.strerror}") from error

    def write(self, key: str, value: str) -> bool:
        """Make a setting `value`; return whether it was another.  Raises DeviceError."""
        if self.read(key) == value:
            return False
        try:
            (self.root / key).write_text(value)
        except OSError as error:
            raise DeviceError(
                f"sysctl {key} can not be set to {value}: {error.strerror}", hint=self._hint(error)
            ) from error
        return True

    def write_all(self, settings: Mapping[str, str]) -> int:
        """Write several settings; return how many were others.  Raises DeviceError at the first refusal."""
        return sum(self.write(key, value) for key, value in settings.items())

    def try_all(self, settings: Mapping[str, str]) -> list[DeviceError]:
        """Write several settings as far as that is allowed; return the refusals."""
        refused = []
        for key, value in settings.items():
            try:
                self.write(key, value)
            except DeviceError as error:
                refused.append(error)
        return refused

    def _hint(self, error: OSError) -> str:
        if error.errno not in _READ_ONLY:
            return ""
        return f"{self.root} is read-only: bind /proc/sys/net to {BOUND_PROC_SYS}/net, or set it on the host"


def host_settings(*, ipv6: bool = False) -> dict[str, str]:
    """What the host needs once: it forwards between its devices."""
    return {"net/ipv4/ip_forward": "1"} | ({"net/ipv6/conf/all/forwarding": "1"} if ipv6 else {})


def needed_by_endpoint(device: str, *, ipv6: bool = False) -> dict[str, str]:
    """Without this nothing passes the host side of a pair; a forwarding host's devices begin with it.

    In IPv6 the device has no address of its own and takes none, so that the kernel announces nothing there.
    """
    settings = {f"net/ipv4/conf/{device}/forwarding": "1"}
    if ipv6:
        base = f"net/ipv6/conf/{device}"
        settings |= {
            f"{base}/addr_gen_mode": "1",
            f"{base}/accept_ra": "0",
            f"{base}/disable_ipv6": "0",
            f"{base}/forwarding": "1",
        }
    return settings


def needed_by_tunnel(device: str) -> dict[str, str]:
    """What the device between hosts must not do: judge sources (its program does), and speak for itself."""
    return {
        f"net/ipv4/conf/{device}/rp_filter": "0",
        f"net/ipv4/conf/{device}/forwarding": "1",
        f"net/ipv6/conf/{device}/addr_gen_mode": "1",
        f"net/ipv6/conf/{device}/accept_ra": "0",
        f"net/ipv6/conf/{device}/forwarding": "1",
    }


def useful_to_endpoint(device: str) -> dict[str, str]:
    """What the host side of a pair should have; an endpoint works without, but for what is said here.

    rp_filter: the programs check sources more strictly, and policy routing on a host would make the
    kernel's check err.  route_localnet: the host's own 127.0.0.1:<published port> leaves by this device
    (the firewall keeps 127/8 out in the other direction).  Redirects: every endpoint is one hop away.
    """
    base = f"net/ipv4/conf/{device}"
    return {
        f"{base}/rp_filter": "0",
        f"{base}/route_localnet": "1",
        f"{base}/accept_redirects": "0",
        f"{base}/send_redirects": "0",
    }


def keep_router_advertisements(sysctls: Sysctls) -> list[str]:
    """Have devices go on listening to routers when the host begins to forward IPv6; return which.

    A host that forwards takes router advertisements only where accept_ra is 2: one that has its default
    route from them would lose it, and with it its network, some time after forwarding began.
    """
    changed = []
    for path in sorted((sysctls.root / "net/ipv6/conf").glob("*/accept_ra")):
        key = str(path.relative_to(sysctls.root))
        if path.parent.name not in ("all", "lo") and sysctls.read(key) == "1" and sysctls.write(key, "2"):
            changed.append(path.parent.name)
    return changed


def quiet_in_ipv6(device: str) -> dict[str, str]:
    """Keep the kernel's own IPv6 announcements off the host side of a pair.

    Where endpoints have no IPv6 addresses each announcement would count as a dropped packet.  A host without
    IPv6 has no such setting, and needs none.
    """
    return {f"net/ipv6/conf/{device}/disable_ipv6": "1"}
