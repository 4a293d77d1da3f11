# SPDX-License-Identifier: Apache-2.0
"""Which packets belong together, in either family: connections, ICMP errors about them, fragments."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator

import pytest

from datapath import testrun
from datapath.constants import DatapathOptions
from datapath.layouts import CT_BITS
from datapath.records import CtKey
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import (
    EGRESS,
    INGRESS,
    VM_IDENTITY,
    WORLD,
    Lab,
    identity,
    lab,
    lab_with_neighbours,
)
from tests.support.families import Net
from tests.support.frames import ACK, FIN, RST, SYN

NO_MASQUERADE = 0x0008_0000
FROM_STACK = 1 << CT_BITS.index("from_stack")
BOTH_CLOSING, TX_CLOSING = 0b11, 0b10

# A frame between addresses of whichever family is tested.
Framed = Callable[[Net], bytes]


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab_with_neighbours() as made:
        yield made


def test_a_reply_passes_without_a_rule(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    assert host.send(2, frames.tcp(net.b, net.a, 80, 4000, SYN | ACK)).verdict == ACT_SHOT
    assert host.send(1, frames.tcp(net.a, net.b, 4000, 80)).verdict == ACT_REDIRECT
    assert host.send(2, frames.tcp(net.b, net.a, 80, 4000, SYN | ACK)).verdict == ACT_REDIRECT


def test_a_reply_passes_whichever_side_has_the_higher_port(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    assert host.send(1, frames.udp(net.a, net.b, 50, 9000)).verdict == ACT_REDIRECT
    assert host.send(2, frames.udp(net.b, net.a, 9000, 50)).verdict == ACT_REDIRECT


def test_entries_are_made_at_both_ends_and_count_both_ways(host: Lab, net: Net) -> None:
    host.allow_all(1, 2)
    request, answer = frames.tcp(net.a, net.b, 4000, 80), frames.tcp(net.b, net.a, 80, 4000, SYN | ACK)
    host.send(1, request)
    host.send(2, answer)
    entries = host.connections()
    assert set(entries) == {CtKey(net.a, net.b, 4000, 80, frames.TCP, flags) for flags in (0, 1)}
    out, inside = (entries[CtKey(net.a, net.b, 4000, 80, frames.TCP, flags)] for flags in (0, 1))
    assert (out.tx_packets, out.tx_bytes, out.rx_packets, out.rx_bytes) == (1, len(request), 1, len(answer))
    assert (inside.rx_packets, inside.tx_packets) == (1, 1)
    assert (out.source_identity, inside.source_identity) == (identity(1), identity(1))
    assert (out.tx_flags_seen, out.rx_flags_seen) == (SYN, SYN)


def test_the_lifetime_follows_the_state_of_tcp(host: Lab, net: Net) -> None:
    host.allow_all(1, 2)
    options, key = DatapathOptions(), CtKey(net.a, net.b, 4000, 80, frames.TCP, 0)

    def left() -> int:
        return host.connections()[key].lifetime - int(time.monotonic())

    host.send(1, frames.tcp(net.a, net.b, 4000, 80))
    assert left() == pytest.approx(options.timeout_tcp_syn, abs=2)
    host.send(1, frames.tcp(net.a, net.b, 4000, 80, ACK))
    assert left() == pytest.approx(options.timeout_tcp, abs=2)
    host.send(1, frames.tcp(net.a, net.b, 4000, 80, FIN | ACK))
    assert left() == pytest.approx(options.timeout_tcp, abs=2)  # half closed
    host.send(2, frames.tcp(net.b, net.a, 80, 4000, FIN | ACK))
    assert left() == pytest.approx(options.timeout_tcp_fin, abs=2)
    host.send(1, frames.udp(net.a, net.b, 4000, 53))
    udp = host.connections()[CtKey(net.a, net.b, 4000, 53, frames.UDP, 0)]
    assert udp.lifetime - int(time.monotonic()) == pytest.approx(options.timeout_any, abs=2)


def test_a_reset_closes_both_ways_and_a_syn_opens_anew(host: Lab, net: Net) -> None:
    host.allow_all(1, 2)
    key = CtKey(net.a, net.b, 4000, 80, frames.TCP, 0)
    for flags in (SYN, ACK, RST):
        host.send(1, frames.tcp(net.a, net.b, 4000, 80, flags))
    assert host.connections()[key].bits & BOTH_CLOSING == BOTH_CLOSING
    host.send(1, frames.tcp(net.a, net.b, 4000, 80, SYN))
    entry = host.connections()[key]
    assert (entry.bits & BOTH_CLOSING, entry.tx_packets) == (0, 1)


@pytest.mark.parametrize(
    ("flags", "closing", "timeout"),
    [
        (RST, BOTH_CLOSING, DatapathOptions().timeout_tcp_fin),
        (FIN | ACK, TX_CLOSING, DatapathOptions().timeout_tcp),
    ],
)
def test_a_connection_first_seen_at_its_end_is_closing(
    host: Lab, net: Net, flags: int, closing: int, timeout: int
) -> None:
    host.allow_all(1)
    host.send(1, frames.tcp(net.a, net.outside, 4000, 80, flags))
    (entry,) = host.connections().values()
    assert entry.bits & BOTH_CLOSING == closing
    assert entry.lifetime - int(time.monotonic()) == pytest.approx(timeout, abs=2)


def test_a_rule_taken_back_ends_the_connection(host: Lab, net: Net) -> None:
    key = host.allow(1, EGRESS, VM_IDENTITY)
    assert host.send(1, frames.tcp(net.a, net.vm, 4000, 80, SYN)).verdict == ACT_OK
    assert host.send(1, frames.tcp(net.a, net.vm, 4000, 80, ACK)).verdict == ACT_OK
    host.policies[1].delete([key])
    assert host.send(1, frames.tcp(net.a, net.vm, 4000, 80, ACK)).verdict == ACT_SHOT


def test_a_connection_cannot_be_opened_as_the_reply_to_another(host: Lab, net: Net) -> None:
    host.allow(2, INGRESS)
    host.allow(1, EGRESS)
    host.send(1, frames.tcp(net.a, net.b, 4000, 80))
    assert host.send(2, frames.tcp(net.b, net.a, 80, 4000, ACK)).verdict == ACT_REDIRECT
    assert host.send(2, frames.tcp(net.b, net.a, 80, 4000, SYN)).verdict == ACT_SHOT


def test_a_packet_denied_in_its_own_direction_still_passes_as_a_reply(host: Lab, net: Net) -> None:
    """Both ends opened the same UDP flow; then one loses its right to."""
    host.allow_all(1, 2)
    out, back = (
        CtKey(*ends, frames.UDP, 0) for ends in ((net.a, net.b, 5000, 4000), (net.b, net.a, 4000, 5000))
    )
    datagrams = host.ct_of(out)
    host.send(1, frames.udp(net.a, net.b, 5000, 4000))
    datagrams.delete([out, out._replace(flags=1)])
    host.send(2, frames.udp(net.b, net.a, 4000, 5000))
    datagrams.upsert([(out, host.connections()[back])])
    host.policies[1].sync([])
    assert host.send(1, frames.udp(net.a, net.b, 5000, 4000)).verdict == ACT_REDIRECT


@pytest.mark.parametrize("age", [0, 10])
def test_an_entry_past_its_lifetime_counts_as_absent(host: Lab, net: Net, age: int) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    host.send(1, frames.udp(net.a, net.b, 4000, 53))
    for key, entry in host.connections().items():
        lifetime = int(time.monotonic()) - age + 5
        host.ct_of(key).upsert([(key, entry._replace(lifetime=lifetime))])
    reply = host.send(2, frames.udp(net.b, net.a, 53, 4000))
    assert reply.verdict == (ACT_SHOT if age else ACT_REDIRECT)


# --- ICMP


def test_an_echo_reply_belongs_to_its_request(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    assert host.send(2, frames.echo(net.b, net.a, 7, reply=True)).verdict == ACT_SHOT
    assert host.send(1, frames.echo(net.a, net.b, 7)).verdict == ACT_REDIRECT
    assert host.send(2, frames.echo(net.b, net.a, 8, reply=True)).verdict == ACT_SHOT
    assert host.send(2, frames.echo(net.b, net.a, 7, reply=True)).verdict == ACT_REDIRECT


def test_nothing_but_an_echo_reply_answers_an_echo(host: Lab, net: Net) -> None:
    """An identifier of 0 looks like none; and an echo is no answer to a reply that nobody asked for."""
    host.allow(1, EGRESS)
    host.send(1, frames.echo(net.a, net.outside, 0))
    host.send(1, frames.echo(net.a, net.outside, 7, reply=True))
    other = frames.packet(net.outside, net.a, net.icmp, frames.icmp_message(13 if net.family == 4 else 139))
    for unasked in (frames.echo(net.outside, net.a, 0), frames.echo(net.outside, net.a, 7), other):
        assert host.receive(unasked).verdict == ACT_SHOT
    assert host.receive(frames.echo(net.outside, net.a, 0, reply=True)).verdict == ACT_REDIRECT


def test_an_error_about_a_packet_of_a_connection_passes_from_anybody(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS)
    about, other = frames.tcp(net.a, net.outside, 4000, 80), frames.tcp(net.a, net.outside, 4001, 80)

    def verdict(about: bytes, kind: int) -> int:
        return host.deliver(1, frames.icmp_error(net.router, net.a, about, kind)).verdict

    assert {verdict(about, kind) for kind in net.errors} == {ACT_SHOT}
    assert host.send(1, about).verdict == ACT_OK
    assert {verdict(about, kind) for kind in net.errors} == {ACT_OK}
    assert {verdict(other, kind) for kind in net.errors} == {ACT_SHOT}


@pytest.mark.parametrize(
    "framed",
    [
        pytest.param(lambda net: frames.tcp(net.a, net.outside, 4000, 80), id="tcp"),
        pytest.param(lambda net: frames.udp(net.a, net.outside, 4000, 53), id="udp"),
        pytest.param(lambda net: frames.echo(net.a, net.outside, 7), id="echo"),
        pytest.param(
            lambda net: frames.fragments(
                net.a, net.outside, frames.UDP, frames.udp_datagram(4000, 53, bytes(40))
            )[0],
            id="first fragment",
        ),
    ],
)
def test_an_error_arrives_whatever_it_is_about(host: Lab, net: Net, framed: Framed) -> None:
    host.allow(1, EGRESS)
    error = frames.icmp_error(net.router, net.a, framed(net))
    assert host.receive(error).verdict == ACT_SHOT
    host.send(1, framed(net))
    assert host.receive(error).verdict == ACT_REDIRECT


@pytest.mark.parametrize("kept", [0, 7, 19, 27])
def test_an_error_about_too_little_is_about_nothing(host: Lab, net: Net, kept: int) -> None:
    host.allow(1, EGRESS)
    about = frames.udp(net.a, net.outside, 4000, 53)
    host.send(1, about)
    error = frames.icmp_error(net.router, net.a, about[: 14 + kept + net.header - 20])
    assert host.deliver(1, error).verdict == ACT_SHOT
    assert host.dropped() == {(133, 1): 1}


def test_an_error_goes_to_the_sender_of_what_it_is_about(host: Lab, net: Net) -> None:
    host.allow_all(1)
    host.allow(2, EGRESS)
    about = frames.udp(net.a, net.outside, 4000, 53)
    host.send(1, about)
    assert host.deliver(2, frames.icmp_error(net.outside, net.b, about)).verdict == ACT_SHOT


def test_an_endpoint_may_answer_with_an_error(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    about = frames.udp(net.a, net.b, 4000, 53)
    assert host.send(2, frames.icmp_error(net.b, net.a, about)).verdict == ACT_SHOT
    host.send(1, about)
    assert host.send(2, frames.icmp_error(net.b, net.a, about)).verdict == ACT_REDIRECT
    assert all(key.protocol == frames.UDP for key in host.connections())


def test_an_endpoint_tells_nobody_of_packets_that_another_got(host: Lab, net: Net) -> None:
    host.allow(2, INGRESS)
    about = frames.tcp(net.outside, net.b, 4000, 80)
    assert host.receive(about).verdict == ACT_REDIRECT
    assert host.send(1, frames.icmp_error(net.a, net.outside, about)).verdict == ACT_SHOT
    assert host.send(2, frames.icmp_error(net.b, net.outside, about)).verdict == ACT_OK


# --- fragments


def fragments(net: Net, ident: int = 9, sender: str = "") -> tuple[bytes, bytes]:
    datagram = frames.udp_datagram(4000, 53, bytes(32))
    return frames.fragments(sender or net.a, net.vm, frames.UDP, datagram, ident=ident)


def test_later_fragments_have_the_ports_of_the_first(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, 53, frames.UDP)
    first, later = fragments(net)
    assert host.send(1, later).verdict == ACT_SHOT
    assert host.dropped() == {(175, 2): 1}
    assert host.send(1, first).verdict == ACT_OK
    assert host.send(1, later).verdict == ACT_OK
    assert host.send(1, fragments(net, ident=10)[1]).verdict == ACT_SHOT


def test_fragments_of_an_echo_and_of_its_reply_are_told_apart(host: Lab, net: Net) -> None:
    host.allow(1, EGRESS, VM_IDENTITY, net.echo, net.icmp)
    message = frames.echo(net.a, net.vm, 7)[14 + net.header :] + bytes(40)
    for each in frames.fragments(net.a, net.vm, net.icmp, message):
        assert host.send(1, each).verdict == ACT_OK
    reply = frames.echo(net.vm, net.a, 7, reply=True)[14 + net.header :] + bytes(40)
    for each in frames.fragments(net.vm, net.a, net.icmp, reply):
        assert host.receive(each).verdict == ACT_REDIRECT
    unasked = frames.echo(net.vm, net.a, 8, reply=True)[14 + net.header :] + bytes(40)
    for each in frames.fragments(net.vm, net.a, net.icmp, unasked, ident=10):
        assert host.receive(each).verdict == ACT_SHOT
    assert host.dropped() == {(133, 1): 2}


def test_without_tracking_fragments_match_no_port(net: Net) -> None:
    with lab(1, options=DatapathOptions(track_fragments=False)) as host:
        host.allow(1, EGRESS, WORLD, 53, frames.UDP)
        first, later = fragments(net)
        assert host.send(1, first).verdict == ACT_OK
        assert host.send(1, later).verdict == ACT_SHOT
        host.allow(1, EGRESS, WORLD)
        assert host.send(1, later).verdict == ACT_OK


def test_untracked_fragments_have_no_port_whatever_lies_in_the_control_block(net: Net) -> None:
    """Ports are kept in word 2 of skb->cb, where the kernel left something: here those of a connection."""
    with lab(1, options=DatapathOptions(track_fragments=False)) as host:
        host.allow(1, INGRESS)
        assert host.receive(frames.udp(net.outside, net.a, 53, 4000)).verdict == ACT_REDIRECT
        datagram = frames.udp_datagram(4000, 53, bytes(32))
        _, later = frames.fragments(net.a, net.outside, frames.UDP, datagram)
        (ports,) = struct.unpack("=I", struct.pack(">HH", 4000, 53))
        outcome = testrun.run(host.programs_of(net.family)[1]["from_endpoint"], later, cb=(0, 0, ports, 0, 0))
        assert outcome.verdict == ACT_SHOT


def test_a_spoofed_fragment_leaves_no_trace(host: Lab, net: Net) -> None:
    host.allow_all(1)
    spoofed, later = fragments(net, sender=net.b)
    assert host.send(1, spoofed).verdict == ACT_SHOT
    host.allow(2, EGRESS)
    assert host.send(2, later).verdict == ACT_SHOT
    assert host.dropped() == {(132, 2): 1, (175, 2): 1}
