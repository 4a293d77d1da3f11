# SPDX-License-Identifier: Apache-2.0
"""From the text of a policy to what the programs do with a packet, through real policy maps.

Every example of docs/policy.md, and random policies against their plain meaning (policy_reference.py of
tests/support): 250 sets of them for each family, in all some 1 000 policies, 2 000 rules and 12 000 packets.
Endpoint 1 of a lab is the endpoint; the peer is an address beyond the host that cilium_ipcache knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from itertools import count, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datapath.records import IpcacheEntry
from datapath.testrun import ACT_OK, ACT_SHOT
from identity.labels import CIDR, Labels
from identity.numbers import LOCAL_FLAG
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import ICMP, ICMPV6, Direction, Policy, Transport
from tests.support import frames
from tests.support import policy_strategies as some
from tests.support.bpflab import Lab, lab
from tests.support.families import Net
from tests.support.policy_examples import Example, examples
from tests.support.policy_reference import Verdict, verdict

WORLD, PEER = 2, 1_000
REASONS = {Verdict.NO_RULE: 133, Verdict.DENIED: 181}
# A port of its own for each packet: none may be the answer to another.
source_ports = count(10_000)


@pytest.fixture(scope="module")
def host() -> Iterator[Lab]:
    with lab(1) as made:
        yield made


def number_of(labels: Labels) -> int:
    """Return the identity that stands for `labels` here: real for the world and for prefixes."""
    if any(each.source == CIDR for each in labels):
        return LOCAL_FLAG | 1
    return WORLD if labels.get("reserved", "world") is not None else PEER


def where(net: Net, labels: Labels) -> str | None:
    """Return the prefix at which a peer is found: the longest that its labels name, else one outside.

    None if its labels name only prefixes of the other family.
    """
    prefixes = [ip_network(each.key.replace("-", ":")) for each in labels if each.source == CIDR]
    if not prefixes:
        return net.alone(net.outside)
    longest = max(prefixes, key=lambda each: each.prefixlen)
    return str(longest) if longest.version == net.family else None


def can_carry(net: Net, transport: Transport) -> bool:
    """Each family has an ICMP of its own."""
    return transport.protocol == net.icmp or transport.protocol not in (ICMP, ICMPV6)


def frame(source: str, destination: str, transport: Transport) -> bytes:
    port = 10_000 + next(source_ports) % 50_000
    if transport.protocol in (ICMP, ICMPV6):
        payload = frames.icmp_message(transport.port, port)
    else:
        payload = frames.with_ports(transport.protocol, port, transport.port)
    return frames.packet(source, destination, transport.protocol, payload)


def fate(host: Lab, net: Net, prefix: str, transport: Transport, direction: Direction) -> Verdict:
    """Send one packet and return what became of it, with the drop counted under its reason."""
    remote = str(ip_network(prefix)[0])
    before = drops(host, direction)
    if direction is Direction.EGRESS:
        outcome = host.send(1, frame(net.a, remote, transport))
    else:
        outcome = host.deliver(1, frame(remote, net.a, transport))
    counted = drops(host, direction) - before
    if outcome.verdict == ACT_OK:
        assert not counted
        return Verdict.ALLOWED
    assert outcome.verdict == ACT_SHOT
    assert counted.total() == 1
    return next(iter(counted))


def drops(host: Lab, direction: Direction) -> Counter[Verdict]:
    """All drops by policy so far, by why."""
    counted_as = 1 if direction is Direction.INGRESS else 2
    return Counter({why: host.counted(reason, counted_as).packets for why, reason in REASONS.items()})


@contextmanager
def known(host: Lab, prefix: str, peer: Labels | None) -> Iterator[None]:
    """Let cilium_ipcache know a peer; forget it, and every connection, afterwards."""
    if peer is not None:
        assert not host.ipcache.upsert([(prefix, IpcacheEntry(number_of(peer)))])
    try:
        yield
    finally:
        if peer is not None:
            host.ipcache.delete([prefix])
        for connections in host.ct.values():
            connections.delete(list(connections.keys()))


def enforce(host: Lab, policies: list[Policy], endpoint: Labels, peer: Labels | None) -> None:
    """Put what `policies` mean for the endpoint into its map."""
    engine = PolicyEngine()
    for policy in policies:
        engine.upsert_policy(policy)
    if peer is not None:
        engine.upsert_identity(number_of(peer), peer)
    engine.upsert_endpoint(1, endpoint)
    wanted = engine.map_state(1)
    host.replace_policy(1, wanted.items())
    assert len(host.hits(1)) == len(wanted)


def title(example: Example) -> str:
    return example.text.splitlines()[3].strip()


@pytest.mark.parametrize("example", examples(), ids=title)
def test_packets_of_an_example(host: Lab, net: Net, example: Example) -> None:
    policies = parse_policies(example.text, "docs/policy.md", name="example")
    for packet in example.packets:
        prefix = where(net, packet.peer)
        if prefix is None or not can_carry(net, packet.transport):
            continue
        enforce(host, policies, packet.endpoint, packet.peer)
        with known(host, prefix, packet.peer):
            assert fate(host, net, prefix, packet.transport, packet.direction) is packet.verdict, packet


@pytest.mark.timeout(300)
@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    policies=st.lists(some.policies, min_size=1, max_size=4, unique_by=lambda policy: policy.name),
    endpoint=some.endpoint_labels,
    data=st.data(),
)
def test_packets_of_random_policies(
    host: Lab, net: Net, policies: list[Policy], endpoint: Labels, data: st.DataObject
) -> None:
    """Twelve packets with each of two peers; whom nobody knows an identity of is the world to programs."""
    rules = [rule for policy in policies for rule in policy.rules]
    transports = [each for each in (*some.TRANSPORTS, some.OTHER_TRANSPORT) if can_carry(net, each)]
    somebody = st.one_of(some.peers_of(net.family), st.none())
    for peer in data.draw(st.tuples(somebody, somebody)):
        labels = Labels.of(["reserved:world"]) if peer is None else peer
        prefix = where(net, labels)
        assert prefix is not None
        enforce(host, policies, endpoint, labels)
        with known(host, prefix, peer):
            for direction, transport in product(Direction, transports):
                meant = verdict(rules, endpoint, direction, labels, transport)
                assert fate(host, net, prefix, transport, direction) is meant, (direction, transport)
