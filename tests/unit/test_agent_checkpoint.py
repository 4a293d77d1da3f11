# SPDX-License-Identifier: Apache-2.0
"""The checkpoint: what is written comes back; what is damaged, foreign or newer never stops a start."""

from __future__ import annotations

import json
import stat
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.checkpoint import Checkpoint, Network, Node, check_endpoint, own_lease
from agent.endpoint import ENDPOINT_ID_MAX, Endpoint, Port, macs_of
from agent.errors import CheckpointDamaged
from datapath.devices import host_name, temporary_name


def made(number: int, address: str = "", **fields: Any) -> Endpoint:
    ipv4 = address or str(IPv4Address("10.9.0.0") + number)
    mac, node_mac = macs_of(IPv4Address(ipv4))
    return Endpoint(
        id=number,
        ipv4=ipv4,
        mac=mac,
        node_mac=node_mac,
        interface=host_name(number),
        peer=temporary_name(number),
        **fields,
    )


@given(
    st.integers(1, ENDPOINT_ID_MAX),
    st.ip_addresses(v=4),
    st.lists(st.builds(Port, *[st.integers(1, 65535)] * 4), max_size=3),
    st.text(max_size=30),
)
def test_what_this_agent_writes_is_accepted(
    number: int, address: IPv4Address, ports: list[Port], name: str
) -> None:
    endpoint = made(number, str(address), ports=tuple(ports), container_name=name, connected=True)
    again = msgspec.json.decode(msgspec.json.encode(endpoint), type=Endpoint)
    assert again == endpoint
    check_endpoint(again)


def test_fields_of_a_newer_version_survive(tmp_path: Path) -> None:
    """A host that is taken back a version and upgraded again finds what the newer one knew."""
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save_endpoint(made(7))
    checkpoint.save_node(Node("host-1", "10.9.0.0/16"))
    files = [tmp_path / "endpoints" / "00007.json", tmp_path / "node.json"]
    for path in files:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"next": {"a": ["<b>", 1]}, "version": 2}))
    older = Checkpoint(tmp_path)
    (endpoint,) = older.endpoints()
    node = older.node()
    assert node is not None
    older.save_endpoint(msgspec.structs.replace(endpoint, connected=True))
    older.save_node(msgspec.structs.replace(node, last_endpoint_id=9))
    saved = [json.loads(path.read_text()) for path in files]
    assert [each["next"] for each in saved] == [{"a": ["<b>", 1]}] * 2
    assert (saved[0]["connected"], saved[1]["last_endpoint_id"]) == (True, 9)
    older.drop_endpoint(7)
    older.save_endpoint(made(7))  # another endpoint of the same number
    assert "next" not in json.loads(files[0].read_text())


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state")
    one = made(7, labels="container:app=web;", identity=4711, connected=True, handed_over=True)
    two = made(300)
    network = Network("f" * 64, "holdfast")
    node = Node("host-1", "10.9.0.0/16", last_endpoint_id=300, local_identities={"10.0.0.0/8": 16777217})
    checkpoint.save_endpoint(two)
    checkpoint.save_endpoint(one)
    checkpoint.save_network(network)
    checkpoint.save_node(node)
    again = Checkpoint(tmp_path / "state")
    assert again.endpoints() == [one, two]
    assert again.networks() == [network]
    assert again.node() == node
    again.drop_endpoint(7)
    again.drop_endpoint(8)
    again.drop_network(network.id)
    assert again.endpoints() == [two]
    assert again.networks() == []


def test_files_are_private(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state")
    checkpoint.save_endpoint(made(7))
    for path in (tmp_path / "state").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_nothing_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.endpoints(), checkpoint.networks(), checkpoint.node()) == ([], [], None)


DAMAGE = {
    "half a file": b'{"id": 7, "ipv4": "10.9.',
    "no JSON": b"\x00\xff\x00",
    "another type": b"[1, 2, 3]",
    "empty": b"",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_set_aside(tmp_path: Path, content: bytes) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save_endpoint(made(8))
    (tmp_path / "endpoints" / "00007.json").write_bytes(content)
    (tmp_path / "networks" / "abc.json").write_bytes(content)
    (tmp_path / "node.json").write_bytes(content)
    assert [each.id for each in checkpoint.endpoints()] == [8]
    assert checkpoint.networks() == []
    assert checkpoint.node() is None
    kept = {path.name.partition(".damaged-")[0] for path in tmp_path.rglob("*.damaged-*")}
    assert kept == {"00007.json", "abc.json", "node.json"}


FOREIGN: dict[str, dict[str, Any]] = {
    "the host's interface": {"interface": "eth0"},
    "another endpoint's interface": {"interface": host_name(8)},
    "no address": {"ipv4": "10.9.0.256"},
    "a number out of range": {"id": 70000},
    "zero": {"id": 0},
    "no MAC": {"mac": "aa:bb"},
    "labels with control characters": {"labels": "container:a=\n;", "identity": 300},
    "an identity of nothing": {"identity": 300},
    "a huge identity": {"identity": 1 << 40, "labels": "container:a=b;"},
}


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_records_are_set_aside(tmp_path: Path, fields: dict[str, Any]) -> None:
    checkpoint = Checkpoint(tmp_path)
    record = msgspec.to_builtins(made(7)) | fields
    (tmp_path / "endpoints" / "00007.json").write_text(json.dumps(record))
    assert checkpoint.endpoints() == []
    assert len(list(tmp_path.rglob("*.damaged-*"))) == 1


def test_a_record_under_another_name_and_an_address_that_comes_twice(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save_endpoint(made(7))
    checkpoint.save_endpoint(made(9, address="10.9.0.7"))
    (tmp_path / "endpoints" / "00008.json").write_bytes(msgspec.json.encode(made(10)))
    assert [each.id for each in checkpoint.endpoints()] == [7]


def test_a_newer_version_adds_fields(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    record = msgspec.to_builtins(made(7)) | {"later": "x", "future": [1]}
    (tmp_path / "endpoints" / "00007.json").write_text(json.dumps(record))
    node = {"name": "n", "pool": "10.9.0.0/16", "version": 9, "more": {}}
    (tmp_path / "node.json").write_text(json.dumps(node))
    assert checkpoint.endpoints() == [made(7)]
    found = checkpoint.node()
    assert found is not None
    assert (found.name, found.version) == ("n", 9)


@pytest.mark.parametrize(
    "node",
    [
        {"name": "", "pool": "10.9.0.0/16"},
        {"name": "n", "pool": "10.9.0.0/31"},
        {"name": "n", "pool": "fd00::/64"},
        {"name": "n", "pool": "10.9.0.0/16", "lease": -1},
        {"name": "n", "pool": "10.9.0.0/16", "last_address": "x"},
    ],
)
def test_a_node_that_can_not_be(tmp_path: Path, node: dict[str, Any]) -> None:
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "node.json").write_text(json.dumps(node))
    assert checkpoint.node() is None


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "..", "x" * 200])
def test_networks_never_leave_their_directory(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointDamaged):
        checkpoint.save_network(Network(name, "n"))
    with pytest.raises(CheckpointDamaged):
        checkpoint.drop_network(name)


def test_an_unreadable_entry_is_skipped(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "endpoints" / "00007.json").mkdir()
    checkpoint.save_endpoint(made(8))
    assert [each.id for each in checkpoint.endpoints()] == [8]


def test_a_directory_that_can_not_be_made_is_empty_and_refuses_what_is_written() -> None:
    """The agent starts all the same: what runs is kept up without it."""
    none = Checkpoint(Path("/proc/holdfast"))
    assert (none.node(), none.endpoints(), none.networks()) == (None, [], [])
    with pytest.raises(FileNotFoundError):
        none.save_node(Node("a", "10.1.0.0/16"))


def test_the_lease_of_a_copied_disk_is_left_alone() -> None:
    here, elsewhere = IPv4Address("10.99.0.2"), IPv4Address("10.99.0.3")
    node = Node("host-1", "10.9.0.0/16", lease=7, lease_address=str(here))
    assert own_lease(node, here) == 7
    assert own_lease(node, elsewhere) == 0
    assert own_lease(msgspec.structs.replace(node, lease_address=""), elsewhere) == 7, "of an older version"
