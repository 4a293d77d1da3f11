# SPDX-License-Identifier: Apache-2.0
"""The VXLAN device between hosts: one for all of them, where each packet says which host it is for.

Packets from endpoints get that from their programs, the host's own from the routes of
`datapath.noderoutes`.  The device is ours when its alias says so.  Its index stands in endpoints' programs
as a constant: a device that somebody removed is made again under the same index.

Called by: the agent.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from datapath.devices import Device, Devices
from datapath.errors import DeviceError
from datapath.netlink import Message, Netlink, errno_of
from datapath.sysctl import Sysctls, needed_by_tunnel

DEVICE = "cilium_vxlan"
PORT = 8472  # Cilium's, and Linux's own before IANA's 4789
# What a packet grows by: outer IPv4 header 20, UDP 8, VXLAN 8, inner Ethernet 14.
OVERHEAD = 50
_ALIAS = "holdfast tunnel"


@dataclass(frozen=True)
class Shape:
    """What the device must be like."""

    port: int = PORT
    mtu: int = 1500 - OVERHEAD


class Tunnel:
    """The device, in the namespace that `netlink` was opened in."""

    def __init__(self, netlink: Netlink, shape: Shape, sysctls: Sysctls | None = None) -> None:
        self.shape = shape
        self.index = 0  # 0 until the first `ensure`
        self._netlink = netlink
        self._devices = Devices(netlink)
        self._sysctls = sysctls or Sysctls()

    async def ensure(self) -> bool:
        """Make or mend the device; return whether anything was done.  Raises DeviceError."""
        found = await self._devices.find(DEVICE)
        if found is not None and not await self._is_right(found):
            await self._remove(found)
            found = None
        made = found is None
        if made:
            await self._create()
        device = await self._devices.get(DEVICE)
        self.index = device.index
        self._sysctls.try_all(needed_by_tunnel(DEVICE))
        if device.mtu != self.shape.mtu:
            await self._devices.set_mtu(DEVICE, self.shape.mtu)
        if not device.up or device.alias != _ALIAS:
            # Without ARP: the frames inside have no addresses that anybody looks at.
            what = f"set {DEVICE} up"
            await self._link(what, "set", index=device.index, state="up", arp=False, ifalias=_ALIAS)
        return made or not device.up

    async def is_ours(self) -> bool:
        """True when the device is there and Holdfast made it."""
        found = await self._devices.find(DEVICE)
        return found is not None and found.alias == _ALIAS

    async def remove(self) -> bool:
        """Remove the device if it is ours; return whether it was there."""
        return await self.is_ours() and await self._devices.delete(DEVICE)

    async def _create(self) -> None:
        request = {
            "ifname": DEVICE,
            "kind": "vxlan",
            "vxlan_collect_metadata": 1,
            "vxlan_port": self.shape.port,
            "mtu": self.shape.mtu,
        }
        what = f"create VXLAN device {DEVICE} on UDP port {self.shape.port}"
        try:
            await self._link(what, "add", **request, **({"index": self.index} if self.index else {}))
        except DeviceError as error:
            raise _explained(error) from error

    async def _is_right(self, found: Device) -> bool:
        """Whether a device can stay; one that an agent died over has no alias yet, and is as right."""
        (message,) = await self._link(f"find device {DEVICE}", "get", ifname=DEVICE)
        port, shared = _detail(message, "vxlan_port"), _detail(message, "vxlan_collect_metadata")
        same_index = self.index in (0, found.index)
        return found.kind == "vxlan" and port == self.shape.port and bool(shared) and same_index

    async def _remove(self, found: Device) -> None:
        if found.kind != "vxlan":
            raise DeviceError(
                f"device {DEVICE} is a {found.kind or 'device'} of somebody else", hint="rename or remove it"
            )
        await self._devices.delete(DEVICE)

    async def _link(self, what: str, command: str, **arguments: object) -> list[Message]:
        return await self._netlink.request(what, DeviceError, "link", command, **arguments)


def _detail(message: Message, name: str) -> int:
    return int(message.get(("linkinfo", "data", name)) or 0)


def _explained(error: DeviceError) -> DeviceError:
    """Say what the two usual refusals mean."""
    hints = {
        errno.EOPNOTSUPP: "the kernel has no VXLAN (module vxlan): load it, or set tunnel to disabled",
        errno.EEXIST: "another VXLAN device of this host has the port: remove it or set tunnel-port",
    }
    hint = hints.get(errno_of(error), "")
    return DeviceError(error.message, hint=hint) if hint else error
