# SPDX-License-Identifier: Apache-2.0
"""The checker: does everything that etcd, the agents and the kernels of some hosts hold agree?

    etcd ◀─▶ tables of each agent (its API) ◀─▶ pinned BPF maps and routes of its host

The maps are read where they are pinned, not by the agent, and what a policy map must hold is resolved anew
from the policies and identities that the agent shows.  So an entry that one of them forgot, or keeps for
ever, is named whoever is wrong.  Each difference is one line: who says what.

Used by tests/chaos, after recovery; needs root.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from datapath.addresses import host_prefix
from datapath.maps import IpcacheMap, LxcMap, PolicyMap, TunnelMap, TypedMap
from datapath.mapspec import policy_map_name
from datapath.records import ENDPOINT_IS_HOST
from identity.labels import Labels
from identity.numbers import is_global
from kvstore import schema
from policy.engine import PolicyEngine
from policy.language import parse_policies
from tests.support.agent import AgentHost
from tests.support.fleet import GONE_S

M = TypeVar("M", bound=TypedMap[Any, Any])

NOWHERE = "0.0.0.0"
PAUSE_S = 0.3


@dataclass(frozen=True)
class Stored:
    """One key's value in etcd, and the lease that it hangs on (0: none)."""

    value: bytes
    lease: int


class Checker:
    """Compares some hosts with their etcd; `ctl` runs etcdctl and returns what it printed."""

    def __init__(self, hosts: Sequence[AgentHost], ctl: Callable[..., str]) -> None:
        self.hosts = hosts
        self._ctl = ctl

    def wait_agreed(self, seconds: float = GONE_S) -> None:
        """Return once all agree; AssertionError with every difference when they do not in time."""
        deadline = time.monotonic() + seconds
        while found := self.differences():
            assert time.monotonic() < deadline, f"after {seconds:g} s:\n" + "\n".join(found)
            time.sleep(PAUSE_S)

    def differences(self, stored: Mapping[str, Stored] | None = None) -> list[str]:
        """Return a line for each difference, empty when all agree; `stored` is what etcd is said to hold."""
        keys = self.stored() if stored is None else stored
        return [line for host in self.hosts for line in Books(host, keys).differences()]

    def stored(self) -> dict[str, Stored]:
        """Return everything in etcd."""
        found = json.loads(self._ctl("get", "--prefix", "", "-w", "json")).get("kvs", [])
        return {
            base64.b64decode(each["key"]).decode(): Stored(
                base64.b64decode(each.get("value", "")), each.get("lease", 0)
            )
            for each in found
        }


class Books:
    """What one host's agent and kernel hold, beside what etcd does."""

    def __init__(self, host: AgentHost, keys: Mapping[str, Stored]) -> None:
        self._host = host
        self._keys = keys
        self._pins = pins(host)
        self._endpoints = {each["id"]: each["status"] for each in host.api("/v1/endpoint")}
        self._addresses = {each["cidr"]: each for each in host.api("/v1/ip")}
        self._identities = {each["id"]: each["labels"] for each in host.api("/v1/identity")}
        self._nodes = host.api("/v1/cluster/nodes")
        self._policies = host.api("/v1/policy")["policies"]
        options = host.api("/v1/config")["options"]
        self._tunnelled = options["tunnel"]["value"] == "vxlan"

    def differences(self) -> list[str]:
        lines = [
            *self._identities_in_etcd(),
            *self._addresses_in_etcd(),
            *self._nodes_in_etcd(),
            *self._policies_in_etcd(),
            *self._own_keys(),
            *self._own_addresses(),
            *self._ipcache_map(),
            *self._lxc_map(),
            *self._policy_maps(),
            *self._tunnel_map(),
            *self._routes(),
        ]
        return [f"{self._host.name}: {line}" for line in lines]

    # --- etcd and the agent

    def _below(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        return ((key, each.value) for key, each in self._keys.items() if key.startswith(prefix))

    def _identities_in_etcd(self) -> list[str]:
        parsed = (schema.parse_identity_id(*item) for item in self._below(schema.IDENTITY_IDS))
        said = {number: sorted(map(str, Labels.parse(text))) for number, text in parsed}
        held = {number: labels for number, labels in self._identities.items() if is_global(number)}
        return compared("identity", "etcd", said, "the agent", held)

    def _addresses_in_etcd(self) -> list[str]:
        records = [schema.parse_ip(*item) for item in self._below(schema.IPS)]
        said = {host_prefix(each.prefix): each.identity for each in records}
        held = {
            prefix: each["identity"]
            for prefix, each in self._addresses.items()
            if each["source"] in ("kvstore", "local") and is_global(each["identity"])
        }
        return compared("identity of", "etcd", said, "the agent", held)

    def _nodes_in_etcd(self) -> list[str]:
        said = {}
        for item in self._below(schema.NODES):
            node = schema.parse_node(*item)
            pools = [each.prefix if each else "" for each in (node.ipv4_alloc_cidr, node.ipv6_alloc_cidr)]
            said[f"{node.cluster}/{node.name}"] = [node.address(), node.address(ipv6=True), *pools]
        fields = ("ipv4-address", "ipv6-address", "ipv4-endpoint-cidr", "ipv6-endpoint-cidr")
        held = {f"{each['cluster']}/{each['name']}": [each[name] for name in fields] for each in self._nodes}
        return compared("node", "etcd", said, "the agent", held)

    def _policies_in_etcd(self) -> list[str]:
        said = {
            policy.name: policy.document
            for key, value in self._below(schema.POLICIES)
            for policy in parse_policies(value.decode(), key, name=schema.parse_policy(key, value)[0])
        }
        held = {each["name"]: each["document"] for each in self._policies if each["source"] == "etcd"}
        return compared("policy", "etcd", said, "the agent", held)

    def _own_keys(self) -> list[str]:
        """What hangs on this host's lease is what its endpoints and itself need: no key more, none less."""
        own = next(each for each in self._nodes if each["local"])
        node_key = f"{schema.NODES}{own['cluster']}/{own['name']}"
        wanted = {node_key: "wanted"}
        for endpoint in self._endpoints.values():
            if is_global(endpoint["identity"]["id"]):
                labels = labels_of(endpoint["identity"]["labels"]).serialized
                for address in addresses(endpoint):
                    wanted[schema.ip_key(schema.DEFAULT_SPACE, address)] = "wanted"
                wanted[schema.identity_value_key(labels, own["ipv4-address"])] = "wanted"
        lease = self._keys[node_key].lease if node_key in self._keys else 0
        held = {key: "wanted" for key, each in self._keys.items() if lease and each.lease == lease}
        return compared("own key", "the agent", wanted, "etcd", held)

    # --- the agent and its kernel

    def _own_addresses(self) -> list[str]:
        wanted = {
            host_prefix(address): endpoint["identity"]["id"]
            for endpoint in self._endpoints.values()
            for address in addresses(endpoint)
        }
        held = {
            prefix: each["identity"] for prefix, each in self._addresses.items() if each["source"] == "local"
        }
        return compared("identity of", "its endpoint", wanted, "the agent's table", held)

    def _ipcache_map(self) -> list[str]:
        hosts = {each["ipv4-address"] for each in self._nodes if not each["local"]}
        wanted = {}
        for prefix, each in self._addresses.items():
            behind = each["host-ip"] if self._tunnelled and each["host-ip"] in hosts else NOWHERE
            wanted[prefix] = (each["identity"], behind)
        with opened(IpcacheMap, "cilium_ipcache", self._pins) as kernel:
            held = {prefix: (entry.identity, entry.tunnel_endpoint) for prefix, entry in kernel.items()}
        return compared("(identity, host) of", "the agent's table", wanted, "cilium_ipcache", held)

    def _lxc_map(self) -> list[str]:
        wanted: dict[str, tuple[object, ...]] = {
            each.partition("/")[0]: ("the host",)
            for each, record in self._addresses.items()
            if record["source"] == "host"
        }
        for number, endpoint in self._endpoints.items():
            device = endpoint["networking"]
            for address in addresses(endpoint):
                wanted[address] = (number, device["interface-index"], device["mac"])
        with opened(LxcMap, "cilium_lxc", self._pins) as kernel:
            held: dict[str, tuple[object, ...]] = {
                address: ("the host",)
                if entry.flags & ENDPOINT_IS_HOST
                else (entry.endpoint_id, entry.ifindex, entry.mac)
                for address, entry in kernel.items()
            }
        return compared("(endpoint, device, MAC) of", "the agent", wanted, "cilium_lxc", held)

    def _policy_maps(self) -> list[str]:
        engine, lines = self._resolved(), list[str]()
        pinned = {each.name: "a map" for each in self._pins.glob("cilium_policy_*")}
        names = {policy_map_name(number): number for number in self._endpoints}
        lines += compared("", "the agent", dict.fromkeys(names, "a map"), "the kernel", pinned)
        for name, number in names.items():
            if name not in pinned:
                continue
            wanted = {tuple(map(int, key)): tuple(entry) for key, entry in engine.map_state(number).items()}
            with opened(PolicyMap, name, self._pins) as kernel:
                held = {tuple(key): tuple(entry) for key, entry in kernel.items()}
            what = f"{name}: (deny, proxy, until) of (identity, port, protocol, direction)"
            lines += compared(what, "policy", wanted, "the map", held)
        return lines

    def _resolved(self) -> PolicyEngine:
        """Return what the agent's policies, identities and endpoints come to, resolved here."""
        engine = PolicyEngine()
        for each in self._policies:
            for policy in parse_policies(json.dumps(each["document"]), each["origin"], name=each["name"]):
                engine.upsert_policy(policy)
        for number, labels in self._identities.items():
            engine.upsert_identity(number, labels_of(labels))
        for number, endpoint in self._endpoints.items():
            engine.upsert_endpoint(number, labels_of(endpoint["identity"]["labels"]))
        return engine

    def _pools(self) -> dict[str, str]:
        """Return the pools of other hosts, and the host of each."""
        fields = ("ipv4-endpoint-cidr", "ipv6-endpoint-cidr")
        others = [each for each in self._nodes if not each["local"]]
        return {each[name]: each["ipv4-address"] for each in others for name in fields if each[name]}

    def _tunnel_map(self) -> list[str]:
        pools = self._pools() if self._tunnelled else {}
        wanted = {prefix.partition("/")[0]: host for prefix, host in pools.items()}
        with opened(TunnelMap, "cilium_tunnel_map", self._pins) as kernel:
            held = dict(kernel.items())
        return compared("host of pool", "the agent", wanted, "cilium_tunnel_map", held)

    def _routes(self) -> list[str]:
        """Every other pool has a route; what else the host has is not the agent's."""
        shown = [line.split()[0] for six in ("-4", "-6") for line in self._route_lines(six) if line.strip()]
        return [
            f"route to pool {prefix} of {host}: the agent knows it, the kernel has none"
            for prefix, host in self._pools().items()
            if prefix not in shown
        ]

    def _route_lines(self, family: str) -> list[str]:
        lines: list[str] = self._host.exec("ip", family, "route").stdout.splitlines()
        return lines


def pins(host: AgentHost) -> Path:
    """Return where a host's maps are pinned, as this process sees it."""
    return Path(f"/proc/{host.pid}/root{host.bpffs}/tc/globals")


@contextlib.contextmanager
def opened(kind: type[M], name: str, root: Path) -> Iterator[M]:
    """Yield a pinned map, whichever process is alive that uses it."""
    found = kind.reader(name, root)
    try:
        yield found
    finally:
        found.close()


def labels_of(shown: Sequence[str]) -> Labels:
    """Return labels as the API shows them."""
    return Labels.parse(";".join(shown) + ";")


def addresses(endpoint: Any) -> list[str]:
    """Return the addresses of an endpoint's status, of both families."""
    return [address for each in endpoint["networking"]["addressing"] for address in each.values() if address]


def compared(
    what: str, one: str, first: Mapping[Any, Any], other: str, second: Mapping[Any, Any]
) -> list[str]:
    """Return a line for each key of which the two do not say the same."""
    return [
        f"{what} {key}: {one} says {first.get(key, 'nothing')}, {other} {second.get(key, 'nothing')}".strip()
        for key in sorted(first.keys() | second.keys(), key=str)
        if first.get(key) != second.get(key)
    ]
