# SPDX-License-Identifier: Apache-2.0
"""Packets that are sent while a policy map is written: what both policies say holds for each of them.

Endpoint 1 of a lab; one thread sends, one changes policy to and fro.  The denied peer's identity is the last
of many that the policy denies.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, cycle

import pytest

from datapath.records import IpcacheEntry
from datapath.testrun import ACT_OK
from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import MAX_ENTRIES
from tests.support import frames
from tests.support.bpflab import CATALOGUE, Lab, address, lab

ENDPOINT, BAD, GOOD = address(1), "192.0.2.7", "192.0.2.8"
DENIED, FIRST, GOOD_NUMBER = 100, 1000, 900
ROUNDS = 25
NO_BAD = "ingressDeny: [{fromEndpoints: [{matchLabels: {app: bad}}]}]"
WEB = "toPorts: [{ports: [{port: '80', protocol: TCP}]}]"
GOOD_TO_WEB = f"ingress: [{{fromEndpoints: [{{matchLabels: {{app: good}}}}], {WEB}}}]"


def to_everybody(first: int, last: int) -> str:
    return f"ingress: [{{toPorts: [{{ports: [{{port: '{first}', endPort: {last}, protocol: TCP}}]}}]}}]"


class Changing:
    """Endpoint 1, whose map follows an engine that knows `denied` identities as bad."""

    def __init__(self, host: Lab, denied: int, *, limit: int = MAX_ENTRIES) -> None:
        self.host = host
        self.engine = PolicyEngine(limit=limit)
        for number in range(FIRST, FIRST + denied):
            self.engine.upsert_identity(number, Labels.of({"app": "bad", "n": str(number)}))
        self.engine.upsert_identity(GOOD_NUMBER, Labels.of({"app": "good"}))
        peers = {BAD: FIRST + denied - 1, GOOD: GOOD_NUMBER}
        host.ipcache.upsert((f"{peer}/32", IpcacheEntry(number)) for peer, number in peers.items())
        self.engine.upsert_endpoint(1, Labels.of({"app": "web"}))

    def policy(self, name: str, rule: str) -> None:
        """Put a rule for everybody in force, or take it back with an empty one; and write the map."""
        if rule:
            text = f"[{{endpointSelector: {{}}, {rule}}}]"
            self.engine.upsert_policy(parse_policies(text, "test", name=name)[0])
        else:
            self.engine.delete_policy(name)
        for change in self.engine.take_changes().values():
            assert not self.host.policies[1].apply(change.upserts.items(), change.deletes).failed
        assert dict(self.host.policies[1].items()) == dict(self.engine.map_state(1).items())


@contextlib.contextmanager
def sending(host: Lab, *flows: tuple[str, int]) -> Iterator[Counter[tuple[str, bool]]]:
    """Send new connections of these peers to these ports, in turn; count what passes and what does not."""
    seen: Counter[tuple[str, bool]] = Counter()
    ending = threading.Event()

    def send() -> None:
        for number, (peer, port) in zip(count(), cycle(flows), strict=False):
            if ending.is_set():
                return
            frame = frames.tcp(peer, ENDPOINT, 1024 + number % 60_000, port)
            seen[peer, host.deliver(1, frame).verdict == ACT_OK] += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield seen
    finally:
        ending.set()
        thread.join()


def test_port_is_opened_and_closed_beside_denied_peers() -> None:
    """The peer that is denied never gets in, and the one that is allowed either way always does."""
    with lab(1) as host:
        changing = Changing(host, DENIED)
        changing.policy("deny", NO_BAD)
        changing.policy("good", GOOD_TO_WEB)
        with sending(host, (BAD, 80), (GOOD, 80)) as seen:
            for _ in range(ROUNDS):
                changing.policy("open", to_everybody(80, 80))
                assert len(changing.engine.map_state(1)) == 2 * DENIED + 2
                changing.policy("open", "")
        assert seen[BAD, True] == seen[GOOD, False] == 0, seen
        assert min(seen[BAD, False], seen[GOOD, True]) > ROUNDS, "too few packets to meet anything"


@pytest.mark.parametrize("size", [26, 27, 32, 49])
def test_ports_move_in_a_map_that_has_no_room_for_both(size: int) -> None:
    """Twelve open ports, closed to one peer, become twelve others: with no room at all to nearly enough."""
    with lab(1, catalogue=replace(CATALOGUE, policy_max=size)) as host:
        changing = Changing(host, 1, limit=size)
        changing.policy("deny", NO_BAD)
        ranges = ((8000, 8011), (9000, 9011))
        with sending(host, *((BAD, port) for low, high in ranges for port in range(low, high + 1))) as seen:
            for low, high in ranges * ROUNDS:
                changing.policy("open", to_everybody(low, high))
                assert len(changing.engine.map_state(1)) == 26
        assert not seen[BAD, True], seen
        assert seen[BAD, False] > ROUNDS, "too few packets to meet anything"


def test_policy_that_no_longer_fits_leaves_nothing_half_open() -> None:
    """The engine's limit is beyond the map's size here: the map refuses, before anything is written."""
    with lab(1, catalogue=replace(CATALOGUE, policy_max=26)) as host:
        changing = Changing(host, 1)
        changing.policy("deny", NO_BAD)
        changing.policy("open", to_everybody(8000, 8011))
        before = dict(host.policies[1].items())
        text = f"[{{endpointSelector: {{}}, {to_everybody(8000, 8020)}}}]"
        changing.engine.upsert_policy(parse_policies(text, "test", name="open")[0])
        (change,) = changing.engine.take_changes().values()
        written = host.policies[1].apply(change.upserts.items(), change.deletes)
        assert (written.written, written.deleted) == (0, 0)
        assert written.failed.keys() == change.upserts.keys()
        assert dict(host.policies[1].items()) == before
