# SPDX-License-Identifier: Apache-2.0
"""Other nodes of the cluster: their own addresses are identity `remote-node` in the ip→identity table."""

from __future__ import annotations

from agent.ipcache import NODES_SOURCE, IpTable, Record
from agent.sinks import with_length
from core.options import Config
from core.table import Source, Table
from identity.numbers import REMOTE_NODE
from kvstore import schema

ADDRESS_TYPES = frozenset({"InternalIP", "ExternalIP", "CiliumInternalIP"})


async def follow_nodes(
    nodes: Table[str, schema.NodeRecord], addresses: IpTable, own_name: str, config: Config
) -> None:
    """Keep the source `nodes` of the ip→identity table equal to the nodes until cancelled."""
    source = addresses.source(NODES_SOURCE)
    own = f"{config['cluster-name']}/{own_name}"
    claims = NodeClaims()
    # What this task wrote before it died and was started again: each is written anew, or deleted.
    turned = set(source.entries())
    changes = nodes.subscribe()
    changes.poke()
    try:
        while True:
            await changes.wait()
            for name in changes.take():
                record = None if name == own else nodes.get(name)
                turned |= claims.changed(name, record)
            for prefix in turned:
                _write(source, prefix, claims.host_of(prefix))
            turned.clear()
            if nodes.in_sync:
                source.mark_in_sync()
    finally:
        nodes.unsubscribe(changes)


def _write(source: Source[str, Record], prefix: str, host_ip: str | None) -> None:
    if host_ip is None:
        source.delete(prefix)
    else:
        source.upsert(prefix, Record(REMOTE_NODE, host_ip))


class NodeClaims:
    """Which nodes say that an address is theirs.  Pure.

    Of a host that was renamed or installed again there are two records, until the old one's lease ends; the
    address stays as long as one of them names it, and of their hosts the one that spoke last counts.
    """

    def __init__(self) -> None:
        self._by_prefix: dict[str, dict[str, str]] = {}
        self._by_node: dict[str, set[str]] = {}

    def changed(self, name: str, record: schema.NodeRecord | None) -> set[str]:
        """Take a node's record, or its end; return the prefixes that this may concern."""
        before = self._by_node.pop(name, set())
        now = set() if record is None else node_prefixes(record)
        for prefix in before:
            self._by_prefix[prefix].pop(name)
        if record is not None:
            self._by_node[name] = now
            for prefix in now:
                self._by_prefix.setdefault(prefix, {})[name] = record.address()
        return before | now

    def host_of(self, prefix: str) -> str | None:
        """Return the address of the host that has `prefix`, None when nobody says so."""
        claims = self._by_prefix.get(prefix)
        if claims:
            return next(reversed(claims.values()))
        self._by_prefix.pop(prefix, None)
        return None


def node_prefixes(record: schema.NodeRecord) -> set[str]:
    """Return the prefixes of a node's own addresses.  Pure."""
    return {with_length(each.ip) for each in record.addresses or () if each.type in ADDRESS_TYPES}
