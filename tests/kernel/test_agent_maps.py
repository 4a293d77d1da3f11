# SPDX-License-Identifier: Apache-2.0
"""What the agent reads of whole maps: fill levels, and what nobody wants in cilium_ipcache any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import ipcache, report_maps
from datapath.maps import CtMap, IpcacheMap, LxcMap, MetricsMap
from datapath.mapspec import MapCatalogue, open_or_create
from datapath.records import CtEntry, CtKey, IpcacheEntry, LxcEntry, MetricsKey, MetricsValue
from tests.support.bpf import own_bpffs

CATALOGUE = MapCatalogue(ct_tcp_max=1024, ct_any_max=1024, policy_max=64)
MAC = "02:00:00:00:00:01"


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    with own_bpffs(tmp_path) as root:
        yield root


def test_fill_levels_are_those_of_maps_that_can_fill(pins: Path) -> None:
    """One entry in each map: an array of one word is not a map that is 100 % full."""
    for spec in CATALOGUE.shared():
        open_or_create(spec, pins).close()
    connection = CtEntry(1, 100, 2, 200, 10**9, 0, 0, 0, 0, 0, 0, 0, 0)
    with (
        LxcMap.open(CATALOGUE.lxc, pins).handle as lxc,
        IpcacheMap.open(CATALOGUE.ipcache, pins).handle as addresses,
        CtMap.open(CATALOGUE.ct(tcp=True), pins).handle as connections,
        MetricsMap.open(CATALOGUE.metrics, pins).handle as counters,
    ):
        assert not LxcMap(lxc).upsert([("10.50.0.9", LxcEntry(12, 373, 0, MAC, MAC))])
        assert not IpcacheMap(addresses).upsert([("10.50.0.9/32", IpcacheEntry(300))])
        assert not CtMap(connections).upsert([(CtKey("10.0.0.1", "10.0.0.2", 1, 2, 6, 0), connection)])
        assert not MetricsMap(counters).upsert([(MetricsKey(0, 1), MetricsValue(1, 2))])
    found = {each.name: each for each in report_maps.maps(pins)}
    assert found.keys() == {spec.name for spec in CATALOGUE.shared()}
    filled = {name: (each.entries, each.pressure) for name, each in found.items() if each.pressure}
    assert filled == {
        "cilium_lxc": (1, 1 / 65_535),
        "cilium_ipcache": (1, 1 / 512_000),
        "cilium_ct4_global": (1, 1 / 1024),
        "cilium_metrics": (1, 1 / 1024),
    }
    # A connection is 70 bytes of key and value; the kernel adds its own.
    connection_bytes = found["cilium_ct4_global"].memory / 1024
    assert 70 < connection_bytes < 200
    assert all(each.memory for each in found.values())
    arrays = {name for name, each in found.items() if each.entries == -1}
    assert arrays == {"cilium_call_policy", "holdfast_monitor", "holdfast_events_lost"}


class Nobody:
    async def wait_idle(self) -> None:
        return


class Watched(IpcacheMap):
    """Has `during` run in the loop while the map is read, and waits for it: a read in the loop can not."""

    loop: asyncio.AbstractEventLoop
    during: Callable[[], None]

    def key_chunks(self) -> Iterator[list[str]]:
        yield from super().key_chunks()

        async def change() -> None:
            self.during()

        asyncio.run_coroutine_threadsafe(change(), self.loop).result(timeout=30)


async def test_a_prune_holds_up_nobody_and_leaves_what_came_meanwhile(pins: Path) -> None:
    """10.9.0.7 is in the map from before; etcd speaks of it after the map was read."""
    table = ipcache.new_table()
    kvstore = table.source(ipcache.KVSTORE_SOURCE)
    kvstore.upsert("10.9.0.1/32", ipcache.Record(300))
    stale = [f"10.8.{number >> 8}.{number & 255}/32" for number in range(3 * ipcache.PRUNED_AT_ONCE)]
    entries = {prefix: IpcacheEntry(301) for prefix in ["10.9.0.1/32", "10.9.0.7/32", "0.0.0.0/0", *stale]}
    with Watched.open(CATALOGUE.ipcache, pins).handle as handle:
        watched = Watched(handle)
        watched.loop = asyncio.get_running_loop()
        watched.during = lambda: kvstore.upsert("10.9.0.7/32", ipcache.Record(301))
        assert not watched.upsert(entries.items())
        target = ipcache.IpcacheMapTarget(watched, Nobody())
        assert await target.prune(table) == len(stale)
        assert {prefix for prefix, _ in watched.items()} == {"10.9.0.1/32", "10.9.0.7/32", "0.0.0.0/0"}


async def test_many_entries_are_written_and_a_bad_one_stops_no_other(pins: Path) -> None:
    number = 3 * ipcache.WRITTEN_AT_ONCE
    records = {f"10.8.{index >> 8}.{index & 255}/32": ipcache.Record(300 + index) for index in range(number)}
    with IpcacheMap.open(CATALOGUE.ipcache, pins).handle as handle:
        opened = IpcacheMap(handle)
        target = ipcache.IpcacheMapTarget(opened, Nobody())
        failed = await target.update([*records.items(), ("10.9.0.1/33", ipcache.Record(300))])
        assert list(failed) == ["10.9.0.1/33"]
        found = {prefix: entry.identity for prefix, entry in opened.items()}
        assert found == {prefix: record.identity for prefix, record in records.items()}
        assert sorted(opened.keys()) == sorted(records)


async def test_a_map_that_this_process_made_is_read_from_the_second_prune_on(pins: Path) -> None:
    """Nobody else has written to it before the first; later somebody may have."""
    table = ipcache.new_table()
    with IpcacheMap.open(CATALOGUE.ipcache, pins).handle as handle:
        opened = IpcacheMap(handle)
        target = ipcache.reconciler(table, opened, Nobody()).operations
        opened.upsert([("10.8.0.1/32", IpcacheEntry(300))])
        assert [await target.prune(table) for _ in range(2)] == [0, 1]
    with IpcacheMap.open(CATALOGUE.ipcache, pins).handle as handle:
        opened = IpcacheMap(handle)
        opened.upsert([("10.8.0.1/32", IpcacheEntry(300))])
        assert await ipcache.reconciler(table, opened, Nobody()).operations.prune(table) == 1
