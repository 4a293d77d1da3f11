# SPDX-License-Identifier: Apache-2.0
"""The host's own connection tracking (netfilter's): what it must forget when a container comes or goes.

Address translation is decided by a flow's first packet.  A UDP client that never pauses would go on to
the address of a container that is gone, which the next container may have by then, or past a port that is
published meanwhile.  The programs' conntrack is `datapath.ctgc`'s.
Called by: the agent, when an endpoint goes and after ports were published.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

from datapath.errors import FirewallError
from datapath.firewall import PublishedPort
from datapath.rtnetlink import AsyncConntrack, NetlinkError, NFCTAttrTuple

_DST_NAT = 1 << 5  # IPS_DST_NAT: the flow was led to another destination
_UDP = socket.IPPROTO_UDP

Tuple = Any  # pyroute2's NFCTAttrTuple: saddr, daddr, proto, sport, dport
Flow = tuple[Tuple, Tuple]  # as the first packet was sent, and as answers come


class HostFlows:
    """Netfilter's flows of one family in the namespace this was opened in; an async context manager."""

    def __init__(self, family: int = socket.AF_INET) -> None:
        self._family = family
        self._socket = AsyncConntrack(nfgen_family=family)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the socket."""
        closing = self._socket.close()
        if inspect.isawaitable(closing):
            await closing

    async def forget_address(self, address: str) -> int:
        """Forget the flows that a container opened, and those led to it; return how many.

        Raises FirewallError when the kernel refuses.
        """
        opened = await self._forget(lambda _: True, tuple_orig=self._tuple(saddr=address))
        led = await self._forget(lambda flow: flow[1].saddr == address, status=_DST_NAT, status_mask=_DST_NAT)
        return opened + led

    async def forget_diverted(self, ports: Iterable[PublishedPort]) -> int:
        """Forget UDP flows to published ports that lead elsewhere than the ports do now; return how many."""
        forgotten = 0
        for port in ports:
            if port.protocol == _UDP:
                forgotten += await self._forget(
                    partial(_is_diverted, port), tuple_orig=self._tuple(proto=_UDP, **_one_port(port))
                )
        return forgotten

    def _tuple(self, **fields: Any) -> Tuple:
        return NFCTAttrTuple(family=self._family, **fields)

    async def _forget(self, which: Callable[[Flow], bool], **where: Any) -> int:
        try:
            chosen = [flow async for flow in self._flows(where) if which(flow)]
            return sum([await self._delete(sent) for sent, _ in chosen])
        except NetlinkError as error:
            raise FirewallError(f"flows of the host can not be forgotten: {error.args[1]}") from error

    async def _flows(self, where: dict[str, Any]) -> AsyncIterator[Flow]:
        """Yield the flows that the kernel finds; an old kernel may ignore `where`, so `which` decides."""
        async for message in await self._socket.dump(**where):
            both = (message.get(f"CTA_TUPLE_{side}") for side in ("ORIG", "REPLY"))
            sent, answered = (NFCTAttrTuple.from_netlink(self._family, each) for each in both)
            wanted = where.get("tuple_orig")
            if wanted is None or wanted.nla_eq(self._family, message.get("CTA_TUPLE_ORIG")):
                yield sent, answered

    async def _delete(self, sent: Tuple) -> bool:
        try:
            await self._socket.entry("del", tuple_orig=sent)
        except NetlinkError as error:
            if error.code == 2:  # ENOENT: it ended by itself
                return False
            raise
        return True


def _one_port(port: PublishedPort) -> dict[str, int]:
    """Let the kernel choose by the port, when there is one; a range is looked through here."""
    return {"dport": port.host_port} if port.host_port == port.host_port_end else {}


def _is_diverted(port: PublishedPort, flow: Flow) -> bool:
    sent, answered = flow
    if not port.host_port <= (sent.dport or 0) <= port.host_port_end:
        return False
    if port.host_address and sent.daddr != port.host_address:
        return False
    target = port.container_port + sent.dport - port.host_port
    return (answered.saddr, answered.sport) != (port.container_address, target)
