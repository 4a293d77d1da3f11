# SPDX-License-Identifier: Apache-2.0
"""What the agent writes into etcd and the kernel, byte for byte against what a real agent wrote.

Whoever reads Cilium 1.11's store and maps (a real agent, `cilium`, etcdctl, bpftool) must be able to read
ours.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator, Mapping
from ipaddress import IPv6Network
from typing import Any

import pytest

from tests.support.engine import WORKLOAD_IMAGE
from tests.support.host import wait_for
from tests.support.places import PORTS, Place, passes
from tests.support.rules import element, on, rule, selects
from tests.support.site import Site
from tests.support.vectors import Entry, MapRow, etcd_dump, map_listing

PINS = "/sys/fs/bpf/tc/globals"
# The labels of the three recorded endpoints; all were made by hand and so carry reserved:init, which a
# labelled workload never has.
K8S_LABELS = (
    "k8s:app=web",
    "k8s:io.cilium.k8s.policy.cluster=default",
    "k8s:io.cilium.k8s.policy.serviceaccount=default",
    "k8s:io.kubernetes.pod.namespace=default",
)
INIT = "reserved:init=;"
NETWORK = "container:holdfast.network=holdfast;"
RECORDED = {"web": ("13465", "10.50.68.48", "373"), "db": ("6114", "10.50.181.84", "52")}
RECORDED_K8S = ("20759", "10.50.217.152", "981")
NOT_OURS = re.compile(r"cilium_(events|calls_|lb\d?_|lb|signals|encrypt_state)")
LATER = {"cilium_ipv6_frag_datagrams"}  # Cilium has it since 1.18


def leased_keys(site: Site) -> dict[str, tuple[str, int]]:
    """Return key → (value, lease) of everything under cilium/."""
    answer = json.loads(site.host.etcdctl("get", "--prefix", "cilium/", "-w", "json"))
    return {
        base64.b64decode(each["key"]).decode(): (
            base64.b64decode(each["value"]).decode(),
            int(each.get("lease", 0)),
        )
        for each in answer["kvs"]
    }


# --- etcd


@pytest.fixture(scope="module")
def workloads(site: Site) -> Iterator[dict[str, tuple[str, str, str]]]:
    """The three recorded endpoints, here: name → (identity, address, endpoint), all as text."""
    docker = site.host.engine.docker
    try:
        found = {}
        for name in RECORDED:
            site.host.container(f"fmt-{name}", "sleep", "infinity", labels={"app": name, "env": "prod"})
            found[name] = _numbers(site.host.endpoint_of(f"fmt-{name}"))
        docker(
            "run", "-d", "--init", "--network", "none", "--name", "fmt-k8s", WORKLOAD_IMAGE, "sleep", "600"
        )
        pid = docker("inspect", "-f", "{{.State.Pid}}", "fmt-k8s").stdout.strip()
        body = {"netns": f"/proc/{pid}/ns/net", "labels": list(K8S_LABELS), "name": "fmt-k8s"}
        found["k8s"] = _numbers(site.host.api("/v1/endpoint/60001", method="PUT", body=body))
        yield found
    finally:
        site.host.api("/v1/endpoint/60001", method="DELETE", check=False)
        docker("rm", "-f", "fmt-web", "fmt-db", "fmt-k8s", check=False)


def _numbers(endpoint: Any) -> tuple[str, str, str]:
    status = endpoint["status"]
    address = status["networking"]["addressing"][0]["ipv4"]
    return str(status["identity"]["id"]), address, str(endpoint["id"])


def test_keys_of_endpoints_are_those_of_a_real_agent(
    site: Site, workloads: Mapping[str, tuple[str, str, str]]
) -> None:
    """Only names, numbers, addresses and the label of the network differ."""
    node = site.status()["node"]
    names = {"10.99.0.2": node["ipv4-address"], "10.50.201.195": "10.50.0.1"}
    for name, recorded in (*RECORDED.items(), ("k8s", RECORDED_K8S)):
        names |= dict(zip(recorded[:2], workloads[name][:2], strict=True))
        names[f":vm:{recorded[2]}"] = f":{node['name']}:{workloads[name][2]}"
    names |= {"/default/vm": f"/default/{node['name']}", '"Name":"vm"': f'"Name":"{node["name"]}"'}
    names |= with_ipv6(site)
    found = leased_keys(site)
    for entry in etcd_dump("three-endpoints.txt"):
        key, value, leased = translated(entry, names)
        assert key in found, sorted(found)
        assert (found[key][0], found[key][1] != 0) == (value, leased)
    addresses = {address for _, address, _ in workloads.values()}
    ours = [key for key in found if any(key.endswith(f"/{each}") for each in addresses)]
    assert len(ours) == len(addresses), "one ip/v1 entry an endpoint and nothing else"
    assert len({lease for _, lease in found.values() if lease}) == 1, "all of them on the agent's one lease"


def test_key_of_an_ipv6_address_differs_from_the_other_by_the_address_alone(
    site: Site, workloads: Mapping[str, tuple[str, str, str]]
) -> None:
    """Both name the host by its IPv4 address: tunnels go there."""
    found = leased_keys(site)
    sixth = {each.address: each.other for each in (site.client, site.other, site.server)}
    for _, address, endpoint in workloads.values():
        (both,) = site.host.api(f"/v1/endpoint/{endpoint}")["status"]["networking"]["addressing"]
        sixth[address] = both["ipv6"]
    for four, six in sixth.items():
        value, lease = found[f"cilium/state/ip/v1/default/{four}"]
        ours = (value.replace(f'"IP":"{four}"', f'"IP":"{six}"'), lease)
        assert found[f"cilium/state/ip/v1/default/{six}"] == ours
        assert ours[0] != value


def with_ipv6(site: Site) -> dict[str, str]:
    """Return how the node's record, that of a host without IPv6, reads with it."""
    recorded = {"InternalIP": "10.99.0.2", "CiliumInternalIP": "10.50.201.195"}
    four, six = ({"InternalIP": each.card, "CiliumInternalIP": each.router} for each in (site, site.by(6)))
    names = {
        listed(kind, address): f"{listed(kind, four[kind])},{listed(kind, six[kind])}"
        for kind, address in recorded.items()
    }
    pool = IPv6Network(site.by(6).pool)
    mask = base64.b64encode(pool.netmask.packed).decode()
    allocated = f'{{"IP":"{pool.network_address}","Mask":"{mask}"}}'
    return names | {'"IPv6AllocCIDR":null': f'"IPv6AllocCIDR":{allocated}'}


def listed(kind: str, address: str) -> str:
    return f'{{"Type":"{kind}","IP":"{address}"}}'


def translated(entry: Entry, names: Mapping[str, str]) -> Entry:
    """Return a recorded entry as it must be here."""
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def ours(text: str) -> str:
        text = pattern.sub(lambda match: names[match[0]], text).replace(INIT, "")
        return text.replace("container:env=prod;", f"container:env=prod;{NETWORK}")

    return Entry(ours(entry.key), ours(entry.value), entry.leased)


def test_keys_go_with_their_endpoint(site: Site) -> None:
    """The address and the use of the identity go at once, its number is left to garbage collection."""
    with site.container("fmt-gone", labels={"app": "gone"}, serve=False) as place:
        number = site.identity(place)
        assert f"cilium/state/ip/v1/default/{place.address}" in leased_keys(site)
    labels = f"container:app=gone;{NETWORK}"
    gone = {
        f"cilium/state/ip/v1/default/{place.address}",
        f"cilium/state/identities/v1/value/{labels}/{site.host.address}",
    }
    wait_for(lambda: not gone & set(leased_keys(site)), "end of the endpoint's keys")
    assert leased_keys(site)[f"cilium/state/identities/v1/id/{number}"] == (labels, 0)


# --- maps


def bpftool(site: Site, *arguments: str) -> Any:
    """Return what bpftool says of a map of the host, as JSON."""
    return json.loads(site.host.exec("bpftool", "-j", "map", *arguments).stdout)


def policy_pin(site: Site, place: Place) -> str:
    return f"{PINS}/cilium_policy_{site.endpoint_id(place):05d}"


def test_pinned_maps_are_those_of_a_real_agent(site: Site) -> None:
    """Type, key and value size, entries, flags; names that Cilium does not have are ours (`holdfast_…`)."""
    recorded = map_listing("bpf-maps-default-options-ipv6.txt")
    policy = next(row for name, row in recorded.items() if name.startswith("cilium_policy_"))
    pins = site.host.exec("ls", PINS).stdout.split()
    for name in pins:
        if not name.startswith("holdfast_") and name not in LATER:
            wanted = policy if name.startswith("cilium_policy_") else recorded[name]
            assert as_row(bpftool(site, "show", "pinned", f"{PINS}/{name}")) == wanted, name
    assert {"cilium_ct6_global", "cilium_ct_any6_global"} <= set(pins)
    missing = {name for name in recorded if not NOT_OURS.match(name)} - set(pins)
    assert missing == {"cilium_policy_00183"}
    assert "cilium_events" not in pins


def as_row(shown: Any) -> MapRow:
    sizes = (shown["bytes_key"], shown["bytes_value"], shown["max_entries"], shown["flags"])
    return MapRow(shown["type"], *sizes)


def test_dump_of_a_policy_map_reads_as_operators_read_it(site: Site) -> None:
    """Identity 4 B little endian, port 2 B in network order, protocol 1 B, direction 1 B; value 24 B."""
    named = element("ingress", endpoints=[selects(site.client)], of=on("TCP"))
    with site.policy(rule(site.server, "ingress", named)):
        keys = policy_keys(site, site.server)
        port = struct.pack(">H", PORTS[0])
        assert struct.pack("<I", site.identity(site.client)) + port + b"\x06\x00" in keys
        assert b"\0\0\0\0" + b"\0\0" + b"\0\x01" in keys, "egress is not enforced: everything"
        assert bytes(8) not in keys


def policy_keys(site: Site, place: Place) -> list[bytes]:
    dump = bpftool(site, "dump", "pinned", policy_pin(site, place))
    assert all(len(each["value"]) == 24 for each in dump)
    return [bytes(int(byte, 16) for byte in each["key"]) for each in dump]


def test_emergency_entry_lets_everything_in_at_once(site: Site) -> None:
    """The recipe of the runbook; the agent goes on with its own entries and takes policy back afterwards."""
    entry = ["key", "hex", *["00"] * 8, "value", "hex", *["00"] * 24, "noexist"]
    with site.policy(rule(site.server, "ingress", {})):
        pin = policy_pin(site, site.server)
        assert not passes(site.server, site.other, "ingress", "TCP")
        site.host.exec("bpftool", "map", "update", "pinned", pin, *entry)
        for place in (site.other, site.world, site.on_host):
            assert passes(site.server, place, "ingress", "TCP")
        assert site.host.exec("bpftool", "map", "update", "pinned", pin, *entry, check=False).returncode != 0
        named = element("ingress", endpoints=[selects(site.client)], of=on("TCP"))
        with site.policy(rule(site.server, "ingress", named), name="second"):
            assert bytes(8) in policy_keys(site, site.server), "changes do not touch what they do not name"
            assert passes(site.server, site.other, "ingress", "TCP")
        site.host.exec("bpftool", "map", "delete", "pinned", pin, "key", "hex", *["00"] * 8)
        assert not passes(site.server, site.other, "ingress", "TCP")
    assert passes(site.server, site.other, "ingress", "TCP")
    assert site.status()["holdfast"]["state"] == "Ok"
