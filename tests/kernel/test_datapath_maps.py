# SPDX-License-Identifier: Apache-2.0
"""Maps on the real kernel, pinned in a BPF file system of the test's own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from datapath import syscall
from datapath.bpffs import ensure_bpffs, is_bpffs, raise_memlock
from datapath.ctgc import collect, flush
from datapath.errors import (
    BpffsError,
    DatapathError,
    KeyAbsent,
    KeyExists,
    LayoutMismatch,
    MapFull,
    SyscallError,
)
from datapath.handle import MapHandle
from datapath.layouts import U32, U64
from datapath.maps import (
    CtMap,
    EventsLost,
    IpcacheMap,
    LxcMap,
    MetricsMap,
    MonitorFlag,
    PolicyMap,
    TunnelMap,
    open_or_create,
)
from datapath.mapspec import MapCatalogue, MapSpec, create, events_ring, open_pinned
from datapath.records import (
    CtEntry,
    CtKey,
    IpcacheEntry,
    LxcEntry,
    MetricsKey,
    MetricsValue,
    PolicyEntry,
    PolicyKey,
)
from datapath.uapi import MapType, Update
from tests.support.bpf import own_bpffs
from tests.support.require import require_root, require_tools

CATALOGUE = MapCatalogue(ct_tcp_max=16384, ct_any_max=16384, policy_max=64)


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    with own_bpffs(tmp_path) as root:
        yield root


def small(kind: MapType, max_entries: int = 8, flags: int = 0) -> MapHandle:
    require_root()
    return create(MapSpec("small", kind, U32, U64, max_entries, flags))


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


# --- pins


def test_every_map_can_be_made_and_found_again(pins: Path) -> None:
    specs = [*CATALOGUE.shared(), CATALOGUE.ct(tcp=True, family=6), CATALOGUE.policy(7)]
    for spec in specs:
        with open_or_create(spec, pins) as made, open_or_create(spec, pins) as found:
            assert made.info.id == found.info.id
            assert spec.differences(found.info) == ()
    assert sorted(pin.name for pin in pins.iterdir()) == sorted(spec.name for spec in specs)


def test_a_pinned_map_that_differs_is_refused_and_left_alone(pins: Path) -> None:
    with open_or_create(replace(CATALOGUE.ipcache, max_entries=1000, value=U64), pins) as old:
        with pytest.raises(LayoutMismatch) as refused:
            open_or_create(CATALOGUE.ipcache, pins)
        assert refused.value.differences == (
            "value size is 8, expected 12",
            "max entries is 1000, expected 512000",
        )
        assert str(pins / "cilium_ipcache") in str(refused.value)
        with open_pinned("cilium_ipcache", pins) as found:
            assert found.info.id == old.info.id


def test_missing_pin_is_an_error_that_names_it(pins: Path) -> None:
    with pytest.raises(SyscallError, match=r"open pin .*/cilium_lxc: No such file") as refused:
        LxcMap.reader("cilium_lxc", pins)
    assert refused.value.errno == errno.ENOENT


def test_policy_map_is_unpinned_with_its_endpoint(pins: Path) -> None:
    PolicyMap.of(7, CATALOGUE, pins).close()
    assert PolicyMap.remove(7, pins)
    assert not PolicyMap.remove(7, pins)


def test_pins_need_a_bpf_file_system(tmp_path: Path) -> None:
    require_root()
    assert not is_bpffs(tmp_path)
    with pytest.raises(SyscallError, match="pin "):
        open_or_create(CATALOGUE.monitor, tmp_path / "globals")
    (tmp_path / "file").write_text("")
    with pytest.raises(BpffsError, match="can not be made"):
        ensure_bpffs(tmp_path / "file" / "bpf")


def test_mounting_twice_is_mounting_once(pins: Path) -> None:
    assert is_bpffs(pins.parents[1])
    assert not ensure_bpffs(pins.parents[1])


def test_memlock_limit_is_tolerated() -> None:
    assert raise_memlock() in (True, False)


def test_dump_shows_fields_by_name(pins: Path) -> None:
    require_tools("bpftool")
    with open_or_create(CATALOGUE.policy(7), pins) as handle:
        PolicyMap(handle).upsert([(PolicyKey(4242, 80, 6, 1), PolicyEntry(True, 0))])
    dumped = subprocess.run(
        ["bpftool", "-j", "map", "dump", "pinned", str(pins / "cilium_policy_00007")],
        capture_output=True,
        check=True,
        timeout=10,
    )
    [found] = json.loads(dumped.stdout)
    shown = found["formatted"]
    assert (shown["key"]["sec_label"], shown["key"]["protocol"]) == (4242, 6)
    assert int(str(shown["value"]["deny"]), 16) == 1


def test_ring_of_events_is_pinned_nowhere() -> None:
    require_root()
    with create(events_ring(1 << 16)) as ring:
        assert (ring.info.type, ring.info.max_entries) == (MapType.RINGBUF, 1 << 16)


# --- single entries and errors


def test_errors_name_the_map() -> None:
    with small(MapType.HASH, 1) as handle:
        handle.update(number(1), bytes(8), Update.CREATE)
        with pytest.raises(KeyExists, match="map small: update: File exists"):
            handle.update(number(1), bytes(8), Update.CREATE)
        with pytest.raises(KeyAbsent):
            handle.update(number(2), bytes(8), Update.REPLACE)
        with pytest.raises(MapFull) as full:
            handle.update(number(2), bytes(8))
        assert full.value.map_name == "small"
        assert handle.lookup(number(2)) is None
        assert handle.delete(number(1))
        assert not handle.delete(number(1))


def test_closing_twice_is_harmless() -> None:
    handle = small(MapType.HASH)
    handle.close()
    handle.close()
    with pytest.raises(SyscallError):
        syscall.map_info(handle.fd)


# --- batches


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH, MapType.PERCPU_HASH])
def test_many_entries_written_read_and_deleted(kind: MapType, batches: bool) -> None:
    with small(kind, 20_000) as handle:
        handle._batches = batches
        value = bytes(range(8)) * (handle.value_size // 8)
        keys = [number(index) for index in range(9_000)]
        assert handle.update_many(keys, [value] * len(keys)) == {}
        assert dict(handle.items()) == dict.fromkeys(keys, value)
        assert handle.count() == 9_000
        assert handle.delete_many([*keys[:5_000], number(777_777), *keys[5_000:]]) == 9_000
        assert handle.count() == 0


def test_a_type_without_batches_falls_back() -> None:
    with create(CATALOGUE.call_policy()) as handle:
        assert handle._batches
        assert handle.delete_many([number(3), number(4)]) == 0
        assert not handle._batches
        assert list(handle.items()) == []


def test_an_invalid_entry_does_not_end_batches(pins: Path) -> None:
    ipcache = IpcacheMap.open(CATALOGUE.ipcache, pins)
    value = ipcache._pack_value(IpcacheEntry(1))
    good = [(ipcache._pack_key(f"10.0.0.{index}"), value) for index in range(20)]
    bad = (number(999) + good[0][0][4:], value)  # a prefix longer than an address
    assert list(ipcache.handle.update_many(*zip(bad, *good, bad, strict=True))) == [0, 21]
    assert ipcache.handle._batches
    assert ipcache.handle.count() == 20


def test_a_full_map_says_which_entries_failed() -> None:
    with small(MapType.HASH, 100) as handle:
        failed = handle.update_many([number(index) for index in range(150)], [bytes(8)] * 150)
        assert sorted(failed) == list(range(100, 150))
        assert all(isinstance(error, MapFull) for error in failed.values())
        assert handle.count() == 100


# --- typed maps


def test_ipcache_in_bulk(pins: Path) -> None:
    ipcache = IpcacheMap.open(CATALOGUE.ipcache, pins)
    entries = {
        f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}/32": IpcacheEntry(index, "192.0.2.1")
        for index in range(20_000)
    }
    entries["10.0.0.0/8"] = IpcacheEntry(2)
    entries["fd00::/64"] = IpcacheEntry(3)
    assert ipcache.upsert(entries.items()) == {}
    assert dict(ipcache.items()) == entries
    assert ipcache.pressure() == pytest.approx(20_002 / 512_000)
    assert ipcache.get("10.200.0.1") == IpcacheEntry(2)  # the longest prefix, as the programs see it
    assert ipcache.delete([*entries, "192.0.2.0/24"]) == 20_002
    assert list(ipcache.items()) == []
    ipcache.close()


def test_what_is_no_entry_fails_alone(pins: Path) -> None:
    ipcache = IpcacheMap.open(CATALOGUE.ipcache, pins)
    failed = ipcache.upsert(
        [
            ("10.0.0.1/32", IpcacheEntry(1)),
            ("10.0.0.2/40", IpcacheEntry(1)),
            ("10.0.0.3/32", IpcacheEntry(1 << 32)),
            ("10.0.0.4/32", IpcacheEntry(1, "nobody")),
            ("10.0.0.5/32", IpcacheEntry(5)),
        ]
    )
    assert sorted(failed) == ["10.0.0.2/40", "10.0.0.3/32", "10.0.0.4/32"]
    assert "prefix length 40" in str(failed["10.0.0.2/40"])
    assert dict(ipcache.items()) == {"10.0.0.1/32": IpcacheEntry(1), "10.0.0.5/32": IpcacheEntry(5)}
    ipcache.close()


def test_small_maps(pins: Path) -> None:
    lxc, tunnel = LxcMap.open(CATALOGUE.lxc, pins), TunnelMap.open(CATALOGUE.tunnel, pins)
    entry = LxcEntry(13, 981, 0, "5a:c4:a9:04:07:84", "ae:aa:00:7d:94:a1")
    assert lxc.upsert([("10.50.217.152", entry)]) == {}
    assert dict(lxc.items()) == {"10.50.217.152": entry}
    assert tunnel.upsert([("10.51.0.0", "10.99.0.1")]) == {}
    assert tunnel.get("10.51.0.0") == "10.99.0.1"
    metrics = MetricsMap.open(CATALOGUE.metrics, pins)
    metrics.upsert([(MetricsKey(133, 2), MetricsValue(4, 280))])
    assert dict(metrics.items()) == {MetricsKey(133, 2): MetricsValue(4, 280)}
    flag = MonitorFlag.open(CATALOGUE.monitor, pins)
    flag.set(1)
    assert flag.get(0) == 1
    lost = EventsLost.open(CATALOGUE.events_lost, pins)
    assert lost.total() == 0
    lost.upsert([(0, 7)])
    assert lost.total() == 7


WEB, DB = PolicyKey(13465, 80, 6, 0), PolicyKey(6114, 5432, 6, 1)
ALLOW, DENY = PolicyEntry(False, 0), PolicyEntry(True, 0)


def count_packets(policy: PolicyMap, key: PolicyKey) -> None:
    """Make the entry of `key` look used, as the programs would."""
    value = bytearray(policy.handle.lookup(policy._pack_key(key)) or b"")
    value[8] = 3
    policy.handle.update(policy._pack_key(key), bytes(value))


def test_policy_sync_touches_only_what_differs(pins: Path) -> None:
    policy = PolicyMap.of(7, CATALOGUE, pins)
    assert policy.sync([(WEB, ALLOW), (DB, ALLOW)])[:2] == (2, 0)
    count_packets(policy, WEB)
    assert policy.sync([(WEB, ALLOW), (DB, DENY)])[:2] == (1, 0)
    assert {found.key: (found.entry, found.packets) for found in policy.dump()} == {
        WEB: (ALLOW, 3),
        DB: (DENY, 0),
    }
    assert policy.sync([(WEB, ALLOW)])[:2] == (0, 1)


def test_policy_change_in_a_full_map_finds_room_after_its_deletions(pins: Path) -> None:
    policy = PolicyMap.of(7, CATALOGUE, pins)
    old = [PolicyKey(1000 + index, 0, 0, 0) for index in range(CATALOGUE.policy_max)]
    policy.sync((key, ALLOW) for key in old)
    new = [PolicyKey(2000 + index, 0, 0, 0) for index in range(10)]
    change = policy.apply(((key, ALLOW) for key in new), old[:10])
    assert change == (10, 10, {})
    refused = policy.apply([(WEB, ALLOW)], []).failed
    assert isinstance(refused[WEB], MapFull)


def test_policy_change_ends_at_what_is_refused(pins: Path) -> None:
    """A denial that can not be written leaves the port closed that it is an exception of."""
    policy = PolicyMap.of(7, CATALOGUE, pins)
    policy.sync([(WEB, ALLOW), (DB, ALLOW)])
    no_identity, to_everybody = PolicyKey(1 << 32, 443, 6, 0), PolicyKey(0, 443, 6, 0)
    change = policy.apply([(to_everybody, ALLOW), (no_identity, DENY), (WEB, DENY)], [DB])
    assert (change.written, change.deleted, set(change.failed)) == (1, 0, {no_identity})
    assert dict(policy.items()) == {WEB: DENY, DB: ALLOW}
    assert policy.sync([(to_everybody, ALLOW)]) == (1, 2, {})


def test_policy_change_that_waits_does_not_go_on_over_another(pins: Path) -> None:
    policy = PolicyMap.of(7, CATALOGUE, pins)
    waiting = policy.applying([(WEB, DENY), (PolicyKey(0, 80, 6, 0), ALLOW)], [])
    next(waiting)
    assert dict(policy.items()) == {WEB: DENY}
    policy.sync([])
    with pytest.raises(DatapathError, match="cilium_policy_00007: another change came in between"):
        next(waiting)
    assert dict(policy.items()) == {}


# --- conntrack


def flow(source: str, destination: str, *, port: int) -> CtKey:
    return CtKey(source, destination, port, 80, 6, 0)


def entry(lifetime: int) -> CtEntry:
    return CtEntry(1, 60, 0, 0, lifetime, 0, 0, 0, 2, 0, 13465, 0, 0)


def test_expired_connections_are_collected(pins: Path) -> None:
    connections = CtMap.open(CATALOGUE.ct(tcp=True), pins)
    now = int(time.monotonic())
    connections.upsert(
        (flow("10.50.0.5", "10.50.0.6", port=1024 + index), entry(now - 100 if index % 3 else now + 100))
        for index in range(6_000)
    )
    scan = collect(connections)
    assert scan[:2] == (6_000, 4_000)
    assert scan.capacity == connections.handle.info.max_entries
    assert all(found.lifetime > now for _, found in connections.items())
    assert collect(connections)[:2] == (2_000, 0)


@pytest.mark.parametrize("prefix", ["10.50.0.", "fd00::"])
def test_connections_of_an_address_that_goes_are_flushed(pins: Path, prefix: str) -> None:
    family = 6 if ":" in prefix else 4
    connections = CtMap.open(CATALOGUE.ct(tcp=False, family=family), pins)
    keys = [
        flow(f"{prefix}5", f"{prefix}6", port=1),
        flow(f"{prefix}6", f"{prefix}5", port=2),
        flow(f"{prefix}6", f"{prefix}7", port=3),
    ]
    connections.upsert((key, entry(1)) for key in keys)
    assert flush(connections, [f"{prefix}5", "192.0.2.1", "2001:db8::1"])[:2] == (3, 2)
    assert [key for key, _ in connections.items()] == [keys[2]]


def test_descriptors_close_on_exec() -> None:
    with small(MapType.HASH) as handle:
        assert not os.get_inheritable(handle.fd)
