# SPDX-License-Identifier: Apache-2.0
"""ip/v1/<space>/<address or prefix>: which identity an address has, and on which host it is.

The JSON of Cilium 1.11 (fields of 1.19 are read too)::

    {"IP":"10.50.68.48","Mask":null,"HostIP":"10.99.0.2","ID":13465,"Key":0,"Metadata":"…"}

`Mask` is base64 of the netmask's bytes for a prefix, null for a single address.  Rights in etcd are
rights on keys, so a record that speaks of another address than its key does is an error.
"""

from __future__ import annotations

import functools
import ipaddress
import sys
from collections.abc import Sequence
from itertools import repeat
from socket import AF_INET, AF_INET6, AddressFamily, inet_ntop, inet_pton
from typing import Annotated, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from core.errors import shorten
from kvstore.errors import InvalidKeyPart, RecordError
from kvstore.schema import codec
from kvstore.schema.keys import IPS

U8 = Annotated[int, msgspec.Meta(ge=0, le=255)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]

# What the metadata of a VM or bare-metal machine begins with; its name follows.
MACHINE = "vm:"
_ONES = {bytes([(0xFF << (8 - bits)) & 0xFF]): bits for bits in range(9)}


class NamedPort(msgspec.Struct, frozen=True, gc=False, rename="pascal"):
    name: str
    port: U16
    protocol: str


class IpRecord(msgspec.Struct, frozen=True, gc=False):
    """One address.  Field order is the order in JSON; `host_ip` is empty for an unregistered host."""

    ip: str = msgspec.field(name="IP")
    mask: bytes | None = msgspec.field(name="Mask", default=None)
    host_ip: str = msgspec.field(name="HostIP", default="")
    identity: U32 = msgspec.field(name="ID", default=0)
    key: U8 = msgspec.field(name="Key", default=0)
    metadata: str = msgspec.field(name="Metadata", default="")
    namespace: str | UnsetType = msgspec.field(name="K8sNamespace", default=UNSET)
    pod: str | UnsetType = msgspec.field(name="K8sPodName", default=UNSET)
    service_account: str | UnsetType = msgspec.field(name="K8sServiceAccount", default=UNSET)
    named_ports: tuple[NamedPort, ...] | UnsetType = msgspec.field(name="NamedPorts", default=UNSET)

    @property
    def is_host(self) -> bool:
        """True for a single address: it goes before a prefix of the same full length."""
        return self.mask is None

    @property
    def prefix(self) -> str:
        """The address or prefix as it stands in the key; ValueError when the mask is none."""
        return self.ip if self.mask is None else f"{self.ip}/{mask_length(self.mask)}"


_decoder = msgspec.json.Decoder(IpRecord)
_decode = _decoder.decode


def ip_record(prefix: str, identity: int, *, host_ip: str = "", metadata: str = "", key: int = 0) -> IpRecord:
    """Return the record of an address or prefix as an agent writes it; InvalidKeyPart for no address."""
    try:
        if "/" in prefix:
            network = ipaddress.ip_network(prefix)
            ip, mask = str(network.network_address), network.netmask.packed
        else:
            ip, mask = str(ipaddress.ip_address(prefix)), None
    except ValueError as error:
        raise InvalidKeyPart("address", prefix, str(error)) from error
    return IpRecord(ip, mask, host_ip, identity, key, metadata)


def encode_ip(record: IpRecord) -> bytes:
    return codec.encode(record)


def rewrite_ip(record: IpRecord, old: bytes | None) -> bytes:
    """Return `record` with the fields of `old` that this version does not know."""
    return codec.rewrite(record, old)


def parse_ip_key(key: str) -> tuple[str, str]:
    """Return (address space, address or prefix) as written in the key."""
    space, slash, prefix = key[len(IPS) :].partition("/")
    if not key.startswith(IPS) or not slash or not space.isprintable() or not space or not prefix:
        raise RecordError(key, "is not ip/v1/<space>/<address>", kind="key")
    return space, prefix


def parse_ip(key: str, value: bytes) -> IpRecord:
    """Return the record; RecordError when it can not be used or is not about the key's address."""
    return parse_ip_entry(key, value)[1]


def parse_ip_entry(key: str, value: bytes) -> tuple[str, IpRecord]:
    """Return (address space, record) as `parse_ip` does; the record's prefix is the key's."""
    head, _, wanted = key.rpartition("/")
    space = _space(head)
    if not space or not wanted:
        space, wanted = parse_ip_key(key)
        space = sys.intern(space)
    record = codec.decode(_decoder, key, value)
    address = _packed(key, "IP", record.ip)
    if record.mask is not None:
        _check_mask(key, record, address)
    if wanted != (record.ip if record.mask is None else record.prefix):
        raise RecordError(key, f"it speaks of {shorten(record.prefix)!r}", kind="mismatch")
    if record.host_ip and not _is_host(record.host_ip):
        _packed(key, "HostIP", record.host_ip)
    return space, record


class PlainIps(NamedTuple):
    """Records of single addresses of one family in one address space; `length` is that of their prefixes."""

    space: str
    length: int
    records: list[IpRecord]


def parse_plain_ips(items: Sequence[tuple[str, bytes]]) -> PlainIps | None:
    """Return the records of items that are all alike and all good, as those of a large list nearly always
    are: a third of the time of `parse_ip_entry`, which has to say what is wrong with the others.
    """
    head = items[0][0].rpartition("/")[0]
    space = _space(head)
    if not space or max(map(len, [value for _, value in items])) > codec.MAX_RECORD:
        return None
    try:
        records = [_decode(value) for _, value in items]
        addresses = [record.ip for record in records]
        family = AF_INET6 if ":" in addresses[0] else AF_INET
        packed = list(map(inet_pton, repeat(family), addresses))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError, ValueError):
        return None
    good = (
        [key for key, _ in items] == [f"{head}/{address}" for address in addresses]
        and [record.mask for record in records].count(None) == len(records)
        and all(map(_is_host, {record.host_ip for record in records} - {""}))
        and (family == AF_INET or list(map(inet_ntop, repeat(family), packed)) == addresses)
    )
    return PlainIps(space, 32 if family == AF_INET else 128, records) if good else None


# A hundred thousand records lie in a few address spaces and name a few thousand hosts.
@functools.lru_cache(maxsize=1 << 8)
def _space(head: str) -> str:
    """Return the address space when `head` is all that stands before an address in its key, else ""."""
    space = head.removeprefix(IPS)
    return "" if space == head or "/" in space or not space.isprintable() else sys.intern(space)


@functools.lru_cache(maxsize=1 << 14)
def _is_host(text: str) -> bool:
    try:
        return bool(_packed("", "", text))
    except RecordError:
        return False


def mask_length(mask: bytes) -> int:
    """Return how many leading bits of a netmask are set; ValueError when it is not one."""
    body = mask.rstrip(b"\0")
    if not body:
        return 0
    last = _ONES.get(body[-1:])
    if len(mask) not in (4, 16) or last is None or body[:-1].strip(b"\xff"):
        raise ValueError(f"{mask.hex()} is not a netmask")
    return 8 * (len(body) - 1) + last


def packed_address(text: str) -> tuple[AddressFamily, bytes]:
    """Return the family and the bytes of an address; ValueError when it is none.

    Not by `ipaddress`, which takes ten times as long: a hundred thousand records pass through here.
    """
    family = AF_INET6 if ":" in text else AF_INET
    try:
        return family, inet_pton(family, text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{shorten(text)!r} is not an address") from error


def _packed(key: str, field: str, text: str) -> bytes:
    """Return the address's bytes; one spelling only, because tables compare text."""
    try:
        family, packed = packed_address(text)
    except ValueError as error:
        raise RecordError(key, f"{field} {error}") from error
    if family == AF_INET6 and inet_ntop(family, packed) != text:
        raise RecordError(key, f"{field} {shorten(text)!r} is not in canonical form")
    return packed


def _check_mask(key: str, record: IpRecord, address: bytes) -> None:
    mask = record.mask or b""
    try:
        mask_length(mask)
    except ValueError as error:
        raise RecordError(key, f"Mask {error}") from error
    if len(mask) != len(address):
        raise RecordError(key, f"Mask of {len(mask)} bytes for an address of {len(address)}")
    if any(byte & ~bits & 0xFF for byte, bits in zip(address, mask, strict=True)):
        raise RecordError(key, f"{record.ip} has bits outside its mask")
