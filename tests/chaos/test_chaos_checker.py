# SPDX-License-Identifier: Apache-2.0
"""The checker (`tests.support.checker`) names each kind of wrong entry: else it would prove nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from datapath.maps import IpcacheMap, LxcMap, PolicyMap, TunnelMap
from datapath.mapspec import policy_map_name
from datapath.records import IpcacheEntry, PolicyEntry, PolicyKey
from kvstore import schema
from tests.support.agent import AgentHost
from tests.support.checker import Checker, Stored, opened, pins
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub
from tests.support.stream import POLICY

__all__ = ["engine_parts", "hub"]

NOBODY = "10.99.0.66"


@pytest.fixture(scope="module")
def host(hub: Hub) -> Iterator[AgentHost]:
    """A host with a container under policy."""
    with AgentHost("hfc") as new:
        new.address = hub.join(new)
        new.start_etcd()
        new.etcdctl("put", f"{schema.POLICIES}server", stdin=POLICY)
        new.start_agent()
        new.network()
        for name in ("server", "client"):
            new.container(name, "sleep", "infinity", labels={"app": name})
        yield new


@pytest.fixture(scope="module")
def checker(host: AgentHost) -> Checker:
    made = Checker([host], host.etcdctl)
    made.wait_agreed()
    return made


Break = Callable[[AgentHost], contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def foreign_address(host: AgentHost) -> Iterator[str]:
    with opened(IpcacheMap, "cilium_ipcache", pins(host)) as kernel:
        kernel.upsert([(f"{NOBODY}/32", IpcacheEntry(4321))])
        yield f"{NOBODY}/32: the agent's table says nothing, cilium_ipcache (4321, '0.0.0.0')"
        kernel.delete([f"{NOBODY}/32"])


@contextlib.contextmanager
def forgotten_address(host: AgentHost) -> Iterator[str]:
    address = address_of(host, "server")
    with opened(IpcacheMap, "cilium_ipcache", pins(host)) as kernel:
        entry = dict(kernel.items())[f"{address}/32"]
        kernel.delete([f"{address}/32"])
        yield f"of {address}/32: the agent's table says ({entry.identity}, '0.0.0.0'), cilium_ipcache nothing"
        kernel.upsert([(f"{address}/32", entry)])


@contextlib.contextmanager
def foreign_permission(host: AgentHost) -> Iterator[str]:
    number = host.endpoint_of("server")["id"]
    with opened(PolicyMap, policy_map_name(number), pins(host)) as kernel:
        key = PolicyKey(4321, 0, 0, 0)
        kernel.upsert([(key, PolicyEntry(False, 0))])
        yield "(4321, 0, 0, 0): policy says nothing, the map (False, 0, 0)"
        kernel.delete([key])


@contextlib.contextmanager
def forgotten_permission(host: AgentHost) -> Iterator[str]:
    number = host.endpoint_of("server")["id"]
    client = host.endpoint_of("client")["status"]["identity"]["id"]
    with opened(PolicyMap, policy_map_name(number), pins(host)) as kernel:
        key = PolicyKey(client, 0, 0, 0)
        kernel.delete([key])
        yield f"({client}, 0, 0, 0): policy says (False, 0, 0), the map nothing"
        kernel.upsert([(key, PolicyEntry(False, 0))])


@contextlib.contextmanager
def forgotten_endpoint(host: AgentHost) -> Iterator[str]:
    address = address_of(host, "client")
    with opened(LxcMap, "cilium_lxc", pins(host)) as kernel:
        entry = dict(kernel.items())[address]
        kernel.delete([address])
        yield f"(endpoint, device, MAC) of {address}: the agent says ({entry.endpoint_id},"
        kernel.upsert([(address, entry)])


@contextlib.contextmanager
def foreign_pool(host: AgentHost) -> Iterator[str]:
    with opened(TunnelMap, "cilium_tunnel_map", pins(host)) as kernel:
        kernel.upsert([(NOBODY, "192.0.2.1")])
        yield f"host of pool {NOBODY}: the agent says nothing, cilium_tunnel_map 192.0.2.1"
        kernel.delete([NOBODY])


@pytest.mark.parametrize(
    "broken",
    [
        foreign_address,
        forgotten_address,
        foreign_permission,
        forgotten_permission,
        forgotten_endpoint,
        foreign_pool,
    ],
)
def test_a_wrong_entry_in_the_kernel_is_named(host: AgentHost, checker: Checker, broken: Break) -> None:
    with broken(host) as said:
        (line,) = checker.differences()
        assert said in line
        assert line.startswith(host.name)
    assert checker.differences() == []


# What etcd says, altered where the checker reads it: the agent hears of a key as soon as it is written.
ALTERED = {
    "an address": (
        f"{schema.IPS}default/{NOBODY}",
        schema.encode_ip(schema.ip_record(NOBODY, 4321)),
        f"identity of {NOBODY}/32: etcd says 4321, the agent nothing",
    ),
    "an identity": (
        schema.identity_id_key(4321),
        b"container:app=nobody;",
        "identity 4321: etcd says ['container:app=nobody'], the agent nothing",
    ),
    "a node": (
        f"{schema.NODES}default/nobody",
        schema.encode_node(schema.NodeRecord("nobody", "default")),
        "node default/nobody: etcd says ['', '', '', ''], the agent nothing",
    ),
    "a policy": (
        f"{schema.POLICIES}nobody",
        POLICY.encode(),
        "policy nobody: etcd says",
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_only_etcd_has_is_named(checker: Checker, what: str) -> None:
    key, value, said = ALTERED[what]
    (line,) = checker.differences(checker.stored() | {key: Stored(value, 0)})
    assert said in line


def test_what_etcd_has_lost_is_named(checker: Checker) -> None:
    """Every key on the host's lease, and what it said."""
    whole = checker.stored()
    for key, stored in whole.items():
        if stored.lease and not key.startswith(schema.ELECTIONS):
            lines = checker.differences({each: value for each, value in whole.items() if each != key})
            assert [line for line in lines if f"own key {key}: the agent says wanted, etcd nothing" in line]


def test_an_own_key_too_many_is_named(checker: Checker) -> None:
    whole = checker.stored()
    lease = next(each.lease for key, each in whole.items() if key.startswith(schema.NODES))
    key = f"{schema.IDENTITY_VALUES}container:app=gone;/10.0.0.1"
    (line,) = checker.differences(whole | {key: Stored(b"4321", lease)})
    assert f"own key {key}: the agent says nothing, etcd wanted" in line


def address_of(host: AgentHost, container: str) -> str:
    (addresses,) = host.endpoint_of(container)["status"]["networking"]["addressing"]
    return str(addresses["ipv4"])
