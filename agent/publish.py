# SPDX-License-Identifier: Apache-2.0
"""What this host says about itself in etcd: its node record and an ip/v1 entry an endpoint.

The session owns the keys: it writes them when etcd is there, keeps them alive on the lease and puts them
back when somebody removes them.  So this target only states what is wanted and never waits for etcd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

from agent.endpoint import Endpoint
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
        self._keys: dict[int, str] = {}

    async def update(self, items: Sequence[tuple[int, Endpoint]]) -> Mapping[int, Exception]:
        for endpoint_id, endpoint in items:
            if not endpoint.identity:
                await self._withdraw(endpoint_id)
                continue
            key = schema.ip_key(self._space, endpoint.ipv4)
            if self._keys.get(endpoint_id, key) != key:
                await self._withdraw(endpoint_id)
            self._keys[endpoint_id] = key
            await self._session.own(key, schema.encode_ip(self._record(endpoint)))
        return {}

    async def delete(self, keys: Sequence[int]) -> Mapping[int, Exception]:
        for endpoint_id in keys:
            await self._withdraw(endpoint_id)
        return {}

    async def prune(self, table: Table[int, Endpoint]) -> int:
        """Nothing: what former lives of this node left goes by way of its lease; see `kvstore.former`."""
        return 0

    async def _withdraw(self, endpoint_id: int) -> None:
        key = self._keys.pop(endpoint_id, None)
        if key is not None and key not in self._keys.values():
            await self._session.disown(key)

    def _record(self, endpoint: Endpoint) -> schema.IpRecord:
        metadata = f"{self._metadata}{endpoint.id}"
        return schema.ip_record(endpoint.ipv4, endpoint.identity, host_ip=self._node_ip, metadata=metadata)


def reconciler(table: Table[int, Endpoint], entries: OwnEntries) -> Reconciler[int, Endpoint]:
    return Reconciler("own-entries", table, entries)


def node_record(
    *, name: str, cluster: str, cluster_id: int, node_ip: IPv4Address, router: IPv4Address, pool: IPv4Network
) -> schema.NodeRecord:
    """Return this node's record as a real agent writes it."""
    return schema.NodeRecord(
        name=name,
        cluster=cluster,
        addresses=(
            schema.NodeAddress("InternalIP", str(node_ip)),
            schema.NodeAddress("CiliumInternalIP", str(router)),
        ),
        ipv4_alloc_cidr=schema.AllocCidr.of(str(pool)),
        cluster_id=cluster_id,
        source="local",
        identity=1,
    )
