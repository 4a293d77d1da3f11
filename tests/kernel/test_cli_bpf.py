# SPDX-License-Identifier: Apache-2.0
"""`holdfast bpf …` on real pinned maps, with no agent anywhere."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from datapath.maps import CtMap, IpcacheMap, LxcMap, MetricsMap, PolicyMap, TunnelMap, TypedMap
from datapath.mapspec import MapCatalogue
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
from tests.support.bpf import own_bpffs
from tests.support.cli import run

K = TypeVar("K")
V = TypeVar("V")

CATALOGUE = MapCatalogue(ct_tcp_max=1024, ct_any_max=1024, policy_max=256)
ENTRY = CtEntry(1, 100, 2, 200, 10**9, 0b10000, 0, 7, 0x12, 0x02, 13465, 5, 6)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A BPF file system with a few entries in every map; yields its mount point."""
    with own_bpffs(tmp_path) as pins:
        fill(pins)
        yield pins.parents[1]


def fill(pins: Path) -> None:
    def put(opened: TypedMap[K, V], *entries: tuple[K, V]) -> None:
        assert opened.upsert(entries) == {}
        opened.close()

    host = LxcEntry(0, 0, 1, "00:00:00:00:00:00", "00:00:00:00:00:00")
    endpoint = LxcEntry(12, 373, 0, "0a:58:0a:32:00:09", "0a:59:0a:32:00:09")
    ipcache = IpcacheMap.open(CATALOGUE.ipcache, pins)
    put(ipcache, ("10.50.0.0/16", IpcacheEntry(2)), ("10.50.0.9/32", IpcacheEntry(13465)))
    put(LxcMap.open(CATALOGUE.lxc, pins), ("10.50.0.9", endpoint), ("10.99.0.2", host))
    metrics = MetricsMap.open(CATALOGUE.metrics, pins)
    put(metrics, (MetricsKey(0, 1), MetricsValue(10, 1000)), (MetricsKey(133, 1), MetricsValue(3, 180)))
    put(TunnelMap.open(CATALOGUE.tunnel, pins), ("10.51.0.0", "10.99.0.1"))
    put(
        PolicyMap.of(373, CATALOGUE, pins),
        (PolicyKey(13465, 80, 6, 0), PolicyEntry(False, 0)),
        (PolicyKey(0, 0, 0, 1), PolicyEntry(False, 0)),
        (PolicyKey(2, 8, 1, 0), PolicyEntry(True, 0)),
    )
    tcp = CtKey("10.50.0.9", "10.50.0.8", 40000, 80, 6, 0)
    udp = CtKey("10.50.0.9", "10.50.0.8", 40000, 53, 17, 1)
    put(CtMap.open(CATALOGUE.ct(tcp=True), pins), (tcp, ENTRY))
    put(CtMap.open(CATALOGUE.ct(tcp=False), pins), (udp, ENTRY._replace(lifetime=1)))


def bpf(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = run("bpf", "--bpf-root", str(root), *words, socket=root / "none.sock")
    assert "Traceback" not in done.stderr
    return done


def table(root: Path, *words: str) -> list[list[str]]:
    """Return the words of each line."""
    done = bpf(root, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


def test_ipcache(root: Path) -> None:
    lines = table(root, "ipcache", "list")
    assert lines[0] == ["IP", "PREFIX/ADDRESS", "IDENTITY"]
    assert lines[2] == ["10.50.0.9/32", "identity=13465", "encryptkey=0", "tunnelendpoint=0.0.0.0"]
    assert bpf(root, "ipcache", "get", "10.50.0.9").stdout == "10.50.0.9 maps to identity 13465\n"
    assert bpf(root, "ipcache", "get", "10.50.7.7").stdout == "10.50.7.7 maps to identity 2\n"
    assert bpf(root, "ipcache", "get", "192.0.2.1").returncode == 4
    assert bpf(root, "ipcache", "get", "florp").returncode == 2


def test_endpoints_metrics_tunnel(root: Path) -> None:
    lines = table(root, "endpoint", "list")
    assert lines[0] == ["IP", "ADDRESS", "LOCAL", "ENDPOINT", "INFO"]
    assert lines[1][:3] == ["10.50.0.9:0", "id=373", "flags=0x0000"]
    assert lines[2] == ["10.99.0.2:0", "(localhost)"]
    lines = table(root, "metrics", "list")
    assert lines[0] == ["REASON", "DIRECTION", "PACKETS", "BYTES"]
    assert lines[1:] == [["Success", "INGRESS", "10", "1000"], ["Policy", "denied", "INGRESS", "3", "180"]]
    assert table(root, "tunnel", "list") == [["TUNNEL", "VALUE"], ["10.51.0.0:0", "10.99.0.1:0"]]


def test_policy(root: Path) -> None:
    lines = table(root, "policy", "get", "373", "-n")
    assert lines[0] == ["POLICY", "DIRECTION", "IDENTITY", "PORT/PROTO", "PROXY", "PORT", "BYTES", "PACKETS"]
    assert lines[1:] == [
        ["Deny", "Ingress", "2", "8/ICMP", "NONE", "0", "0"],
        ["Allow", "Ingress", "13465", "80/TCP", "NONE", "0", "0"],
        ["Allow", "Egress", "0", "ANY", "NONE", "0", "0"],
    ]
    assert table(root, "policy", "list")[1][:2] == ["373", "3"]
    assert "Endpoint ID: 373" in bpf(root, "policy", "get", "--all").stdout
    assert (
        json.loads(bpf(root, "policy", "get", "373", "-o", "json").stdout)["cilium_policy_00373"][0]["deny"]
        is True
    )
    missing = bpf(root, "policy", "get", "9")
    assert (missing.returncode, "cilium_policy_00009" in missing.stderr) == (4, True)
    assert bpf(root, "policy", "get").returncode == 2
    named = bpf(root, "policy", "get", "web")
    assert (named.returncode, "holdfast endpoint list" in named.stderr) == (2, True)


def test_conntrack(root: Path) -> None:
    lines = bpf(root, "ct", "list").stdout.splitlines()
    assert lines[0].startswith(
        "TCP OUT 10.50.0.9:40000 -> 10.50.0.8:80 expires=1000000000 RxPackets=1 RxBytes=100 "
    )
    assert "Flags=0x0010 [ SeenNonSyn ] RevNAT=0 SourceSecurityID=13465 IfIndex=7" in lines[0]
    assert lines[1].startswith("UDP IN 10.50.0.9:40000 -> 10.50.0.8:53 ")
    assert len(bpf(root, "ct", "list", "--alive").stdout.splitlines()) == 1
    refused = bpf(root, "ct", "flush")
    assert (refused.returncode, "nothing was changed" in refused.stderr) == (1, True)
    assert bpf(root, "ct", "flush", "-f").stdout == "2 entries removed\n"
    assert bpf(root, "ct", "list").stdout == ""


def test_ipv6_beside_ipv4(root: Path) -> None:
    """Addresses of IPv6 stand in brackets before a port; connections of both families are forgotten."""
    pins = root / "tc" / "globals"
    endpoint = LxcEntry(12, 373, 0, "0a:58:0a:32:00:09", "0a:59:0a:32:00:09")
    with LxcMap.open(CATALOGUE.lxc, pins).handle as handle:
        assert LxcMap(handle).upsert([("fd00::9", endpoint)]) == {}
    with CtMap.open(CATALOGUE.ct(tcp=True, family=6), pins).handle as handle:
        assert CtMap(handle).upsert([(CtKey("fd00::9", "fd00::8", 40000, 80, 6, 0), ENTRY)]) == {}
    assert [line[0] for line in table(root, "endpoint", "list")[1:]] == [
        "10.50.0.9:0",
        "10.99.0.2:0",
        "[fd00::9]:0",
    ]
    listed = bpf(root, "ct", "list", "global").stdout
    assert "TCP OUT [fd00::9]:40000 -> [fd00::8]:80 expires=1000000000 " in listed
    assert bpf(root, "ct", "flush", "-f").stdout == "3 entries removed\n"
    assert bpf(root, "ct", "list").stdout == ""


# Command → its first line, and what its JSON says of one entry.
TABLES: dict[str, tuple[str, Any]] = {
    "ipcache list": (
        "IP PREFIX/ADDRESS   IDENTITY",
        ("10.50.0.9/32", {"identity": 13465, "tunnel_endpoint": "0.0.0.0", "key": 0}),
    ),
    "endpoint list": ("IP ADDRESS    LOCAL ENDPOINT INFO", ("10.50.0.9", {"endpoint_id": 373})),
    "metrics list": (
        "REASON          DIRECTION   PACKETS   BYTES",
        (1, {"reason": "Policy denied", "direction": "INGRESS", "packets": 3, "bytes": 180}),
    ),
    "tunnel list": ("TUNNEL        VALUE", ("10.51.0.0", "10.99.0.1")),
    "policy get 373 -n": (
        "POLICY   DIRECTION   IDENTITY   PORT/PROTO   PROXY PORT   BYTES   PACKETS",
        ("cilium_policy_00373", [{"identity": 2, "dport": 8, "protocol": 1, "direction": 0, "deny": True}]),
    ),
    "policy list": ("ENDPOINT   ENTRIES   PATH", (0, {"endpoint": 373, "entries": 3})),
}


@pytest.mark.parametrize("words", TABLES)
def test_headers_are_stable_and_can_be_left_out(root: Path, words: str) -> None:
    assert bpf(root, *words.split()).stdout.splitlines()[0] == TABLES[words][0]
    assert table(root, *words.split(), "--no-headers") == table(root, *words.split())[1:]


@pytest.mark.parametrize("words", TABLES)
def test_json_says_what_the_table_says(root: Path, words: str) -> None:
    found = json.loads(bpf(root, *words.split(), "-o", "json").stdout)
    where, expected = TABLES[words][1]
    assert holds(found[where], expected), found


def holds(found: Any, expected: Any) -> bool:
    """True when everything expected is in what was found; it may hold more."""
    if isinstance(expected, dict):
        return all(name in found and holds(found[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return all(any(holds(each, wanted) for each in found) for wanted in expected)
    return bool(found == expected)


def test_connections_as_json(root: Path) -> None:
    found = json.loads(bpf(root, "ct", "list", "-o", "json").stdout)
    ports = {(each["protocol"], each["destination_port"], each["source_identity"]) for each in found}
    assert ports == {(6, 80, 13465), (17, 53, 13465)}
    assert json.loads(bpf(root, "ct", "flush", "-f", "-o", "json").stdout) == {"deleted": 2}
    assert json.loads(bpf(root, "ct", "list", "-o", "json").stdout) == []


def test_a_host_without_maps(tmp_path: Path) -> None:
    for words in (["ipcache", "list"], ["ct", "list"], ["metrics", "list"], ["policy", "get", "5"]):
        done = bpf(tmp_path, *words)
        assert (done.returncode, done.stderr.startswith("Error: there is no ")) == (4, True)
    assert bpf(tmp_path, "policy", "list", "--no-headers").stdout == ""
