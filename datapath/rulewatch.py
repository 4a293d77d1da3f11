# SPDX-License-Identifier: Apache-2.0
"""Says when somebody changed nftables: docker restarted, ufw was reloaded, an administrator flushed.

Responsible for: the kernel's notices of netfilter, gathered so that a burst counts once.  What was
changed is not looked at: `ensure` of the firewall finds out.  Changes through iptables-legacy make no
notice, so the caller also looks at intervals.  Called by: the agent, beside its firewall reconciler.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from types import TracebackType
from typing import Self

from datapath.errors import FirewallError

_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_SETTLE_S = 0.1  # a restarting docker writes its rules one by one, within some 50 ms


class RuleWatch:
    """Counts changes of nftables in the namespace it was opened in; use as an async context manager."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Subscribe.  Raises FirewallError where that is not allowed."""
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
            )
            self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        except OSError as error:
            raise FirewallError(f"changes of nftables can not be watched: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._socket, self._drain)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    async def changed(self) -> None:
        """Return when something was changed since the last call, and no more comes for a moment."""
        await self._changed.wait()
        while self._changed.is_set():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    await self._changed.wait()
                continue
            return

    def _drain(self) -> None:
        self._changed.set()
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # too many to keep is still "changed"
                    raise
