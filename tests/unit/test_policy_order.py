# SPDX-License-Identifier: Apache-2.0
"""The order in which a policy map is changed, on a model of the lookup: what packets meet after each write.

A story is every state that a map goes through.  Where the old policy and the new one agree about a packet,
all of them have to: for all pairs of maps of one packet's four keys, for random maps, and for the maps that
random policies resolve to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.policy_order import (
    RawPolicyEntry,
    RawPolicyKey,
    RawPolicyMap,
    Write,
    in_order,
    make_room,
    rank,
    replacing,
)
from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import ALLOW, ANY_TRANSPORT, DENY, TCP, Direction, Policy, PolicyEntry, PolicyKey, Transport
from tests.support import policy_strategies as some
from tests.support.policy_reference import Verdict, lookup

State = dict[PolicyKey, PolicyEntry]
Packet = tuple[int, Transport, Direction]
IN = Direction.INGRESS
WEB, DNS, OTHER = Transport(80, TCP), Transport(53, 17), Transport(4242, TCP)
STRANGER = 999  # an identity that no map knows
UNLIMITED = 1 << 14
unhurried = settings(deadline=None)


def key(identity: int, transport: Transport = ANY_TRANSPORT, direction: Direction = IN) -> PolicyKey:
    return PolicyKey(identity, *transport, direction)


def allowed(state: State, packet: Packet) -> bool:
    return lookup(state, *packet) is Verdict.ALLOWED


def asked(packet: Packet) -> list[PolicyKey]:
    identity, transport, direction = packet
    who = (identity, transport), (0, transport), (identity, ANY_TRANSPORT), (0, ANY_TRANSPORT)
    return [key(number, port, direction) for number, port in who]


def decider(state: State, packet: Packet) -> PolicyKey | None:
    return next((each for each in asked(packet) if each in state), None)


def packets(*states: State) -> list[Packet]:
    """Return a packet for each way in which these maps can be asked."""
    keys = [each for state in states for each in state]
    numbers = sorted({each.identity for each in keys} - {0} | {STRANGER})
    ports = {Transport(each.dport, each.protocol) for each in keys} | {OTHER, ANY_TRANSPORT}
    return list(product(numbers, sorted(ports), sorted({each.direction for each in keys})))


def story(start: State, writes: Iterable[Write]) -> Iterator[tuple[State, bool]]:
    """Yield each state that a map goes through, and whether programs had ended before what led to it."""
    state = dict(start)
    yield dict(state), False
    for write in writes:
        waits = write.waits
        for where, entry in write.upserts:
            state[PolicyKey(*where[:3], Direction(where[3]))] = PolicyEntry(*entry)
            yield dict(state), waits
            waits = False
        for where in write.deletes:
            del state[PolicyKey(*where[:3], Direction(where[3]))]
            yield dict(state), waits
            waits = False


def raw(state: State) -> RawPolicyMap:
    return dict(state.items())


def change(old: State, new: State, size: int = UNLIMITED) -> Iterator[Write]:
    return replacing(raw(old), raw(new), size)


def makes_room(old: State, new: State, size: int) -> list[RawPolicyKey]:
    return make_room(raw(old), raw(new), size)


def check(old: State, new: State, writes: Iterable[Write]) -> None:
    """Every state gives every packet what the old map or the new one does."""
    everybody = packets(old, new)
    state = old
    for state, _ in story(old, writes):
        for packet in everybody:
            assert allowed(state, packet) in (allowed(old, packet), allowed(new, packet)), (packet, state)
    assert state == new


# --- maps

VALUES = (None, ALLOW, DENY)
FOUR = asked((7, WEB, IN))
keys = st.builds(
    key,
    st.sampled_from([0, 0, 7, 8]),
    st.sampled_from([ANY_TRANSPORT, WEB, DNS]),
    st.sampled_from([IN, IN, Direction.EGRESS]),
)
states = st.dictionaries(keys, st.sampled_from([ALLOW, DENY]), max_size=14)


def all_maps() -> Iterator[State]:
    """Yield every map of the four keys that one packet asks for."""
    for values in product(VALUES, repeat=len(FOUR)):
        yield {where: value for where, value in zip(FOUR, values, strict=True) if value is not None}


def resolved(policies: list[Policy], identities: Mapping[int, Labels], endpoint: Labels) -> State:
    engine = PolicyEngine()
    for number, labels in identities.items():
        engine.upsert_identity(number, labels)
    for policy in policies:
        engine.upsert_policy(policy)
    engine.upsert_endpoint(1, endpoint)
    return dict(engine.map_state(1))


@st.composite
def resolved_pairs(draw: st.DrawFn) -> tuple[State, State]:
    """Return the maps of an endpoint before and after policies and identities changed, some of them."""
    policies = st.lists(some.policies, min_size=1, max_size=3, unique_by=lambda policy: policy.name)
    identities = st.dictionaries(st.integers(256, 260), some.peer_labels, min_size=2)
    endpoint, before, known = draw(some.endpoint_labels), draw(policies), draw(identities)
    after = draw(st.one_of(policies, st.permutations(before).map(lambda kept: kept[1:])))
    now = draw(st.one_of(st.just(known), identities))
    return resolved(before, known, endpoint), resolved(after, now, endpoint)


def policy(name: str, text: str) -> Policy:
    return parse_policies(f"[{{endpointSelector: {{}}, {text}}}]", "test", name=name)[0]


DENY_BAD = policy("deny", "ingressDeny: [{fromEndpoints: [{matchLabels: {app: bad}}]}]")
OPEN_WEB = policy("open", "ingress: [{toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]")
BAD = {256 + number: Labels.of({"app": "bad", "n": str(number)}) for number in range(5)}


# --- what both policies say holds at every moment


def test_every_pair_of_maps_of_one_packet() -> None:
    found = list(all_maps())
    assert len(found) == 81
    for old, new in product(found, found):
        check(old, new, change(old, new))


@unhurried
@given(states, states, st.booleans())
def test_random_maps(old: State, new: State, turned: bool) -> None:
    """In whatever order the entries of one rank come."""
    writes = list(change(old, new))
    if turned:
        writes = [Write(each.upserts[::-1], each.deletes[::-1], each.waits) for each in writes]
    check(old, new, writes)


@unhurried
@given(resolved_pairs())
def test_maps_of_random_policies(pair: tuple[State, State]) -> None:
    check(*pair, change(*pair))


@pytest.mark.parametrize("opened", [True, False])
def test_denied_peers_while_a_port_is_opened_to_everybody_or_closed(opened: bool) -> None:
    old, new = (resolved(each, BAD, Labels.of({"app": "web"})) for each in ([DENY_BAD], [DENY_BAD, OPEN_WEB]))
    assert len(new) == len(old) + len(BAD) + 1
    check(old, new, change(old, new)) if opened else check(new, old, change(new, old))


@unhurried
@given(states, states, states)
def test_change_that_ended_in_the_middle_is_gone_on_with(old: State, new: State, next_one: State) -> None:
    """An agent dies, or an entry is refused, after any write; what comes then starts from there."""
    everybody = packets(old, new, next_one)
    agreed = [
        (packet, allowed(old, packet))
        for packet in everybody
        if allowed(old, packet) == allowed(new, packet) == allowed(next_one, packet)
    ]
    for middle, _ in story(old, change(old, new)):
        for state, _ in story(middle, change(middle, next_one)):
            for packet, verdict in agreed:
                assert allowed(state, packet) is verdict, (packet, middle, state)


# --- where there is no room


def check_full(old: State, new: State, size: int) -> None:
    """Nobody gets in whom both policies deny; what both allow only drops if its entry had to make room."""
    everybody, gone = packets(old, new), set(makes_room(old, new, size))
    state = old
    for state, _ in story(old, change(old, new, size)):
        assert len(state) <= size
        for packet in everybody:
            before, after = allowed(old, packet), allowed(new, packet)
            if not before and not after:
                assert not allowed(state, packet), packet
            if before and after and decider(old, packet) not in gone:
                assert allowed(state, packet), packet
    assert state == new


def test_every_pair_of_maps_of_one_packet_without_room() -> None:
    found = list(all_maps())
    for old, new in product(found, found):
        check_full(old, new, max(len(old), len(new)))


@unhurried
@given(st.one_of(st.tuples(states, states), resolved_pairs()), st.data())
def test_random_maps_with_little_room(pair: tuple[State, State], data: st.DataObject) -> None:
    old, new = pair
    check_full(old, new, data.draw(st.integers(max(len(old), len(new)), len(old.keys() | new.keys()))))


def test_what_makes_room_first_is_what_ends_anyway() -> None:
    old: State = {key(7, WEB): ALLOW, key(7, DNS): ALLOW, key(8): ALLOW, key(9): ALLOW, key(6): DENY}
    new: State = {key(7): ALLOW, key(9, WEB): ALLOW, key(9, DNS): ALLOW, key(6): DENY}
    assert makes_room(old, new, 7) == [key(8)]
    assert set(makes_room(old, new, 5)) >= {key(8)}
    assert key(6) not in makes_room(old, new, 5)


def test_denials_make_room_once_nothing_is_allowed_under_them() -> None:
    """Six open ports become six others, all denied to one peer: what stays open is not closed for it."""
    ports = [Transport(port, TCP) for port in range(8000, 8012)]
    old, new = ({key(6): DENY, key(0, direction=Direction.EGRESS): ALLOW} for _ in range(2))
    for state, half in ((old, ports[:6]), (new, ports[6:])):
        for port in half:
            state.update({key(0, port): ALLOW, key(6, port): DENY})
    gone = makes_room(old, new, len(new))
    assert set(gone) == old.keys() - new.keys()
    assert [raw(old)[each] for each in gone] == [ALLOW] * 6 + [DENY] * 6


def test_map_full_of_denials_that_change_is_closed() -> None:
    old: State = {key(0): ALLOW, key(7): DENY, key(8): DENY}
    new: State = {key(0): ALLOW, key(7, WEB): DENY, key(8, WEB): DENY}
    assert makes_room(old, new, 3) == [key(0), key(7), key(8)]
    assert makes_room(old, new, 5) == []


# --- packets that ask while entries are written


def may_get(seen: list[State], packet: Packet, verdict: PolicyEntry) -> bool:
    """Whether a packet may get `verdict` that asks its questions while a map goes through these states."""
    at = 0
    for where in asked(packet):
        later = range(at, len(seen))
        if any(seen[each].get(where) == verdict for each in later):
            return True
        absent = next((each for each in later if where not in seen[each]), None)
        if absent is None:
            return False
        at = absent
    return verdict == DENY


def between_pauses(start: State, writes: Iterable[Write]) -> Iterator[list[State]]:
    """Yield the states that one run of a program may see: it has ended at the next pause."""
    seen: list[State] = []
    for state, waited in story(start, writes):
        if waited:
            yield seen
            seen = seen[-1:]
        seen.append(state)
    yield seen


def check_slow_packets(old: State, new: State, size: int = UNLIMITED) -> None:
    """None gets the opposite of what both policies say; without room that is promised of denials alone."""
    agreed = [each for each in packets(old, new) if allowed(old, each) == allowed(new, each)]
    for seen in between_pauses(old, change(old, new, size)):
        for packet in agreed:
            if not allowed(old, packet):
                assert not may_get(seen, packet, ALLOW), (packet, seen)
            elif size == UNLIMITED:
                assert not may_get(seen, packet, DENY), (packet, seen)


def test_slow_packet_between_every_pair_of_maps() -> None:
    found = list(all_maps())
    for old, new in product(found, found):
        check_slow_packets(old, new)
        check_slow_packets(old, new, max(len(old), len(new)))


@unhurried
@given(st.one_of(st.tuples(states, states), resolved_pairs()), st.booleans())
def test_slow_packet_between_random_maps(pair: tuple[State, State], full: bool) -> None:
    check_slow_packets(*pair, max(map(len, pair)) if full else UNLIMITED)


def pauses(old: list[Policy], new: list[Policy]) -> int:
    before, after = (resolved(each, BAD, Labels.of({"app": "web"})) for each in (old, new))
    return sum(each.waits for each in change(before, after))


def test_only_contradictions_pause() -> None:
    """The default is an entry that allows everything: it goes when a port is opened."""
    assert pauses([DENY_BAD], [DENY_BAD, OPEN_WEB]) == 1
    assert pauses([], [OPEN_WEB]) == 1
    assert pauses([], [DENY_BAD, OPEN_WEB]) == 3
    for old, new in (
        ([OPEN_WEB], [DENY_BAD, OPEN_WEB]),
        ([DENY_BAD, OPEN_WEB], [DENY_BAD]),
        ([DENY_BAD, OPEN_WEB], [OPEN_WEB]),
        ([OPEN_WEB], []),
    ):
        assert pauses(old, new) == 0, (old, new)


# --- the order itself


def test_rank_is_the_place_in_the_lookup() -> None:
    for packet in product((7,), (WEB, Transport(0, 1)), Direction):
        assert [rank(each) for each in asked(packet)] == [0, 1, 2, 3]
    assert [rank(each) for each in asked((7, ANY_TRANSPORT, IN))] == [2, 3, 2, 3]


def test_exceptions_are_written_before_and_deleted_after() -> None:
    entries: list[tuple[RawPolicyKey, RawPolicyEntry]] = [(each, ALLOW) for each in reversed(FOUR)]
    written = [where for each in in_order(entries, ()) for where, _ in each.upserts]
    deleted = [where for each in in_order((), FOUR) for where in each.deletes]
    assert written == FOUR
    assert deleted == FOUR[::-1]
    assert all(rank(first) < rank(second) for first, second in pairwise(FOUR))
