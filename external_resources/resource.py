# SPDX-License-Identifier: Apache-2.0
"""What an external resource is, and which keys in etcd follow from it.  Pure.

A resource named ``legacy-1`` with the address 10.77.0.5 and the labels ``container:app=legacyvm`` and
``container:site=dc1``, whose identity is 4242, is these keys, as an agent would write them::

    cilium/state/identities/v1/id/4242                                            the labels
    cilium/state/identities/v1/value/container:app=legacyvm;…;/10.77.0.5          4242
    cilium/state/ip/v1/default/10.77.0.5    {"IP":"10.77.0.5",…,"ID":4242,"Key":0,"Metadata":"vm:legacy-1"}

The resource is its own user of the identity (the address behind the last ``/`` is its first one), so two
resources of the same labels never release each other's.  ``HostIP`` is empty unless the machine is on a
registered node: in tunnel mode traffic is encapsulated to it.

Called by: external_resources.registry, cli.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from core.errors import shorten
from external_resources.errors import InvalidResource
from identity.errors import LabelError
from identity.labels import CIDR, CONTAINER, GENERATED, RESERVED, Label, Labels
from identity.transactions import Slot
from kvstore import schema
from kvstore.errors import InvalidKeyPart

# Keys of one resource are written in one transaction, which etcd limits to 128 operations.
MAX_ADDRESSES = 50
# Sources whose labels say what a thing is (host, world, a prefix), not what somebody calls it.
_NOT_TO_GIVE = (RESERVED, CIDR, GENERATED)


@dataclass(frozen=True)
class Resource:
    """One VM or machine.  Build it by `of` or `from_record`; `addresses` are canonical."""

    name: str
    addresses: tuple[str, ...]
    labels: Labels
    host_ip: str = ""
    description: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        addresses: Iterable[str],
        labels: Mapping[str, str] | Iterable[Label | str],
        *,
        host_ip: str = "",
        description: str = "",
    ) -> Resource:
        """Check and normalize what a person or a program gave.  Labels without a source are ``container:``.

        Raises InvalidResource, which names the resource, the value and the reason.
        """
        try:
            schema.external_key(name)
            host = str(ip_address(host_ip)) if host_ip else ""
            found = Labels.of(labels, source=CONTAINER)
            cleaned = tuple(dict.fromkeys(canonical_address(address) for address in addresses))
        except (InvalidKeyPart, LabelError, ValueError) as error:
            raise InvalidResource(f"external resource {shorten(name)}: {error}") from error
        _check_labels(name, found)
        if not 1 <= len(cleaned) <= MAX_ADDRESSES:
            raise InvalidResource(
                f"external resource {name} has {len(cleaned)} addresses",
                hint=f"give 1 to {MAX_ADDRESSES}",
            )
        return cls(name, cleaned, found, host, description)

    @classmethod
    def from_record(cls, record: schema.ExternalRecord) -> Resource:
        """Build from the record in etcd; raises InvalidResource."""
        return cls.of(
            record.name,
            record.addresses,
            record.labels,
            host_ip=record.host_ip,
            description=record.description,
        )

    def record(self) -> schema.ExternalRecord:
        """Return what is kept at holdfast/external/v1/<name>."""
        return schema.ExternalRecord(
            self.name, self.addresses, tuple(self.labels.texts()), self.host_ip, self.description
        )

    @property
    def slot(self) -> Slot:
        """Its place among the users of its identity."""
        return Slot(self.labels, self.addresses[0].partition("/")[0])

    @property
    def metadata(self) -> str:
        """What its address records carry, and what tells them from others'."""
        return f"{schema.MACHINE}{self.name}"

    def ip_keys(self, space: str = schema.DEFAULT_SPACE) -> dict[str, str]:
        """Return key → address."""
        return {schema.ip_key(space, address): address for address in self.addresses}

    def ip_records(self, number: int, space: str = schema.DEFAULT_SPACE) -> dict[str, bytes]:
        """Return key → record of its addresses for the identity `number`."""
        return {
            key: schema.encode_ip(
                schema.ip_record(address, number, host_ip=self.host_ip, metadata=self.metadata)
            )
            for key, address in self.ip_keys(space).items()
        }

    def keys(self, number: int, space: str = schema.DEFAULT_SPACE) -> dict[str, bytes]:
        """Return every key under cilium/ that this resource needs for the identity `number`."""
        return {
            schema.identity_id_key(number): schema.encode_identity_id(self.slot.text),
            self.slot.value_key: schema.encode_identity_value(number),
            **self.ip_records(number, space),
        }


def _check_labels(name: str, labels: Labels) -> None:
    if not len(labels):
        raise InvalidResource(f"external resource {name} has no labels", hint="give at least one label")
    for each in labels:
        if each.source in _NOT_TO_GIVE:
            raise InvalidResource(
                f"external resource {name}: label {shorten(str(each))} would pass for what agents give",
                hint=f"use another source than {each.source}, for example {CONTAINER}",
            )


def canonical_address(text: str) -> str:
    """Return an address or prefix in its one spelling; ValueError for other text, host bits included.

    A prefix of full length is the address: a record for it as a prefix would lose against a host's.
    """
    network = ip_network(text)
    if network.prefixlen == network.max_prefixlen:
        return str(network.network_address)
    if network.prefixlen == 0:
        raise ValueError(f"{text} would be every address")
    return str(network)


def owned_by(name: str, record: schema.IpRecord) -> bool:
    """True when an address record is that of the external resource `name`."""
    return record.metadata == f"{schema.MACHINE}{name}"


def describe_owner(record: schema.IpRecord) -> str:
    """Say whose an address record is, for a message."""
    who = record.metadata or "a record without metadata"
    where = f" on {record.host_ip}" if record.host_ip else ""
    return f"{who}{where} (identity {record.identity})"
