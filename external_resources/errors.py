# SPDX-License-Identifier: Apache-2.0
"""What can be wrong about external resources.

HoldfastError
└── ExternalResourceError
    ├── InvalidResource      a name, address or label that can not be used
    ├── AddressConflict      an address belongs to somebody else; the message names the owner
    ├── HostUnknown          the host that the resource is said to be on is no registered node
    └── Contended            others kept changing the same keys while we tried
"""

from __future__ import annotations

from core.errors import HoldfastError, shorten


class ExternalResourceError(HoldfastError):
    """Root of this package's errors."""


class InvalidResource(ExternalResourceError):
    """Raised when a resource can not be made from what was given."""


class AddressConflict(ExternalResourceError):
    """Raised when `address` has an owner already; `owner` says who, as its record in etcd does."""

    def __init__(self, name: str, address: str, owner: str) -> None:
        super().__init__(
            f"address {address} of {shorten(name)} belongs to {shorten(owner)}",
            hint="unregister that owner first, or choose another address",
        )
        self.address = address
        self.owner = owner


class HostUnknown(ExternalResourceError):
    """Raised when no node record has the given host address: agents would not know how to reach it."""


class Contended(ExternalResourceError):
    """Raised when a registration found its keys changed by others after every attempt."""
