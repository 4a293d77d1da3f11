# SPDX-License-Identifier: Apache-2.0
"""Keeps what belongs to the host itself: forwarding, the router's address, the pool's route, the programs
on the devices that face other machines, and the host's own addresses as identity `host`.

It looks at the host every few seconds, because addresses and devices come and go without telling us.  When
those that other hosts know this one by are gone for good, the agent has to begin anew under others (`moved`).
What a former life or a former configuration left bears our marks, and is taken away.
"""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from loguru import logger

from agent import ipcache
from agent.host import HostView, look
from core.backoff import jittered
from core.errors import HoldfastError
from datapath.devices import Devices
from datapath.maps import LxcMap
from datapath.records import ENDPOINT_IS_HOST, LxcEntry
from datapath.routes import Routes
from datapath.sysctl import Sysctls, host_settings, keep_router_advertisements

LOOK_S = 5.0
# So often in a row an address of the host must be missing: a network that is restarted gives it back.
MISSED_LOOKS = 6
_NO_MAC = "00:00:00:00:00:00"


class NetdevPrograms(Protocol):
    """Attaches the program on the host's own devices (agent.programs)."""

    async def attach_netdev(self, name: str, index: int) -> bool:
        """Attach unless it is there; return whether anything was done."""
        ...

    async def has_netdev(self, index: int) -> bool:
        """True when the program is on a device, whoever attached it."""
        ...

    async def release_netdev(self, index: int) -> None:
        """Take the program off a device."""
        ...


class Between(Protocol):
    """The device between hosts (agent.overlay)."""

    async def ensure(self) -> None:
        """Have it there, with its program; or, where there is no tunnel, take a former life's away."""
        ...


class Keeper:
    """Owner of the host-wide kernel state."""

    def __init__(
        self,
        view: HostView,
        addresses: ipcache.IpTable,
        devices: Devices,
        routes: Routes,
        lxc: LxcMap,
        programs: NetdevPrograms,
        between: Between,
        *,
        configured_devices: tuple[str, ...],
        pools: tuple[str, ...],
        routers: tuple[str, ...],
        known_by: frozenset[IPv4Address | IPv6Address] = frozenset(),
    ) -> None:
        """`known_by`: the addresses in this node's record, but for those that the configuration demands."""
        self.view = view
        self.error = ""
        self.moved = asyncio.Event()
        self._known_by = known_by
        self._missed = 0
        self._addresses = addresses
        self._devices = devices
        self._routes = routes
        self._lxc = lxc
        self._programs = programs
        self._between = between
        self._configured = configured_devices
        self._pools = pools
        self._routers = routers
        # Devices that the program may be on, by index; None until a former life's were looked for.
        self._carriers: set[int] | None = None

    async def run(self) -> None:
        """Look and repair until cancelled."""
        while True:
            try:
                await self.once()
                self.error = ""
            except (HoldfastError, OSError) as error:
                if str(error) != self.error:
                    logger.error("host state: {}", error)
                self.error = str(error)
            await asyncio.sleep(jittered(LOOK_S))

    async def once(self) -> None:
        """Bring the host's state to what it must be."""
        self._let_forward(Sysctls())
        await self._give_routers()
        for pool in self._pools:
            await self._routes.add_unreachable(pool)
        await self._between.ensure()
        await self._look()
        self._tell_addresses()
        await self._attach()
        await self._release()

    async def _look(self) -> None:
        self.view = await asyncio.to_thread(look, self.view.node_ip, self._configured)
        gone = self._known_by - self.view.addresses
        self._missed = self._missed + 1 if gone else 0
        if self._missed < MISSED_LOOKS:
            return
        # Raises while the host has no other: then there is nothing to begin anew with.
        now = await asyncio.to_thread(look, None, self._configured)
        if not self.moved.is_set():
            was = ", ".join(map(str, sorted(gone, key=str)))
            logger.warning("this host is known by {}, which it has no more, but {}", was, now.node_ip)
        self.moved.set()

    def _let_forward(self, sysctls: Sysctls) -> None:
        for name in keep_router_advertisements(sysctls) if self._ipv6 else ():
            logger.info("device {} goes on taking router advertisements (accept_ra=2)", name)
        sysctls.write_all(host_settings(ipv6=self._ipv6))

    @property
    def _ipv6(self) -> bool:
        return any(":" in router for router in self._routers)

    async def _give_routers(self) -> None:
        """Have the router's addresses on lo, and none that a former life gave it for another pool."""
        for router in self._routers:
            await self._devices.add_router(router)
        for address in await self._devices.routers() - set(self._routers):
            if await self._devices.remove_address(address):
                logger.info("address {} of a former pool taken off lo", address)

    def _tell_addresses(self) -> None:
        addresses = {str(address) for address in self.view.addresses if self._is_reachable(address)}
        addresses |= {*self._routers, str(self.view.node_ip)}
        ipcache.set_host_addresses(self._addresses, addresses)
        entry = LxcEntry(0, 0, ENDPOINT_IS_HOST, _NO_MAC, _NO_MAC)
        known = {address for address, each in self._lxc.items() if each.flags & ENDPOINT_IS_HOST}
        for failure in self._lxc.upsert((address, entry) for address in addresses - known).values():
            raise failure
        if known - addresses:
            self._lxc.delete(known - addresses)

    def _is_reachable(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether an endpoint could send to an address of this host."""
        if address.is_loopback:
            return False
        return address.version == 4 or (self._ipv6 and not address.is_link_local)

    async def _attach(self) -> None:
        if self._carriers is None:
            self._carriers = await self._find_carriers()
        for name, index in self.view.devices.items():
            if await self._programs.attach_netdev(name, index):
                logger.info("program from_netdev attached to {}", name)
            self._carriers.add(index)

    async def _find_carriers(self) -> set[int]:
        """Return the devices that a former life attached the program to; endpoints' have their own."""
        others = [each.index for each in await self._devices.all() if not each.is_ours]
        return {index for index in others if await self._programs.has_netdev(index)}

    async def _release(self) -> None:
        """Take the program off devices that do not face other machines any more."""
        carriers = self._carriers or set()
        for index in carriers - set(self.view.devices.values()):
            device = await self._devices.find_index(index)
            if device is not None and not device.up:
                continue  # nothing passes; its program is there when it comes up again
            if device is not None and await self._programs.has_netdev(index):
                await self._programs.release_netdev(index)
                logger.info("program from_netdev taken off {}: it faces no other machine now", device.name)
            carriers.discard(index)

    @property
    def devices(self) -> dict[str, int]:
        """Return the devices that face other machines and have the program, name → index."""
        carriers = self._carriers or set()
        return {name: index for name, index in self.view.devices.items() if index in carriers}
