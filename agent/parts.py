# SPDX-License-Identifier: Apache-2.0
"""The composition root: builds every part from the configuration and wires them together.

    sources                    tables               reconcilers → targets
    driver, checkpoint, API    endpoints            endpoints → interface, programs, route
    identities/v1/id/          identities           policy-maps → cilium_policy_<id>
    policies (dir, etcd)       policies             ipcache → cilium_ipcache
    ip/v1/, nodes/v1/          ipcache, nodes       own-entries → ip/v1/ keys under our lease
                                                    firewall → nft, iptables

`build` goes through them in stages, each standing on the ones before; `agent.tasks` starts what runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

from agent import ipcache, publish, remembered, sinks
from agent.checkpoint import Checkpoint, Node, own_lease
from agent.conntrack import Conntrack
from agent.derive import Derivations
from agent.driver import Driver
from agent.endpoint import Endpoint
from agent.endpoints import EndpointManager
from agent.engine import Engine
from agent.engine_watch import EngineWatch
from agent.events import EventPump
from agent.firewall import FamilyRules, FirewallRules, FirewallTarget
from agent.gate import Gates
from agent.host import HostView, look, node_name
from agent.keeper import Keeper
from agent.plumbing import EndpointTarget, Place, PolicyMapStore
from agent.policies import DocumentTable, PolicyNames, PolicyTable, Refusals, new_documents, new_policies
from agent.policy_maps import PolicyMaps
from agent.policy_sources import PolicyDirectory, PolicyKeys
from agent.pool import Pool, automatic_network, automatic_network6
from agent.programs import HostPrograms
from core.options import Config
from core.reconciler import Reconciler
from core.table import Table
from datapath.devices import Devices
from datapath.firewall import FirewallState
from datapath.netlink import Netlink
from datapath.routes import Routes
from identity.allocator import Allocator
from identity.cache import IdentityCache
from identity.filter import LabelFilter
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

# The elected role changes hands within this time after its holder is gone.
ROLE_TTL_S = 30
OPERATOR = "operator"


@dataclass(eq=False)
class Ground:
    """What everything stands on: the configuration, this host, what is kept, and the way into the kernel."""

    config: Config
    gates: Gates
    events: EventPump
    programs: HostPrograms
    checkpoint: Checkpoint
    host: HostView
    node: Node
    pool: Pool
    netlink: Netlink
    devices: Devices
    routes: Routes


@dataclass(eq=False)
class Store:
    """etcd: one client, the session of this node's keys, and a short one for elected roles."""

    client: Client
    session: Session
    role_session: Session
    election: Election


@dataclass(eq=False)
class Knowledge:
    """The tables and what feeds them from etcd and from the policy directory."""

    identities: IdentityCache
    local: LocalIdentities
    documents: DocumentTable
    policies: PolicyTable
    policy_names: PolicyNames
    refusals: Refusals
    directory: PolicyDirectory
    policy_keys: PolicyKeys
    addresses: ipcache.IpTable
    nodes: Table[str, schema.NodeRecord]
    ip_sink: sinks.IpSink
    node_sink: TableSink[str, schema.NodeRecord]
    followers: list[Follower]


@dataclass(eq=False)
class Enforcement:
    """From the tables into the kernel: policy maps, ip→identity, endpoints, firewall, the host itself."""

    policy_store: PolicyMapStore
    policy_maps: PolicyMaps
    derivations: Derivations
    ipcache: Reconciler[str, ipcache.Record]
    allocator: Allocator
    endpoints: EndpointManager
    reconcilers: dict[str, Reconciler[int, Endpoint]]
    firewall: FirewallRules
    conntrack: Conntrack
    keeper: Keeper


@dataclass(eq=False)
class EngineSide:
    """The container engine; all None where the host has none."""

    engine: Engine | None = None
    driver: Driver | None = None
    engine_watch: EngineWatch | None = None


@dataclass(eq=False)
class Parts(EngineSide, Enforcement, Knowledge, Store, Ground):
    """Everything that was built; each part says in its own module who owns it."""


async def build(config: Config, events: EventPump, programs: HostPrograms, gates: Gates) -> Parts:
    """Build everything.  Raises HoldfastError for what the host or the configuration makes impossible."""
    ground = await _ground(config, events, programs, gates)
    store = _store(ground)
    view = await asyncio.to_thread(ground.checkpoint.view)
    knowledge = _knowledge(ground, store, view)
    enforcement = _enforcement(ground, store, knowledge)
    engine = _engine(ground, enforcement)
    stages = (ground, store, knowledge, enforcement, engine)
    return Parts(**{name: part for stage in stages for name, part in vars(stage).items()})


async def _ground(config: Config, events: EventPump, programs: HostPrograms, gates: Gates) -> Ground:
    checkpoint = Checkpoint(config["state-dir"])
    host = await asyncio.to_thread(look, config["ipv4-node"], config["devices"])
    node_ip6 = (config["ipv6-node"] or host.node_ip6) if config["enable-ipv6"] else None
    host = replace(host, node_ip6=node_ip6)
    node = await asyncio.to_thread(_node, config, checkpoint, host)
    pool = Pool(IPv4Network(node.pool), _ipv6_range(config, host))
    if node.last_address:
        pool.resume_after(IPv4Address(node.last_address))
    netlink = Netlink()
    return Ground(
        config,
        gates,
        events,
        programs,
        checkpoint,
        host,
        node,
        pool,
        netlink,
        Devices(netlink, ipv6=pool.network6 is not None),
        Routes(netlink),
    )


def _store(ground: Ground) -> Store:
    client = Client(_etcd_config(ground.config))
    session = Session(client, ttl=int(ground.config["kvstore-lease-ttl"]), lease=ground.node.lease)
    role_session = Session(client, ttl=ROLE_TTL_S, name=ground.node.name)
    return Store(client, session, role_session, Election(client, role_session, OPERATOR))


def _knowledge(ground: Ground, store: Store, view: remembered.View) -> Knowledge:
    grace = ground.config["kvstore-missing-grace-period"]
    identities = IdentityCache(grace=grace)
    local = LocalIdentities(identities.local)
    local.restore(ground.node.local_identities)
    identities.local.mark_in_sync()
    documents, policies, refusals = new_documents(), new_policies(), Refusals()
    names = PolicyNames(documents, policies, refusals)
    keys = PolicyKeys(documents, refusals, grace)
    addresses = ipcache.new_table(ipv6=ground.pool.network6 is not None)
    nodes: Table[str, schema.NodeRecord] = Table("nodes", ("kvstore",))
    ip_sink = sinks.IpSink(addresses.source(ipcache.KVSTORE_SOURCE), grace)
    node_sink = TableSink(nodes.source("kvstore"), sinks.node_entry, sinks.node_name, grace=grace)
    remembered.restore(view, keys, identities)
    remembered.restore_addresses(ip_sink.source, ground.programs.maps.ipcache, ground.pool.networks)
    client, relist = store.client, ground.gates.relist
    return Knowledge(
        identities,
        local,
        documents,
        policies,
        names,
        refusals,
        PolicyDirectory(Path(ground.config["policy-dir"]), documents, names, refusals),
        keys,
        addresses,
        nodes,
        ip_sink,
        node_sink,
        followers=[
            _resuming(client, schema.IDENTITY_IDS, identities, view.identities_at, ground.gates),
            _resuming(client, schema.POLICIES, keys, view.policies_at, ground.gates),
            Follower(client, schema.NODES, node_sink, gate=relist),
            _resuming(client, schema.IPS, ip_sink, ground.node.addresses_at, ground.gates, partial=True),
        ],
    )


def _resuming(
    client: Client, prefix: str, sink: Sink, at: remembered.Place, gates: Gates, *, partial: bool = False
) -> Follower:
    """Return a follower that goes on where the restored view stands."""
    return Follower(
        client,
        prefix,
        sink,
        resume_revision=at.revision,
        resume_cluster=at.cluster_id,
        partial=partial,
        gate=gates.relist,
    )


def _enforcement(ground: Ground, store: Store, known: Knowledge) -> Enforcement:
    maps, config = ground.programs.maps, ground.config
    policy_store = PolicyMapStore(ground.programs.catalogue, ground.programs.root)
    engine = PolicyEngine(limit=config["bpf-policy-map-max"], mode=EnforcementMode(config["enable-policy"]))
    policy_maps = PolicyMaps(engine, policy_store)
    derivations = Derivations(
        known.identities.table, known.policies, known.local, known.addresses, policy_maps
    )
    table: Table[int, Endpoint] = Table("endpoints", ("agent",))
    allocator, endpoints = _endpoints(ground, store, known, table, derivations)
    reconcilers = {
        "endpoints": Reconciler("endpoints", table, _endpoint_target(ground, policy_store)),
        "own-entries": publish.reconciler(table, _own_entries(ground, store)),
    }
    ip_reconciler = ipcache.reconciler(known.addresses, maps.ipcache, policy_maps.reconciler)
    conntrack = Conntrack(maps.conntrack)
    firewall = _firewall(config, ground.pool)
    derivations.attach(reconcilers["endpoints"], ip_reconciler, conntrack, firewall)
    return Enforcement(
        policy_store,
        policy_maps,
        derivations,
        ip_reconciler,
        allocator,
        endpoints,
        reconcilers,
        firewall,
        conntrack,
        _keeper(ground, known),
    )


def _endpoints(
    ground: Ground,
    store: Store,
    known: Knowledge,
    table: Table[int, Endpoint],
    kernel: Derivations,
) -> tuple[Allocator, EndpointManager]:
    """Return the allocator and the manager; each has to know the other."""
    slot: list[EndpointManager] = []
    allocator = Allocator(
        store.client,
        store.session,
        known.identities,
        owner=str(ground.host.node_ip),
        cluster_id=ground.config["cluster-id"],
        on_renumbered=partial(_renumbered, slot),
    )
    label_filter = LabelFilter(ground.config["labels"])
    manager = EndpointManager(table, ground.pool, ground.checkpoint, allocator, label_filter, kernel)
    manager.store.last_id = ground.node.last_endpoint_id
    slot.append(manager)
    return allocator, manager


def _renumbered(slot: list[EndpointManager], labels: Labels, old: int, new: int) -> None:
    for manager in slot:
        manager.renumber(labels, new)


def _endpoint_target(ground: Ground, policy_store: PolicyMapStore) -> EndpointTarget:
    sources: dict[int, tuple[str, ...]] = {4: (str(ground.host.node_ip),)}
    if ground.pool.network6 is not None:
        known = (ground.host.node_ip6, ground.pool.ipv6_of(ground.pool.router))
        sources[6] = tuple(str(each) for each in known if each is not None)
    place = Place(
        ground.programs.root, ground.config["mtu"] or ground.host.mtu, ground.pool.networks, sources
    )
    lxc = ground.programs.maps.lxc
    return EndpointTarget(place, ground.devices, ground.routes, lxc, policy_store, ground.programs)


def _own_entries(ground: Ground, store: Store) -> publish.OwnEntries:
    return publish.OwnEntries(
        store.session,
        space=ground.config["ip-address-space"],
        cluster=ground.config["cluster-name"],
        node=ground.node.name,
        node_ip=ground.host.node_ip,
    )


def _keeper(ground: Ground, known: Knowledge) -> Keeper:
    return Keeper(
        ground.host,
        known.addresses,
        ground.devices,
        ground.routes,
        ground.programs.maps.lxc,
        ground.programs,
        configured_devices=ground.config["devices"],
        pools=ground.pool.networks,
        routers=ground.pool.routers,
    )


def _engine(ground: Ground, enforcement: Enforcement) -> EngineSide:
    socket = ground.config["docker-endpoint"].removeprefix("unix://")
    if not socket:
        return EngineSide()
    engine = Engine(socket)
    plugin = ground.config["docker-plugin-socket"]
    driver = Driver(plugin, enforcement.endpoints, engine, ground.checkpoint)
    return EngineSide(engine, driver, EngineWatch(engine, enforcement.endpoints, driver))


def _ipv6_range(config: Config, host: HostView) -> IPv6Network | None:
    if not config["enable-ipv6"]:
        return None
    return config["ipv6-range"] or automatic_network6(host.node_ip)


def _node(config: Config, checkpoint: Checkpoint, host: HostView) -> Node:
    """Return this node's name and pool: configured, else as before, else found out."""
    known = checkpoint.node()
    name = node_name(config["node-name"] or (known.name if known else ""))
    pool = config["ipv4-range"] or (IPv4Network(known.pool) if known else None)
    if pool is None:
        pool = automatic_network(IPv4Address(host.node_ip), list(host.networks))
    node = _node_record(known, name, str(pool), host.node_ip)
    checkpoint.save_node(node)
    return node


def _node_record(known: Node | None, name: str, pool: str, node_ip: IPv4Address) -> Node:
    """Return the node's record with this name and pool, keeping what else was known."""
    if known is None:
        return Node(name, pool)
    return Node(
        name,
        pool,
        last_endpoint_id=known.last_endpoint_id,
        last_address=known.last_address,
        local_identities=known.local_identities,
        lease=own_lease(known, node_ip),
        lease_address=str(node_ip),
        addresses_at=known.addresses_at,
    )


def _etcd_config(config: Config) -> EtcdConfig:
    given = config["kvstore-opt"]
    if "etcd.address" in given:
        return EtcdConfig((given["etcd.address"],))
    return EtcdConfig.load(Path(given["etcd.config"]))


def _firewall(config: Config, pool: Pool) -> FirewallRules:
    direct = config["ipv4-native-routing-cidr"]
    states = {
        family: FirewallState(
            router=router,
            pools=frozenset({network}),
            direct=frozenset({str(direct)} if direct and family == 4 else ()),
            masquerade=config[f"enable-ipv{family}-masquerade"],
        )
        for family, router, network in zip((4, 6), pool.routers, pool.networks, strict=False)
    }
    accept = config["install-iptables-rules"]
    rules = {family: FamilyRules(family, accept=accept) for family in states}
    return FirewallRules(states, FirewallTarget(rules))
