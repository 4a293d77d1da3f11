# SPDX-License-Identifier: Apache-2.0
"""What the programs do with single packets: verdicts, counters, conntrack, and what is rewritten.

Frames go through BPF_PROG_TEST_RUN, so that a redirect is decided but goes nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from datapath.constants import DatapathOptions
from datapath.layouts import CT_BITS
from datapath.mapspec import MapCatalogue
from datapath.records import CtKey, IpcacheEntry, LxcEntry
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import EGRESS, HOST, INGRESS, LOOPBACK, WORLD, Lab, address, identity, lab
from tests.support.frames import ACK, FIN, RST, SYN

A, B = address(1), address(2)
VM, OUTSIDE, NODE = "10.9.0.5", "192.0.2.7", "10.8.0.1"
VM_IDENTITY = 777
NO_MASQUERADE = 0x0008_0000
FROM_STACK = 1 << CT_BITS.index("from_stack")
BOTH_CLOSING = 0b11


@pytest.fixture
def host() -> Iterator[Lab]:
    """Endpoints 1 and 2, a known VM, and the host's own address."""
    with lab(1, 2) as made:
        made.ipcache.upsert([(f"{VM}/32", IpcacheEntry(VM_IDENTITY)), (f"{NODE}/32", IpcacheEntry(HOST))])
        made.lxc.upsert([(NODE, LxcEntry(0, 0, 1, "00:00:00:00:00:00", "00:00:00:00:00:00"))])
        yield made


def open_all(host: Lab, *endpoints: int) -> None:
    for number in endpoints:
        for direction in (INGRESS, EGRESS):
            host.allow(number, direction)


# --- who may speak to whom


def test_nothing_passes_without_policy(host: Lab) -> None:
    assert host.send(1, frames.tcp(A, B, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(133, 2): 1}
    assert host.connections() == {}


def test_a_local_packet_needs_both_sides(host: Lab) -> None:
    host.allow(1, EGRESS, identity(2), 80, frames.TCP)
    assert host.send(1, frames.tcp(A, B, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(133, 1): 1}
    host.allow(2, INGRESS, identity(1), 80, frames.TCP)
    assert host.send(1, frames.tcp(A, B, 4000, 80)).verdict == ACT_REDIRECT
    assert host.counted(0, 1).packets == 1


def test_a_local_packet_is_addressed_to_the_receiver_and_one_hop_older(host: Lab) -> None:
    open_all(host, 1, 2)
    after = host.send(1, frames.tcp(A, B, 4000, 80)).packet
    assert after[:12].hex(":") == "02:00:00:00:00:c2:02:00:00:00:00:a2"
    assert after[14 + 8] == 63
    assert frames.checksum(after[14:34]) == 0


@pytest.mark.parametrize(
    ("frame", "protocol", "port"),
    [
        (frames.tcp(A, B, 4000, 80), frames.TCP, 80),
        (frames.udp(A, B, 4000, 53), frames.UDP, 53),
        (
            frames.ethernet(frames.ipv4(A, B, frames.SCTP, frames.udp_datagram(4000, 99))),
            frames.SCTP,
            99,
        ),
        (frames.echo(A, B, 7), frames.ICMP, frames.ECHO),
    ],
    ids=["tcp", "udp", "sctp", "icmp"],
)
def test_each_protocol_is_matched_by_port(host: Lab, frame: bytes, protocol: int, port: int) -> None:
    for number, direction, remote in ((1, EGRESS, 2), (2, INGRESS, 1)):
        host.allow(number, direction, identity(remote), port + 1, protocol)
    assert host.send(1, frame).verdict == ACT_SHOT
    for number, direction, remote in ((1, EGRESS, 2), (2, INGRESS, 1)):
        host.allow(number, direction, identity(remote), port, protocol)
    assert host.send(1, frame).verdict == ACT_REDIRECT


@pytest.mark.parametrize(
    ("entries", "hit", "verdict"),
    [
        # exact, then port, then identity, then all: the first hit decides, deny or not
        ([(VM_IDENTITY, 80, 6, False), (0, 80, 6, True)], 0, ACT_OK),
        ([(0, 80, 6, False), (VM_IDENTITY, 0, 0, True)], 0, ACT_OK),
        ([(VM_IDENTITY, 0, 0, False), (0, 0, 0, True)], 0, ACT_OK),
        ([(0, 0, 0, False)], 0, ACT_OK),
        ([(VM_IDENTITY, 80, 6, True), (0, 80, 6, False)], 0, ACT_SHOT),
        ([(0, 80, 6, True), (VM_IDENTITY, 0, 0, False)], 0, ACT_SHOT),
    ],
)
def test_the_first_hit_decides_and_is_counted(
    host: Lab, entries: list[tuple[int, int, int, bool]], hit: int, verdict: int
) -> None:
    keys = [host.allow(1, EGRESS, *entry[:3], deny=entry[3]) for entry in entries]
    frame = frames.tcp(A, VM, 4000, 80)
    assert host.send(1, frame).verdict == verdict
    counted = {key: (one.packets, one.bytes) for key, one in host.hits(1).items() if one.packets}
    assert counted == {keys[hit]: (1, len(frame))}
    assert host.dropped() == ({(181, 2): 1} if verdict == ACT_SHOT else {})


def test_an_unknown_address_is_the_world(host: Lab) -> None:
    host.allow(1, EGRESS, WORLD)
    assert host.send(1, frames.udp(A, OUTSIDE, 4000, 53)).verdict == ACT_OK
    assert host.send(1, frames.udp(A, VM, 4000, 53)).verdict == ACT_SHOT


def test_the_longest_prefix_says_who_an_address_is(host: Lab) -> None:
    host.ipcache.upsert([("192.0.0.0/8", IpcacheEntry(501)), ("192.0.2.0/24", IpcacheEntry(502))])
    host.allow(1, EGRESS, 502)
    assert host.send(1, frames.udp(A, "192.0.2.9", 4000, 53)).verdict == ACT_OK
    assert host.send(1, frames.udp(A, "192.9.2.9", 4000, 53)).verdict == ACT_SHOT


# --- connections


def test_a_reply_passes_without_a_rule(host: Lab) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    assert host.send(2, frames.tcp(B, A, 80, 4000, SYN | ACK)).verdict == ACT_SHOT
    assert host.send(1, frames.tcp(A, B, 4000, 80)).verdict == ACT_REDIRECT
    assert host.send(2, frames.tcp(B, A, 80, 4000, SYN | ACK)).verdict == ACT_REDIRECT


def test_a_reply_passes_whichever_side_has_the_higher_port(host: Lab) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    assert host.send(1, frames.udp(A, B, 50, 9000)).verdict == ACT_REDIRECT
    assert host.send(2, frames.udp(B, A, 9000, 50)).verdict == ACT_REDIRECT


def test_entries_are_made_at_both_ends_and_count_both_ways(host: Lab) -> None:
    open_all(host, 1, 2)
    request, answer = frames.tcp(A, B, 4000, 80), frames.tcp(B, A, 80, 4000, SYN | ACK)
    host.send(1, request)
    host.send(2, answer)
    entries = host.connections()
    assert set(entries) == {CtKey(A, B, 4000, 80, frames.TCP, flags) for flags in (0, 1)}
    out, inside = (entries[CtKey(A, B, 4000, 80, frames.TCP, flags)] for flags in (0, 1))
    assert (out.tx_packets, out.tx_bytes, out.rx_packets, out.rx_bytes) == (1, len(request), 1, len(answer))
    assert (inside.rx_packets, inside.tx_packets) == (1, 1)
    assert (out.source_identity, inside.source_identity) == (identity(1), identity(1))
    assert (out.tx_flags_seen, out.rx_flags_seen) == (SYN, SYN)


def test_the_lifetime_follows_the_state_of_tcp(host: Lab) -> None:
    open_all(host, 1, 2)
    options, key = DatapathOptions(), CtKey(A, B, 4000, 80, frames.TCP, 0)

    def left() -> int:
        return host.connections()[key].lifetime - int(time.monotonic())

    host.send(1, frames.tcp(A, B, 4000, 80))
    assert left() == pytest.approx(options.timeout_tcp_syn, abs=2)
    host.send(1, frames.tcp(A, B, 4000, 80, ACK))
    assert left() == pytest.approx(options.timeout_tcp, abs=2)
    host.send(1, frames.tcp(A, B, 4000, 80, FIN | ACK))
    assert left() == pytest.approx(options.timeout_tcp, abs=2)  # half closed
    host.send(2, frames.tcp(B, A, 80, 4000, FIN | ACK))
    assert left() == pytest.approx(options.timeout_tcp_fin, abs=2)
    host.send(1, frames.udp(A, B, 4000, 53))
    udp = host.connections()[CtKey(A, B, 4000, 53, frames.UDP, 0)]
    assert udp.lifetime - int(time.monotonic()) == pytest.approx(options.timeout_any, abs=2)


def test_a_reset_closes_both_ways_and_a_syn_opens_anew(host: Lab) -> None:
    open_all(host, 1, 2)
    key = CtKey(A, B, 4000, 80, frames.TCP, 0)
    for flags in (SYN, ACK, RST):
        host.send(1, frames.tcp(A, B, 4000, 80, flags))
    assert host.connections()[key].bits & BOTH_CLOSING == BOTH_CLOSING
    host.send(1, frames.tcp(A, B, 4000, 80, SYN))
    entry = host.connections()[key]
    assert (entry.bits & BOTH_CLOSING, entry.tx_packets) == (0, 1)


def test_a_rule_taken_back_ends_the_connection(host: Lab) -> None:
    key = host.allow(1, EGRESS, VM_IDENTITY)
    assert host.send(1, frames.tcp(A, VM, 4000, 80, SYN)).verdict == ACT_OK
    assert host.send(1, frames.tcp(A, VM, 4000, 80, ACK)).verdict == ACT_OK
    host.policies[1].delete([key])
    assert host.send(1, frames.tcp(A, VM, 4000, 80, ACK)).verdict == ACT_SHOT


def test_a_connection_cannot_be_opened_as_the_reply_to_another(host: Lab) -> None:
    host.allow(2, INGRESS)
    host.allow(1, EGRESS)
    host.send(1, frames.tcp(A, B, 4000, 80))
    assert host.send(2, frames.tcp(B, A, 80, 4000, ACK)).verdict == ACT_REDIRECT
    assert host.send(2, frames.tcp(B, A, 80, 4000, SYN)).verdict == ACT_SHOT


def test_a_packet_denied_in_its_own_direction_still_passes_as_a_reply(host: Lab) -> None:
    """Both ends opened the same UDP flow; then one loses its right to."""
    open_all(host, 1, 2)
    host.send(1, frames.udp(A, B, 5000, 4000))
    host.ct["cilium_ct_any4_global"].delete([CtKey(A, B, 5000, 4000, frames.UDP, flags) for flags in (0, 1)])
    host.send(2, frames.udp(B, A, 4000, 5000))
    out = CtKey(A, B, 5000, 4000, frames.UDP, 0)
    host.ct["cilium_ct_any4_global"].upsert(
        [(out, host.connections()[CtKey(B, A, 4000, 5000, frames.UDP, 0)])]
    )
    host.policies[1].sync([])
    assert host.send(1, frames.udp(A, B, 5000, 4000)).verdict == ACT_REDIRECT


@pytest.mark.parametrize("age", [0, 10])
def test_an_entry_past_its_lifetime_counts_as_absent(host: Lab, age: int) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    host.send(1, frames.udp(A, B, 4000, 53))
    for key, entry in host.connections().items():
        host.ct["cilium_ct_any4_global"].upsert(
            [(key, entry._replace(lifetime=int(time.monotonic()) - age + 5))]
        )
    reply = host.send(2, frames.udp(B, A, 53, 4000))
    assert reply.verdict == (ACT_SHOT if age else ACT_REDIRECT)


# --- ICMP


def test_an_echo_reply_belongs_to_its_request(host: Lab) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    assert host.send(2, frames.echo(B, A, 7, frames.ECHO_REPLY)).verdict == ACT_SHOT
    assert host.send(1, frames.echo(A, B, 7)).verdict == ACT_REDIRECT
    assert host.send(2, frames.echo(B, A, 8, frames.ECHO_REPLY)).verdict == ACT_SHOT
    assert host.send(2, frames.echo(B, A, 7, frames.ECHO_REPLY)).verdict == ACT_REDIRECT


@pytest.mark.parametrize("kind", [frames.UNREACHABLE, frames.TIME_EXCEEDED])
def test_an_error_about_a_packet_of_a_connection_passes_from_anybody(host: Lab, kind: int) -> None:
    host.allow(1, EGRESS)
    about = frames.tcp(A, OUTSIDE, 4000, 80)
    router = "203.0.113.1"
    assert host.deliver(1, frames.icmp_error(router, A, about, kind)).verdict == ACT_SHOT
    assert host.send(1, about).verdict == ACT_OK
    assert host.deliver(1, frames.icmp_error(router, A, about, kind)).verdict == ACT_OK
    other = frames.tcp(A, OUTSIDE, 4001, 80)
    assert host.deliver(1, frames.icmp_error(router, A, other, kind)).verdict == ACT_SHOT


def test_an_error_goes_to_the_sender_of_what_it_is_about(host: Lab) -> None:
    open_all(host, 1)
    host.allow(2, EGRESS)
    about = frames.udp(A, OUTSIDE, 4000, 53)
    host.send(1, about)
    assert host.deliver(2, frames.icmp_error(OUTSIDE, B, about)).verdict == ACT_SHOT


def test_an_endpoint_may_answer_with_an_error(host: Lab) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    about = frames.udp(A, B, 4000, 53)
    assert host.send(2, frames.icmp_error(B, A, about)).verdict == ACT_SHOT
    host.send(1, about)
    assert host.send(2, frames.icmp_error(B, A, about)).verdict == ACT_REDIRECT
    assert all(key.protocol == frames.UDP for key in host.connections())


# --- fragments and options


def fragments(ident: int = 9) -> tuple[bytes, bytes]:
    first = frames.ipv4(
        A, VM, frames.UDP, frames.udp_datagram(4000, 53, bytes(16)), ident=ident, fragment=0x2000
    )
    later = frames.ipv4(A, VM, frames.UDP, bytes(16), ident=ident, fragment=3)
    return frames.ethernet(first), frames.ethernet(later)


def test_later_fragments_have_the_ports_of_the_first(host: Lab) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 53, frames.UDP)
    first, later = fragments()
    assert host.send(1, later).verdict == ACT_SHOT
    assert host.dropped() == {(175, 2): 1}
    assert host.send(1, first).verdict == ACT_OK
    assert host.send(1, later).verdict == ACT_OK
    assert host.send(1, fragments(ident=10)[1]).verdict == ACT_SHOT


def test_without_tracking_fragments_match_no_port() -> None:
    with lab(1, options=DatapathOptions(track_fragments=False)) as host:
        host.allow(1, EGRESS, WORLD, 53, frames.UDP)
        first, later = fragments()
        assert host.send(1, first).verdict == ACT_OK
        assert host.send(1, later).verdict == ACT_SHOT
        host.allow(1, EGRESS, WORLD)
        assert host.send(1, later).verdict == ACT_OK


def test_a_spoofed_fragment_leaves_no_trace(host: Lab) -> None:
    open_all(host, 1)
    spoofed = frames.ipv4(B, VM, frames.UDP, frames.udp_datagram(1, 53), ident=9, fragment=0x2000)
    assert host.send(1, frames.ethernet(spoofed)).verdict == ACT_SHOT
    later = frames.ipv4(B, VM, frames.UDP, bytes(16), ident=9, fragment=3)
    host.allow(2, EGRESS)
    assert host.send(2, frames.ethernet(later)).verdict == ACT_SHOT


def test_options_move_the_ports(host: Lab) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 80, frames.TCP)
    segment = frames.tcp_segment(4000, 80, SYN)
    for words in range(11):
        options = b"\x01" * 4 * words
        frame = frames.ethernet(frames.ipv4(A, VM, frames.TCP, segment, options=options))
        assert host.send(1, frame).verdict == ACT_OK, words
    assert len(host.connections()) == 1


# --- what never passes


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        pytest.param(frames.tcp(B, VM, 4000, 80), 132, id="source of another endpoint"),
        pytest.param(frames.tcp("0.0.0.0", VM, 4000, 80), 132, id="no source"),
        pytest.param(frames.tcp(A, "127.0.0.1", 4000, 80), 151, id="the host's loopback"),
        pytest.param(frames.tcp(A, "127.9.9.9", 4000, 80), 151, id="loopback network"),
        pytest.param(frames.ethernet(bytes(40), 0x88CC), 139, id="LLDP"),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 6, bytes(20), version=5)), 134, id="version"),
        pytest.param(
            frames.ethernet(frames.ipv4(A, VM, 6, bytes(20), header_words=4)), 134, id="short header"
        ),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 6, b"", header_words=15)), 134, id="header too long"),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 6, bytes(20), total=99)), 134, id="total too long"),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 6, bytes(20), total=19)), 134, id="total too short"),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 6, bytes(13))), 135, id="cut TCP"),
        pytest.param(
            frames.ethernet(frames.ipv4(A, VM, 6, bytes(20), total=33)), 135, id="TCP in the padding"
        ),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 17, bytes(7))), 135, id="cut UDP"),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 1, bytes(7))), 135, id="cut ICMP"),
        pytest.param(frames.ethernet(frames.ipv4(A, VM, 47, bytes(20))), 137, id="GRE"),
        pytest.param(frames.arp_request("10.0.0.2"), 166, id="ARP for a neighbour"),
        pytest.param(frames.arp_request("169.254.1.1", operation=2), 166, id="ARP answer"),
        pytest.param(frames.arp_request("169.254.1.1")[:30], 166, id="cut ARP"),
    ],
)
def test_what_is_wrong_is_dropped_by_its_reason(host: Lab, frame: bytes, reason: int) -> None:
    open_all(host, 1)
    assert host.send(1, frame).verdict == ACT_SHOT
    assert host.dropped() == {(reason, 2): 1}
    assert host.connections() == {}


# --- ARP, the host, and the way to it


def test_the_gateway_answers_arp(host: Lab) -> None:
    outcome = host.send(1, frames.arp_request("169.254.1.1", sender=A))
    assert outcome.verdict == ACT_REDIRECT
    frame = outcome.packet
    assert frame[:12].hex(":") == "02:00:00:00:00:01:02:00:00:00:00:a1"
    assert frame[20:22] == b"\0\2"
    assert frame[22:28].hex(":") == "02:00:00:00:00:a1"
    assert frame[28:32] == bytes([169, 254, 1, 1])
    assert frame[38:42] == bytes([10, 0, 0, 1])


def test_the_hosts_own_address_is_reached_through_the_stack(host: Lab) -> None:
    host.allow(1, EGRESS, HOST)
    assert host.send(1, frames.tcp(A, NODE, 4000, 22)).verdict == ACT_OK
    assert host.counted(0, 2).packets == 1


def test_a_packet_at_the_end_of_its_life_goes_to_the_stack(host: Lab) -> None:
    open_all(host, 1, 2)
    outcome = host.send(1, frames.tcp(A, B, 4000, 80, ttl=1))
    assert outcome.verdict == ACT_OK
    assert outcome.packet[14 + 8] == 1


def test_a_receiver_without_a_program_is_no_hole(host: Lab) -> None:
    open_all(host, 1)
    host.lxc.upsert([("10.0.0.9", LxcEntry(LOOPBACK, 9, 0, "02:00:00:00:00:09", "02:00:00:00:00:0a"))])
    assert host.send(1, frames.tcp(A, "10.0.0.9", 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(140, 2): 1}


def test_the_host_needs_permission_too(host: Lab) -> None:
    assert host.deliver(1, frames.tcp(NODE, A, 4000, 80)).verdict == ACT_SHOT
    host.allow(1, INGRESS, HOST, 80, frames.TCP)
    assert host.deliver(1, frames.tcp(NODE, A, 4000, 80)).verdict == ACT_OK
    assert host.deliver(1, frames.arp_request(A)).verdict == ACT_OK
    assert host.deliver(1, frames.ethernet(b"\x60" + bytes(39), frames.ETH_IPV6)).verdict == ACT_SHOT


def test_what_came_through_the_stack_is_answered_there(host: Lab) -> None:
    """As a published port: endpoint 2 asked the host, which translated to endpoint 1."""
    host.allow(1, INGRESS, identity(2))
    assert host.deliver(1, frames.tcp(B, A, 4000, 80), arrived_by=LOOPBACK).verdict == ACT_OK
    assert host.connections()[CtKey(B, A, 4000, 80, frames.TCP, 1)].bits & FROM_STACK
    answer = host.send(1, frames.tcp(A, B, 80, 4000, SYN | ACK))
    assert answer.verdict == ACT_OK  # not redirected to endpoint 2, though it is local
    assert answer.mark & NO_MASQUERADE


def test_an_error_about_what_came_through_the_stack_goes_back_there(host: Lab) -> None:
    host.allow(1, INGRESS, identity(2))
    request = frames.udp(B, A, 4000, 80)
    host.deliver(1, request, arrived_by=LOOPBACK)
    assert host.send(1, frames.icmp_error(A, B, request)).verdict == ACT_OK


@pytest.mark.parametrize("arrived_by", [0, LOOPBACK + 1], ids=["the host itself", "another device"])
def test_nobody_else_speaks_with_an_endpoints_address(host: Lab, arrived_by: int) -> None:
    """A container on a bridge that nobody watches, or a machine on a wire, may write any source address."""
    host.allow(1, INGRESS, identity(2))
    assert host.deliver(1, frames.tcp(B, A, 4000, 80), arrived_by=arrived_by).verdict == ACT_SHOT
    assert host.dropped() == {(132, 1): 1}
    assert host.connections() == {}


def test_only_replies_are_marked_against_masquerading(host: Lab) -> None:
    open_all(host, 1)
    assert host.send(1, frames.udp(A, OUTSIDE, 4000, 53)).mark == 0
    assert host.receive(frames.udp(VM, A, 4000, 53)).verdict == ACT_REDIRECT
    assert host.send(1, frames.udp(A, VM, 53, 4000)).mark == NO_MASQUERADE


# --- the host's device


def test_a_vm_is_known_by_its_address(host: Lab) -> None:
    host.allow(1, INGRESS, VM_IDENTITY, 80, frames.TCP)
    outcome = host.receive(frames.tcp(VM, A, 4000, 80))
    assert outcome.verdict == ACT_REDIRECT
    assert outcome.packet[:6].hex(":") == "02:00:00:00:00:c1"
    assert host.receive(frames.tcp(OUTSIDE, A, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(133, 1): 1}


def test_nobody_outside_is_the_host(host: Lab) -> None:
    host.allow(1, INGRESS, HOST)
    assert host.receive(frames.tcp(NODE, A, 4000, 80)).verdict == ACT_SHOT
    host.allow(1, INGRESS, WORLD)
    assert host.receive(frames.tcp(NODE, A, 4001, 80)).verdict == ACT_REDIRECT


def test_nobody_outside_is_a_local_endpoint(host: Lab) -> None:
    open_all(host, 1)
    assert host.receive(frames.tcp(B, A, 4000, 80)).verdict == ACT_SHOT
    assert host.dropped() == {(132, 1): 1}


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(frames.tcp(OUTSIDE, NODE, 4000, 22), id="ssh"),
        pytest.param(frames.tcp(OUTSIDE, "10.77.0.1", 4000, 22), id="forwarded"),
        pytest.param(frames.tcp(B, NODE, 4000, 22), id="endpoint's address to the host"),
        pytest.param(frames.arp_request(NODE), id="ARP"),
        pytest.param(frames.ethernet(bytes(60), frames.ETH_IPV6), id="IPv6"),
        pytest.param(frames.ethernet(frames.ipv4(OUTSIDE, NODE, 47, bytes(20))), id="GRE"),
        pytest.param(frames.ethernet(frames.ipv4(OUTSIDE, NODE, 6, bytes(3))), id="cut TCP"),
        pytest.param(frames.ethernet(frames.ipv4(OUTSIDE, NODE, 6, bytes(20), version=7)), id="nonsense"),
    ],
)
def test_what_is_not_for_an_endpoint_is_left_alone(host: Lab, frame: bytes) -> None:
    outcome = host.receive(frame)
    assert (outcome.verdict, outcome.packet, outcome.mark) == (ACT_OK, frame, 0)
    assert host.dropped() == {}


def test_a_full_conntrack_map_makes_room(host: Lab) -> None:
    open_all(host, 1)
    for port in range(6000):
        assert host.send(1, frames.udp(A, VM, 10_000 + port, 53)).verdict == ACT_OK
    assert 0 < sum(1 for _ in host.ct["cilium_ct_any4_global"].items()) <= 4096


def test_without_ipv6_every_packet_of_it_is_dropped() -> None:
    with lab(1, catalogue=MapCatalogue(ct_tcp_max=1024, ct_any_max=1024)) as host:
        open_all(host, 1)
        assert host.send(1, frames.ethernet(b"\x60" + bytes(39), frames.ETH_IPV6)).verdict == ACT_SHOT
        assert host.dropped() == {(139, 2): 1}
