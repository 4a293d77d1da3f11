# SPDX-License-Identifier: Apache-2.0
"""Every metric with its help text.  Names are Cilium's where Cilium has one, else `holdfast_…`.

The docs page is generated from this module (`python -m core.metrics > docs/metrics.md`).  A collector that
reads maps at scrape time (drops, forwards, map pressure) registers itself with `REGISTRY` from the agent;
what it yields is described here too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

# A second series for every counter and histogram that only says when this process made it.
disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY = CollectorRegistry()


class Description(NamedTuple):
    """One metric as a collector builds it and as the docs page shows it."""

    name: str
    text: str
    labels: tuple[str, ...]
    kind: str


# Section of the docs page → its metrics, in the order of this module.
DESCRIBED: dict[str, list[Description]] = {}


def _section(title: str) -> None:
    DESCRIBED[title] = []


def _described(kind: str, name: str, text: str, labels: tuple[str, ...]) -> Description:
    description = Description(name, text, labels, kind)
    DESCRIBED[next(reversed(DESCRIBED))].append(description)
    return description


def _counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
    _described("counter", name, text, labels)
    return Counter(name, text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
    _described("gauge", name, text, labels)
    return Gauge(name, text, labels, registry=REGISTRY)


def _histogram(
    name: str,
    text: str,
    labels: tuple[str, ...] = (),
    buckets: Sequence[float] = Histogram.DEFAULT_BUCKETS,
) -> Histogram:
    _described("histogram", name, text, labels)
    return Histogram(name, text, labels, registry=REGISTRY, buckets=buckets)


# --- the mechanism
_section("The mechanism")
RECONCILER_OBJECTS = _counter(
    "holdfast_reconciler_objects_total", "Objects written to a target", ("reconciler", "operation", "outcome")
)
RECONCILER_ERRORS = _gauge("holdfast_reconciler_errors", "Objects whose last write failed", ("reconciler",))
TASK_DEATHS = _counter("holdfast_task_deaths_total", "Times a supervised task ended by itself", ("task",))
ERRORS_WARNINGS = _counter(
    "cilium_errors_warnings_total", "Log records of this level", ("level", "subsystem")
)
CONFIG_HASH = _gauge("holdfast_config_hash", "Hash of the configuration in force (low 52 bits)")
WAITING_SECONDS = _gauge("holdfast_waiting_seconds", "How long the longest present wait has lasted")
LOOP_PAUSE_SECONDS = _histogram(
    "holdfast_loop_pause_seconds",
    "Time for which one round of the event loop let nobody else run; rounds of more than 10 ms",
    buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
LOOP_LONGEST_PAUSE_SECONDS = _gauge(
    "holdfast_loop_longest_pause_seconds", "The longest such time since the agent started"
)

# --- kvstore
_section("Kvstore")
KVSTORE_OPERATION_SECONDS = _histogram(
    "cilium_kvstore_operations_duration_seconds",
    "Duration of kvstore operations",
    ("scope", "kind", "action", "outcome"),
)
KVSTORE_QUORUM_ERRORS = _counter("cilium_kvstore_quorum_errors_total", "Times etcd had no quorum", ("error",))
KVSTORE_WATCH_STATE = _gauge(
    "holdfast_kvstore_watch_state", "1 for the state a watch of this prefix is in", ("prefix", "state")
)
KVSTORE_RECORDS_IGNORED = _counter(
    "holdfast_kvstore_records_ignored_total", "Records in etcd that were not used", ("prefix", "reason")
)
KVSTORE_MISSING = _gauge(
    "holdfast_kvstore_missing_records", "Records a relist lacked, kept until their grace ends", ("table",)
)
KVSTORE_OWN_KEYS_RESTORED = _counter(
    "holdfast_kvstore_own_keys_restored_total", "Own keys that were gone or changed and were written again"
)
KVSTORE_LEASE_LOST = _counter("holdfast_kvstore_lease_lost_total", "Times the session's lease was lost")
KVSTORE_LIMITER_WAIT_SECONDS = _histogram(
    "holdfast_kvstore_limiter_wait_duration_seconds",
    "Time for which requests to etcd were held back by etcd.qps; those that were not are not counted",
    buckets=(0.01, 0.1, 0.5, 1.0, 5.0, 20.0, 60.0, 300.0),
)
KVSTORE_STALENESS_SECONDS = _gauge(
    "holdfast_kvstore_staleness_seconds", "Time since the kvstore last proved that this view is current"
)
KVSTORE_STALE = _gauge(
    "holdfast_kvstore_stale", "1 while that is longer than the option kvstore-staleness-threshold"
)

# --- identities and policy
_section("Identities and policy")
IDENTITY_COUNT = _gauge("cilium_identity", "Identities known", ("type",))
IDENTITY_ALLOCATIONS = _counter("holdfast_identity_allocations_total", "Identity allocations", ("outcome",))
POLICY_COUNT = _gauge("cilium_policy", "Policy rules loaded")
POLICY_REVISION = _gauge("cilium_policy_max_revision", "Highest policy revision")
POLICY_IMPORT_ERRORS = _counter("cilium_policy_import_errors_total", "Policies refused")
POLICY_REGENERATIONS = _counter("cilium_policy_regeneration_total", "Policy calculations of endpoints")
ALLOW_ALL_ORDERS = _gauge("holdfast_allow_all_orders", "Operators' orders to allow all that are in force")
ALLOW_ALL_SECONDS = _gauge("holdfast_allow_all_remaining_seconds", "Time until the last of them ends")

# --- endpoints and datapath
_section("Endpoints and data path")
ENDPOINT_STATE = _gauge("cilium_endpoint_state", "Endpoints by state", ("endpoint_state",))
ENDPOINT_REGENERATIONS = _counter(
    "cilium_endpoint_regenerations_total", "Endpoints whose programs were loaded", ("outcome",)
)
ENDPOINT_REGENERATION_SECONDS = _histogram(
    "cilium_endpoint_regeneration_time_stats_seconds",
    "Time to load an endpoint's programs",
    ("scope", "status"),
)
LATE_STARTS = _counter(
    "holdfast_late_starts_total", "Containers started again that the engine could not start", ("outcome",)
)
IPAM_EVENTS = _counter(
    "cilium_ipam_events_total", "Addresses handed out and taken back", ("action", "family")
)
CONNTRACK_GC_RUNS = _counter(
    "cilium_datapath_conntrack_gc_runs_total",
    "Collections of expired connections",
    ("family", "protocol", "status"),
)
CONNTRACK_GC_ENTRIES = _gauge(
    "cilium_datapath_conntrack_gc_entries",
    "Connections that the last collection left (alive) and deleted",
    ("family", "protocol", "status"),
)
CONNTRACK_GC_SECONDS = _histogram(
    "cilium_datapath_conntrack_gc_duration_seconds",
    "Duration of collections of expired connections",
    ("family", "protocol", "status"),
)
EVENTS_LOST = _counter("holdfast_events_lost_total", "Datapath events that found the ring full")
DRIVER_SECONDS = _histogram("holdfast_driver_seconds", "Duration of network driver calls", ("method",))
API_SECONDS = _histogram(
    "cilium_agent_api_process_time_seconds", "Duration of API requests", ("path", "method", "return_code")
)
API_LIMITER_WAIT_SECONDS = _histogram(
    "cilium_api_limiter_wait_history_duration_seconds",
    "Time that calls of the API and the network driver waited for their turn (option api-rate-limit)",
    ("api_call",),
    buckets=(0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0),
)
API_LIMITER_PROCESSED = _counter(
    "cilium_api_limiter_processed_requests_total",
    "Calls that were limited, by what became of them; refused: they did not get their turn in time",
    ("api_call", "outcome"),
)
API_LIMITER_IN_FLIGHT = _gauge(
    "cilium_api_limiter_requests_in_flight",
    "Calls under way (in-flight) and how many may be (limit; 0: any number)",
    ("api_call", "value"),
)
API_LIMITER_RATE = _gauge(
    "cilium_api_limiter_rate_limit",
    "Calls a second that are allowed (limit; 0: any number), and how many at once (burst)",
    ("api_call", "value"),
)

# --- probes between nodes (agent.health, agent.report_health)
_section("Probes between nodes")
UNREACHABLE_NODES = _described(
    "gauge", "cilium_unreachable_nodes", "Nodes of which the last probe was not answered", ()
)
NODE_HEALTH_STATUS = _described(
    "gauge",
    "cilium_node_health_connectivity_status",
    "Nodes by what is known of them: reachable, unreachable, unknown",
    ("source_cluster", "source_node_name", "type", "status"),
)
NODE_HEALTH_LATENCY = _histogram(
    "cilium_node_health_connectivity_latency_seconds",
    "Latency of probes that were answered",
    ("source_cluster", "source_node_name", "type", "protocol", "address_type"),
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
_TARGET = (
    *("source_cluster", "source_node_name", "target_cluster", "target_node_name", "target_node_type"),
    "type",
)
NODE_STATUS = _described(
    "gauge",
    "cilium_node_connectivity_status",
    "1 for a node whose last probe was answered, 0 for one whose was not; in clusters of up to 100 nodes",
    _TARGET,
)
NODE_LATENCY = _described(
    "gauge",
    "cilium_node_connectivity_latency_seconds",
    "Latency of a node's last probe, of the protocols that were answered; in clusters of up to 100 nodes",
    (*_TARGET, "target_node_ip", "protocol", "address_type"),
)
NARROW_PATHS = _described(
    "gauge",
    "holdfast_narrow_paths",
    "Addresses of nodes at which less arrives than this host's devices send",
    (),
)
NODE_MTU = _described(
    "gauge",
    "holdfast_node_path_mtu_bytes",
    "The longest packet, from the IP header on, that arrives at a node; in clusters of up to 100 nodes",
    (*_TARGET, "target_node_ip"),
)
CLOCK_AHEAD = _described(
    "gauge",
    "holdfast_clock_ahead_seconds",
    "Seconds that this host's clock is ahead of most nodes' (negative: behind); 0 within ten seconds",
    (),
)
WRONG_CLOCKS = _described(
    "gauge", "holdfast_wrong_clocks", "Other nodes whose clocks differ from most by more than ten seconds", ()
)
NODE_CLOCK = _described(
    "gauge",
    "holdfast_node_clock_ahead_seconds",
    "Seconds that a node's clock is ahead of this host's, to about a second; in clusters of up to 100 nodes",
    _TARGET,
)

# --- names across hosts (agent.names, agent.names_server)
_section("Names across hosts")
DNS_QUERIES = _counter(
    "holdfast_dns_queries_total",
    "Questions for names, by what became of them; limited: beyond what one address may ask",
    ("outcome",),
)
DNS_NAMES = _gauge("holdfast_dns_names", "Names of the cluster that have an address")
DNS_UNUSABLE = _gauge(
    "holdfast_dns_unusable_names", "Identities whose service or project can be no label of DNS"
)

# --- read from the kernel's maps at each scrape (agent.collector)
_section("Read from the kernel's maps at each scrape")
DROP_COUNT = _described("counter", "cilium_drop_count_total", "Packets dropped", ("reason", "direction"))
DROP_BYTES = _described("counter", "cilium_drop_bytes_total", "Bytes dropped", ("reason", "direction"))
FORWARD_COUNT = _described("counter", "cilium_forward_count_total", "Packets forwarded", ("direction",))
FORWARD_BYTES = _described("counter", "cilium_forward_bytes_total", "Bytes forwarded", ("direction",))
MAP_PRESSURE = _described(
    "gauge",
    "cilium_bpf_map_pressure",
    "Fill level of a BPF map, 0 to 1; above 1: a policy that does not fit, the last one that did is in force",
    ("map_name",),
)

_HEAD = """\
# Metrics

Generated by `python -m core.metrics > docs/metrics.md`; do not edit.

Scraped at `/metrics` of the address in the option `prometheus-serve-addr`, and of the agent's socket;
`holdfast metrics list` prints them. A histogram NAME is scraped as `NAME_bucket`, `NAME_sum` and
`NAME_count`. Counters begin again with the agent, but for those of the last section: they live in the kernel.
"""

_TAIL = """
## Rules for alerts

Where a person is needed; everything else ends by itself. `holdfast status` on the host says more.

```yaml
groups:
- name: holdfast
  rules:
  - alert: HoldfastViewIsStale        # policy that was changed since may not be in force on this host
    expr: holdfast_kvstore_stale == 1
    for: 1m
    annotations: {summary: "{{ $labels.instance }}: etcd has confirmed nothing for a long time"}
  - alert: HoldfastAsksEtcdTooMuch    # more than etcd.qps for minutes
    expr: rate(holdfast_kvstore_limiter_wait_duration_seconds_count[5m]) > 10
    for: 10m
  - alert: HoldfastRefusesCalls       # api-rate-limit
    expr: increase(cilium_api_limiter_processed_requests_total{outcome="refused"}[10m]) > 0
```
"""


def docs_page() -> str:
    """Return docs/metrics.md."""
    parts = [_HEAD]
    for title, described in DESCRIBED.items():
        parts.append(f"\n## {title}\n\n| Metric | Kind | Labels | Meaning |\n|---|---|---|---|\n")
        parts += [_row(each) for each in described]
    return "".join([*parts, _TAIL])


def _row(each: Description) -> str:
    labels = ", ".join(f"`{label}`" for label in each.labels)
    return f"| `{each.name}` | {each.kind} | {labels} | {each.text} |\n"


if __name__ == "__main__":
    sys.stdout.write(docs_page())
