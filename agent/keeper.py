# SPDX-License-Identifier: Apache-2.0
"""Keeps what belongs to the host itself: forwarding, the router's address, the pool's route, the programs
on the devices that face other machines, and the host's own addresses as identity `host`.

It looks at the host every few seconds, because addresses and devices come and go without telling us.
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
        self._attached: dict[str, int] = {}

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
        await self._devices.add_address(self._router)
        await self._routes.add_unreachable(self._pool)
        self.view = await asyncio.to_thread(look, self.view.node_ip, self._configured)
        self._tell_addresses()
        await self._attach()

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
        for name, index in self.view.devices.items():
            if await self._programs.attach_netdev(name, index):
                logger.info("program from_netdev attached to {}", name)
        self._attached = dict(self.view.devices)

    @property
    def devices(self) -> dict[str, int]:
        return dict(self._attached)
