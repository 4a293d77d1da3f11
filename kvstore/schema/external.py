# SPDX-License-Identifier: Apache-2.0
"""What Holdfast adds to Cilium's schema: external resources, policies; and the heartbeat.

holdfast/external/v1/<name>   JSON: a VM or machine without an agent; its identity and ip keys derive
                              from it (external_resources)
holdfast/policies/v1/<name>   the policy document itself, YAML or JSON text
cilium/.heartbeat             RFC 3339 time, to the second
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime

import msgspec

from core.errors import shorten
from kvstore.errors import RecordError
from kvstore.schema import codec
from kvstore.schema.keys import EXTERNAL, HEARTBEAT, POLICIES, name_of

# Bytes.  etcd takes 1.5 MiB a request (--max-request-bytes), the key and the message are in it too.
MAX_POLICY = 1_500_000


class ExternalRecord(msgspec.Struct, frozen=True):
    """A machine without an agent.  `labels` are "source:key=value" texts, `addresses` IPs or prefixes.

    `host_ip` is the address of the registered node that the machine runs on, else empty.
    """

    name: str
    addresses: tuple[str, ...]
    labels: tuple[str, ...]
    host_ip: str = ""
    description: str = ""


_decoder = msgspec.json.Decoder(ExternalRecord)


def encode_external(record: ExternalRecord, old: bytes | None = None) -> bytes:
    """Return the record as JSON, with the fields of `old` that this version does not know."""
    return codec.rewrite(record, old)


def parse_external(key: str, value: bytes) -> ExternalRecord:
    """Return the record; RecordError when it can not be used or is not about the key's name."""
    name = name_of(key, EXTERNAL)
    record = codec.decode(_decoder, key, value)
    if record.name != name:
        raise RecordError(key, f"it speaks of {shorten(record.name)!r}", kind="mismatch")
    for address in (*record.addresses, *filter(None, [record.host_ip])):
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            raise RecordError(key, f"addresses: {shorten(str(error))}") from error
    return record


def encode_policy(document: str) -> bytes:
    return document.encode()


def parse_policy(key: str, value: bytes) -> tuple[str, str]:
    """Return (name, document text); the name is ``name`` or ``namespace/name``."""
    return name_of(key, POLICIES, parts=2), codec.text_of(key, value, limit=MAX_POLICY)


def encode_heartbeat(at: datetime) -> bytes:
    """Return an aware time as Cilium's operator writes it, in UTC: 2026-11-20T10:21:54Z."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()


def parse_heartbeat(value: bytes) -> datetime:
    """Return the time in a heartbeat; RecordError when it is none."""
    text = codec.text_of(HEARTBEAT, value)
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise RecordError(HEARTBEAT, f"{shorten(text)!r} is not a time") from error
    return at if at.tzinfo else at.replace(tzinfo=UTC)
