# SPDX-License-Identifier: Apache-2.0
"""The node's address pool: which address of which endpoint, and which are free.

With IPv6 each endpoint has a second address that is made of its first: the node's IPv6 range, ending with
the 32 bits of the IPv4 address.  So there is one pool, and people see at once what belongs together.

Pure: no I/O, no kernel.  Addresses are handed out in rotation, so that one that was just given back rests
as long as possible (peers may still have it in their connection tracking), and for `REST_S` at least where
another is free: for so long other hosts may take it for the former one's (`kvstore.sink.HOLD_S`).  Owner: the
endpoint manager.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from agent.errors import AddressTaken, PoolExhausted

# The first address is the node's own inside the pool (Cilium's CiliumInternalIP).
RESERVED_FIRST = 2  # network address and router
# Seconds.
REST_S = 30.0
# Of our own (RFC 4193): "hold", then the node's IPv4 address, as Cilium makes a node's range.
AUTOMATIC_IPV6 = IPv6Network("fd68:6f6c:6400::/64")


class Pool:
    """Addresses of one network, each with the name of its user."""

    def __init__(
        self,
        network: IPv4Network,
        network6: IPv6Network | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if network.num_addresses < 8:
            raise PoolExhausted(
                f"pool {network} has too few addresses", hint="use a network of /29 or larger for ipv4-range"
            )
        self.network = network
        self.network6 = network6
        self._first = int(network.network_address) + RESERVED_FIRST
        self._last = int(network.broadcast_address) - 1
        self._next = self._first
        self._users: dict[IPv4Address, str] = {}
        self._excluded: set[IPv4Network] = set()
        self._rest: dict[IPv4Address, float] = {}  # given back, at
        self._clock = clock
        self.others_know: Callable[[], bool] = lambda: True  # what was given back, by etcd

    def exclude(self, subnet: IPv4Network) -> None:
        """Never hand out addresses of `subnet` by ourselves: the engine's own IPAM assigns them."""
        self._excluded.add(subnet)

    def include(self, subnet: IPv4Network) -> None:
        """Undo `exclude`."""
        self._excluded.discard(subnet)

    def resume_after(self, address: IPv4Address) -> None:
        """Go on behind an address that was handed out before a restart."""
        if self._first <= int(address) < self._last:
            self._next = int(address) + 1

    @property
    def last(self) -> IPv4Address:
        """Return the address that rotation reached last; a checkpoint keeps it."""
        return IPv4Address(self._next - 1 if self._next > self._first else self._last)

    @property
    def router(self) -> IPv4Address:
        """Return the node's own address inside the pool."""
        return self.network.network_address + 1

    def ipv6_of(self, address: IPv4Address) -> IPv6Address | None:
        """Return the IPv6 address that goes with an address; None without IPv6."""
        return None if self.network6 is None else self.network6.network_address + int(address)

    @property
    def networks(self) -> tuple[str, ...]:
        """Return the pool, and the IPv6 range."""
        return tuple(str(each) for each in (self.network, self.network6) if each is not None)

    @property
    def routers(self) -> tuple[str, ...]:
        """Return the node's own addresses inside `networks`."""
        found = (self.router, self.ipv6_of(self.router))
        return tuple(str(each) for each in found if each is not None)

    @property
    def capacity(self) -> int:
        return self._last - self._first + 1

    @property
    def used(self) -> int:
        return len(self._users)

    def allocate(self, user: str) -> IPv4Address:
        """Return the next free address for `user`; PoolExhausted when there is none."""
        if self.others_know():
            now = self._clock()
            self._rest = {address: at for address, at in self._rest.items() if now - at < REST_S}
        candidate = self._next_free(avoided=self._rest) or self._next_free()
        if candidate is not None:
            self._users[candidate] = user
            return candidate
        assigned = f"; the engine assigns those of {', '.join(map(str, self._excluded))}"
        raise PoolExhausted(
            f"no free address in pool {self.network}: {self.used} of {self.capacity} are in use"
            f"{assigned if self._excluded else ''}",
            hint="remove endpoints or configure a larger ipv4-range",
        )

    def _next_free(self, avoided: Container[IPv4Address] = ()) -> IPv4Address | None:
        for _ in range(self.capacity):
            candidate = IPv4Address(self._next)
            self._next = self._next + 1 if self._next < self._last else self._first
            if candidate in self._users or candidate in avoided:
                continue
            if not any(candidate in each for each in self._excluded):
                return candidate
        return None

    def reserve(self, address: IPv4Address, user: str) -> None:
        """Mark a given address as used by `user`; AddressTaken when it is not to be had."""
        if not self._first <= int(address) <= self._last:
            raise AddressTaken(
                f"address {address} is not an assignable address of the node's pool {self.network}",
                hint="leave the address to Holdfast or choose one inside the pool",
            )
        holder = self._users.setdefault(address, user)
        if holder != user:
            raise AddressTaken(f"address {address} is in use by {holder}", hint="choose another address")

    def release(self, address: IPv4Address, user: str) -> None:
        """Give an address back; another user's claim on it is left alone."""
        if self._users.get(address) == user:
            del self._users[address]
            self._rest[address] = self._clock()

    def holder(self, address: IPv4Address) -> str | None:
        return self._users.get(address)


def automatic_network(node: IPv4Address, taken: list[IPv4Network]) -> IPv4Network:
    """Return a /16 of 10.0.0.0/8 for this node that overlaps nothing in `taken`.

    As Cilium's `ipv4-range: auto`, the second byte is the last one of the node's address; where that
    network is in use on this host, the following ones are tried.
    """
    start = node.packed[3]
    for step in range(256):
        candidate = IPv4Network((bytes([10, (start + step) % 256, 0, 0]), 16))
        if not any(candidate.overlaps(each) for each in taken if each.prefixlen > 0):
            return candidate
    raise PoolExhausted(
        "every 10.x.0.0/16 overlaps a route of this host", hint="set ipv4-range to a network that is free"
    )


def automatic_network6(node: IPv4Address) -> IPv6Network:
    """Return the /96 of this node: of its own in the cluster, as its IPv4 address is."""
    return IPv6Network((int(AUTOMATIC_IPV6.network_address) | int(node) << 32, 96))
