# SPDX-License-Identifier: Apache-2.0
"""The composition root: builds every part from the configuration and wires them together.

    sources                    tables               reconcilers → targets
    driver, checkpoint, API    endpoints            endpoints → interface, programs, route
    identities/v1/id/          identities           policy-maps → cilium_policy_<id>
    policies (dir, etcd)       policies             ipcache → cilium_ipcache
    ip/v1/, nodes/v1/          ipcache, nodes       own-entries → ip/v1/ keys under our lease
                                                    firewall → nft, iptables
                               other hosts' pools   node-routes, tunnel-map
    probes                     path MTUs            path-mtu, node-routes

`build` goes through them in stages, each standing on the ones before; `agent.tasks` starts what runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_network
from pathlib import Path

from agent import beside, ipcache, path_mtu, publish, remembered, sinks, viewfile
from agent.allow_all import AllowAll
from agent.beside import HealthSide, NamesSide
from agent.checkpoint import Checkpoint, Node
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
from agent.host import HostView, look
from agent.keeper import Keeper
from agent.limits import Limits
from agent.node_routes import (
    Direct,
    NodeReconcilers,
    NodeRouteTarget,
    PathMtuTarget,
    Tunnelled,
    TunnelMapTarget,
    Way,
)
from agent.node_routes import reconcilers as node_reconcilers
from agent.nodes import NodeFollower, NodeTable, Own, PoolTable, node_names
from agent.overlay import Overlay
from agent.path_mtu import PathMtus
from agent.plumbing import EndpointTarget, Place, PolicyMapStore
from agent.policies import DocumentTable, PolicyNames, PolicyTable, Refusals, new_documents, new_policies
from agent.policy_maps import PolicyMaps
from agent.policy_sources import PolicyDirectory, PolicyKeys
from agent.pool import Pool
from agent.programs import HostPrograms
from agent.registration import Registration
from agent.renumbering import Renumbering
from agent.standing import etcd_config, ipv6_range, own_node, requests_per_s
from core.options import Config
from core.reconciler import Reconciler
from core.table import Table
from datapath.allowall import BOTH_WAYS
from datapath.devices import Devices, is_present
from datapath.firewall import FirewallState
from datapath.netlink import Netlink
from datapath.noderoutes import NodeRoutes
from datapath.routes import Routes
from datapath.tunnel import OVERHEAD, Shape, Tunnel
from identity.allocator import Allocator
from identity.cache import IdentityCache
from identity.filter import LabelFilter
from identity.local import LocalIdentities
from kvstore import schema
from kvstore.client import Client
from kvstore.election import Election
from kvstore.pools import Wish
from kvstore.session import Session
from kvstore.sink import HOLD_S, TableSink
from kvstore.watcher import Follower
from policy.engine import PolicyEngine
from policy.model import EnforcementMode

# The elected role changes hands within this time after its holder is gone.  It grows with the cluster, as
# every node renews such a lease at a third of it; a heartbeat a minute later is still younger than the three
# minutes after which a real cilium-agent reports failure.
ROLE_TTL_S, LONGEST_ROLE_TTL_S = 30, 100
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
    wish: Wish
    pool: Pool
    netlink: Netlink
    devices: Devices
    routes: Routes
    overlay: Overlay


@dataclass(eq=False)
class Store:
    """etcd: one client, the session of this node's keys, and a short one for elected roles."""

    client: Client
    session: Session
    registration: Registration
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
    nodes: NodeTable
    pools: PoolTable
    path_mtus: PathMtus
    hosts: set[str]  # that packets are encapsulated to; agent.nodes owns it
    ip_sink: sinks.IpSink
    node_sink: TableSink[str, schema.NodeRecord]
    followers: list[Follower]
    memory: remembered.Remembered
    address_view: remembered.AddressView
    addresses_restored: asyncio.Event


@dataclass(eq=False)
class Enforcement:
    """From the tables into the kernel: policy maps, ip→identity, endpoints, firewall, the host itself."""

    allow_all: AllowAll
    policy_store: PolicyMapStore
    policy_maps: PolicyMaps
    derivations: Derivations
    ipcache: Reconciler[str, ipcache.Record]
    allocator: Allocator
    endpoints: EndpointManager
    renumbering: Renumbering
    reconcilers: dict[str, Reconciler[int, Endpoint]]
    node_follower: NodeFollower
    node_reconcilers: NodeReconcilers
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
class Parts(EngineSide, HealthSide, NamesSide, Enforcement, Knowledge, Store, Ground):
    """Everything that was built; each part says in its own module who owns it."""


async def build(
    config: Config, events: EventPump, programs: HostPrograms, gates: Gates, limits: Limits
) -> Parts:
    """Build everything.  Raises HoldfastError for what the host or the configuration makes impossible."""
    ground = await _ground(config, events, programs, gates)
    store = _store(ground)
    knowledge = await _knowledge(ground, store)
    enforcement = _enforcement(ground, store, knowledge)
    engine = _engine(ground, enforcement, limits)
    sides = (beside.health(ground, knowledge), beside.names(ground, knowledge))
    stages = (ground, store, knowledge, enforcement, engine, *sides)
    return Parts(**{name: part for stage in stages for name, part in vars(stage).items()})


async def _ground(config: Config, events: EventPump, programs: HostPrograms, gates: Gates) -> Ground:
    checkpoint = Checkpoint(config["state-dir"])
    host = await asyncio.to_thread(look, config["ipv4-node"], config["devices"])
    ipv6 = programs.catalogue.enable_ipv6
    node_ip6 = (config["ipv6-node"] or host.node_ip6) if ipv6 else None
    host = replace(host, node_ip6=node_ip6)
    node, wish = await own_node(config, checkpoint, host, gates)
    pool = Pool(IPv4Network(node.pool), ipv6_range(config, host) if ipv6 else None)
    if node.last_address:
        pool.resume_after(IPv4Address(node.last_address))
    netlink = Netlink()
    overlay = _overlay(config, host, programs, netlink)
    await overlay.prepare()
    return Ground(
        config,
        gates,
        events,
        programs,
        checkpoint,
        host,
        node,
        wish,
        pool,
        netlink,
        Devices(netlink, ipv6=pool.network6 is not None),
        Routes(netlink),
        overlay,
    )


def _overlay(config: Config, host: HostView, programs: HostPrograms, netlink: Netlink) -> Overlay:
    shape = Shape(config["tunnel-port"], host.mtu - OVERHEAD)
    return Overlay(Tunnel(netlink, shape), programs, enabled=config["tunnel"] == "vxlan")


def _store(ground: Ground) -> Store:
    client = Client(etcd_config(ground.config), gate=ground.gates.connect, qps=requests_per_s(ground.config))
    session = Session(
        client,
        ttl=int(ground.config["kvstore-lease-ttl"]),
        lease=ground.node.lease,
        lost=ground.node.lost_leases,
        elsewhere=(schema.IPS, schema.IDENTITY_VALUES),
        read_elsewhere=(schema.IDENTITY_VALUES,),  # by the allocator, together with id/ keys
        sync=ground.config["kvstore-periodic-sync"],
    )
    role_session = Session(client, ttl=ROLE_TTL_S, longest_ttl=LONGEST_ROLE_TTL_S, name=ground.node.name)
    registration = Registration(
        client,
        ground.config["cluster-name"],
        ground.wish,
        ttl=ground.config["kvstore-lease-ttl"],
        former_lease=ground.node.former_lease,
    )
    return Store(client, session, registration, role_session, Election(client, role_session, OPERATOR))


async def _knowledge(ground: Ground, store: Store) -> Knowledge:
    grace = ground.config["kvstore-missing-grace-period"]
    identities = IdentityCache(grace=grace, hold=HOLD_S)
    local = LocalIdentities(identities.local)
    local.restore(ground.node.local_identities)
    identities.local.mark_in_sync()
    documents, policies, refusals = new_documents(), new_policies(), Refusals()
    names = PolicyNames(documents, policies, refusals)
    keys = PolicyKeys(documents, refusals, grace)
    addresses = ipcache.new_table(ipv6=ground.pool.network6 is not None)
    nodes: NodeTable = Table("nodes", ("kvstore",))
    pools: PoolTable = Table("node-pools", ("nodes",))
    store.session.nodes = store.role_session.nodes = nodes.__len__
    hosts = {host for _, host in ground.programs.maps.tunnel.items()} if ground.overlay.enabled else set()
    ip_sink = sinks.IpSink(
        addresses.source(ipcache.KVSTORE_SOURCE), grace, hold=HOLD_S, own=str(ground.host.node_ip)
    )
    ground.gates.cluster = lambda: (ground.node.name, node_names(nodes, ground.node.name))
    node_sink = TableSink(
        nodes.source("kvstore"), sinks.node_entry, sinks.node_name, grace=grace, hold=HOLD_S
    )
    follow = partial(Follower, store.client, gate=ground.gates.relist)
    identity_follower = follow(schema.IDENTITY_IDS, identities)
    policy_follower = follow(schema.POLICIES, keys, prepare=keys.prepare)
    node_follower = follow(schema.NODES, node_sink)
    ip_follower = follow(schema.IPS, ip_sink, observer=store.session.seen)
    memory = await _memory(ground, grace)
    await memory.restore(remembered.identity_view(identity_follower, identities))
    await memory.restore(remembered.policy_view(policy_follower, keys))
    await memory.restore(remembered.node_view(node_follower, node_sink))
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
        pools,
        path_mtu.new_table(),
        hosts,
        ip_sink,
        node_sink,
        followers=[identity_follower, policy_follower, node_follower, ip_follower],
        memory=memory,
        address_view=remembered.AddressView(ip_follower, ip_sink),
        addresses_restored=asyncio.Event(),
    )


async def _memory(ground: Ground, grace: float) -> remembered.Remembered:
    owner = f"{ground.config['cluster-name']}/{ground.node.name}"
    file = viewfile.ViewFile(ground.config["state-dir"] / viewfile.NAME, owner, remembered.SHAPES)
    memory = remembered.Remembered(file, grace=grace)
    await memory.open()
    return memory


def _enforcement(ground: Ground, store: Store, known: Knowledge) -> Enforcement:
    maps, config = ground.programs.maps, ground.config
    allow_all = AllowAll(config["state-dir"])
    policy_store = PolicyMapStore(ground.programs.catalogue, ground.programs.root, allow_all.entries)
    room = config["bpf-policy-map-max"] - len(BOTH_WAYS)  # an emergency has its entries in every map
    engine = PolicyEngine(limit=room, mode=EnforcementMode(config["enable-policy"]))
    policy_maps = PolicyMaps(engine, policy_store)
    derivations = Derivations(
        known.identities.table,
        known.policies,
        known.local,
        known.addresses,
        policy_maps,
        restore_grace=config["identity-restore-grace-period"],
    )
    table: Table[int, Endpoint] = Table("endpoints", ("agent",))
    allocator, endpoints, renumbering = _endpoints(ground, store, known, table, derivations)
    reconcilers = {
        "endpoints": Reconciler("endpoints", table, _endpoint_target(ground, policy_store)),
        "own-entries": publish.reconciler(table, _own_entries(ground, store)),
    }
    ip_reconciler = ipcache.reconciler(known.addresses, maps.ipcache, derivations, known.hosts)
    conntrack = Conntrack(maps.conntrack, config["conntrack-gc-interval"])
    firewall = _firewall(config, ground.pool)
    derivations.attach(reconcilers["endpoints"], ip_reconciler, conntrack, firewall)
    return Enforcement(
        allow_all,
        policy_store,
        policy_maps,
        derivations,
        ip_reconciler,
        allocator,
        endpoints,
        renumbering,
        reconcilers,
        _node_follower(ground, known, ip_reconciler),
        _node_reconcilers(ground, known),
        firewall,
        conntrack,
        _keeper(ground, known),
    )


def _node_follower(
    ground: Ground, known: Knowledge, addresses: Reconciler[str, ipcache.Record]
) -> NodeFollower:
    async def moved(hosts: set[str]) -> None:
        if ground.overlay.enabled:
            addresses.touch(await ipcache.behind(known.addresses, hosts))

    own = Own(
        f"{ground.config['cluster-name']}/{ground.node.name}",
        tuple(ip_network(pool) for pool in ground.pool.networks),
        frozenset(str(each) for each in ground.host.addresses if not each.is_loopback),
    )
    # Without a tunnel nothing is encapsulated, whoever is registered.
    hosts = known.hosts if ground.overlay.enabled else set()
    return NodeFollower(known.nodes, known.addresses, known.pools, own, hosts=hosts, moved=moved)


def _node_reconcilers(ground: Ground, known: Knowledge) -> NodeReconcilers:
    way: Way | None = None
    if ground.overlay.enabled:
        routers = dict(zip((4, 6), ground.pool.routers, strict=False))
        way = Tunnelled(lambda: ground.overlay.tunnel.index, routers, known.path_mtus)
    elif ground.config["auto-direct-node-routes"]:
        way = Direct((4, 6) if ground.pool.network6 else (4,), known.path_mtus)
    return node_reconcilers(
        known.pools,
        known.path_mtus,
        NodeRouteTarget(NodeRoutes(ground.netlink), way),
        TunnelMapTarget(ground.programs.maps.tunnel, enabled=ground.overlay.enabled),
        PathMtuTarget(ground.programs.maps.path_mtu),
    )


def _endpoints(
    ground: Ground,
    store: Store,
    known: Knowledge,
    table: Table[int, Endpoint],
    kernel: Derivations,
) -> tuple[Allocator, EndpointManager, Renumbering]:
    """Return the allocator, the manager, and what moves its endpoints to other numbers."""
    renumbering = Renumbering(known.identities.table)
    allocator = Allocator(
        store.client,
        store.session,
        known.identities,
        owner=str(ground.host.node_ip),
        cluster_id=ground.config["cluster-id"],
        on_renumbered=renumbering.heard,
        sync=ground.config["kvstore-periodic-sync"],
        nodes=known.nodes.__len__,
    )
    label_filter = LabelFilter(ground.config["labels"])
    manager = EndpointManager(table, ground.pool, ground.checkpoint, allocator, label_filter, kernel)
    manager.identity_patience = ground.config["identity-allocation-timeout"]
    manager.store.last_id = ground.node.last_endpoint_id
    manager.has_interface = is_present
    ground.pool.others_know = lambda: not store.session.error
    manager.refused_because = lambda: store.registration.refusal
    return allocator, manager, renumbering


def _endpoint_target(ground: Ground, policy_store: PolicyMapStore) -> EndpointTarget:
    sources: dict[int, tuple[str, ...]] = {4: (str(ground.host.node_ip),)}
    if ground.pool.network6 is not None:
        known = (ground.host.node_ip6, ground.pool.ipv6_of(ground.pool.router))
        sources[6] = tuple(str(each) for each in known if each is not None)
    inside = ground.host.mtu - (OVERHEAD if ground.overlay.enabled else 0)
    place = Place(ground.programs.root, ground.config["mtu"] or inside, ground.pool.networks, sources)
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
        ground.overlay,
        configured_devices=ground.config["devices"],
        pools=ground.pool.networks,
        routers=ground.pool.routers,
        known_by=_chosen_addresses(ground),
    )


def _chosen_addresses(ground: Ground) -> frozenset[IPv4Address | IPv6Address]:
    """Return the addresses that this node is known by and that nobody demanded."""
    chosen: set[IPv4Address | IPv6Address] = set()
    if ground.config["ipv4-node"] is None:
        chosen.add(ground.host.node_ip)
    if ground.host.node_ip6 is not None and ground.config["ipv6-node"] is None:
        chosen.add(ground.host.node_ip6)
    return frozenset(chosen)


def _engine(ground: Ground, enforcement: Enforcement, limits: Limits) -> EngineSide:
    socket = ground.config["docker-endpoint"].removeprefix("unix://")
    if not socket:
        return EngineSide()
    engine = Engine(socket)
    plugin = ground.config["docker-plugin-socket"]
    driver = Driver(plugin, enforcement.endpoints, engine, ground.checkpoint, limits)
    return EngineSide(engine, driver, EngineWatch(engine, enforcement.endpoints, driver))


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
