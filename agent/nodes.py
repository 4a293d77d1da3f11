# SPDX-License-Identifier: Apache-2.0
"""Other nodes of the cluster: their own addresses are identity `remote-node` in the ip→identity table."""

from __future__ import annotations

from agent.ipcache import NODES_SOURCE, IpTable, Record
from agent.sinks import with_length
from core.options import Config
from core.table import Table
from identity.numbers import REMOTE_NODE
from kvstore import schema

ADDRESS_TYPES = frozenset({"InternalIP", "ExternalIP", "CiliumInternalIP"})


async def follow_nodes(
    nodes: Table[str, schema.NodeRecord], addresses: IpTable, own_name: str, config: Config
) -> None:
    """Keep the source `nodes` of the ip→identity table equal to the nodes until cancelled."""
    source = addresses.source(NODES_SOURCE)
    own = f"{config['cluster-name']}/{own_name}"
    changes = nodes.subscribe()
    known: dict[str, set[str]] = {}
    while True:
        await changes.wait()
        for name in changes.take():
            record = nodes.get(name)
            wanted = set() if record is None or name == own else node_prefixes(record)
            host_ip = record.address() if record is not None else ""
            for prefix in wanted:
                source.upsert(prefix, Record(REMOTE_NODE, host_ip))
            for prefix in known.get(name, set()) - wanted:
                source.delete(prefix)
            known[name] = wanted
        if nodes.in_sync:
            source.mark_in_sync()


def node_prefixes(record: schema.NodeRecord) -> set[str]:
    """Return the prefixes of a node's own addresses.  Pure."""
    return {with_length(each.ip) for each in record.addresses or () if each.type in ADDRESS_TYPES}
