# SPDX-License-Identifier: Apache-2.0
"""Who this node is before anything is built: its name, its pools, its lease, and where its etcd is.

From the configuration, else from the checkpoint, else from the cluster.  Called by: agent.parts.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

from loguru import logger

from agent.checkpoint import Checkpoint, Node, own_lease
from agent.gate import Gates
from agent.host import HostView, node_name
from agent.options import ETCD_CONFIG, ETCD_QPS
from agent.pool import automatic_network, automatic_network6
from agent.registration import first_pool
from core.options import Config
from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.pools import Wish


def ipv6_range(config: Config, host: HostView) -> IPv6Network:
    return config["ipv6-range"] or automatic_network6(host.node_ip)


async def own_node(config: Config, checkpoint: Checkpoint, host: HostView, gates: Gates) -> tuple[Node, Wish]:
    """Return this node's name and pool, and what it asks the cluster for.

    The pool is configured, else as before, else claimed (which waits for etcd), else found out.
    """
    known = await asyncio.to_thread(checkpoint.node)
    name = node_name(config["node-name"] or (known.name if known else ""))
    wish = _wish(config, known, name, host)
    if wish.fixed is None:
        await gates.connect()
        client = Client(etcd_config(config))
        try:
            wish = replace(wish, fixed=await first_pool(client, config["cluster-name"], wish))
        finally:
            await client.close()
    node = _node_record(known, name, str(wish.fixed), host.node_ip)
    if node != known:
        try:
            await asyncio.to_thread(checkpoint.save_node, node)
        except OSError as error:  # no reason to keep containers waiting; it is tried again
            logger.error("checkpoint of this node can not be written: {}", error)
    return node, wish


def _wish(config: Config, known: Node | None, name: str, host: HostView) -> Wish:
    pool = config["ipv4-range"] or (IPv4Network(known.pool) if known else None)
    if pool is None and config["cluster-pool-ipv4-cidr"] is None:
        pool = automatic_network(IPv4Address(host.node_ip), list(host.networks))
    return Wish(
        name,
        str(host.node_ip),
        fixed=pool,
        cluster_range=config["cluster-pool-ipv4-cidr"],
        length=config["cluster-pool-ipv4-mask-size"],
        former=known.name if known else "",
        lease=(known.former_lease or known.lease) if known else 0,
        avoid=tuple(each for each in host.networks if each.prefixlen),
    )


def _node_record(known: Node | None, name: str, pool: str, node_ip: IPv4Address) -> Node:
    """Return the node's record with this name and pool, keeping what else was known."""
    if known is None:
        return Node(name, pool)
    lease = own_lease(known, node_ip)
    return Node(
        name,
        pool,
        last_endpoint_id=known.last_endpoint_id,
        last_address=known.last_address,
        local_identities=known.local_identities,
        lease=lease,
        lost_leases=known.lost_leases if known.lease_address in ("", str(node_ip)) else (),
        lease_address=str(node_ip),
        former_lease=known.former_lease or (known.lease if not lease else 0),
    )


def etcd_config(config: Config) -> EtcdConfig:
    given = config["kvstore-opt"]
    if "etcd.address" in given:
        return EtcdConfig((given["etcd.address"],))
    return EtcdConfig.load(Path(given.get("etcd.config", ETCD_CONFIG)))


def requests_per_s(config: Config) -> int:
    """Return how many requests a second etcd gets from this host."""
    return int(config["kvstore-opt"].get("etcd.qps", ETCD_QPS))
