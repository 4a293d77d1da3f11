# SPDX-License-Identifier: Apache-2.0
"""Metrics that live in BPF maps: drops, forwards and fill levels, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from loguru import logger
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.programs import HostMaps
from core.errors import HoldfastError
from core.metrics import DROP_BYTES, DROP_COUNT, FORWARD_BYTES, FORWARD_COUNT, MAP_PRESSURE
from datapath.mapspec import policy_map_name
from datapath.reasons import direction_name, reason_name
from datapath.records import MetricsKey, MetricsValue

# A policy map has a series of its own from this fill level.
POLICY_THRESHOLD = 0.1

Family = CounterMetricFamily | GaugeMetricFamily


class MapCollector(Collector):
    """Reads cilium_metrics, and cilium_lxc and cilium_ipcache as a whole, at each scrape.

    That is a tenth of a second for 300 000 addresses: scrape in a thread.  Only maps are touched here, and
    `policies`, which returns what endpoints' policies need of their maps; it must be safe in a thread.
    """

    def __init__(self, maps: HostMaps, policies: Callable[[], Mapping[int, float]]) -> None:
        self._maps = maps
        self._policies = policies

    def collect(self) -> Iterable[Family]:
        try:
            return [*_packets(self._maps.metrics.items()), self._pressure()]
        except HoldfastError as error:
            logger.error("metrics of the data path can not be read: {}", error)
            return []

    def _pressure(self) -> Family:
        family = GaugeMetricFamily(*MAP_PRESSURE[:2], labels=MAP_PRESSURE.labels)
        for each in (self._maps.lxc, self._maps.ipcache):
            family.add_metric([each.name], each.pressure())
        for endpoint_id, level in self._policies().items():
            # As in Cilium: hundreds of maps that are nearly empty are no news.
            if level > POLICY_THRESHOLD:
                family.add_metric([policy_map_name(endpoint_id)], level)
        return family


def _packets(entries: Iterable[tuple[MetricsKey, MetricsValue]]) -> Iterator[Family]:
    """Yield Cilium's four families of counters.  Pure."""
    drop_count, drop_bytes, forward_count, forward_bytes = (
        CounterMetricFamily(*each[:2], labels=each.labels)
        for each in (DROP_COUNT, DROP_BYTES, FORWARD_COUNT, FORWARD_BYTES)
    )
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
