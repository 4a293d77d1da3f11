# SPDX-License-Identifier: Apache-2.0
"""The composition root: builds every part from the configuration and wires them together.

    sources                    tables               reconcilers → targets
    driver, checkpoint, API    endpoints            endpoints → interface, programs, route
    identities/v1/id/          identities           policy-maps → cilium_policy_<id>
    policies (dir, etcd)       policies             ipcache → cilium_ipcache
    ip/v1/, nodes/v1/          ipcache, nodes       own-entries → ip/v1/ keys under our lease
                                                    firewall → nft, iptables

`build` does what needs the kernel and the disk once; `start` hands every task to the supervisor with the
answer to what happens when it dies.  That answer is always "start it again": the kernel goes on enforcing
whatever happens here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from loguru import logger

from agent import ipcache, publish, remembered, sinks
from agent.checkpoint import Checkpoint, Node
from agent.collector import MapCollector
from agent.conntrack import Conntrack
from agent.derive import Derivations
from agent.driver import Driver
from agent.endpoint import Endpoint
from agent.endpoints import EndpointManager
from agent.engine import Engine
from agent.engine_watch import EngineWatch
from agent.events import EventPump
from agent.firewall import FirewallRules, FirewallTarget
from agent.gate import Gates
from agent.host import HostView, look, node_name
from agent.keeper import Keeper
from agent.nodes import follow_nodes
from agent.plumbing import EndpointTarget, Place, PolicyMapStore
from agent.policies import DocumentTable, PolicyNames, PolicyTable, Refusals, new_documents, new_policies
from agent.policy_maps import PolicyMaps
from agent.policy_sources import PolicyDirectory, PolicyKeys
from agent.pool import Pool, automatic_network
from agent.programs import HostPrograms
from core import metrics
from core.backoff import jittered
from core.files import write_atomic
from core.options import Config
from core.reconciler import Reconciler
from core.supervisor import Supervisor
from core.table import Table
from datapath.devices import Devices
from datapath.firewall import Firewall, FirewallState
from datapath.forward import ForwardChain
from datapath.maps import IpcacheMap, LxcMap
from datapath.netlink import Netlink
from datapath.routes import Routes
from identity import heartbeat
from identity.allocator import Allocator
from identity.cache import IdentityCache
from identity.filter import LabelFilter
from identity.gc import Collector
from identity.labels import Labels
from identity.local import LocalIdentities
from kvstore import schema
from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.election import Election
from kvstore.session import Session
from kvstore.sink import TableSink
from kvstore.watcher import Follower, Sink
from policy.engine import PolicyEngine
from policy.model import EnforcementMode
from prestart import cluster

# Records that a relist lacked are looked at this often; their grace is minutes to hours.
EXPIRE_S = 15.0
CHECKPOINT_S = 5.0
# The elected role changes hands within this time after its holder is gone.
ROLE_TTL_S = 30
OPERATOR = "operator"


@dataclass(eq=False)
class Parts:
    """Everything that was built; each part says in its own module who owns it."""

    config: Config
    node: Node
    host: HostView
    pool: Pool
    checkpoint: Checkpoint
    client: Client
    session: Session
    role_session: Session
    election: Election
    identities: IdentityCache
    local: LocalIdentities
    allocator: Allocator
    documents: DocumentTable
    policies: PolicyTable
    policy_names: PolicyNames
    refusals: Refusals
    directory: PolicyDirectory
    policy_keys: PolicyKeys
    policy_maps: PolicyMaps
    policy_store: PolicyMapStore
    addresses: ipcache.IpTable
    nodes: Table[str, schema.NodeRecord]
    endpoints: EndpointManager
    derivations: Derivations
    firewall: FirewallRules
    keeper: Keeper
    programs: HostPrograms
    events: EventPump
    engine: Engine | None
    driver: Driver | None
    engine_watch: EngineWatch | None
    lxc: LxcMap
    ipcache_map: IpcacheMap
    netlink: Netlink
    devices: Devices
    reconcilers: dict[str, Reconciler[int, Endpoint]]
    ipcache: Reconciler[str, ipcache.Record]
    followers: list[Follower]
    gates: Gates
    conntrack: Conntrack
    ip_sink: sinks.IpSink
    node_sink: TableSink[str, schema.NodeRecord]


async def build(config: Config, events: EventPump, programs: HostPrograms, gates: Gates) -> Parts:
    """Build everything.  Raises HoldfastError for what the host or the configuration makes impossible."""
    checkpoint = Checkpoint(config["state-dir"])
    host = await asyncio.to_thread(look, config["ipv4-node"], config["devices"])
    node = await asyncio.to_thread(_node, config, checkpoint, host)
    pool = Pool(IPv4Network(node.pool))
    netlink = Netlink()
    devices, routes = Devices(netlink), Routes(netlink)
    lxc, ipcache_map = programs.maps.lxc, programs.maps.ipcache

    client = Client(_etcd_config(config))
    session = Session(client, ttl=int(config["kvstore-lease-ttl"]), lease=node.lease)
    role_session = Session(client, ttl=ROLE_TTL_S, name=node.name)
    identities = IdentityCache(grace=config["kvstore-missing-grace-period"])
    local = LocalIdentities(identities.local)
    local.restore(node.local_identities)
    identities.local.mark_in_sync()

    documents, policies, refusals = new_documents(), new_policies(), Refusals()
    policy_names = PolicyNames(documents, policies, refusals)
    engine = PolicyEngine(limit=config["bpf-policy-map-max"], mode=EnforcementMode(config["enable-policy"]))
    policy_store = PolicyMapStore(programs.catalogue, programs.root)
    policy_maps = PolicyMaps(engine, policy_store)
    addresses = ipcache.new_table()
    nodes: Table[str, schema.NodeRecord] = Table("nodes", ("kvstore",))
    derivations = Derivations(identities.table, policies, local, addresses, policy_maps)
    ip_reconciler = ipcache.reconciler(addresses, ipcache_map, policy_maps.reconciler)

    table: Table[int, Endpoint] = Table("endpoints", ("agent",))
    manager_slot: list[EndpointManager] = []
    allocator = Allocator(
        client,
        session,
        identities,
        owner=str(host.node_ip),
        cluster_id=config["cluster-id"],
        on_renumbered=partial(_renumbered, manager_slot),
    )
    endpoints = EndpointManager(
        table, pool, checkpoint, allocator, LabelFilter(config["labels"]), derivations
    )
    manager_slot.append(endpoints)
    endpoints.store.last_id = node.last_endpoint_id
    if node.last_address:
        pool.resume_after(IPv4Address(node.last_address))

    conntrack = Conntrack((programs.maps.ct_tcp, programs.maps.ct_any))
    place = Place(programs.root, config["mtu"] or host.mtu, str(host.node_ip), node.pool)
    target = EndpointTarget(place, devices, routes, lxc, policy_store, programs)
    own = publish.OwnEntries(
        session,
        space=config["ip-address-space"],
        cluster=config["cluster-name"],
        node=node.name,
        node_ip=host.node_ip,
    )
    reconcilers = {
        "endpoints": Reconciler("endpoints", table, target),
        "own-entries": publish.reconciler(table, own),
    }
    forward = ForwardChain() if config["install-iptables-rules"] else None
    firewall = FirewallRules(_firewall_state(config, pool), FirewallTarget(Firewall(), forward))
    derivations.attach(reconcilers["endpoints"], ip_reconciler, conntrack, firewall)

    docker = config["docker-endpoint"].removeprefix("unix://")
    container_engine = Engine(docker) if docker else None
    driver = watch = None
    if container_engine is not None:
        driver = Driver(config["docker-plugin-socket"], endpoints, container_engine, checkpoint)
        watch = EngineWatch(container_engine, endpoints, driver)

    ip_sink = sinks.IpSink(addresses.source(ipcache.KVSTORE_SOURCE), config["kvstore-missing-grace-period"])
    node_sink = TableSink(
        nodes.source("kvstore"),
        sinks.node_entry,
        sinks.node_name,
        grace=config["kvstore-missing-grace-period"],
    )
    policy_keys = PolicyKeys(documents, refusals, config["kvstore-missing-grace-period"])
    view = await asyncio.to_thread(checkpoint.view)
    remembered.restore(view, policy_keys, identities)
    remembered.restore_addresses(addresses.source(ipcache.KVSTORE_SOURCE), ipcache_map, pool.network)
    return Parts(
        config=config,
        node=node,
        host=host,
        pool=pool,
        checkpoint=checkpoint,
        client=client,
        session=session,
        role_session=role_session,
        election=Election(client, role_session, OPERATOR),
        identities=identities,
        local=local,
        allocator=allocator,
        documents=documents,
        policies=policies,
        policy_names=policy_names,
        refusals=refusals,
        directory=PolicyDirectory(Path(config["policy-dir"]), documents, policy_names, refusals),
        policy_keys=policy_keys,
        policy_maps=policy_maps,
        policy_store=policy_store,
        addresses=addresses,
        nodes=nodes,
        endpoints=endpoints,
        derivations=derivations,
        firewall=firewall,
        keeper=Keeper(
            host,
            addresses,
            devices,
            routes,
            lxc,
            programs,
            configured_devices=config["devices"],
            pool=node.pool,
            router=str(pool.router),
        ),
        programs=programs,
        events=events,
        engine=container_engine,
        driver=driver,
        engine_watch=watch,
        lxc=lxc,
        ipcache_map=ipcache_map,
        netlink=netlink,
        devices=devices,
        reconcilers=reconcilers,
        ipcache=ip_reconciler,
        gates=gates,
        conntrack=conntrack,
        followers=[
            _resuming(client, schema.IDENTITY_IDS, identities, view.identities_at, gates),
            _resuming(client, schema.POLICIES, policy_keys, view.policies_at, gates),
            Follower(client, schema.NODES, node_sink, gate=gates.relist),
            Follower(client, schema.IPS, ip_sink, gate=gates.relist),
        ],
        ip_sink=ip_sink,
        node_sink=node_sink,
    )


def _resuming(client: Client, prefix: str, sink: Sink, at: remembered.Place, gates: Gates) -> Follower:
    """Return a follower that goes on where the restored view stands."""
    return Follower(
        client, prefix, sink, resume_revision=at.revision, resume_cluster=at.cluster_id, gate=gates.relist
    )


def start(parts: Parts, supervisor: Supervisor) -> None:
    """Restore what the checkpoint knows and start every task."""
    restored = parts.endpoints.restore()
    if parts.driver is not None:
        parts.driver.restore()
    metrics.REGISTRY.register(MapCollector(parts.programs.maps))
    logger.info("{} endpoints restored, pool {}, node {}", restored, parts.node.pool, parts.node.name)
    for name, main in _tasks(parts).items():
        supervisor.start(name, main)


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
    for follower in parts.followers:
        gated = follower.prefix == schema.IPS
        run = partial(_follow_after_gate, parts, follower) if gated else follower.run
        tasks[f"watch {follower.prefix}"] = held(run)
    tasks["nodes to ipcache"] = partial(
        follow_nodes, parts.nodes, parts.addresses, parts.node.name, parts.config
    )
    tasks["conntrack"] = parts.conntrack.run
    tasks["grace periods"] = partial(_expire, parts)
    tasks["checkpoint"] = partial(_checkpoint, parts)
    tasks["restored"] = partial(_restored, parts)
    if parts.driver is not None and parts.engine_watch is not None:
        tasks["network driver"] = parts.driver.serve
        tasks["engine watch"] = parts.engine_watch.run
    return tasks


async def _session(parts: Parts) -> None:
    record = publish.node_record(
        name=parts.node.name,
        cluster=parts.config["cluster-name"],
        cluster_id=parts.config["cluster-id"],
        node_ip=parts.host.node_ip,
        router=parts.pool.router,
        pool=parts.pool.network,
    )
    key = schema.node_key(parts.config["cluster-name"], parts.node.name)
    await parts.session.own(key, schema.encode_node(record))
    await parts.session.run()


async def _follow_after_gate(parts: Parts, follower: Follower) -> None:
    """Addresses come after policies and identities: an address must not get a number no map knows."""
    await parts.policy_maps.opened.wait()
    await follower.run()


async def _restored(parts: Parts) -> None:
    """Say that the endpoints are complete once the engine has listed and the kernel has been written."""
    if parts.engine_watch is not None:
        await parts.engine_watch.first_list.wait()
    await parts.reconcilers["endpoints"].wait_idle()
    parts.endpoints.restored()
    parts.addresses.source(ipcache.LOCAL_SOURCE).mark_in_sync()
    await asyncio.Event().wait()


async def _expire(parts: Parts) -> None:
    while True:
        await asyncio.sleep(jittered(EXPIRE_S))
        ended = len(parts.identities.expire()) + len(parts.policy_keys.source.expire())
        ended += len(parts.ip_sink.source.expire()) + len(parts.node_sink.source.expire())
        if ended:
            logger.warning("{} records stayed missing in etcd for their whole grace: removed", ended)


async def _checkpoint(parts: Parts) -> None:
    """Keep the node's record and, for the start hook, the list of the cluster's nodes."""
    written: list[str] = []
    saved = (-1, -1)
    while True:
        await asyncio.sleep(CHECKPOINT_S)
        saved = await _save_view(parts, saved)
        parts.endpoints.store.save_unsaved()
        now = node_now(parts)
        if now != parts.node:
            parts.node = now
            await asyncio.to_thread(parts.checkpoint.save_node, now)
        if parts.nodes.in_sync:
            names = sorted({record.name for _, record in parts.nodes.items()} | {parts.node.name})
            if names != written:
                path = parts.checkpoint.directory / "cluster.json"
                await asyncio.to_thread(write_atomic, path, cluster.encode(names))
                written = names


async def _save_view(parts: Parts, saved: tuple[int, int]) -> tuple[int, int]:
    """Write what is known of policies and identities if it changed since `saved` (the tables' revisions)."""
    now = (parts.policies.revision, parts.identities.table.revision)
    places = {each.prefix: remembered.place_of(each) for each in parts.followers}
    if now == saved or not parts.policy_maps.is_open:
        return saved
    view = remembered.view_of(
        parts.policy_keys, parts.identities, places[schema.POLICIES], places[schema.IDENTITY_IDS]
    )
    await asyncio.to_thread(parts.checkpoint.save_view, view)
    return now


def node_now(parts: Parts) -> Node:
    """Return the node's checkpoint record as of now."""
    return Node(
        name=parts.node.name,
        pool=parts.node.pool,
        last_endpoint_id=parts.endpoints.store.last_id,
        last_address=str(parts.pool.last),
        local_identities=parts.local.numbers(),
        lease=parts.session.lease_id,
    )


def _renumbered(slot: list[EndpointManager], labels: Labels, old: int, new: int) -> None:
    for manager in slot:
        manager.renumber(labels, new)


def _node(config: Config, checkpoint: Checkpoint, host: HostView) -> Node:
    """Return this node's name and pool: configured, else as before, else found out."""
    known = checkpoint.node()
    name = node_name(config["node-name"] or (known.name if known else ""))
    pool = config["ipv4-range"] or (IPv4Network(known.pool) if known else None)
    if pool is None:
        pool = automatic_network(IPv4Address(host.node_ip), list(host.networks))
    node = _node_record(known, name, str(pool))
    checkpoint.save_node(node)
    return node


def _node_record(known: Node | None, name: str, pool: str) -> Node:
    """Return the node's record with this name and pool, keeping what else was known."""
    if known is None:
        return Node(name, pool)
    return Node(
        name,
        pool,
        last_endpoint_id=known.last_endpoint_id,
        last_address=known.last_address,
        local_identities=known.local_identities,
        lease=known.lease,
    )


def _etcd_config(config: Config) -> EtcdConfig:
    given = config["kvstore-opt"]
    if "etcd.address" in given:
        return EtcdConfig((given["etcd.address"],))
    return EtcdConfig.load(Path(given["etcd.config"]))


def _firewall_state(config: Config, pool: Pool) -> FirewallState:
    direct = config["ipv4-native-routing-cidr"]
    return FirewallState(
        router=str(pool.router),
        pools=frozenset({str(pool.network)}),
        direct=frozenset({str(direct)} if direct else ()),
        masquerade=config["enable-ipv4-masquerade"],
    )
