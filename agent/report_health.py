# SPDX-License-Identifier: Apache-2.0
"""What is shown of the probes between nodes: the answer of /v1/health, status' line, Cilium's metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.api import models
from agent.api import models_health as wire
from agent.clocks import Verdict
from agent.health import UNKNOWN, NodeHealth, Path, Prober, State
from agent.health_server import HealthServer
from agent.path_mtu import PathProber
from agent.probes import Outcome
from agent.report_endpoints import when
from core.metrics import (
    CLOCK_AHEAD,
    NARROW_PATHS,
    NODE_CLOCK,
    NODE_HEALTH_STATUS,
    NODE_LATENCY,
    NODE_MTU,
    NODE_STATUS,
    UNREACHABLE_NODES,
    WRONG_CLOCKS,
    Description,
)

# Nodes that status names, of each kind; whoever wants all asks for `holdfast health`.
SHOWN = 10
# A series a node and more: every agent has them of every other, so a large cluster gets the totals alone.
SERIES_NODES_MAX = 100


def health(prober: Prober) -> wire.HealthStatus:
    """Return what is known of every node: this one first, then by name.  Safe in a thread."""
    names = sorted(prober.schedule, key=lambda name: (name != prober.own, name))
    found, now = dict(prober.results.nodes), time.time()
    mtus, verdict = _mtus(prober.sizes), prober.clocks.verdict()
    return wire.HealthStatus(
        local=wire.SelfStatus(name=prober.own),
        timestamp=_when(prober.results.last),
        interval=prober.schedule.period,
        device_mtu=prober.sizes.full if prober.sizes is not None else 0,
        clock=_clock(verdict),
        nodes=[
            _node(name, found.get(name, UNKNOWN), now, mtus, wrong=name in verdict.wrong) for name in names
        ],
    )


def summary(prober: Prober | None, server: HealthServer | None) -> models.ClusterHealth:
    """Return the probes in short; `state` and `msg` are about this node's own side."""
    if prober is None or server is None:
        return models.ClusterHealth(state="Disabled", msg="cluster-health-port is 0")
    results = prober.results
    narrow = prober.sizes.lowered if prober.sizes is not None else {}
    failures = [f"{ip} port {server.port}: {reason}" for ip, reason in server.errors.items()]
    return models.ClusterHealth(
        state="Warning" if failures else "Ok",
        msg=f"others' probes can not be answered at {'; '.join(failures)}" if failures else "",
        nodes=len(prober.schedule),
        reachable=len(results.nodes) - len(results.unreachable),
        unreachable=len(results.unreachable),
        interval=prober.schedule.period,
        age=_age(results.last, time.time()),
        unreachable_nodes=[_unreachable(*each) for each in islice(results.unreachable.items(), SHOWN)],
        narrow=len(narrow),
        narrow_paths=_narrow(prober.sizes, narrow) if prober.sizes is not None else [],
        clock=_clock(prober.clocks.verdict()),
    )


def _clock(verdict: Verdict) -> models.Clock:
    named = [
        models.WrongClock(name=name, ahead=round(ahead, 1))
        for name, ahead in islice(verdict.wrong.items(), SHOWN)
    ]
    return models.Clock(
        ahead=round(verdict.ahead, 1),
        differing=verdict.differing,
        others=verdict.others,
        wrong=len(verdict.wrong),
        wrong_nodes=named,
    )


def _narrow(sizes: PathProber, lowered: dict[str, int]) -> list[models.NarrowPath]:
    return [
        models.NarrowPath(name=sizes.names.get(ip, ""), ip=ip, mtu=mtu, device_mtu=sizes.full)
        for ip, mtu in islice(lowered.items(), SHOWN)
    ]


def _mtus(sizes: PathProber | None) -> dict[str, int]:
    """Return what arrives at each address that is known of."""
    return sizes.found | sizes.lowered if sizes is not None else {}


def _unreachable(name: str, found: NodeHealth) -> models.UnreachableNode:
    failed = next(path for path in found.paths if path.error)
    return models.UnreachableNode(name=name, ip=failed.ip, error=failed.error)


def _when(moment: float) -> str:
    return when(moment) if moment else ""


def _age(moment: float, now: float) -> float:
    """Return the seconds since then, -1 for never; a clock that was set back makes none younger than new."""
    return max(0.0, now - moment) if moment else -1.0


def _node(name: str, found: NodeHealth, now: float, mtus: dict[str, int], *, wrong: bool) -> wire.NodeStatus:
    paths = [_path(each, mtus.get(each.ip, 0)) for each in found.paths]
    return wire.NodeStatus(
        name=name,
        state=found.state.value,
        host=wire.HostStatus(primary_address=next(iter(paths), None), secondary_addresses=paths[1:]),
        probed=_when(found.time),
        age=_age(found.time, now),
        clock_ahead=None if found.ahead is None else round(found.ahead, 1),
        clock_wrong=wrong,
    )


def _path(path: Path, mtu: int) -> wire.PathStatus:
    icmp = None if path.icmp is None else _outcome(path.icmp)
    tcp, http = _outcome(path.tcp), _outcome(path.http)
    return wire.PathStatus(ip=path.ip, icmp=icmp, tcp=tcp, http=http, mtu=mtu)


def _outcome(outcome: Outcome) -> wire.ConnectivityStatus:
    return wire.ConnectivityStatus(latency=round(outcome.latency * 1e9), status=outcome.error)


class HealthCollector(Collector):
    """Gauges of connectivity, made at each scrape; safe in a thread, it looks at copies."""

    def __init__(self, prober: Prober) -> None:
        self._prober = prober
        self._source = tuple(prober.own.split("/", 1))

    def collect(self) -> Iterable[GaugeMetricFamily]:
        results, nodes = self._prober.results, len(self._prober.schedule)
        probed, failed = len(results.nodes), len(results.unreachable)
        unreachable, totals = _family(UNREACHABLE_NODES), _family(NODE_HEALTH_STATUS)
        unreachable.add_metric((), failed)
        states = (
            (State.REACHABLE, probed - failed),
            (State.UNREACHABLE, failed),
            (State.UNKNOWN, nodes - probed),
        )
        for state, number in states:
            totals.add_metric((*self._source, "node", state.value), number)
        yield from (unreachable, totals, self._narrow(), *self._clocks())
        if nodes <= SERIES_NODES_MAX:
            yield from self._each(dict(results.nodes))

    def _narrow(self) -> GaugeMetricFamily:
        narrow, sizes = _family(NARROW_PATHS), self._prober.sizes
        narrow.add_metric((), len(sizes.lowered) if sizes is not None else 0)
        return narrow

    def _clocks(self) -> Iterable[GaugeMetricFamily]:
        verdict, ahead, wrong = self._prober.clocks.verdict(), _family(CLOCK_AHEAD), _family(WRONG_CLOCKS)
        ahead.add_metric((), verdict.ahead)
        wrong.add_metric((), len(verdict.wrong))
        return ahead, wrong

    def _each(self, found: dict[str, NodeHealth]) -> Iterable[GaugeMetricFamily]:
        status, latency, mtu = _family(NODE_STATUS), _family(NODE_LATENCY), _family(NODE_MTU)
        clock = _family(NODE_CLOCK)
        mtus = _mtus(self._prober.sizes)
        for name, each in found.items():
            labels = (*self._source, *name.split("/", 1), self._type(name), "node")
            status.add_metric(labels, each.state is State.REACHABLE)
            for answer in each.answers():
                latency.add_metric((*labels, *answer[:3]), answer.latency)
            if each.ahead is not None:
                clock.add_metric(labels, each.ahead)
            for path in each.paths:
                if path.ip in mtus:
                    mtu.add_metric((*labels, path.ip), mtus[path.ip])
        return status, latency, mtu, clock

    def _type(self, name: str) -> str:
        if name == self._prober.own:
            return "local_node"
        same = name.startswith(f"{self._source[0]}/")
        return "remote_intra_cluster" if same else "remote_inter_cluster"


def _family(described: Description) -> GaugeMetricFamily:
    return GaugeMetricFamily(described.name, described.text, labels=described.labels)
