# SPDX-License-Identifier: Apache-2.0
"""The tunnel to other hosts: the VXLAN device and the program that meets what comes in by it.

`prepare` comes before any endpoint's programs are loaded, because they know the device by its index;
`ensure` is called every few seconds by the keeper.
"""

from __future__ import annotations

from typing import Protocol

from loguru import logger

from datapath.tunnel import DEVICE, Tunnel


class OverlayPrograms(Protocol):
    """Loads and attaches (agent.programs)."""

    def use_tunnel(self, ifindex: int) -> None: ...

    async def attach_overlay(self, name: str, index: int) -> bool: ...


class Overlay:
    """Implements agent.keeper.Between; without a tunnel it only clears away what a former life had."""

    def __init__(self, tunnel: Tunnel, programs: OverlayPrograms, *, enabled: bool) -> None:
        self.tunnel = tunnel
        self.enabled = enabled
        self._programs = programs
        self._cleared = False

    async def prepare(self) -> None:
        """Make the device and tell the programs.  Raises DeviceError."""
        if self.enabled:
            await self.tunnel.ensure()
            self._programs.use_tunnel(self.tunnel.index)

    async def ensure(self) -> None:
        if not self.enabled:
            await self._clear()
            return
        if await self.tunnel.ensure():
            logger.info("device {} made, UDP port {}", DEVICE, self.tunnel.shape.port)
        if await self._programs.attach_overlay(DEVICE, self.tunnel.index):
            logger.info("program from_overlay attached to {}", DEVICE)

    async def _clear(self) -> None:
        if not self._cleared and await self.tunnel.remove():
            logger.info("device {} removed: this host uses no tunnel", DEVICE)
        self._cleared = True
