# SPDX-License-Identifier: Apache-2.0
"""From the text of a policy to what the programs do with a packet, through real policy maps.

Every example of docs/policy.md, and random policies against their plain meaning.  Endpoint 1 of a lab is the
endpoint; the peer is an address beyond the host that cilium_ipcache knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datapath.records import IpcacheEntry
from datapath.testrun import ACT_OK, ACT_SHOT
from identity.labels import CIDR, Labels
from identity.numbers import LOCAL_FLAG
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import ICMP, SCTP, TCP, Direction, Policy, Transport
from tests.support import frames
from tests.support import policy_strategies as some
from tests.support.bpflab import Lab, address, lab
from tests.support.policy_examples import Example, examples
from tests.support.policy_reference import Verdict, verdict

ENDPOINT, WORLD, PEER = address(1), 2, 1_000
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


def where(labels: Labels) -> str:
    """Return the prefix at which the peer is found: the longest that its labels name, else one outside."""
    prefixes = [each.key for each in labels if each.source == CIDR and ":" not in each.key]
    return max(prefixes, key=lambda each: int(each.partition("/")[2]), default="192.0.2.7/32")


def frame(source: str, destination: str, transport: Transport) -> bytes:
    port = 10_000 + next(source_ports) % 50_000
    if transport.protocol == ICMP:
        return frames.packet(source, destination, ICMP, frames.icmp_message(transport.port, port))
    if transport.protocol == TCP:
        return frames.tcp(source, destination, port, transport.port)
    if transport.protocol == SCTP:
        head = port.to_bytes(2) + transport.port.to_bytes(2) + bytes(8)
        return frames.ethernet(frames.ipv4(source, destination, SCTP, head))
    return frames.udp(source, destination, port, transport.port)


def fate(host: Lab, peer: Labels | None, transport: Transport, direction: Direction) -> Verdict:
    """Send one packet and return what became of it, with the drop counted under its reason."""
    prefix = where(peer or Labels())
    if peer is not None:
        assert not host.ipcache.upsert([(prefix, IpcacheEntry(number_of(peer)))])
    remote = str(ip_network(prefix)[0])
    before = host.dropped()
    if direction is Direction.EGRESS:
        outcome = host.send(1, frame(ENDPOINT, remote, transport))
    else:
        outcome = host.deliver(1, frame(remote, ENDPOINT, transport))
    if peer is not None:
        host.ipcache.delete([prefix])
    for keys in host.ct.values():
        keys.delete(key for key, _ in list(keys.items()))
    after = host.dropped()
    found = [key for key in after if after[key] != before.get(key, 0)]
    if outcome.verdict == ACT_OK:
        assert not found
        return Verdict.ALLOWED
    assert outcome.verdict == ACT_SHOT
    ((reason, counted),) = found
    assert counted == (1 if direction is Direction.INGRESS else 2)
    return next(each for each, number in REASONS.items() if number == reason)


def enforce(host: Lab, policies: list[Policy], endpoint: Labels, peer: Labels | None) -> None:
    """Put what `policies` mean for the endpoint into its map."""
    engine = PolicyEngine()
    for policy in policies:
        engine.upsert_policy(policy)
    if peer is not None:
        engine.upsert_identity(number_of(peer), peer)
    engine.upsert_endpoint(1, endpoint)
    wanted = engine.map_state(1)
    assert not host.policies[1].sync(wanted.items()).failed
    assert len(host.hits(1)) == len(wanted)


def title(example: Example) -> str:
    return example.text.splitlines()[3].strip()


@pytest.mark.parametrize("example", examples(), ids=title)
def test_packets_of_an_example(host: Lab, example: Example) -> None:
    policies = parse_policies(example.text, "docs/policy.md", name="example")
    for packet in example.packets:
        enforce(host, policies, packet.endpoint, packet.peer)
        assert fate(host, packet.peer, packet.transport, packet.direction) is packet.verdict, packet


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policies=st.lists(some.policies, min_size=1, max_size=4, unique_by=lambda policy: policy.name),
    peer=st.one_of(some.peer_labels, st.none()),
    endpoint=some.endpoint_labels,
)
def test_packets_of_random_policies(
    host: Lab, policies: list[Policy], peer: Labels | None, endpoint: Labels
) -> None:
    """Twelve packets each; what nobody knows an identity of is the world to the programs."""
    rules = [rule for policy in policies for rule in policy.rules]
    labels = Labels.of(["reserved:world"]) if peer is None else peer
    enforce(host, policies, endpoint, labels)
    for direction in Direction:
        for transport in (*some.TRANSPORTS, some.OTHER_TRANSPORT):
            meant = verdict(rules, endpoint, direction, labels, transport)
            assert fate(host, peer, transport, direction) is meant, (direction, transport)
