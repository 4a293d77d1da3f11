# SPDX-License-Identifier: Apache-2.0
"""What is answered to a question, read by a DNS library that knows all of it; and hostile packets."""

from __future__ import annotations

import random
from collections import Counter

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent import names_wire as wire
from agent.names import TTL_S, Names
from agent.names_zone import Outcome, Reply, Zone
from identity.labels import Labels

WEB = "web.shop.holdfast."
LARGE = "large.shop.holdfast."
MANY = 400


class Index(Names):
    """An index of plain calls."""

    complete = True
    serial = 7

    def put(self, identity: int, service: str, *prefixes: str) -> None:
        texts = [f"com.docker.compose.service={service}", "com.docker.compose.project=shop"]
        self.set_labels(identity, Labels.of(texts, source="container"))
        for each in prefixes:
            self.set_identity(each, identity)


@pytest.fixture(scope="module")
def index() -> Index:
    made = Index()
    made.put(300, "web", "10.0.0.1/32", "10.0.0.2/32", "fd00::1/128")
    made.put(301, "four", "10.0.0.4/32")
    made.put(302, "large", *(f"10.1.{n // 250}.{n % 250}/32" for n in range(MANY)))
    return made


@pytest.fixture(scope="module")
def zone(index: Index) -> Zone:
    return Zone("holdfast", index)


def ask(zone: Zone, query: dns.message.Message, **how: bool) -> dns.message.Message:
    """Return the answer, which fits the question."""
    answer = dns.message.from_wire(zone.reply(query.to_wire(), **how).packet)
    assert query.is_response(answer)
    assert not answer.flags & dns.flags.RA
    return answer


def asked(zone: Zone, name: str, kind: str = "A", **how: bool) -> dns.message.Message:
    return ask(zone, dns.message.make_query(name, kind), **how)


def found(answer: dns.message.Message) -> list[str]:
    return [each.to_text() for rrset in answer.answer for each in rrset]


# --- answers


def test_a_name_has_its_addresses_of_the_type(zone: Zone) -> None:
    answer = asked(zone, WEB)
    assert answer.flags & dns.flags.AA
    assert sorted(found(answer)) == ["10.0.0.1", "10.0.0.2"]
    assert answer.answer[0].ttl == TTL_S
    assert found(asked(zone, WEB, "AAAA")) == ["fd00::1"]
    assert sorted(found(asked(zone, WEB, "ANY"))) == ["10.0.0.1", "10.0.0.2", "fd00::1"]


def test_case_is_kept_and_does_not_count(zone: Zone) -> None:
    answer = asked(zone, "WeB.sHoP.HoldFast.")
    assert len(found(answer)) == 2
    assert answer.answer[0].name.to_text() == "WeB.sHoP.HoldFast."


@pytest.mark.parametrize("name", ["four.shop.holdfast.", "shop.holdfast.", "holdfast."])
def test_what_is_there_without_the_type_is_answered_with_nothing(zone: Zone, name: str) -> None:
    answer = asked(zone, name, "AAAA")
    assert answer.rcode() == dns.rcode.NOERROR
    assert not answer.answer
    (authority,) = answer.authority
    assert authority.name.to_text() == "holdfast."
    assert (authority.rdtype, authority.ttl, authority[0].minimum) == (dns.rdatatype.SOA, TTL_S, TTL_S)


@pytest.mark.parametrize(
    "name", ["db.shop.holdfast.", "web.other.holdfast.", "other.holdfast.", "a.web.shop.holdfast."]
)
def test_what_is_not_there_is_denied_with_the_zones_soa(zone: Zone, name: str) -> None:
    answer = asked(zone, name)
    assert answer.rcode() == dns.rcode.NXDOMAIN
    assert answer.flags & dns.flags.AA, "docker asks the next server otherwise"
    assert answer.authority[0].name.to_text() == "holdfast."
    assert answer.authority[0][0].rname.to_text() == "hostmaster.holdfast."
    assert answer.authority[0][0].serial == 7


def test_a_label_with_a_dot_in_it_is_not_two(zone: Zone) -> None:
    for name in (r"web\.shop.holdfast.", r"a.web\.shop.holdfast."):
        assert asked(zone, name).rcode() == dns.rcode.NXDOMAIN
    assert asked(zone, r"web.shop\.holdfast.").rcode() == dns.rcode.REFUSED


def test_the_domain_has_its_soa(zone: Zone) -> None:
    (rrset,) = asked(zone, "holdfast.", "SOA").answer
    assert rrset.name.to_text() == "holdfast."


def test_a_domain_of_several_labels(index: Index) -> None:
    zone = Zone("hosts.example", index)
    assert len(found(asked(zone, "web.shop.hosts.example."))) == 2
    assert asked(zone, "x.shop.hosts.example.").authority[0].name.to_text() == "hosts.example."
    for name in (WEB, "web.shop.example.", "example.", "."):
        assert asked(zone, name).rcode() == dns.rcode.REFUSED


@pytest.mark.parametrize("name", ["www.example.com.", ".", "holdfast.example.", "xholdfast.", "com."])
def test_anything_else_is_refused(zone: Zone, name: str) -> None:
    answer = asked(zone, name)
    assert answer.rcode() == dns.rcode.REFUSED
    assert not answer.flags & dns.flags.AA


def test_transfers_and_other_classes_are_refused(zone: Zone) -> None:
    assert asked(zone, "holdfast.", "AXFR").rcode() == dns.rcode.REFUSED
    query = dns.message.make_query(WEB, "A", rdclass=dns.rdataclass.CH)
    assert ask(zone, query).rcode() == dns.rcode.REFUSED


def test_strangers_are_refused(zone: Zone) -> None:
    answer = asked(zone, WEB, served=False)
    assert answer.rcode() == dns.rcode.REFUSED
    assert not answer.answer


def test_before_all_is_known_nothing_is_denied() -> None:
    index = Index()
    index.complete = False
    index.put(300, "web", "10.0.0.1/32")
    zone = Zone("holdfast", index)
    assert found(asked(zone, WEB)) == ["10.0.0.1"], "what is known is answered"
    for name, kind in (("db.shop.holdfast.", "A"), (WEB, "AAAA"), ("shop.holdfast.", "A")):
        answer = asked(zone, name, kind)
        assert (answer.rcode(), answer.authority) == (dns.rcode.SERVFAIL, [])
    assert asked(zone, "www.example.com.").rcode() == dns.rcode.REFUSED


# --- many addresses


@pytest.mark.parametrize(
    ("edns", "size"), [(None, 512), (512, 512), (1000, 1000), (1232, 1232), (4096, 1232), (100, 512)]
)
def test_by_udp_as_many_as_fit_and_the_mark(zone: Zone, edns: int | None, size: int) -> None:
    query = dns.message.make_query(LARGE, "A", use_edns=edns is not None, payload=edns or 0)
    reply = zone.reply(query.to_wire())
    assert reply.outcome is Outcome.TRUNCATED
    assert size - 16 < len(reply.packet) <= size
    answer = dns.message.from_wire(reply.packet)
    assert answer.flags & dns.flags.TC
    assert (answer.edns == 0) == (edns is not None)


def test_by_tcp_all(zone: Zone) -> None:
    reply = zone.reply(dns.message.make_query(LARGE, "A").to_wire(), stream=True)
    assert reply.outcome is Outcome.ANSWERED
    answer = dns.message.from_wire(reply.packet)
    assert not answer.flags & dns.flags.TC
    assert len(set(found(answer))) == MANY


def test_by_tcp_as_many_as_a_message_has_room_for() -> None:
    index = Index()
    index.put(300, "huge", *(f"10.{n >> 8}.{n & 255}.1/32" for n in range(5000)))
    answer = asked(Zone("holdfast", index), "huge.shop.holdfast.", stream=True)
    assert 4000 < len(found(answer)) < 5000
    assert not answer.flags & dns.flags.TC, "there is no larger way to ask again"


def test_answers_begin_with_each_address_as_often(index: Index) -> None:
    zone = Zone("holdfast", index, random.Random(7).randrange)
    first = Counter(found(asked(zone, WEB))[0] for _ in range(200))
    assert min(first["10.0.0.1"], first["10.0.0.2"]) > 70
    assert len({found(asked(zone, LARGE))[0] for _ in range(50)}) > 30


# --- packets that are no questions of ours


def refused_as(zone: Zone, packet: bytes) -> dns.rcode.Rcode:
    reply = zone.reply(packet)
    assert reply.outcome is Outcome.MALFORMED
    answer = dns.message.from_wire(reply.packet)
    assert answer.id == int.from_bytes(packet[:2])
    return answer.rcode()


def test_what_is_malformed_is_said_to_be(zone: Zone) -> None:
    good = dns.message.make_query(WEB, "A", use_edns=0).to_wire()
    two = good[:4] + b"\0\2" + good[6:]
    pointer = good[:12] + b"\xc0\x0c\0\1\0\1"
    for packet in (two, pointer, good[:-1], good + b"x", good[:20], good[:12]):
        assert refused_as(zone, packet) == dns.rcode.FORMERR
    long_name = b"".join(b"\x3f" + b"a" * 63 for _ in range(4)) + b"\0"
    assert refused_as(zone, good[:12] + long_name + b"\0\1\0\1") == dns.rcode.FORMERR
    update = dns.message.make_query(WEB, "A")
    update.set_opcode(dns.opcode.NOTIFY)
    assert refused_as(zone, update.to_wire()) == dns.rcode.NOTIMP
    later = dns.message.make_query(WEB, "A", use_edns=1)
    assert refused_as(zone, later.to_wire()) == dns.rcode.BADVERS


def test_options_of_edns_are_read_over(zone: Zone) -> None:
    options: list[dns.edns.Option] = [
        dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678"),
        dns.edns.GenericOption(dns.edns.OptionType.PADDING, bytes(128)),
    ]
    query = dns.message.make_query(WEB, "A", use_edns=0, payload=1232, options=options)
    assert len(found(ask(zone, query))) == 2


def test_answers_and_crumbs_are_not_answered(zone: Zone) -> None:
    answer = zone.reply(dns.message.make_query(WEB, "A").to_wire()).packet
    for packet in (answer, b"", answer[:11], bytes(11)):
        assert zone.reply(packet) == Reply(b"", Outcome.IGNORED)


@given(st.binary(max_size=64) | st.binary(min_size=12, max_size=1200), st.booleans())
@example(bytes(2) + b"\1\0" + b"\0\1" + bytes(6), False)
def test_no_packet_does_harm(packet: bytes, stream: bool) -> None:
    check_reply(packet, stream)


@given(st.data())
def test_no_damaged_question_does_harm(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([WEB, LARGE, "x.holdfast.", "holdfast.", "www.example.com.", "."]))
    kind = data.draw(st.sampled_from(["A", "AAAA", "ANY", "SOA", "MX"]))
    packet = bytearray(
        dns.message.make_query(name, kind, use_edns=data.draw(st.sampled_from([False, 0]))).to_wire()
    )
    for _ in range(data.draw(st.integers(0, 3))):
        packet[data.draw(st.integers(2, len(packet) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packet)))
    check_reply(bytes(packet[: cut if data.draw(st.booleans()) else None]), data.draw(st.booleans()))


FUZZED = Index()
FUZZED.put(300, "web", "10.0.0.1/32", "fd00::1/128")
FUZZED.put(302, "large", *(f"10.1.{n // 250}.{n % 250}/32" for n in range(MANY)))


def check_reply(packet: bytes, stream: bool) -> None:
    """Whatever came: nothing, or an answer that can be read, is not too long and is to this packet."""
    reply = Zone("holdfast", FUZZED).reply(packet, stream=stream)
    if not reply.packet:
        assert reply.outcome is Outcome.IGNORED
        return
    answer = dns.message.from_wire(reply.packet)
    assert answer.flags & dns.flags.QR
    assert answer.id == int.from_bytes(packet[:2])
    assert len(reply.packet) <= (wire.STREAM_SIZE if stream else wire.EDNS_SIZE)
    try:
        query = dns.message.from_wire(packet)
    except (dns.exception.DNSException, ValueError):
        return
    if reply.outcome in (Outcome.ANSWERED, Outcome.TRUNCATED):
        assert query.is_response(answer)
