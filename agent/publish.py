# SPDX-License-Identifier: Apache-2.0
"""What this host says about itself in etcd: its node record and an ip/v1 entry an endpoint.

The session owns the keys: it writes them when etcd is there, keeps them alive on the lease and puts them
back when somebody removes them.  So this target only states what is wanted and never waits for etcd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address

from agent.endpoint import Endpoint
from agent.pool import Pool
from core.reconciler import Reconciler
from core.table import Table
from kvstore import schema
from kvstore.session import Session


class OwnEntries:
    """Operations over the endpoints: the ip/v1 keys of those that have an identity."""

    def __init__(
        self, session: Session, *, space: str, cluster: str, node: str, node_ip: IPv4Address
    ) -> None:
        self._session = session
        self._space = space
        self._metadata = f"cilium-global:{cluster}:{node}:"
        self._node_ip = str(node_ip)
        # Of each endpoint, one of each of its addresses.
        self._keys: dict[int, frozenset[str]] = {}

    async def update(self, items: Sequence[tuple[int, Endpoint]]) -> Mapping[int, Exception]:
        for endpoint_id, endpoint in items:
            records = self._records(endpoint)
            await self._withdraw(endpoint_id, keep=frozenset(records))
            if records:
                self._keys[endpoint_id] = frozenset(records)
            for key, record in records.items():
                await self._session.own(key, record)
        return {}

    async def delete(self, keys: Sequence[int]) -> Mapping[int, Exception]:
        for endpoint_id in keys:
            await self._withdraw(endpoint_id)
        return {}

    async def prune(self, table: Table[int, Endpoint]) -> int:
        """Nothing: what former lives of this node left goes by way of its lease; see `kvstore.former`."""
        return 0

    async def _withdraw(self, endpoint_id: int, keep: frozenset[str] = frozenset()) -> None:
        """Disown an endpoint's keys but for `keep`, and but for what another endpoint has by now."""
        gone = self._keys.pop(endpoint_id, frozenset()) - keep
        for key in gone.difference(*self._keys.values()):
            await self._session.disown(key)

    def _records(self, endpoint: Endpoint) -> dict[str, bytes]:
        """Return key → record of an endpoint; nothing of one without an identity."""
        if not endpoint.identity:
            return {}
        host, metadata = self._node_ip, f"{self._metadata}{endpoint.id}"
        return {
            schema.ip_key(self._space, address): schema.encode_ip(
                schema.ip_record(address, endpoint.identity, host_ip=host, metadata=metadata)
            )
            for address in endpoint.addresses.values()
        }


def reconciler(table: Table[int, Endpoint], entries: OwnEntries) -> Reconciler[int, Endpoint]:
    return Reconciler("own-entries", table, entries)


def node_record(
    *, name: str, cluster: str, cluster_id: int, node_ips: Sequence[str], pool: Pool
) -> schema.NodeRecord:
    """Return this node's record as a real agent writes it; `node_ips`: at most one of each family."""
    return schema.NodeRecord(
        name=name,
        cluster=cluster,
        addresses=(
            *(schema.NodeAddress("InternalIP", address) for address in node_ips),
            *(schema.NodeAddress("CiliumInternalIP", address) for address in pool.routers),
        ),
        ipv4_alloc_cidr=schema.AllocCidr.of(str(pool.network)),
        ipv6_alloc_cidr=schema.AllocCidr.of(str(pool.network6)) if pool.network6 else None,
        cluster_id=cluster_id,
        source="local",
        identity=1,
    )
