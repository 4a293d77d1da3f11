# SPDX-License-Identifier: Apache-2.0
"""Metrics that live in BPF maps: drops, forwards and fill levels, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loguru import logger
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.programs import HostMaps
from core.errors import HoldfastError
from datapath.reasons import direction_name, reason_name
from datapath.records import MetricsKey, MetricsValue

Family = CounterMetricFamily | GaugeMetricFamily


class MapCollector(Collector):
    """Reads cilium_metrics and the fill of the small maps at each scrape (under a millisecond)."""

    def __init__(self, maps: HostMaps) -> None:
        self._maps = maps

    def collect(self) -> Iterable[Family]:
        try:
            return [*_packets(self._maps.metrics.items()), self._pressure()]
        except HoldfastError as error:
            logger.error("metrics of the data path can not be read: {}", error)
            return []

    def _pressure(self) -> Family:
        family = GaugeMetricFamily(
            "cilium_bpf_map_pressure", "Fill level of a BPF map, 0 to 1", labels=["map_name"]
        )
        for each in (self._maps.lxc, self._maps.ipcache):
            family.add_metric([each.name], each.pressure())
        return family


def _packets(entries: Iterable[tuple[MetricsKey, MetricsValue]]) -> Iterator[Family]:
    """Yield Cilium's four families of counters.  Pure."""
    drops, forwards = ["reason", "direction"], ["direction"]
    drop_count = CounterMetricFamily("cilium_drop_count", "Packets dropped", labels=drops)
    drop_bytes = CounterMetricFamily("cilium_drop_bytes", "Bytes dropped", labels=drops)
    forward_count = CounterMetricFamily("cilium_forward_count", "Packets forwarded", labels=forwards)
    forward_bytes = CounterMetricFamily("cilium_forward_bytes", "Bytes forwarded", labels=forwards)
    for key, value in entries:
        direction = direction_name(key.direction)
        if key.reason == 0:
            forward_count.add_metric([direction], value.packets)
            forward_bytes.add_metric([direction], value.bytes)
        else:
            labels = [reason_name(key.reason), direction]
            drop_count.add_metric(labels, value.packets)
            drop_bytes.add_metric(labels, value.bytes)
    yield from (drop_count, drop_bytes, forward_count, forward_bytes)
