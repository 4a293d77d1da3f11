# SPDX-License-Identifier: Apache-2.0
"""How records of `ip/v1/` and `nodes/v1/` become entries of the tables (see `kvstore.sink`)."""

from __future__ import annotations

import sys

from agent.ipcache import Record
from core.table import Source
from identity.numbers import FIRST_ALLOCATED, HOST, REMOTE_NODE, is_global
from kvstore import schema
from kvstore.errors import RecordError
from kvstore.sink import TableSink


def ip_entry(key: str, value: bytes) -> tuple[str, Record]:
    """Return (prefix, record) of an ip/v1 entry; what another node calls `host` is a remote node to us."""
    space, prefix = schema.parse_ip_key(key)
    found = schema.parse_ip(key, value)
    if not (is_global(found.identity) or 0 < found.identity < FIRST_ALLOCATED):
        raise RecordError(key, f"identity {found.identity} is not one that several hosts can speak of")
    identity = REMOTE_NODE if found.identity == HOST else found.identity
    host_ip, metadata = sys.intern(found.host_ip), found.metadata
    return with_length(prefix), Record(identity, host_ip, found.key, metadata, sys.intern(space))


def ip_prefix(key: str) -> str:
    """Return the prefix of an ip/v1 key as the ip→identity table writes it: always with its length."""
    return with_length(schema.parse_ip_key(key)[1])


def node_entry(key: str, value: bytes) -> tuple[str, schema.NodeRecord]:
    return node_name(key), schema.parse_node(key, value)


def node_name(key: str) -> str:
    """Return ``<cluster>/<name>``."""
    return "/".join(schema.parse_node_key(key))


def with_length(prefix: str) -> str:
    """Return ``10.0.0.1`` as ``10.0.0.1/32``, ``fd00::1`` as ``fd00::1/128``, a prefix as it is."""
    if "/" in prefix:
        return prefix
    return f"{prefix}/{128 if ':' in prefix else 32}"


class IpSink(TableSink[str, Record]):
    """All address spaces in one table: the last writer counts, and only its deletion is a deletion.

    Of what was restored from the kernel's map the space is not known: any deletion of it counts.
    """

    def __init__(self, source: Source[str, Record], grace: float) -> None:
        super().__init__(source, ip_entry, ip_prefix, grace=grace)

    def deleted(self, key: str) -> None:
        self.ignored.pop(key, None)
        try:
            space, prefix = schema.parse_ip_key(key)
        except RecordError:
            return
        known = self.source.entries().get(with_length(prefix))
        if known is None or known.space in ("", space):
            super().deleted(key)
