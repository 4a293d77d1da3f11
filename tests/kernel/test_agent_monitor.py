# SPDX-License-Identifier: Apache-2.0
"""From packets to a reader of the monitor: the agent's pump on events that the programs wrote."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from agent.api.monitor import Listener, MonitorFilter
from agent.events import EventPump
from core import metrics
from datapath.constants import Aggregation
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, Lab, address, identity, lab
from tests.support.eventually import eventually

FAMILIES = (4, 6)


@pytest.fixture
def host() -> Iterator[Lab]:
    """Two endpoints; 1 may speak to 2 on port 80."""
    with lab(1, 2, aggregation=Aggregation.NONE) as made:
        made.allow(1, EGRESS, identity(2), 80, frames.TCP)
        made.allow(2, INGRESS, identity(1), 80, frames.TCP)
        yield made


@pytest.fixture
async def pump(host: Lab) -> AsyncIterator[EventPump]:
    made = EventPump(queue_size=100)
    made.attach(host.ring, host.monitor, host.lost)
    yield made
    made.detach()


def syn(family: int, port: int) -> bytes:
    """Return the beginning of a connection from endpoint 1 to 2."""
    return frames.tcp(address(1, family), address(2, family), 4000, port)


def flow(family: int, port: int) -> str:
    if family == 4:
        return f"10.0.0.1:4000 -> 10.0.0.2:{port} tcp SYN"
    return f"[fd00::1]:4000 -> [fd00::2]:{port} tcp SYN"


async def told(listener: Listener, pump: EventPump, records: int) -> list[dict[str, Any]]:
    """Return the lines of a listener once the pump has taken `records` from the ring."""
    await eventually(lambda: pump.hub.seen >= records, f"{records} events seen")
    listener.close()  # also when nothing was for it
    return [json.loads(line) for line in (await listener.take()).splitlines()]


def without_hash(event: dict[str, Any]) -> str:
    return str(event["summary"]).replace(event["details"]["flow"], "F")


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_connection_is_told_at_every_point(host: Lab, pump: EventPump, family: int) -> None:
    with pump.hub.listen(MonitorFilter()) as listener:
        host.send(1, syn(family, 80))
        events = await told(listener, pump, 4)
    words, any_ip = flow(family, 80), "0.0.0.0" if family == 4 else "::"
    assert [without_hash(each) for each in events] == [
        f"<- endpoint 1 flow F identity 301->0 state new ifindex 1 orig-ip {any_ip}: {words}",
        "Policy verdict log: flow F local EP ID 1, remote ID 302, dst port 80, proto 6, ingress false, "
        f"action allow, match L3-L4, {words}",
        "Policy verdict log: flow F local EP ID 2, remote ID 301, dst port 80, proto 6, ingress true, "
        f"action allow, match L3-L4, {words}",
        f"-> endpoint 2 flow F identity 301->302 state new ifindex 1 orig-ip {any_ip}: {words}",
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        (MonitorFilter(types=frozenset({"drop"})), ["drop"]),
        (MonitorFilter(types=frozenset({"policy-verdict", "drop"})), ["policy-verdict"] * 3 + ["drop"]),
        (MonitorFilter(source=frozenset({1})), ["trace", "policy-verdict"] * 2 + ["drop"]),
        (MonitorFilter(destination=frozenset({2})), ["policy-verdict", "trace"]),
        (MonitorFilter(related=frozenset({2, 7})), ["policy-verdict", "trace"]),
        (MonitorFilter(types=frozenset({"trace"}), destination=frozenset({2})), ["trace"]),
        (MonitorFilter(source=frozenset({2})), []),
        (MonitorFilter(related=frozenset({7})), []),
    ],
)
async def test_a_reader_gets_what_it_asked_for(
    host: Lab, pump: EventPump, family: int, wanted: MonitorFilter, kinds: list[str]
) -> None:
    """One connection that passes (four events), one that is denied (three)."""
    with pump.hub.listen(wanted) as listener:
        host.send(1, syn(family, 80))
        host.send(1, syn(family, 81))
        events = await told(listener, pump, 7)
    assert [each["type"] for each in events] == kinds


async def test_a_loss_is_counted_and_told_to_every_reader(host: Lab, pump: EventPump) -> None:
    before = metrics.EVENTS_LOST._value.get()
    with pump.hub.listen(MonitorFilter(types=frozenset({"trace"}), related=frozenset({7}))) as listener:
        for _ in range(300):
            host.send(1, syn(4, 81))
        lost = host.lost.total()
        (event,) = await told(listener, pump, 900 - lost + 1)
    assert 0 < lost < 900
    assert event["summary"] == f"CPU 00: Lost {lost} events: the ring was full"
    assert event["details"] == {"lost": lost}
    assert metrics.EVENTS_LOST._value.get() == before + lost
