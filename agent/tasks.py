# SPDX-License-Identifier: Apache-2.0
"""The tasks of a running agent: what is started, what holds it back, and the small periodic chores.

`start` hands every task to the supervisor; all of them are started again when they die.  Called by
`agent.main` with what `agent.parts` built.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from loguru import logger

from agent import ipcache, publish, remembered
from agent.agent_events import AgentEvents, start_event
from agent.checkpoint import Node
from agent.collector import MapCollector
from agent.departures import Departures
from agent.nodes import node_names
from agent.parts import Parts
from agent.report_health import HealthCollector
from agent.staleness import StalenessAlarm
from core import metrics
from core.backoff import jittered
from core.files import write_atomic
from core.supervisor import Supervisor
from identity import heartbeat
from identity.gc import Collector
from kvstore import former, schema
from kvstore.watcher import Follower
from prestart import cluster

# Prefixes that no policy names, and numbers that nothing has, are looked for this often.
UNUSED_S = 15.0
CHECKPOINT_S = 5.0


def start(parts: Parts, supervisor: Supervisor) -> None:
    """Restore what the checkpoint knows and start every task."""
    restored = parts.endpoints.restore()
    if parts.driver is not None:
        parts.driver.restore()
    metrics.REGISTRY.register(MapCollector(parts.programs.maps, lambda: parts.policy_maps.pressure))
    if parts.prober is not None:
        metrics.REGISTRY.register(HealthCollector(parts.prober))
    logger.info("{} endpoints restored, pool {}, node {}", restored, parts.node.pool, parts.node.name)
    for name, main in _tasks(parts).items():
        supervisor.start(name, main)
    parts.events.hub.publish(start_event())


def _tasks(parts: Parts) -> dict[str, Callable[[], Awaitable[None]]]:
    """Name every task.  All of them are started again when they die."""
    tasks: dict[str, Callable[[], Awaitable[None]]] = {
        f"reconciler {name}": reconciler.run for name, reconciler in parts.reconcilers.items()
    }
    tasks["reconciler policy-maps"] = parts.policy_maps.reconciler.run
    tasks["reconciler ipcache"] = parts.ipcache.run
    tasks["reconciler firewall"] = parts.firewall.reconciler.run
    tasks["host"] = parts.keeper.run
    tasks["firewall watch"] = parts.firewall.watch
    tasks["firewall rules"] = partial(parts.firewall.follow, parts.endpoints.table)
    tasks["identities to policy"] = parts.derivations.follow_identities
    tasks["policies to policy"] = parts.derivations.follow_policies
    tasks["policy directory"] = parts.directory.run
    told = AgentEvents(
        parts.events.hub, parts.policies, parts.endpoints.table, parts.policy_maps, parts.derivations
    )
    tasks["events of policies"] = told.follow_policies
    tasks["events of endpoints"] = told.follow_endpoints
    tasks["events of policy maps"] = told.follow_maps
    tasks["orders to allow all"] = partial(parts.allow_all.run, parts.policy_maps)
    tasks["policy names"] = parts.policy_names.run
    held = parts.gates.behind_connect
    tasks["kvstore session"] = held(partial(_session, parts))
    tasks["kvstore roles"] = held(parts.role_session.run)
    tasks["election"] = held(parts.election.run)
    tasks["heartbeat"] = partial(heartbeat.run, parts.client, parts.election)
    tasks["identity garbage collection"] = partial(
        Collector(
            parts.client,
            cluster_id=parts.config["cluster-id"],
            interval=parts.config["identity-gc-interval"],
        ).run,
        parts.election,
    )
    tasks["identity allocator"] = held(parts.allocator.run)
    tasks["renumbering"] = partial(parts.renumbering.run, parts.endpoints.renumber)
    for follower in parts.followers:
        gated = follower.prefix == schema.IPS
        run = partial(_follow_after_gate, parts, follower) if gated else follower.run
        tasks[f"watch {follower.prefix}"] = held(run)
    tasks["nodes"] = parts.node_follower.run
    for each in parts.node_reconcilers:
        tasks[f"reconciler {each.name}"] = each.run
    tasks["path MTUs to routes"] = parts.node_reconcilers.follow_mtus
    if not parts.overlay.enabled:
        tasks["firewall pools"] = partial(parts.firewall.follow_pools, parts.pools, parts.endpoints.table)
    tasks["staleness"] = StalenessAlarm(parts.config["kvstore-staleness-threshold"]).run
    tasks["conntrack"] = parts.conntrack.run
    tasks["unused prefixes"] = partial(_forget_unused, parts)
    tasks["departures"] = Departures(
        parts.nodes,
        parts.addresses,
        parts.identities.source,
        parts.policy_keys.source,
        parts.followers,
        own=f"{parts.config['cluster-name']}/{parts.node.name}",
        who_answers=parts.prober.who_answers if parts.prober is not None else None,
    ).run
    tasks["checkpoint"] = partial(_checkpoint, parts)
    tasks["views"] = parts.memory.run
    tasks["addresses of the last life"] = partial(_restore_addresses, parts)
    tasks["restored"] = partial(_restored, parts)
    tasks["former keys"] = partial(_former_keys, parts)
    if parts.driver is not None and parts.engine_watch is not None:
        tasks["network driver"] = parts.driver.serve
        tasks["engine watch"] = parts.engine_watch.run
    if parts.prober is not None and parts.health_server is not None:
        tasks["health probes"] = parts.prober.run
        tasks["health answers"] = parts.health_server.run
    if parts.name_index is not None and parts.names_server is not None:
        tasks["names from identities"] = parts.name_index.follow_identities
        tasks["names from addresses"] = parts.name_index.follow_addresses
        tasks["names answers"] = parts.names_server.run
    if parts.path_prober is not None:
        tasks["path MTUs"] = parts.path_prober.run
    return tasks


async def _session(parts: Parts) -> None:
    record = publish.node_record(
        name=parts.node.name,
        cluster=parts.config["cluster-name"],
        cluster_id=parts.config["cluster-id"],
        node_ips=parts.host.node_ips,
        pool=parts.pool,
    )
    key = schema.node_key(parts.config["cluster-name"], parts.node.name)
    await parts.registration.confirm()
    await parts.session.own(key, schema.encode_node(record))
    await parts.session.run()


async def _follow_after_gate(parts: Parts, follower: Follower) -> None:
    """Addresses come after policies and identities: an address must not get a number no map knows.

    And after nodes, so that each is written once: with the host that it is behind.
    """
    await parts.addresses_restored.wait()
    await parts.policy_maps.opened.wait()
    await parts.node_follower.caught_up.wait()
    await follower.run()


async def _restored(parts: Parts) -> None:
    """Say that the endpoints are complete once the engine has listed and the kernel has been written."""
    if parts.engine_watch is not None:
        await parts.engine_watch.first_list.wait()
    await parts.reconcilers["endpoints"].wait_idle()
    parts.endpoints.restored()
    parts.addresses.source(ipcache.LOCAL_SOURCE).mark_in_sync()
    await asyncio.Event().wait()


async def _former_keys(parts: Parts) -> None:
    """Have what former lives left in etcd deleted as soon as it is known what this one wants there.

    And again after each full list: a store restored from a snapshot has what this life has deleted since.
    """
    listed = asyncio.Event()
    parts.identities.on_listed.append(listed.set)
    try:
        await parts.endpoints.table.wait_in_sync()
        while True:
            listed.clear()
            await parts.reconcilers["own-entries"].wait_idle()
            await former.abandon_all(parts.client, parts.session, parts.allocator.value_keys)
            await listed.wait()
    finally:
        parts.identities.on_listed.remove(listed.set)


async def _forget_unused(parts: Parts) -> None:
    while True:
        await asyncio.sleep(jittered(UNUSED_S))
        parts.derivations.free_restored_prefixes()
        await parts.derivations.forget_unused()


async def _checkpoint(parts: Parts) -> None:
    """Keep the node's record and, for the start hook, what it has to know: who is in the cluster, and
    whether the next life will go on from a revision or list everything."""
    written: tuple[list[str], bool] = ([], False)
    while True:
        await asyncio.sleep(CHECKPOINT_S)
        parts.checkpoint.save_unsaved()
        now = node_now(parts)
        if now != parts.node:
            parts.node = now
            await asyncio.to_thread(parts.checkpoint.save_node, now)
        if parts.nodes.in_sync:
            names = node_names(parts.nodes, parts.node.name)
            revision = parts.memory.resumable
            if (names, revision > 0) != written:
                path = parts.checkpoint.directory / cluster.FILE
                await asyncio.to_thread(write_atomic, path, cluster.encode(names, revision=revision))
                written = names, revision > 0


async def _restore_addresses(parts: Parts) -> None:
    """Have the addresses of the last life in force before etcd is asked.

    Behind the policy maps: an address must not get a number no map knows.  What the pinned map holds it has
    got already.
    """
    if not parts.addresses_restored.is_set():
        if parts.memory.has_views:
            await parts.policy_maps.opened.wait()
        if not await parts.memory.restore(parts.address_view):
            source, pinned = parts.ip_sink.source, parts.programs.maps.ipcache
            await remembered.restore_pinned(source, pinned, parts.pool.networks)
        parts.addresses_restored.set()
    await asyncio.Event().wait()


def node_now(parts: Parts) -> Node:
    """Return the node's checkpoint record as of now."""
    return Node(
        name=parts.node.name,
        pool=parts.node.pool,
        last_endpoint_id=parts.endpoints.store.last_id,
        last_address=str(parts.pool.last),
        local_identities=parts.local.numbers(),
        lease=parts.session.lease_id,
        lost_leases=parts.session.lost,
        lease_address=str(parts.host.node_ip),
        former_lease=parts.registration.former_lease,
    )
