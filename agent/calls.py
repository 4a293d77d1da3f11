# SPDX-License-Identifier: Apache-2.0
"""The bodies of network driver calls as structs: what the engine sends is checked before anything acts on it.

Field names are the protocol's.  Fields that nobody here reads are ignored; a list or object that Go has as
nil arrives as null.  Identifiers become file names and parts of URLs, so their form is checked too.

Called by: `agent.driver`.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from agent.errors import DriverError
from core.errors import shorten

Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
# Empty: the driver is to choose one.
Mac = Annotated[str, msgspec.Meta(pattern=r"^([0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5})?$")]

T = TypeVar("T", bound="Call")


class Call(msgspec.Struct, frozen=True, rename="pascal"):
    """A call whose body does not matter."""


class IpamData(msgspec.Struct, frozen=True, rename="pascal"):
    """One pool of a network; the null IPAM driver gives 0.0.0.0/0."""

    pool: str = ""


class NetworkCall(Call, frozen=True):
    """DeleteNetwork."""

    network_id: Id = msgspec.field(name="NetworkID")


class CreateNetwork(NetworkCall, frozen=True):
    pools: list[IpamData] | None = msgspec.field(name="IPv4Data", default=None)


class Interface(msgspec.Struct, frozen=True, rename="pascal"):
    """What the engine's own IPAM has chosen; all empty with the null driver."""

    address: str = ""
    address_ipv6: str = msgspec.field(name="AddressIPv6", default="")
    mac_address: Mac = ""


class EndpointCall(NetworkCall, frozen=True):
    """Leave, EndpointOperInfo, RevokeExternalConnectivity, DeleteEndpoint."""

    endpoint_id: Id = msgspec.field(name="EndpointID")


class Join(EndpointCall, frozen=True):
    sandbox_key: str | None = None  # a path that stands for the container's namespace


class CreateEndpoint(EndpointCall, frozen=True):
    interface: Interface | None = None


class ProgramExternal(EndpointCall, frozen=True):
    options: dict[str, Any] | None = None


def decode(method: str, body: bytes, kind: type[T]) -> T:
    """Return the body of a call; DriverError names the method, the field and what is wrong with it."""
    try:
        return msgspec.json.decode(body if body.strip() else b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DriverError(f"the body {shorten(body)} of {method} is refused: {error}") from error
