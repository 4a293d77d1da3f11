# SPDX-License-Identifier: Apache-2.0
"""The JSON of the API, as msgspec structs: what the handlers send and accept, and nothing else.

Names on the wire are Cilium's kebab-case, and the shape of an endpoint, an identity and the status is
Cilium's where Cilium has one, so that a `jq` written for it keeps working.  The agent builds these
structs (see `view`), the command line reads them as plain JSON.  Addresses, MACs and times are text,
times are RFC 3339 in UTC, durations are seconds.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """The base of everything that is sent: keyword only, kebab-case on the wire."""


class Request(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The base of everything that is accepted: a field that nobody knows is an error that names it."""


# --- status


class Component(Model, frozen=True, kw_only=True):
    """One part's health.  `state` is Ok, Warning, Failure or Disabled; `msg` one sentence."""

    state: str
    msg: str = ""


class AllowAll(Model, frozen=True, kw_only=True):
    """An operator's order to let everything pass that is in force."""

    endpoint: int  # 0: every endpoint of this host
    until: str  # RFC 3339
    seconds: float  # that are left
    by: str
    reason: str


class Ipam(Model, frozen=True, kw_only=True):
    """The node's pool of addresses."""

    pool: str  # CIDR
    used: int
    available: int
    pool6: str = ""  # where IPv6 addresses lie; each ends with an IPv4 address of the pool
    lacking: str = ""  # what the configuration wants and this host can not have


class Controller(Model, frozen=True, kw_only=True):
    """One supervised task or reconciler of the agent."""

    name: str
    state: str  # running, starting, dead; reconcilers: ok, failing
    error: str = ""
    restarts: int = 0
    since: str = ""


class WaitInfo(Model, frozen=True, kw_only=True):
    """Something the agent waits for (`core.waiting`)."""

    subject: str
    purpose: str
    seconds: float
    note: str = ""


class TableInfo(Model, frozen=True, kw_only=True):
    """One table of desired state."""

    name: str
    entries: int
    in_sync: bool
    waiting_for: list[str] = []  # sources that have not said "in sync"
    missing: int = 0  # entries a relist lacked, kept until their grace ends


class MapInfo(Model, frozen=True, kw_only=True):
    """One BPF map.  `entries` is -1 for arrays, which are never more or less full."""

    name: str
    type: str
    entries: int
    max_entries: int
    errors: int = 0
    pressure: float = 0.0  # 0 to 1
    memory: int = 0  # bytes of the kernel's
    cached: bool = False  # whether the agent keeps the desired contents, as Cilium's map cache


class Unmanaged(Model, frozen=True, kw_only=True):
    """A container that policy does not reach, and why (docker's own bridge, the host's network…)."""

    name: str
    reason: str


class IgnoredRecord(Model, frozen=True, kw_only=True):
    """A record in etcd that can not be used; what was good of its key before stays in force."""

    key: str
    error: str


class MonitorInfo(Model, frozen=True, kw_only=True):
    """The event stream: listeners now, events seen and lost since the start."""

    listeners: int
    seen: int
    lost: int


class UnreachableNode(Model, frozen=True, kw_only=True):
    """A node whose last probe failed, and what of it."""

    name: str
    ip: str
    error: str


class NarrowPath(Model, frozen=True, kw_only=True):
    """A way that carries less than this host's devices send; both in bytes from the IP header on."""

    name: str  # of the node; empty until it has answered in this life of the agent
    ip: str
    mtu: int
    device_mtu: int


class WrongClock(Model, frozen=True, kw_only=True):
    """A node whose clock differs from most."""

    name: str
    ahead: float  # seconds; negative: behind


class Clock(Model, frozen=True, kw_only=True):
    """This host's clock among those of the nodes that answered; `ahead` is 0 when it agrees with most."""

    ahead: float = 0.0  # seconds; negative: behind
    differing: int = 0  # other nodes that differ from it
    others: int = 0  # whose clocks are known
    wrong: int = 0  # nodes whose clocks differ from most
    wrong_nodes: list[WrongClock] = []  # the first of them


class ClusterHealth(Component, frozen=True, kw_only=True):
    """Probes between nodes in short; `state` is about this node's own side of them."""

    nodes: int = 0
    reachable: int = 0
    unreachable: int = 0
    interval: float = 0.0  # seconds between two probes of a node
    age: float = -1.0  # seconds since the last probe of any node; -1: none yet
    unreachable_nodes: list[UnreachableNode] = []  # the first of them
    narrow: int = 0  # ways that carry less than this host sends
    narrow_paths: list[NarrowPath] = []  # the first of them
    clock: Clock = Clock()


class ClusterDns(Component, frozen=True, kw_only=True):
    """Names across hosts in short; `state` is about this host's answers."""

    domain: str = ""
    addresses: list[str] = []  # where this host answers
    names: int = 0  # that have an address
    unusable: int = 0  # services whose labels make no name
    unusable_names: list[str] = []  # the first of them


class Status(Model, frozen=True, kw_only=True):
    """The answer of /v1/healthz and the whole of `holdfast status`."""

    holdfast: Component  # the agent in one sentence: what its last cycle did, or what is wrong
    kvstore: Component
    container_runtime: Component
    network_driver: Component
    masquerading: Component
    ipam: Ipam
    node_monitor: MonitorInfo
    node: Node
    version: str
    uptime: float
    staleness: float  # seconds since the kvstore last proved this view current; -1 = never since the start
    staleness_threshold: float = 0.0  # seconds after which that is a warning
    policy_revision: int
    policies: int
    policy_errors: list[PolicyError] = []  # refused; the last good ones stay in force
    endpoints: dict[str, int] = {}  # state → number
    identities: int = 0
    identity_range: str = ""  # "min 256, max 65535"
    controllers: list[Controller] = []
    tables: list[TableInfo] = []
    waits: list[WaitInfo] = []
    unmanaged: list[Unmanaged] = []
    ignored: int = 0  # records in etcd that can not be used
    ignored_records: list[IgnoredRecord] = []  # the first of them
    maps: list[MapInfo] = []
    checkpoint: Component = Component(state="Disabled", msg="not started")
    allow_all: list[AllowAll] = []
    allow_all_error: str = ""  # why orders can not be read
    cluster_health: ClusterHealth = ClusterHealth(state="Disabled", msg="not started")
    cluster_dns: ClusterDns = ClusterDns(state="Disabled", msg="not started")


# --- configuration


class OptionValue(Model, frozen=True, kw_only=True):
    """One option in force and where its value came from."""

    value: str
    origin: str


class Configuration(Model, frozen=True, kw_only=True):
    """The answer of /v1/config."""

    hash: str
    options: dict[str, OptionValue]


# --- endpoints


class Identity(Model, frozen=True, kw_only=True):
    """An identity: `labels` is a list of ``source:key[=value]``, sorted."""

    id: int
    labels: list[str]
    reference_count: int = 0  # endpoints of this node that have it


class EndpointLabels(Model, frozen=True, kw_only=True):
    """Labels that make the identity, and those that only inform."""

    security_relevant: list[str]
    derived: list[str] = []


class EndpointAddress(Model, frozen=True, kw_only=True):
    ipv4: str = ""
    ipv6: str = ""


class EndpointNetworking(Model, frozen=True, kw_only=True):
    addressing: list[EndpointAddress]
    interface_name: str = ""
    interface_index: int = 0
    mac: str = ""
    host_mac: str = ""
    # As `docker ps` writes them ("0.0.0.0:8080->80/tcp"): the engine does not show a remote driver's.
    published_ports: list[str] = []


class EndpointPolicy(Model, frozen=True, kw_only=True):
    """`policy_enabled` is none, ingress, egress or both; the map's fill level beside it."""

    policy_enabled: str
    policy_revision: int = 0
    map_entries: int = 0
    error: str = ""  # why the desired policy is not in the map (overflow…); the last good state is
    allow_all_until: str = ""  # RFC 3339: all passes until then, by an operator's order


class ExternalIdentifiers(Model, frozen=True, kw_only=True):
    """What others call this endpoint."""

    container_id: str = ""
    container_name: str = ""
    docker_endpoint_id: str = ""
    docker_network_id: str = ""
    docker_network_name: str = ""
    netns: str = ""


class EndpointHealth(Model, frozen=True, kw_only=True):
    """OK, Warning, Failure, Bootstrap or Disabled, for each part."""

    bpf: str
    policy: str
    connected: bool
    overall_health: str = msgspec.field(name="overallHealth")


class LogEntry(Model, frozen=True, kw_only=True):
    """One line of an endpoint's history: `code` is OK or Failure."""

    timestamp: str
    code: str
    state: str
    message: str


class EndpointStatus(Model, frozen=True, kw_only=True):
    state: str  # agent.endpoint.State
    identity: Identity
    labels: EndpointLabels
    networking: EndpointNetworking
    policy: EndpointPolicy
    external_identifiers: ExternalIdentifiers
    health: EndpointHealth
    log: list[LogEntry] = []


class Endpoint(Model, frozen=True, kw_only=True):
    id: int
    status: EndpointStatus


class EndpointRequest(Request, frozen=True, kw_only=True):
    """Body of PUT /v1/endpoint/{id}: an endpoint for anything with a network namespace.

    `netns` is a path (/run/netns/x, /proc/PID/ns/net).  `labels` are ``source:key=value``; a label without
    a source gets ``container``.  Without `ipv4` the agent takes an address from the pool.
    """

    netns: str
    labels: list[str] = []
    ipv4: str = ""
    name: str = ""
    interface: str = "eth0"


# --- addresses and nodes


class Address(Model, frozen=True, kw_only=True):
    """One entry of the table ip → identity."""

    cidr: str  # 10.0.0.1/32
    identity: int
    source: str = ""  # local, kvstore, host, cidr…
    host_ip: str = ""
    metadata: str = ""
    encrypt_key: int = 0


class Node(Model, frozen=True, kw_only=True):
    """A node of the cluster; the agent's own has `local`."""

    name: str
    cluster: str = "default"
    ipv4_address: str = ""
    ipv4_endpoint_cidr: str = ""
    ipv6_address: str = ""
    ipv6_endpoint_cidr: str = ""
    source: str = ""
    local: bool = False


# --- policy


class PolicyInfo(Model, frozen=True, kw_only=True):
    """One policy in force: where it came from and its document as JSON would load it."""

    name: str
    source: str  # etcd or local (the watched directory)
    origin: str  # the key or the file
    rules: int
    document: Any = None


class PolicyError(Model, frozen=True, kw_only=True):
    """A policy that was refused; whatever was in force under that name still is."""

    name: str
    origin: str
    error: str
    since: str = ""


class PolicyRepository(Model, frozen=True, kw_only=True):
    """The answer of /v1/policy."""

    revision: int
    policies: list[PolicyInfo]
    errors: list[PolicyError] = []


class StartOrder(Request, frozen=True, kw_only=True):
    """Body of PUT /v1/start-now: who wants it."""

    by: str


class StartedNow(Model, frozen=True, kw_only=True):
    """What was left of the wait for this host's slot, in seconds; 0: nothing was waited for."""

    seconds: float


class PolicyText(Request, frozen=True, kw_only=True):
    """Body of PUT /v1/policy/{name}: the document as a person wrote it, YAML or JSON."""

    text: str


class PolicyChange(Model, frozen=True, kw_only=True):
    """What a change of the local policies led to."""

    name: str
    revision: int
    path: str = ""


class Selector(Model, frozen=True, kw_only=True):
    """One selector of the cache: how many rules use it and which identities it selects."""

    selector: str
    users: int
    identities: list[int]


class TraceRequest(Request, frozen=True, kw_only=True):
    """Body of POST /v1/policy/resolve.

    Source and destination are an endpoint, else an identity, else labels: the first that is given counts.
    """

    source_endpoint: int = 0
    source_identity: int = 0
    source_labels: list[str] = []
    destination_endpoint: int = 0
    destination_identity: int = 0
    destination_labels: list[str] = []
    dport: int = 0
    protocol: str = "ANY"  # TCP, UDP, SCTP, ICMP, ANY


class TraceResult(Model, frozen=True, kw_only=True):
    """`verdict` is ALLOWED or DENIED, as `ingress` and `egress`; `log` is the whole report, line by line."""

    verdict: str
    ingress: str
    egress: str
    log: list[str]


# --- maps, monitor, cleanup


class MapEntry(Model, frozen=True, kw_only=True):
    """One entry of a map as text; `state` is sync, pending or error when the agent knows."""

    key: str
    value: str
    state: str = ""
    error: str = ""


class MapDump(Model, frozen=True, kw_only=True):
    name: str
    entries: list[MapEntry]


class MonitorEvent(Model, frozen=True, kw_only=True):
    """One event of the data path or of the agent.  `summary` is Cilium's monitor line; endpoints are ids (0 =
    none of this node)."""

    time: float  # Unix seconds
    type: str  # drop, trace, policy-verdict, agent, lost
    summary: str
    source: int = 0
    destination: int = 0
    source_identity: int = 0
    destination_identity: int = 0
    reason: str = ""  # drop reason, trace point, verdict, or what the agent did
    details: dict[str, Any] = {}


class NetworkInfo(Model, frozen=True, kw_only=True):
    """One docker network that the driver serves."""

    id: str
    name: str
    endpoints: int
    pool: str = ""


class CleanupItem(Model, frozen=True, kw_only=True):
    """Something that `holdfast cleanup` would remove from this host."""

    kind: str  # program, pin, device, route, firewall, state
    name: str


class Debuginfo(Model, frozen=True, kw_only=True):
    """Every part's state for `bugtool`: no secrets in it."""

    status: Status
    configuration: Configuration
    environment: dict[str, str]
    log: list[str]  # the last records
    subsystems: dict[str, Any] = {}  # whatever a part wants to show


class ErrorBody(Model, frozen=True, kw_only=True):
    """The body of every answer that is not 2xx."""

    error: str
    hint: str = ""
