# SPDX-License-Identifier: Apache-2.0
"""Real traffic of both families through real devices: who reaches whom, what is translated, what a reload
disturbs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bpfhost import BpfHost, bpf_host
from tests.support.bpflab import EGRESS, HOST, INGRESS, VM_IDENTITY, WORLD, identity
from tests.support.families import Net
from tests.support.netns import Netns
from tests.support.traffic import REFUSED_AFTER_S, TCP, UDP, ask, connected, seen_by_server, serving

PORT = 8080
PROTOCOLS = {"tcp": (6, TCP), "udp": (17, UDP)}
SMALL_MTU = 1300  # IPv6 knows none below 1280


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BpfHost]:
    with bpf_host(tmp_path, 1, 2) as made:
        yield made


def party(host: BpfHost, net: Net, name: str) -> tuple[Netns, str, int, int]:
    """Return namespace, address, identity and endpoint id (0: none) of a party by name."""
    if name == "host":
        return host.netns, net.wire, HOST, 0
    if name == "vm":
        return host.vm, net.vm, VM_IDENTITY, 0
    number = int(name)
    return host.endpoints[number], net.endpoint(number), identity(number), number


def ping(client: Netns, target: str, *options: str) -> subprocess.CompletedProcess[str]:
    argv = client.command(["ping", "-c", "1", "-W", str(REFUSED_AFTER_S), *options, target])
    return subprocess.run(argv, capture_output=True, text=True, timeout=10)


def reaches(client: Netns, server: Netns, target: str, protocol: str) -> bool:
    if protocol == "icmp":
        return ping(client, target).returncode == 0
    kind = PROTOCOLS[protocol][1]
    with serving(server, PORT, kind, target):
        return seen_by_server(client, target, PORT, kind) is not None


@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
@pytest.mark.parametrize(
    ("source", "target"), [("1", "2"), ("1", "vm"), ("vm", "1"), ("1", "host"), ("host", "1")]
)
def test_what_policy_says_is_what_passes(
    host: BpfHost, net: Net, source: str, target: str, protocol: str
) -> None:
    client, _, client_identity, client_id = party(host, net, source)
    server, server_address, server_identity, server_id = party(host, net, target)
    number, port = (net.icmp, net.echo) if protocol == "icmp" else (PROTOCOLS[protocol][0], PORT)
    assert not reaches(client, server, server_address, protocol)
    first_drop = (133, 2) if client_id else (133, 1)
    assert host.dropped().get(first_drop, 0) >= 1
    if client_id:
        host.allow(client_id, EGRESS, server_identity, port, number)
    if client_id and server_id:
        assert not reaches(client, server, server_address, protocol)
        assert host.dropped().get((133, 1), 0) >= 1
    if server_id:
        host.allow(server_id, INGRESS, client_identity, port, number)
    assert reaches(client, server, server_address, protocol)
    for endpoint in filter(None, (client_id, server_id)):
        host.forbid(endpoint)
    assert not reaches(client, server, server_address, protocol)


def test_a_vms_request_is_answered_from_the_address_it_asked(host: BpfHost, net: Net) -> None:
    """The request went past the host's netfilter; the answer must not be masqueraded by it."""
    host.allow(1, INGRESS, VM_IDENTITY, PORT, 17)
    with serving(host.endpoints[1], PORT, UDP, net.a):
        assert seen_by_server(host.vm, net.a, PORT, UDP) == net.vm


def test_what_an_endpoint_opens_is_masqueraded(host: BpfHost, net: Net) -> None:
    host.allow(1, EGRESS, VM_IDENTITY)
    for kind in (TCP, UDP):
        with serving(host.vm, PORT, kind, net.vm):
            assert seen_by_server(host.endpoints[1], net.vm, PORT, kind) == net.wire


def test_large_datagrams_pass_in_fragments(host: BpfHost, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS, identity(1), PORT, 17)
    host.allow(2, INGRESS, identity(1), net.echo, net.icmp)
    with (
        serving(host.endpoints[2], PORT, UDP, net.b),
        connected(host.endpoints[1], net.b, PORT, UDP) as client,
    ):
        assert ask(client, "x" * 3500) == net.a
    for target in (net.b, net.vm):
        assert ping(host.endpoints[1], target, "-s", "4000").returncode == 0
    assert host.dropped() == {}


def answered(client: socket.socket, size: int) -> bool:
    try:
        ask(client, "x" * size)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size", [1400, 3500])
@pytest.mark.parametrize("opener", ["1", "beyond"])
def test_a_smaller_mtu_on_the_way_is_told_to_the_sender(
    host: BpfHost, net: Net, opener: str, size: int
) -> None:
    """By the VM, about a packet that the host translated or one that it did not; never twice."""
    beyond = host.add_beyond(SMALL_MTU)
    host.allow(1, EGRESS, WORLD)
    host.allow(1, INGRESS, WORLD, PORT, 17)
    endpoint = host.endpoints[1]
    client, server, target = endpoint, beyond, net.beyond
    if opener == "beyond":
        client, server, target = beyond, endpoint, net.a
    with serving(server, PORT, UDP, target), connected(client, target, PORT, UDP) as datagrams:
        assert answered(datagrams, 100)
        first = answered(datagrams, size)
        assert answered(datagrams, size)
    # IPv4 routers put what the sender already has in fragments into smaller ones, and tell nobody.
    told = net.family == 6 or size < 1500
    assert first != told
    assert (f"mtu {SMALL_MTU}" in endpoint.run("ip", "route", "get", net.beyond)) == told
    # An error about a later fragment has no ports, so it belongs to no connection; that about the first does.
    assert host.dropped().keys() <= ({(133, 1)} if net.family == 6 and size > 1500 else set())


def test_the_end_of_a_packets_life_is_told_to_its_sender(host: BpfHost, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    told = ping(host.endpoints[1], net.b, "-t", "1").stdout
    assert f"From {net.wire}" in told
    assert ("Time to live exceeded" if net.family == 4 else "Hop limit") in told


def test_a_port_without_a_server_is_told_to_the_client(host: BpfHost, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS, identity(1), PORT, 17)
    with connected(host.endpoints[1], net.b, PORT, UDP) as client, pytest.raises(ConnectionRefusedError):
        ask(client)


def test_a_spoofed_source_does_not_leave_the_endpoint(host: BpfHost, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    stolen = net.endpoint(77)
    host.endpoints[1].run("ip", "addr", "add", net.alone(stolen), "dev", "eth0")
    assert ping(host.endpoints[1], net.b, "-I", stolen).returncode != 0
    assert host.dropped() == {(132, 2): 1}


def test_programs_outlive_whoever_loaded_them(host: BpfHost, net: Net) -> None:
    for number in (3, 4):
        host.add_endpoint(number, load=False)
        host.load_and_die(number)
    host.allow(3, EGRESS, identity(4), PORT, 6)
    host.allow(4, INGRESS, identity(3), PORT, 6)
    client, server, target = host.endpoints[3], host.endpoints[4], net.endpoint(4)
    assert reaches(client, server, target, "tcp")
    assert not reaches(client, server, target, "udp")


@contextlib.contextmanager
def reloading(host: BpfHost, *numbers: int) -> Iterator[list[int]]:
    """Replace the programs of endpoints again and again for the time of the block; counts the rounds."""
    done, rounds = threading.Event(), [0]

    def reload() -> None:
        while not done.is_set():
            for number in numbers:
                host.load(number)
            rounds[0] += 1

    thread = threading.Thread(target=reload)  # a thread inherits the namespace of the one that made it
    thread.start()
    try:
        yield rounds
    finally:
        done.set()
        thread.join(30)


@pytest.mark.parametrize(("source", "target"), [("1", "2"), ("vm", "1")])
def test_programs_are_replaced_without_losing_a_packet(
    host: BpfHost, net: Net, source: str, target: str
) -> None:
    host.allow(1, EGRESS)
    host.allow(1, INGRESS)
    host.allow(2, INGRESS)
    client, (server, server_address, _, _) = party(host, net, source)[0], party(host, net, target)
    with (
        serving(server, PORT, TCP, server_address),
        serving(server, PORT, UDP, server_address),
        connected(client, server_address, PORT, TCP) as stream,
        connected(client, server_address, PORT, UDP) as datagrams,
        reloading(host, 1, 2) as rounds,
    ):
        for connection in (stream, datagrams):
            connection.settimeout(5)  # a loss of a datagram would last that long
        asked, until = 0, time.monotonic() + 30
        while rounds[0] < 20 and time.monotonic() < until:
            ask(stream, f"stream {asked}")
            ask(datagrams, f"datagram {asked}")
            asked += 1
        retransmitted = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:104]
    assert rounds[0] >= 20
    assert asked > rounds[0]
    assert host.dropped() == {}
    assert int.from_bytes(retransmitted, "little") == 0
