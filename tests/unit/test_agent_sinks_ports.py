# SPDX-License-Identifier: Apache-2.0
"""Addresses of etcd as entries of the table, and which host port a published port gets."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from agent import ipcache
from agent.endpoint import Port
from agent.errors import DriverError
from agent.ports import LOOPBACK6, PORTMAP, parse_portmap, taken_ports
from agent.sinks import IpSink, with_length
from identity.numbers import REMOTE_NODE
from kvstore import schema


def bindings(**changes: Any) -> dict[str, Any]:
    binding = {"Proto": 17, "IP": "", "Port": 53, "HostIP": "", "HostPort": 0, "HostPortEnd": 0} | changes
    return {PORTMAP: [binding]}


def a_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_a_port_that_was_asked_for() -> None:
    port = a_free_port()
    (found,) = parse_portmap(bindings(HostPort=port, HostPortEnd=port), ())
    assert found == Port(17, 53, port, port)
    assert taken_ports([found]) == {(17, "", port)}


@pytest.mark.parametrize("taken_on", ["", "127.0.0.1"])
def test_a_port_that_another_container_has(taken_on: str) -> None:
    port = a_free_port()
    wanted = bindings(HostPort=port, HostPortEnd=port, HostIP="127.0.0.1")
    with pytest.raises(DriverError, match=f"host port {port}/udp is in use"):
        parse_portmap(wanted, {(17, taken_on, port)})
    assert parse_portmap(wanted, {(6, taken_on, port)})


def test_a_port_that_a_service_of_the_host_has() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        port = service.getsockname()[1]
        with pytest.raises(DriverError, match="service of the host"):
            parse_portmap(bindings(HostPort=port, HostPortEnd=port), ())


def test_a_call_that_comes_again_keeps_its_ports() -> None:
    first = parse_portmap(bindings(), ())
    others = {(17, "", first[0].host_port - 1)}
    assert parse_portmap(bindings(), others, first) == first
    assert parse_portmap(bindings(), taken_ports(first), first) != first
    assert parse_portmap(bindings(Port=54), (), first)[0].container_port == 54


@pytest.mark.parametrize(
    "changes",
    [
        {"Proto": 1},
        {"Port": 0},
        {"Port": 70000},
        {"HostPort": 70000},
        {"HostPort": -1},
        {"Port": "x"},
        {"HostIP": "nonsense"},
        {"HostIP": "192.0.2.1"},
    ],
)
def test_bindings_that_can_not_be(changes: dict[str, Any]) -> None:
    with pytest.raises(DriverError):
        parse_portmap(bindings(**changes), ())


def test_ipv6_bindings_are_left_out_and_no_list_is_refused() -> None:
    assert parse_portmap(bindings(HostIP="::"), ()) == ()
    assert parse_portmap({}, ()) == ()
    with pytest.raises(DriverError, match="not a list"):
        parse_portmap({PORTMAP: "8080"}, ())


def test_loopback_of_ipv6_is_refused_by_name() -> None:
    """The kernel would not deliver the answers, and the client would wait for them."""
    with pytest.raises(DriverError, match=f"can not be published on {LOOPBACK6}"):
        parse_portmap(bindings(HostIP=LOOPBACK6), (), ipv6=True)


def record(address: str, number: int) -> bytes:
    return schema.encode_ip(schema.ip_record(address, number, host_ip="192.0.2.1", metadata=""))


class Addresses:
    def __init__(self) -> None:
        self.table = ipcache.new_table()
        self.sink = IpSink(self.table.source(ipcache.KVSTORE_SOURCE), grace=60.0)

    def number(self, prefix: str) -> int:
        found = self.table.get(prefix)
        return found.identity if found else 0


def test_the_last_writer_counts_and_only_its_deletion() -> None:
    held = Addresses()
    default, other = (schema.ip_key(space, "10.1.0.1") for space in ("default", "east"))
    held.sink.put(default, record("10.1.0.1", 300))
    held.sink.put(other, record("10.1.0.1", 301))
    assert held.number("10.1.0.1/32") == 301
    held.sink.deleted(default)
    assert held.number("10.1.0.1/32") == 301
    held.sink.deleted(other)
    assert held.number("10.1.0.1/32") == 0


def test_held_is_what_is_behind_another_host() -> None:
    held = Addresses()
    held.sink = IpSink(held.table.source(ipcache.KVSTORE_SOURCE), 60.0, hold=60.0, own="192.0.2.2")
    hosts = {"10.1.0.1": "192.0.2.1", "10.1.0.2": "192.0.2.2", "10.1.0.3": ""}
    for address, host in hosts.items():
        value = schema.encode_ip(schema.ip_record(address, 300, host_ip=host, metadata=""))
        held.sink.put(schema.ip_key("default", address), value)
    for address in hosts:
        held.sink.deleted(schema.ip_key("default", address))
    machine = schema.ip_record("10.1.0.4", 300, host_ip="192.0.2.1", metadata="vm:legacy")
    held.sink.put(schema.ip_key("default", "10.1.0.4"), schema.encode_ip(machine))
    held.sink.deleted(schema.ip_key("default", "10.1.0.4"))
    assert held.number("10.1.0.4/32") == 0, "a person has taken it back"
    assert list(held.sink.source.held) == ["10.1.0.1/32"]
    assert [held.number(f"{address}/32") for address in hosts] == [300, 0, 0]


def test_restored_record_goes_with_a_deletion_in_any_space() -> None:
    held = Addresses()
    held.sink.source.upsert("10.1.0.1/32", ipcache.Record(300))
    held.sink.deleted(schema.ip_key("east", "10.1.0.1"))
    assert held.number("10.1.0.1/32") == 0


def test_records_that_must_not_be_used() -> None:
    held = Addresses()
    key = schema.ip_key("default", "10.1.0.1")
    held.sink.put(key, record("10.1.0.1", 300))
    for bad in (b"{[", b"[]", record("10.1.0.2", 301), json.dumps({"IP": "10.1.0.1", "ID": "x"}).encode()):
        held.sink.put(key, bad)
        assert held.number("10.1.0.1/32") == 300
        assert key in held.sink.ignored
    held.sink.deleted("cilium/state/ip/v1/default/nonsense")
    held.sink.put(key, record("10.1.0.1", 302))
    assert held.sink.ignored == {}


def test_the_host_of_another_node_is_a_remote_node() -> None:
    held = Addresses()
    held.sink.put(schema.ip_key("default", "10.1.0.1"), record("10.1.0.1", 1))
    assert held.number("10.1.0.1/32") == REMOTE_NODE


def test_precedence() -> None:
    """What this host knows itself beats etcd, and comes to light again when it goes."""
    held = Addresses()
    held.sink.put(schema.ip_key("default", "10.1.0.1"), record("10.1.0.1", 300))
    held.table.source(ipcache.CIDR_SOURCE).upsert("10.1.0.1/32", ipcache.Record(1 << 24 | 1))
    assert held.number("10.1.0.1/32") == 300
    held.table.source(ipcache.LOCAL_SOURCE).upsert("10.1.0.1/32", ipcache.Record(400))
    assert held.number("10.1.0.1/32") == 400
    ipcache.set_host_addresses(held.table, ["10.1.0.1"])
    assert held.number("10.1.0.1/32") == 1
    ipcache.set_host_addresses(held.table, [])
    assert held.number("10.1.0.1/32") == 400


def test_prefixes_always_have_their_length() -> None:
    assert [with_length(each) for each in ("10.0.0.1", "fd00::1", "10.0.0.0/8")] == [
        "10.0.0.1/32",
        "fd00::1/128",
        "10.0.0.0/8",
    ]
