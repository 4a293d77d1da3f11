# SPDX-License-Identifier: Apache-2.0
"""Keeps what belongs to the host itself: forwarding, the router's address, the pool's route, the programs
on the devices that face other machines, and the host's own addresses as identity `host`.

It looks at the host every few seconds, because addresses and devices come and go without telling us.
What a former life or a former configuration left bears our marks, and is taken away.
"""

from __future__ import annotations

import asyncio
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
from datapath.sysctl import Sysctls, host_settings

LOOK_S = 5.0
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
        *,
        configured_devices: tuple[str, ...],
        pool: str,
        router: str,
    ) -> None:
        self.view = view
        self.error = ""
        self._addresses = addresses
        self._devices = devices
        self._routes = routes
        self._lxc = lxc
        self._programs = programs
        self._configured = configured_devices
        self._pool = pool
        self._router = router
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
        Sysctls().write_all(host_settings())
        await self._give_router()
        await self._routes.add_unreachable(self._pool)
        self.view = await asyncio.to_thread(look, self.view.node_ip, self._configured)
        self._tell_addresses()
        await self._attach()
        await self._release()

    async def _give_router(self) -> None:
        """Have the router's address on lo, and none that a former life gave it for another pool."""
        await self._devices.add_router(self._router)
        for address in await self._devices.routers() - {self._router}:
            if await self._devices.remove_address(address):
                logger.info("address {} of a former pool taken off lo", address)

    def _tell_addresses(self) -> None:
        addresses = {str(address) for address in self.view.addresses if not address.is_loopback}
        addresses |= {self._router, str(self.view.node_ip)}
        ipcache.set_host_addresses(self._addresses, addresses)
        entry = LxcEntry(0, 0, ENDPOINT_IS_HOST, _NO_MAC, _NO_MAC)
        known = {address for address, each in self._lxc.items() if each.flags & ENDPOINT_IS_HOST}
        for failure in self._lxc.upsert((address, entry) for address in addresses - known).values():
            raise failure
        if known - addresses:
            self._lxc.delete(known - addresses)

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
