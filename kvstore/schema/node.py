# SPDX-License-Identifier: Apache-2.0
"""nodes/v1/<cluster>/<name>: a host, its addresses, and the pool its workloads get theirs from."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from socket import inet_ntop

import msgspec

from core.errors import shorten
from kvstore.errors import InvalidKeyPart, RecordError
from kvstore.schema import codec
from kvstore.schema.ip import U8, U32, mask_length, packed_address
from kvstore.schema.keys import NODES


class NodeAddress(msgspec.Struct, frozen=True, gc=False):
    """`type` is InternalIP, ExternalIP, CiliumInternalIP, Hostname, InternalDNS or ExternalDNS."""

    type: str = msgspec.field(name="Type")
    ip: str = msgspec.field(name="IP")


class AllocCidr(msgspec.Struct, frozen=True, gc=False):
    """A prefix as Go writes a net.IPNet: address and base64 of the mask's bytes."""

    ip: str = msgspec.field(name="IP")
    mask: str = msgspec.field(name="Mask")

    @classmethod
    def of(cls, prefix: str) -> AllocCidr:
        """Return "10.50.0.0/16" in this form; InvalidKeyPart when it is no prefix."""
        try:
            network = ipaddress.ip_network(prefix)
        except ValueError as error:
            raise InvalidKeyPart("allocation prefix", prefix, str(error)) from error
        return cls(str(network.network_address), base64.b64encode(network.netmask.packed).decode())

    @property
    def prefix(self) -> str:
        """The prefix as text; ValueError when the parts are not those of one."""
        bits = mask_length(base64.b64decode(self.mask, validate=True))
        family, address = packed_address(self.ip)
        host_bits = 8 * len(address) - bits
        if host_bits < 0 or int.from_bytes(address) & (1 << host_bits) - 1:
            raise ValueError(f"{self.ip}/{bits} is not a prefix")
        return f"{inet_ntop(family, address)}/{bits}"


class NodeRecord(msgspec.Struct, frozen=True):
    """One host.  Field order is the order in JSON."""

    name: str = msgspec.field(name="Name")
    cluster: str = msgspec.field(name="Cluster")
    addresses: tuple[NodeAddress, ...] | None = msgspec.field(name="IPAddresses", default=None)
    ipv4_alloc_cidr: AllocCidr | None = msgspec.field(name="IPv4AllocCIDR", default=None)
    ipv6_alloc_cidr: AllocCidr | None = msgspec.field(name="IPv6AllocCIDR", default=None)
    ipv4_health_ip: str = msgspec.field(name="IPv4HealthIP", default="")
    ipv6_health_ip: str = msgspec.field(name="IPv6HealthIP", default="")
    cluster_id: U8 = msgspec.field(name="ClusterID", default=0)
    source: str = msgspec.field(name="Source", default="")
    encryption_key: U8 = msgspec.field(name="EncryptionKey", default=0)
    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)
    identity: U32 = msgspec.field(name="NodeIdentity", default=0)
    wireguard_key: str = msgspec.field(name="WireguardPubKey", default="")

    def address(self, kind: str = "InternalIP", *, ipv6: bool = False) -> str:
        """Return the first address of a type and family, or an empty text."""
        for each in self.addresses or ():
            if each.type == kind and (":" in each.ip) == ipv6:
                return each.ip
        return ""


_decoder = msgspec.json.Decoder(NodeRecord)


def encode_node(record: NodeRecord) -> bytes:
    return codec.encode(_sorted_labels(record))


def rewrite_node(record: NodeRecord, old: bytes | None) -> bytes:
    """Return `record` with the fields of `old` that this version does not know (1.19 has several)."""
    return codec.rewrite(_sorted_labels(record), old)


def _sorted_labels(record: NodeRecord) -> NodeRecord:
    """Go writes maps sorted by key."""
    if not record.labels:
        return record
    return msgspec.structs.replace(record, labels=dict(sorted(record.labels.items())))


def parse_node_key(key: str) -> tuple[str, str]:
    """Return (cluster, name)."""
    cluster, slash, name = key[len(NODES) :].partition("/")
    if not key.startswith(NODES) or not slash or not cluster or not name or "/" in name:
        raise RecordError(key, "is not nodes/v1/<cluster>/<name>", kind="key")
    if not (cluster.isprintable() and name.isprintable()):  # names stand in logs and tables
        raise RecordError(key, "the node's name has characters that can not be shown", kind="key")
    return cluster, name


def parse_node(key: str, value: bytes) -> NodeRecord:
    """Return the record; RecordError when it can not be used or is not about the key's node."""
    cluster, name = parse_node_key(key)
    record = codec.decode(_decoder, key, value)
    if (record.cluster, record.name) != (cluster, name):
        said = f"{shorten(record.cluster)}/{shorten(record.name)}"
        raise RecordError(key, f"it speaks of the node {said}", kind="mismatch")
    for address in record.addresses or ():
        if not address.type.endswith(("DNS", "Hostname")):
            _check_address(key, address.ip)
    for cidr in (record.ipv4_alloc_cidr, record.ipv6_alloc_cidr):
        _check_cidr(key, cidr)
    return record


def _check_address(key: str, text: str) -> None:
    try:
        packed_address(text)
    except ValueError as error:
        raise RecordError(key, f"IPAddresses: {error}") from error


def _check_cidr(key: str, cidr: AllocCidr | None) -> None:
    if cidr is None:
        return
    try:
        _ = cidr.prefix
    except (ValueError, binascii.Error) as error:
        raise RecordError(key, f"AllocCIDR {shorten(cidr.ip)}: {shorten(str(error))}") from error
