# SPDX-License-Identifier: Apache-2.0
"""Network devices of endpoints: veth pairs, their addresses and settings, and the host's router address.

Responsible for: names, creation in the order that leaves nothing half-made, moving a device into a
container's namespace and setting it up there, and finding devices that no endpoint owns any more.
A device is ours when its name and its alias say so: real Cilium and LXC name theirs alike.
Called by: the agent's endpoint manager.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from loguru import logger

from datapath.addresses import host_prefix
from datapath.errors import DeviceError
from datapath.namespace import inside, open_namespace
from datapath.netlink import Message, Netlink, errno_of
from datapath.routes import PROTOCOL
from datapath.sysctl import Sysctls, needed_by_endpoint, quiet_in_ipv6, useful_to_endpoint

HOST_PREFIX = "lxc0"  # every name below starts so: ids are 16 bits in five hex digits
DEVICE_PATTERN = f"{HOST_PREFIX}*"  # for nft; iptables says "lxc0+"
_OURS = re.compile(r"lxc0[0-9a-f]{4}")
_ALIAS = "holdfast endpoint "
_FLAG_UP = 1
GATEWAY = "169.254.1.1"  # what every container's default route names; answered in BPF
GATEWAY6 = "fe80::1"  # the same in IPv6
_SCOPE_LINK = 253
_NO_DUPLICATE_DETECTION = 0x02  # IFA_F_NODAD: addresses are ours to give, and in use at once
# The mark of the router's address: what somebody else set on lo bears another label.  IPv6 has no labels, but
# says since Linux 5.18 who set an address (routes.PROTOCOL); older kernels forget it.
_ROUTER_LABEL = "lo:holdfast"


@dataclass(frozen=True)
class Device:
    """One network device; `peer` is the other side's index (in whichever namespace), 0 without one."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    up: bool
    peer: int
    alias: str

    @property
    def is_ours(self) -> bool:
        """Whether this is the host side of an endpoint's pair; the other side goes with it."""
        return self.kind == "veth" and bool(_OURS.fullmatch(self.name)) and self.alias.startswith(_ALIAS)

    @property
    def endpoint_id(self) -> int | None:
        """The endpoint this device was made for, or None when it is not ours."""
        number = self.alias.removeprefix(_ALIAS)
        return int(number) if self.is_ours and number.isdigit() else None

    def is_made_for(self, endpoint_id: int, host_mac: str) -> bool:
        """Whether this is the host side of exactly this endpoint's pair, and completely set up.

        The alias is the last thing that `Devices.create_veth` sets.
        """
        return self.endpoint_id == endpoint_id and self.mac == host_mac


@dataclass(frozen=True)
class VethPair:
    """A new pair: the host's side, and the other side still beside it under a temporary name."""

    host: Device
    container: Device


def host_name(endpoint_id: int) -> str:
    """Name of the host side, as "lxc000b7"."""
    return f"lxc{endpoint_id:05x}"


def temporary_name(endpoint_id: int) -> str:
    """Name of the container's side until the engine or `move_inside` renames it."""
    return f"hf{endpoint_id:05x}"


def is_present(name: str) -> bool:
    """True when this network namespace has a device of that name."""
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def random_mac() -> str:
    """Return a locally administered unicast address."""
    data = bytearray(secrets.token_bytes(6))
    data[0] = data[0] & 0xFE | 0x02
    return data.hex(":")


class Devices:
    """Devices of the namespace that `netlink` was opened in."""

    def __init__(self, netlink: Netlink, sysctls: Sysctls | None = None, *, ipv6: bool = False) -> None:
        self._netlink = netlink
        self._sysctls = sysctls or Sysctls()
        self._ipv6 = ipv6
        self._warned = False

    async def create_veth(self, endpoint_id: int, *, mtu: int, mac: str, host_mac: str = "") -> VethPair:
        """Make an endpoint's pair, set up and up on the host's side.

        A pair left over under the same name is replaced.  Raises DeviceError; nothing stays behind then.
        """
        name, other = host_name(endpoint_id), temporary_name(endpoint_id)
        request = {
            "ifname": name,
            "kind": "veth",
            "mtu": mtu,
            "address": host_mac or random_mac(),
            "peer": {"ifname": other, "address": mac, "mtu": mtu},
        }
        try:
            await self._link(f"create veth pair {name}", "add", **request)
        except DeviceError as error:
            if errno_of(error) != errno.EEXIST:
                raise
            await self._remove_leftover(endpoint_id)
            await self._link(f"create veth pair {name}", "add", **request)
        try:
            return await self._prepare(endpoint_id, name, other, mac)
        except BaseException:
            await self.delete(name)
            raise

    async def _prepare(self, endpoint_id: int, name: str, other: str, mac: str) -> VethPair:
        self._sysctls.write_all(needed_by_endpoint(name, ipv6=self._ipv6))
        self._set_useful(name)
        host = await self.get(name)
        alias = f"{_ALIAS}{endpoint_id}"
        await self._link(f"set {name} up", "set", index=host.index, state="up", ifalias=alias)
        container = Device(host.peer, other, "veth", mac, host.mtu, up=False, peer=host.index, alias="")
        return VethPair(replace(host, up=True, alias=alias), container)

    def _set_useful(self, name: str) -> None:
        """Write settings that an endpoint can do without; where /proc/sys is read-only, say so once."""
        if not self._ipv6:
            self._sysctls.try_all(quiet_in_ipv6(name))
        refused = self._sysctls.try_all(useful_to_endpoint(name))
        if refused and not self._warned:
            self._warned = True
            logger.warning("{}: endpoints work, 127.0.0.1:<published port> may not", refused[0])

    async def _remove_leftover(self, endpoint_id: int) -> None:
        """Delete the pair that holds our name.  Raises DeviceError when it is somebody else's."""
        name = host_name(endpoint_id)
        old = await self.find(name)
        if old is None or not (old.is_ours or await self._is_half_made(old, endpoint_id)):
            raise DeviceError(f"device {name} exists and is not Holdfast's", hint="rename or remove it")
        await self.delete(name)

    async def _is_half_made(self, device: Device, endpoint_id: int) -> bool:
        """Whether an agent died while it made this pair: no alias yet, but the other side has our name."""
        other = await self.find(temporary_name(endpoint_id))
        return other is not None and (other.index, other.peer) == (device.peer, device.index)

    async def get(self, name: str) -> Device:
        """Return a device by name.  Raises DeviceError when there is none."""
        return _device((await self._link(f"find device {name}", "get", ifname=name))[0])

    async def find(self, name: str) -> Device | None:
        """Return a device by name, or None."""
        try:
            return await self.get(name)
        except DeviceError as error:
            if errno_of(error) == errno.ENODEV:
                return None
            raise

    async def find_index(self, index: int) -> Device | None:
        """Return a device by its index, or None."""
        try:
            return _device((await self._link(f"find device {index}", "get", index=index))[0])
        except DeviceError as error:
            if errno_of(error) == errno.ENODEV:
                return None
            raise

    async def all(self) -> list[Device]:
        """Return every device of the namespace."""
        return [_device(message) for message in await self._link("list devices", "dump")]

    async def ours(self) -> dict[str, Device]:
        """Return the devices that Holdfast made, by name."""
        return {device.name: device for device in await self.all() if device.is_ours}

    async def collect_leaks(self, keep: Iterable[int]) -> list[str]:
        """Delete our devices of endpoints not in `keep` (ids); return the names that were deleted."""
        wanted = set(keep)
        leaked = [device for device in (await self.ours()).values() if device.endpoint_id not in wanted]
        return [device.name for device in leaked if await self.delete(device.name)]

    async def delete(self, name: str) -> bool:
        """Delete a device (of a pair: both); return whether it was there.

        Takes 10–20 ms: the kernel waits for readers of the device.
        """
        device = await self.find(name)
        if device is None:
            return False
        try:
            await self._link(f"delete {name}", "del", index=device.index)
        except DeviceError as error:
            if errno_of(error) == errno.ENODEV:
                return False
            raise
        return True

    async def set_mtu(self, name: str, mtu: int) -> None:
        """Change a device's MTU.  Raises DeviceError."""
        device = await self.get(name)
        await self._link(f"set MTU of {name} to {mtu}", "set", index=device.index, mtu=mtu)

    async def add_router(self, address: str) -> None:
        """Give lo the host's own address among its endpoints ("10.0.0.1"); having it already is fine.

        It bears our mark, unless somebody else had set it before.
        """
        mark: dict[str, object] = {"proto": PROTOCOL} if ":" in address else {"label": _ROUTER_LABEL}
        await self._address("replace", address, "lo", **mark)

    async def routers(self) -> set[str]:
        """Return the addresses that `add_router` has put on lo, in this life or a former one."""
        found: set[str] = set()
        for family, mark, value in (
            (socket.AF_INET, "label", _ROUTER_LABEL),
            (socket.AF_INET6, "proto", PROTOCOL),
        ):
            messages = await self._netlink.request(
                "list addresses of lo", DeviceError, "addr", "dump", family=family
            )
            found |= {message.get("address") for message in messages if message.get(mark) == value}
        return found

    async def add_address(self, address: str, device: str) -> None:
        """Give a device an address ("10.0.0.1", as /32 or /128); having it already is fine."""
        await self._address("replace", address, device)

    async def remove_address(self, address: str, device: str = "lo") -> bool:
        """Take an address away; return whether it was there."""
        try:
            await self._address("del", address, device)
        except DeviceError as error:
            if errno_of(error) == errno.EADDRNOTAVAIL:
                return False
            raise
        return True

    async def _address(self, command: str, address: str, device: str, **more: object) -> None:
        index = (await self.get(device)).index
        length = 128 if ":" in address else 32
        if ":" in address and command != "del":
            more["flags"] = _NO_DUPLICATE_DETECTION
        what = f"{command} address {address} on {device}"
        await self._netlink.request(
            what, DeviceError, "addr", command, index=index, address=address, prefixlen=length, **more
        )

    async def move_inside(self, name: str, netns: Path, inside_name: str, *addresses: str) -> None:
        """Move a device into a namespace and set it up there: name, addresses, default routes by the gateway.

        For endpoints that no engine sets up.  Raises DeviceError; the device may then be in either place.
        """
        device = await self.get(name)
        handle = open_namespace(netns)
        try:
            await self._link(f"move {name} to {netns}", "set", index=device.index, net_ns_fd=handle)
            await inside(handle, lambda netlink: _set_up_inside(netlink, name, inside_name, addresses))
        finally:
            os.close(handle)

    async def _link(self, what: str, command: str, **arguments: object) -> list[Message]:
        return await self._netlink.request(what, DeviceError, "link", command, **arguments)


def _device(message: Message) -> Device:
    kind = message.get(("linkinfo", "kind"))
    return Device(
        index=message["index"],
        name=message.get("ifname"),
        kind=kind or "",
        mac=message.get("address") or "",
        mtu=message.get("mtu") or 0,
        up=bool(message["flags"] & _FLAG_UP),
        peer=message.get("link") or 0,
        alias=message.get("ifalias") or "",
    )


async def _set_up_inside(netlink: Netlink, name: str, inside_name: str, addresses: Iterable[str]) -> None:
    devices = Devices(netlink)
    device = await devices.get(name)
    await devices._link(f"rename {name} to {inside_name}", "set", index=device.index, ifname=inside_name)
    await devices._link(f"set {inside_name} up", "set", index=device.index, state="up")
    for address in addresses:
        if ":" in address:
            # docker switches IPv6 off where it has given no address of it, as in --network none.
            devices._sysctls.write(f"net/ipv6/conf/{inside_name}/disable_ipv6", "0")
        await devices.add_address(address, inside_name)
        gateway, everywhere = (GATEWAY6, "::/0") if ":" in address else (GATEWAY, "0.0.0.0/0")
        for route in (
            {"dst": host_prefix(gateway), "scope": _SCOPE_LINK},
            {"dst": everywhere, "gateway": gateway},
        ):
            what = f"default route by {gateway} on {inside_name}"
            await netlink.request(what, DeviceError, "route", "replace", oif=device.index, **route)
