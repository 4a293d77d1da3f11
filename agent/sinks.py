# SPDX-License-Identifier: Apache-2.0
"""How records of `ip/v1/` and `nodes/v1/` become entries of the tables (see `kvstore.sink`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import repeat

from agent.ipcache import Record
from core.table import Source
from identity.numbers import FIRST_ALLOCATED, HOST, LOCAL_FLAG, REMOTE_NODE
from kvstore import schema
from kvstore.errors import RecordError
from kvstore.sink import TableSink


def ip_entry(key: str, value: bytes) -> tuple[str, Record]:
    """Return (prefix, record) of an ip/v1 entry."""
    space, found = schema.parse_ip_entry(key, value)
    identity = found.identity
    if not FIRST_ALLOCATED <= identity < LOCAL_FLAG:
        identity = _reserved(key, identity)
    record = Record(identity, sys.intern(found.host_ip), found.key, found.metadata, space)
    return with_length(found.ip if found.mask is None else found.prefix), record


def ip_entries(items: Sequence[tuple[str, bytes]]) -> list[tuple[str, Record]] | None:
    """Return what `ip_entry` does of each item; None where one of them needs a closer look."""
    plain = schema.parse_plain_ips(items) if items else None
    if plain is None:
        return None
    identities = [each.identity for each in plain.records]
    if min(identities) < FIRST_ALLOCATED or max(identities) >= LOCAL_FLAG:
        return None
    records = map(
        Record,
        identities,
        map(sys.intern, [each.host_ip for each in plain.records]),
        [each.key for each in plain.records],
        [each.metadata for each in plain.records],
        repeat(plain.space),
    )
    tail = f"/{plain.length}"
    return list(zip([each.ip + tail for each in plain.records], records, strict=True))


def _reserved(key: str, identity: int) -> int:
    """Return what a reserved number means here: what another node calls `host` is a remote node to us."""
    if not 0 < identity < FIRST_ALLOCATED:
        raise RecordError(key, f"identity {identity} is not one that several hosts can speak of")
    return REMOTE_NODE if identity == HOST else identity


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
    return f"{prefix}/128" if ":" in prefix else f"{prefix}/32"


class IpSink(TableSink[str, Record]):
    """All address spaces in one table: the last writer counts, and only its deletion is a deletion.

    Of what was restored from the kernel's map the space is not known: any deletion of it counts.  Held are
    deletions of what agents of other hosts than the `own` one wrote: a machine's entry is on no host's lease.
    """

    def __init__(
        self, source: Source[str, Record], grace: float, *, hold: float = 0.0, own: str = ""
    ) -> None:
        super().__init__(source, ip_entry, ip_prefix, grace=grace, hold=hold)
        self._not_held = ("", own)

    def _read(self, items: Sequence[tuple[str, bytes]]) -> tuple[list[tuple[str, Record]], list[RecordError]]:
        plain = ip_entries(items)
        return (plain, []) if plain is not None else super()._read(items)

    def deleted(self, key: str) -> None:
        self.ignored.pop(key, None)
        try:
            space, prefix = schema.parse_ip_key(key)
        except RecordError:
            return
        known = self.source.entries().get(with_length(prefix))
        if known is None or known.space in ("", space):
            super().deleted(key)

    def _may_be_lost(self, entry: str) -> bool:
        known = self.source.entries().get(entry)
        return known is not None and known.host_ip not in self._not_held and not is_machine(known)


def is_machine(record: Record) -> bool:
    """True for the entry of a VM or bare-metal machine: no agent's, and taken back by a person."""
    return record.metadata.startswith(schema.MACHINE)
