# SPDX-License-Identifier: Apache-2.0
"""Who an address is: cilium_ipcache and the programs that ask it, against a slow and obvious model.

The model (tests/support/lpm_reference.py) is a list of prefixes.  Prefixes of every length lie around two
addresses of each family, so that they nest; they are written, deleted and pruned in any order, as the agent
does it.  For each family 200 histories of the map, and 100 after each of which some 20 packets are judged:
in all 5 000 prefixes written, 13 000 lookups and 4 500 packets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from ipaddress import ip_address, ip_network
from itertools import product
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.ipcache import KVSTORE_SOURCE, IpcacheMapTarget, IpTable, Record
from core.table import Table
from datapath.records import IpcacheEntry, PolicyEntry, PolicyKey
from datapath.testrun import ACT_SHOT, Outcome
from identity.numbers import LOCAL_FLAG
from tests.support import frames
from tests.support.bpflab import EGRESS, HOST, INGRESS, WORLD, Lab, lab
from tests.support.families import NET4, NET6, Net
from tests.support.lpm_reference import Network, Prefixes

IDENTITIES = (0, HOST, WORLD, 300, 65_535, LOCAL_FLAG | 1)  # 0: what nobody is
EXAMPLES = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EXAMPLES_OF_PACKETS = settings(EXAMPLES, max_examples=100)


def cluster(*addresses: str) -> list[str]:
    """These addresses, and each with one bit changed: they share prefixes of every length."""
    found = []
    for address in map(ip_address, addresses):
        bits = (0, *(1 << bit for bit in range(address.max_prefixlen)))
        found += [str(type(address)(int(address) ^ bit)) for bit in bits]
    return found


CLUSTERS = {4: cluster(NET4.outside, NET4.router), 6: cluster(NET6.outside, NET6.router)}


def prefixes_of(family: int) -> st.SearchStrategy[Network]:
    """Prefixes of every length; every fourth is a single address."""
    longest = 32 if family == 4 else 128
    lengths = [*range(longest + 1), *[longest] * (longest // 3)]
    all_of_them = [*product(CLUSTERS[family], lengths)]
    which = st.integers(0, len(all_of_them) - 1)
    return which.map(lambda index: ip_network(all_of_them[index], strict=False))


prefixes = {family: prefixes_of(family) for family in CLUSTERS}
identities = st.sampled_from(IDENTITIES)


class History(NamedTuple):
    """Prefixes, and what happens to them in cilium_ipcache: a verb and what it is done to or with."""

    pool: list[Network]
    changes: list[tuple[str, Any]]


@st.composite
def histories(draw: st.DrawFn, net: Net) -> History:
    """Few prefixes, so that they are met again; some are of the other family."""
    of_both = st.one_of(prefixes[net.family], prefixes[net.family], prefixes[10 - net.family])
    pool = draw(st.lists(of_both, min_size=1, max_size=12))
    some = st.lists(st.sampled_from(pool), min_size=1, max_size=8)
    written = st.lists(st.tuples(st.sampled_from(pool), identities), min_size=1, max_size=12)
    verbs = st.lists(st.sampled_from(["write", "delete", "keep"]), max_size=3)
    return History(
        pool, [(verb, draw(written if verb == "write" else some)) for verb in ("write", *draw(verbs))]
    )


@pytest.fixture(scope="module")
def host() -> Iterator[Lab]:
    with lab(1) as made:
        yield made


class NobodyWaits:
    async def wait_idle(self) -> None:
        return


def prune(host: Lab, kept: Collection[Network]) -> int:
    """Have the agent remove what is not in its table."""
    table: IpTable = Table("ipcache", (KVSTORE_SOURCE,))
    for network in kept:
        table.source(KVSTORE_SOURCE).upsert(str(network), Record(WORLD))
    return asyncio.run(IpcacheMapTarget(host.ipcache, NobodyWaits(), ()).prune(table))


def carry_out(host: Lab, history: History) -> Prefixes:
    """Do to the map and to the model what a history says, from nothing."""
    host.ipcache.delete(list(host.ipcache.keys()))
    model = Prefixes()
    for verb, of in history.changes:
        if verb == "write":
            assert not host.ipcache.upsert((str(network), IpcacheEntry(number)) for network, number in of)
            for network, number in of:
                model.upsert(network, number)
        elif verb == "delete":
            assert host.ipcache.delete(map(str, of)) == sum([model.delete(network) for network in of])
        else:
            assert prune(host, of) == model.keep(of)
    return model


def edges(network: Network) -> Iterator[Network]:
    """The first and the last address of a prefix, and the ones before and behind it."""
    first, last = int(network[0]), int(network[-1])
    for number in (first - 1, first, last, last + 1):
        if 0 <= number < 1 << network.max_prefixlen:
            yield ip_network(type(network[0])(number))


def peers_at(network: Network) -> list[str]:
    """Those of its edges that an endpoint may send to."""
    addresses = [each[0] for each in edges(network)]
    return [
        str(each) for each in addresses if not (each.is_loopback or each.is_unspecified or each.is_multicast)
    ]


@EXAMPLES
@given(batches=st.booleans(), data=st.data())
def test_the_map_finds_the_longest_prefix(host: Lab, net: Net, batches: bool, data: st.DataObject) -> None:
    """Asked by all prefixes and by the addresses at their edges; without batches as older kernels do."""
    host.ipcache.handle._batches = batches
    history = data.draw(histories(net))
    model = carry_out(host, history)
    held = {ip_network(prefix): entry.identity for prefix, entry in host.ipcache.items()}
    assert held == dict(model.entries)
    for network in {*history.pool, data.draw(prefixes[net.family])}:
        for each in (network, *edges(network)):
            found = host.ipcache.get(str(each))
            assert (None if found is None else found.identity) == model.lookup(each), each


# What a packet between endpoint 1 and an address is to the programs: its direction, and how it comes to them.
WAYS: dict[str, tuple[int, Callable[[Lab, Net, str], Outcome]]] = {
    "sent": (EGRESS, lambda host, net, peer: host.send(1, frames.udp(net.a, peer, 4000, 53))),
    "from the stack": (INGRESS, lambda host, net, peer: host.deliver(1, frames.udp(peer, net.a, 4000, 54))),
    "from outside": (INGRESS, lambda host, net, peer: host.receive(frames.udp(peer, net.a, 4000, 54))),
}


@EXAMPLES_OF_PACKETS
@given(data=st.data())
def test_packets_are_judged_by_the_longest_prefix(host: Lab, net: Net, data: st.DataObject) -> None:
    """From and to the edges of a prefix: allowed if their identity alone is, not if only the others are."""
    history = data.draw(histories(net))
    model = carry_out(host, history)
    ours = [network for network in history.pool if network.version == net.family]
    for peer in peers_at(data.draw(st.sampled_from([*ours, ip_network(net.outside)]))):
        found = model.lookup(ip_network(peer)) or WORLD
        for way, (direction, pass_on) in WAYS.items():
            # Whatever a wire says, it is not this host that speaks there.
            number = WORLD if way == "from outside" and found == HOST else found
            for allowed in ({number}, {*IDENTITIES[1:]} - {number}):
                allow_only(host, direction, allowed)
                passes = pass_on(host, net, peer).verdict != ACT_SHOT
                assert passes == (number in allowed), (peer, way, number)


def allow_only(host: Lab, direction: int, numbers: Collection[int]) -> None:
    entries = [(PolicyKey(number, 0, 0, direction), PolicyEntry(False, 0)) for number in numbers]
    host.replace_policy(1, entries)
