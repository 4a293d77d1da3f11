# SPDX-License-Identifier: Apache-2.0
"""Real traffic through real devices: who reaches whom, what is translated, and what a reload disturbs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bpfhost import HOST_ADDRESS, VM_ADDRESS, VM_IDENTITY, BpfHost, bpf_host
from tests.support.bpflab import EGRESS, HOST, INGRESS, address, identity
from tests.support.netns import Netns
from tests.support.traffic import TCP, UDP, ask, connected, seen_by_server, serving

A, B = address(1), address(2)
PORT = 8080
PROTOCOLS = {"tcp": (6, TCP), "udp": (17, UDP)}
ECHO = 8


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BpfHost]:
    with bpf_host(tmp_path, 1, 2) as made:
        yield made


def party(host: BpfHost, name: str) -> tuple[Netns, str, int, int]:
    """Return namespace, address, identity and endpoint id (0: none) of a party by name."""
    if name == "host":
        return host.netns, HOST_ADDRESS, HOST, 0
    if name == "vm":
        return host.vm, VM_ADDRESS, VM_IDENTITY, 0
    number = int(name)
    return host.endpoints[number], address(number), identity(number), number


def reaches(client: Netns, server: Netns, target: str, protocol: str) -> bool:
    if protocol == "icmp":
        done = subprocess.run(
            client.command(["ping", "-c", "1", "-W", "1", target]), capture_output=True, timeout=10
        )
        return done.returncode == 0
    kind = PROTOCOLS[protocol][1]
    with serving(server, PORT, kind):
        return seen_by_server(client, target, PORT, kind) is not None


@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
@pytest.mark.parametrize(
    ("source", "target"), [("1", "2"), ("1", "vm"), ("vm", "1"), ("1", "host"), ("host", "1")]
)
def test_what_policy_says_is_what_passes(host: BpfHost, source: str, target: str, protocol: str) -> None:
    client, _, client_identity, client_id = party(host, source)
    server, server_address, server_identity, server_id = party(host, target)
    number, port = (1, ECHO) if protocol == "icmp" else (PROTOCOLS[protocol][0], PORT)
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


def test_a_vms_request_is_answered_from_the_address_it_asked(host: BpfHost) -> None:
    """The request went past the host's netfilter; the answer must not be masqueraded by it."""
    host.allow(1, INGRESS, VM_IDENTITY, PORT, 17)
    with serving(host.endpoints[1], PORT, UDP):
        assert seen_by_server(host.vm, A, PORT, UDP) == VM_ADDRESS


def test_what_an_endpoint_opens_is_masqueraded(host: BpfHost) -> None:
    host.allow(1, EGRESS, VM_IDENTITY)
    for kind in (TCP, UDP):
        with serving(host.vm, PORT, kind):
            assert seen_by_server(host.endpoints[1], VM_ADDRESS, PORT, kind) == HOST_ADDRESS


def test_large_datagrams_pass_in_fragments(host: BpfHost) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS, identity(1), PORT, 17)
    host.allow(2, INGRESS, identity(1), ECHO, 1)
    with serving(host.endpoints[2], PORT, UDP), connected(host.endpoints[1], B, PORT, UDP) as client:
        assert ask(client, "x" * 3500) == A
    for target in (B, VM_ADDRESS):
        host.endpoints[1].run("ping", "-c", "1", "-W", "1", "-s", "4000", target)
    assert host.dropped() == {}


def test_the_end_of_a_packets_life_is_told_to_its_sender(host: BpfHost) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    ping = host.endpoints[1].command(["ping", "-c", "1", "-W", "1", "-t", "1", B])
    told = subprocess.run(ping, capture_output=True, text=True, timeout=10).stdout
    assert f"From {HOST_ADDRESS}" in told
    assert "Time to live exceeded" in told


def test_a_port_without_a_server_is_told_to_the_client(host: BpfHost) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS, identity(1), PORT, 17)
    with connected(host.endpoints[1], B, PORT, UDP) as client, pytest.raises(ConnectionRefusedError):
        ask(client)


def test_a_spoofed_source_does_not_leave_the_endpoint(host: BpfHost) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    host.endpoints[1].run("ip", "addr", "add", "10.0.0.77/32", "dev", "eth0")
    ping = host.endpoints[1].command(["ping", "-c", "1", "-W", "1", "-I", "10.0.0.77", B])
    assert subprocess.run(ping, capture_output=True, timeout=10).returncode != 0
    assert host.dropped() == {(132, 2): 1}


def test_programs_outlive_whoever_loaded_them(host: BpfHost) -> None:
    for number in (3, 4):
        host.add_endpoint(number, load=False)
        host.load_and_die(number)
    host.allow(3, EGRESS, identity(4), PORT, 6)
    host.allow(4, INGRESS, identity(3), PORT, 6)
    client, server, target = host.endpoints[3], host.endpoints[4], address(4)
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
def test_programs_are_replaced_without_losing_a_packet(host: BpfHost, source: str, target: str) -> None:
    host.allow(1, EGRESS)
    host.allow(1, INGRESS)
    host.allow(2, INGRESS)
    client, server = party(host, source)[0], party(host, target)[0]
    server_address = party(host, target)[1]
    with (
        serving(server, PORT, TCP),
        serving(server, PORT, UDP),
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
