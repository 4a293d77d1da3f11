# SPDX-License-Identifier: Apache-2.0
"""Every option of the agent: one table that help, environment, sample, docs page and validation come from.

Names are Cilium's where Cilium has the option; defaults put stability first (patience with the kvstore, a
long lease, few events).

Used by: `agent.configuration`, which loads and checks, and by the code that reads ``config["name"]``.
"""

from __future__ import annotations

from pathlib import Path

from core.options import Option, Type

CONFIG_DIR = Path("/etc/holdfast/config")
ETCD_CONFIG = "/etc/holdfast/etcd.config"
# Requests a second; docs/performance.md has what a host makes.
ETCD_QPS = 100

# Durations have an end: in the programs a second is 32 bits, and a time-out is added to the present one.
_YEAR = 365 * 86400.0

_AGENT = "Agent"
_KVSTORE = "Kvstore and cluster"
_IDENTITY = "Identities"
_ADDRESS = "Addresses and devices"
_ENGINE = "Container engine"
_NAMES = "Names"
_POLICY = "Policy"
_MAPS = "BPF maps and conntrack"
_MONITOR = "Monitor"

OPTIONS: tuple[Option, ...] = (
    # --- agent
    Option(
        "config", Type.PATH, None, "YAML file with options, later than config-dir", section=_AGENT, auto=True
    ),
    Option(
        "config-dir",
        Type.PATH,
        None,
        f"Directory with one file an option; auto is {CONFIG_DIR} if it exists",
        section=_AGENT,
        auto=True,
    ),
    Option("debug", Type.BOOL, False, "Log at level debug, whatever log-opt says", section=_AGENT),
    Option(
        "log-driver",
        Type.TEXT,
        "text",
        "Where the log goes: text or JSON lines on stderr, or syslog",
        choices=("text", "json", "syslog"),
        section=_AGENT,
    ),
    Option(
        "log-opt",
        Type.MAP,
        {},
        "Settings of the log: level=INFO, syslog.address=/dev/log or host:port, syslog.facility=local5",
        section=_AGENT,
    ),
    Option(
        "socket-path",
        Type.PATH,
        Path("/var/run/holdfast/holdfast.sock"),
        "Unix socket of the agent's API",
        section=_AGENT,
    ),
    Option(
        "state-dir",
        Type.PATH,
        Path("/var/lib/holdfast"),
        "Directory of the checkpoint: endpoints, networks, what etcd said last, this node's pool",
        section=_AGENT,
    ),
    Option(
        "api-rate-limit",
        Type.SETTINGS,
        {},
        "Limits of calls to the agent, replacing single settings of the built-in ones (docs/patience.md): "
        "endpoint-create=rate-limit:10/s,rate-burst:4,parallel-requests:4,max-wait-duration:15s",
        section=_AGENT,
    ),
    Option(
        "prometheus-serve-addr",
        Type.TEXT,
        "",
        "host:port or :port to serve /metrics on by TCP as well; empty: on the API's socket only",
        section=_AGENT,
    ),
    # --- kvstore and cluster
    Option(
        "cluster-name", Type.TEXT, "default", "Name of the cluster this node belongs to", section=_KVSTORE
    ),
    Option(
        "cluster-id",
        Type.INT,
        0,
        "Number of the cluster, bits 16 to 23 of its identities; 0 is a cluster that is not meshed",
        low=0,
        high=255,
        section=_KVSTORE,
    ),
    Option(
        "node-name",
        Type.TEXT,
        None,
        "Name of this node in the kvstore; auto is the host name",
        section=_KVSTORE,
        auto=True,
    ),
    Option(
        "kvstore-opt",
        Type.MAP,
        {"etcd.config": ETCD_CONFIG},
        f"How to reach etcd: etcd.config=FILE (endpoints and certificates; {ETCD_CONFIG} unless given) or "
        f"etcd.address=URL; etcd.qps={ETCD_QPS}: requests a second in the long run, ten seconds' worth at "
        "once",
        section=_KVSTORE,
    ),
    Option(
        "kvstore-lease-ttl",
        Type.DURATION,
        86400.0,
        "How long this node's keys outlive its last sign of life",
        low=30,
        high=86400,
        section=_KVSTORE,
    ),
    Option(
        "kvstore-periodic-sync",
        Type.DURATION,
        300.0,
        "How often this node reads back its own keys that it does not watch; grows with the logarithm of the "
        "cluster's size",
        low=10,
        high=86400,
        section=_KVSTORE,
    ),
    Option(
        "kvstore-missing-grace-period",
        Type.DURATION,
        3600.0,
        "How long entries are kept that a relist lacks although no deletion was seen",
        low=0,
        high=_YEAR,
        section=_KVSTORE,
    ),
    Option(
        "kvstore-staleness-threshold",
        Type.DURATION,
        600.0,
        "How old the view of etcd may be before status and a metric warn and the log says so, once",
        low=60,  # an idle watch is confirmed every 30 to 50 s
        high=_YEAR,
        section=_KVSTORE,
    ),
    Option(
        "allocator-list-timeout",
        Type.DURATION,
        10800.0,
        "How long the first list of identities may take before status calls it a failure; it goes on",
        low=1,
        high=_YEAR,
        section=_KVSTORE,
    ),
    Option(
        "ip-address-space",
        Type.TEXT,
        "default",
        "Address space of the ip keys this node writes: default, or the cluster's name once meshed",
        section=_KVSTORE,
    ),
    Option(
        "cluster-health-port",
        Type.INT,
        4240,
        "TCP port that nodes answer each other's health probes on, the same on all; 0: no answers, no probes"
        " (of path MTUs and clocks neither)",
        low=0,
        high=65535,
        section=_KVSTORE,
    ),
    Option(
        "cluster-health-interval",
        Type.DURATION,
        60.0,
        "How often a node is probed; grows with the logarithm of the cluster's size",
        low=1,
        high=_YEAR,
        section=_KVSTORE,
    ),
    # --- identities
    Option(
        "labels",
        Type.LIST,
        (),
        "Labels that make an identity, beside the built-in list: "
        "[source:][!]regular expression, anchored at the key's start",
        section=_IDENTITY,
    ),
    Option(
        "identity-allocation-timeout",
        Type.DURATION,
        8.0,
        "How long the start of a container waits for its identity; afterwards it starts, denied until etcd "
        "answers",
        low=0.1,
        high=9,  # the engine asks twice a start, and the driver answers it within 20 s
        section=_IDENTITY,
    ),
    Option(
        "identity-restore-grace-period",
        Type.DURATION,
        10800.0,
        "How long after a start prefixes that no policy names any more keep the last life's identities",
        low=0,
        high=_YEAR,
        section=_IDENTITY,
    ),
    Option(
        "identity-gc-interval",
        Type.DURATION,
        900.0,
        "How often the elected agent looks for identities that nobody uses",
        low=10,
        high=_YEAR,
        section=_IDENTITY,
    ),
    # --- addresses and devices
    Option(
        "ipv4-node",
        Type.ADDRESS,
        None,
        "Address of this node that other nodes reach; auto is the one of the default route",
        section=_ADDRESS,
        auto=True,
    ),
    Option(
        "ipv4-range",
        Type.CIDR4,
        None,
        "Pool of this node's endpoints, its own in the cluster; auto is what the node has claimed, or claims "
        "of cluster-pool-ipv4-cidr, else derives it from the node's address",
        section=_ADDRESS,
        auto=True,
    ),
    Option(
        "cluster-pool-ipv4-cidr",
        Type.CIDR4,
        None,
        "Range of the whole cluster: a node that has no pool claims a block of it in the kvstore, for good",
        section=_ADDRESS,
        auto=True,
    ),
    Option(
        "cluster-pool-ipv4-mask-size",
        Type.INT,
        24,
        "Length of such a block, the same on all nodes",
        low=9,
        high=29,
        section=_ADDRESS,
    ),
    Option(
        "ipv4-native-routing-cidr",
        Type.CIDR4,
        None,
        "Destinations that know the way back to the pool: no masquerade to them; auto is the pool alone",
        section=_ADDRESS,
        auto=True,
    ),
    Option(
        "enable-ipv4-masquerade",
        Type.BOOL,
        True,
        "Give endpoints' traffic that leaves the host the host's address",
        section=_ADDRESS,
    ),
    Option(
        "enable-ipv6",
        Type.BOOL,
        False,
        "Give endpoints an IPv6 address as well",
        section=_ADDRESS,
    ),
    Option(
        "ipv6-node",
        Type.ADDRESS,
        None,
        "IPv6 address of this node that other nodes reach; auto is one of the devices', none is fine",
        section=_ADDRESS,
        auto=True,
    ),
    Option(
        "ipv6-range",
        Type.CIDR6,
        None,
        "Where endpoints' IPv6 addresses lie, a /96 or shorter: each ends with the endpoint's IPv4 address; "
        "auto derives it from the node's address",
        section=_ADDRESS,
        auto=True,
    ),
    Option(
        "enable-ipv6-masquerade",
        Type.BOOL,
        True,
        "Give endpoints' IPv6 traffic that leaves the host the host's address",
        section=_ADDRESS,
    ),
    Option(
        "install-iptables-rules",
        Type.BOOL,
        True,
        "Keep a chain of accept rules first in FORWARD, which docker, ufw and firewalld set to DROP",
        section=_ADDRESS,
    ),
    Option(
        "tunnel",
        Type.TEXT,
        "vxlan",
        "How endpoints' packets get to other hosts: in a VXLAN that says who speaks, or as routed",
        choices=("vxlan", "disabled"),
        section=_ADDRESS,
    ),
    Option(
        "tunnel-port",
        Type.INT,
        8472,
        "UDP port of the VXLAN, the same on all hosts",
        low=1,
        high=65535,
        section=_ADDRESS,
    ),
    Option(
        "auto-direct-node-routes",
        Type.BOOL,
        False,
        "Without a tunnel: write routes to other hosts' pools; no router may be between",
        section=_ADDRESS,
    ),
    Option(
        "devices",
        Type.LIST,
        (),
        "The host's network devices that programs are attached to; empty: those with a default route "
        "and the one with the node's address",
        section=_ADDRESS,
    ),
    Option(
        "mtu",
        Type.INT,
        0,
        "MTU of the endpoints' devices; 0 is that of the node's device, with a tunnel 50 less",
        low=0,
        high=65535,
        section=_ADDRESS,
    ),
    # --- container engine
    Option(
        "docker-endpoint",
        Type.TEXT,
        "unix:///var/run/docker.sock",
        "The engine's API; empty runs without an engine",
        section=_ENGINE,
    ),
    Option(
        "docker-plugin-socket",
        Type.PATH,
        Path("/run/docker/plugins/holdfast.sock"),
        "Unix socket of the network driver; the file's name is the driver's name",
        section=_ENGINE,
    ),
    # --- names
    Option(
        "enable-cluster-dns",
        Type.BOOL,
        False,
        "Answer <service>.<project>.<cluster-dns-domain> for the compose services of all hosts, "
        "at port 53 of this host's address in its pool",
        section=_NAMES,
    ),
    Option(
        "cluster-dns-domain",
        Type.TEXT,
        "holdfast",
        "Domain of these names, in lower case, the same on all hosts",
        section=_NAMES,
    ),
    # --- policy
    Option(
        "enable-policy",
        Type.TEXT,
        "default",
        "Enforcement: default (where a rule selects the endpoint), always, never",
        choices=("default", "always", "never"),
        section=_POLICY,
    ),
    Option(
        "allow-localhost",
        Type.TEXT,
        "auto",
        "Whether this host may reach its endpoints: as policy says (auto means that; there is no always yet)",
        choices=("auto", "policy"),
        section=_POLICY,
    ),
    Option(
        "policy-dir",
        Type.PATH,
        Path("/etc/holdfast/policies"),
        "Directory that is watched for policy files (YAML or JSON)",
        section=_POLICY,
    ),
    # --- maps and conntrack
    Option(
        "bpf-root",
        Type.PATH,
        Path("/sys/fs/bpf"),
        "Where the BPF file system is, or is mounted when it is not",
        section=_MAPS,
    ),
    Option(
        "bpf-object-dir",
        Type.PATH,
        None,
        "Directory of the compiled programs; auto is /usr/lib/holdfast/bpf, else the source tree's bpf/build",
        section=_MAPS,
        auto=True,
    ),
    Option(
        "bpf-policy-map-max",
        Type.INT,
        16384,
        "Entries of an endpoint's policy map, two of which are kept for allow-all",
        low=256,
        high=65536,
        section=_MAPS,
    ),
    Option(
        "bpf-ct-global-tcp-max",
        Type.INT,
        524288,
        "Entries of the conntrack map for TCP",
        low=1024,
        high=1 << 24,
        section=_MAPS,
    ),
    Option(
        "bpf-ct-global-any-max",
        Type.INT,
        262144,
        "Entries of the conntrack map for everything but TCP",
        low=1024,
        high=1 << 24,
        section=_MAPS,
    ),
    Option(
        "bpf-fragments-map-max",
        Type.INT,
        8192,
        "Fragmented datagrams that are tracked at once",
        low=1,
        high=65536,
        section=_MAPS,
    ),
    Option(
        "bpf-ct-timeout-regular-tcp",
        Type.DURATION,
        21600.0,
        "Lifetime of an idle TCP connection",
        low=1,
        high=_YEAR,
        section=_MAPS,
    ),
    Option(
        "bpf-ct-timeout-regular-any",
        Type.DURATION,
        60.0,
        "Lifetime of an idle flow that is not TCP",
        low=1,
        high=_YEAR,
        section=_MAPS,
    ),
    Option(
        "bpf-ct-timeout-regular-tcp-syn",
        Type.DURATION,
        60.0,
        "Lifetime of a TCP connection that is being opened",
        low=1,
        high=_YEAR,
        section=_MAPS,
    ),
    Option(
        "bpf-ct-timeout-regular-tcp-fin",
        Type.DURATION,
        10.0,
        "Lifetime of a TCP connection that is being closed",
        low=1,
        high=_YEAR,
        section=_MAPS,
    ),
    Option(
        "conntrack-gc-interval",
        Type.DURATION,
        0.0,
        "How often expired connections are collected; 0: as the maps fill, 10s when nearly full to 30m",
        low=0,
        high=86400,
        section=_MAPS,
    ),
    # --- monitor
    Option(
        "monitor-aggregation",
        Type.TEXT,
        "medium",
        "Which packets have trace events: none (all, at every point), low (all, where they go), medium (new "
        "connections, first SYN, FIN and RST, one an interval), maximum (medium without the interval)",
        choices=("none", "low", "medium", "maximum"),
        section=_MONITOR,
    ),
    Option(
        "monitor-aggregation-interval",
        Type.DURATION,
        5.0,
        "Shortest time between two trace events of one connection when they are aggregated",
        low=1,
        high=_YEAR,
        section=_MONITOR,
    ),
    Option(
        "monitor-queue-size",
        Type.INT,
        0,
        "Events that a reader of the monitor may fall behind; 0 is 1024 a CPU, at most 16384",
        low=0,
        high=1 << 20,
        section=_MONITOR,
    ),
    Option(
        "trace-payloadlen",
        Type.INT,
        128,
        "Bytes of the packet in an event",
        low=0,
        high=128,  # what the programs have room for
        section=_MONITOR,
    ),
)
