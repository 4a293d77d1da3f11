# SPDX-License-Identifier: Apache-2.0
"""Bad policies, labels, options and records: each is named with its reason, and nobody else notices it."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.host import REPO, wait_for
from tests.support.live import Stream
from tests.support.places import PORTS
from tests.support.rules import document, element, rule, selects
from tests.support.site import Site

MEGABYTE = 1_000_000
NAME = "broken"
POLICY_KEY = f"holdfast/policies/v1/{NAME}"


@pytest.fixture(scope="module")
def stream(site: Site) -> Iterator[Stream]:
    with Stream("client to server", site.client.netns, site.server.address, PORTS[0]) as live:
        yield live


@pytest.fixture(autouse=True)
def nobody_notices(site: Site, stream: Stream) -> Iterator[None]:
    """Everybody else's traffic goes on through each test, and the agent is well before and after it."""
    stream.goes_on()
    yield
    stream.goes_on()
    assert site.status()["holdfast"]["state"] == "Ok"


# --- policies


def spec(**fields: Any) -> str:
    """Return a policy of one rule with these fields, whatever they are."""
    return document(NAME, {"endpointSelector": {"matchLabels": {"app": "server"}}, **fields})


def ingress(**fields: Any) -> str:
    return spec(ingress=[fields])


# what is wrong → (document, what the error names)
BROKEN = {
    "no YAML": ("kind: [", "YAML"),
    "no policy": ("just text", "no policy"),
    "nothing": ("", "holds no policy"),
    "unknown field": (spec(ingres=[{}]), "ingres"),
    "unsupported field": (spec(egress=[{"toFQDNs": [{"matchName": "a.example"}]}]), "toFQDNs"),
    "prefix": (ingress(fromCIDR=["10.0.0.0/99"]), "10.0.0.0/99"),
    "entity": (ingress(fromEntities=["everybody"]), "everybody"),
    "port": (ingress(toPorts=[{"ports": [{"port": "70000", "protocol": "TCP"}]}]), "70000"),
    "protocol": (ingress(toPorts=[{"ports": [{"port": "1", "protocol": "GRE"}]}]), "GRE"),
    "label": (ingress(fromEndpoints=[{"matchLabels": {"app": "a;k8s:role=admin"}}]), "role=admin"),
    "type": (ingress(fromEndpoints="all"), "fromEndpoints"),
    "two of one name": (spec(ingress=[{}]) + "\n---\n" + spec(ingress=[{}]), NAME),
}

Source = Callable[[str], None]


@pytest.fixture(params=["file", "key"])
def source(site: Site, request: pytest.FixtureRequest) -> Iterator[Source]:
    """Return what puts a document where the agent finds it; it is taken away afterwards."""
    path: Path = site.host.policies / f"{NAME}.yaml"

    def write(text: str) -> None:
        path.write_text(text)

    def put(text: str) -> None:
        site.host.etcdctl("put", POLICY_KEY, "--", text)

    yield write if request.param == "file" else put
    path.unlink(missing_ok=True)
    site.host.etcdctl("del", POLICY_KEY)
    wait_for(lambda: not known(site) and not refusals(site), "end of the policy")


def known(site: Site) -> bool:
    return any(each["name"] == NAME for each in site.host.api("/v1/policy")["policies"])


def refusals(site: Site) -> list[dict[str, str]]:
    """Return what status shows of refused policies."""
    found: list[dict[str, str]] = site.status()["policy-errors"]
    return found


def good(site: Site) -> str:
    return document(NAME, rule(site.server, "ingress", element("ingress", endpoints=[selects(site.client)])))


def test_broken_policy_is_named_and_the_last_good_one_stays(
    site: Site, source: Source, request: pytest.FixtureRequest
) -> None:
    """Each in turn over the same name; then it is mended, which ends the complaint."""
    # The directory is looked at every two seconds, so it gets those that take different ways.
    few = ("no YAML", "nothing", "unsupported field")
    cases = list(BROKEN) if request.node.callspec.params["source"] == "key" else few
    source(good(site))
    wait_for(lambda: known(site), "policy in force")
    wait_for(lambda: site.other.asks("TCP", site.server.address) is None, "denied stranger")
    for what in cases:
        text, word = BROKEN[what]
        source(text)
        wait_for(functools.partial(complains_of, site, word), f"complaint about {what} ({word})")
        assert site.other.asks("TCP", site.server.address) is None, what
        assert site.client.asks("TCP", site.server.address) is not None, what
    assert "Policy refused" in site.cli("status")
    source(good(site))
    wait_for(lambda: not refusals(site), "end of the complaint")
    assert known(site)


def complains_of(site: Site, word: str) -> bool:
    """True when status has one complaint, which names the origin and says `word`."""
    found = refusals(site)
    return len(found) == 1 and NAME in found[0]["origin"] and word in found[0]["error"]


def test_one_name_in_both_places_is_refused(site: Site) -> None:
    """Who was in force first stays."""
    path: Path = site.host.policies / f"{NAME}.yaml"
    try:
        path.write_text(good(site))
        wait_for(lambda: known(site), "policy in force")
        site.host.etcdctl("put", POLICY_KEY, spec(ingress=[{}]))
        wait_for(lambda: bool(refusals(site)), "complaint")
        assert str(path) in refusals(site)[0]["error"]
        assert site.other.asks("TCP", site.server.address) is None
    finally:
        path.unlink(missing_ok=True)
        site.host.etcdctl("del", POLICY_KEY)
    wait_for(lambda: not known(site) and not refusals(site), "end of the policy")


# --- labels


# what is wrong → (label, what the complaint says)
BAD_LABELS = {
    "forges another": ("app=x;k8s:role=admin", "role=admin"),
    "control character": ("app=x\ny", "x\\ny"),
    "escape sequence": ("env=\x1b[2J", "x1b[2J"),
    "64 KB": ("app=" + "x" * 65_536, "longer than"),
}


@pytest.mark.parametrize("what", list(BAD_LABELS))
def test_container_whose_label_could_forge_an_identity_stays_denied(site: Site, what: str) -> None:
    label, said = BAD_LABELS[what]
    with site.container("bad-label", options=["-l", label]) as place:
        endpoint = site.host.endpoint_of("bad-label")["status"]
        assert (endpoint["identity"]["id"], endpoint["state"]) == (5, "waiting-for-identity")
        complaints = [line["message"] for line in endpoint["log"] if line["code"] != "OK"]
        assert any(said in line and label.partition("=")[0] in line for line in complaints), endpoint["log"]
        for protocol in ("TCP", "UDP", "ICMP"):
            assert site.client.asks(protocol, place.address) is None
            assert place.asks(protocol, site.server.address) is None
        assert "role=admin" not in json.dumps(site.host.keys("cilium/state/identities/"))


def test_bad_label_that_does_not_count_is_ignored(site: Site) -> None:
    bad = ["-l", "note=a;b\n", "-l", "blob=" + "x" * 65_536]
    with site.container("odd-label", labels={"app": "odd"}, options=bad) as place:
        endpoint = site.host.endpoint_of("odd-label")["status"]
        assert endpoint["state"] == "ready"
        assert endpoint["labels"]["security-relevant"] == [
            "container:app=odd",
            "container:holdfast.network=holdfast",
        ]
        assert endpoint["labels"]["derived"] == []
        assert place.asks("TCP", site.server.address) == place.address


# --- options


# what the option is → (arguments, words of the error)
BAD_OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown": (["--ipv4-rang", "10.0.0.0/16"], ["ipv4-rang", "command line", "ipv4-range"]),
    "duplicate": (["--debug=true", "--debug=false"], ["debug", "duplicate", "command line"]),
    "out of range": (["--cluster-id", "999"], ["cluster-id", "999", "255", "command line"]),
    "no network": (["--ipv4-range", "10.300.0.0/16"], ["ipv4-range", "10.300.0.0/16", "command line"]),
    "too small a pool": (["--ipv4-range", "10.50.0.0/30"], ["ipv4-range", "10.50.0.0/30", "/29"]),
    "no choice": (["--enable-policy", "sometimes"], ["enable-policy", "sometimes", "always"]),
}


@pytest.mark.parametrize("what", list(BAD_OPTIONS))
def test_bad_option_ends_the_agent_with_option_value_and_source(site: Site, what: str) -> None:
    arguments, words = BAD_OPTIONS[what]
    refused = agent(site, *arguments)
    assert all(word in refused for word in words), refused


def test_bad_option_in_a_file_names_the_file(site: Site, tmp_path: Path) -> None:
    (tmp_path / "kvstore-lease-ttl").write_text("tomorrow")
    refused = agent(site, "--config-dir", str(tmp_path))
    assert all(word in refused for word in ("kvstore-lease-ttl", "tomorrow", str(tmp_path))), refused


def test_bad_word_of_the_start_hook_is_named(site: Site) -> None:
    refused = agent(site, HOLDFAST_CONNECT_NOT_BEFORE="soon")
    assert "environment HOLDFAST_CONNECT_NOT_BEFORE='soon' is not a time in seconds" in refused


def agent(site: Site, *arguments: str, **more: str) -> str:
    """Start an agent that must refuse its configuration; return what it says."""
    environment = {"PYTHONPATH": str(REPO), **more}
    done = site.host.exec(sys.executable, "-m", "agent", *arguments, environment=environment, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return str(done.stderr)


# --- records in etcd


def bad_records(site: Site) -> Mapping[str, str]:
    """Return records that nobody may use: garbage, wrong types, too big, reserved, about something else."""
    ip, identity, node = (
        "cilium/state/ip/v1/default",
        "cilium/state/identities/v1/id",
        "cilium/state/nodes/v1",
    )
    return {
        f"{ip}/10.77.9.1": "{not json",
        f"{ip}/10.77.9.2": '{"IP":5,"ID":"many"}',
        f"{ip}/10.77.9.3": '{"IP":"10.77.9.3","ID":4242,"Metadata":"' + "x" * MEGABYTE + '"}',
        f"{ip}/10.77.9.4": record(site.server.address, 4242),
        f"{ip}/10.77.9.5": record("10.77.9.5", 1 << 24 | 7),
        f"{ip}/nowhere": record("nowhere", 4242),
        "cilium/state/ip/v1/foreign": "x",
        f"{identity}/1": "container:app=admin;",
        f"{identity}/2": "container:app=client;",
        f"{identity}/5": "container:app=client;",
        f"{identity}/04242": "container:app=client;",
        f"{identity}/{1 << 24 | 7}": "container:app=client;",
        f"{identity}/abc": "container:app=client;",
        f"{identity}/4243": "no end",
        f"{identity}/4244": "container:app=a;container:app=b;",
        f"{identity}/4245": "container:app=" + "x" * MEGABYTE + ";",
        f"{node}/default/n1": "[]",
        f"{node}/default/n2": '{"Name":"other","Cluster":"default"}',
        f"{node}/default/n3/x": "{}",
    }


def record(address: str, number: int) -> str:
    return json.dumps({"IP": address, "Mask": None, "HostIP": "", "ID": number, "Key": 0, "Metadata": ""})


@pytest.fixture
def put(site: Site) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Return what writes records into etcd; they are deleted afterwards."""
    written: set[str] = set()

    def write(records: Mapping[str, str]) -> None:
        for key, value in records.items():
            written.add(key)
            site.host.etcdctl("put", key, stdin=value)

    yield write
    for key in written:
        site.host.etcdctl("del", key)


def test_records_that_can_not_be_used_are_ignored_and_named(
    site: Site, put: Callable[[Mapping[str, str]], None]
) -> None:
    bad = bad_records(site)
    before = site.json("identity", "list")
    put(bad)
    wait_for(lambda: ignored(site) == set(bad), f"complaint about {len(bad)} records")
    assert f"{len(bad)} in etcd can not be used" in site.cli("status")
    assert site.json("identity", "list") == before
    kernel: dict[str, Any] = site.json("bpf", "ipcache", "list")
    assert not [prefix for prefix in kernel if prefix.startswith("10.77.9.")]
    assert kernel[f"{site.server.address}/32"]["identity"] == site.identity(site.server)
    with site.policy(rule(site.server, "ingress", element("ingress", endpoints=[selects(site.client)]))):
        assert site.client.asks("TCP", site.server.address) is not None
        assert site.world.asks("TCP", site.server.address) is None
    for key in bad:
        site.host.etcdctl("del", key)
    wait_for(lambda: not ignored(site), "end of the complaint")


def ignored(site: Site) -> set[str]:
    """Return the keys that the agent ignores."""
    found: Mapping[str, str] = site.host.api("/v1/debuginfo")["subsystems"]["ignored-records"]
    return set(found)


def test_records_about_our_own_addresses_change_nothing_here(
    site: Site, put: Callable[[Mapping[str, str]], None]
) -> None:
    """An address of an endpoint here, of the host, of the router: the host knows better; keys come back."""
    stranger = site.identity(site.other)
    mine = {site.server.address: site.identity(site.server), site.host.address: 1, "10.50.0.1": 1}
    key = f"cilium/state/ip/v1/default/{site.server.address}"
    own = site.host.keys(key)[key]
    foreign = {f"cilium/state/ip/v1/elsewhere/{each}": record(each, stranger) for each in mine}
    put(foreign)
    site.host.etcdctl("put", key, stdin=record(site.server.address, stranger))
    wait_for(lambda: site.host.keys(key)[key] == own, "own record, written again")
    kernel: dict[str, Any] = site.json("bpf", "ipcache", "list")
    assert {each: kernel[f"{each}/32"]["identity"] for each in mine} == mine
    site.host.etcdctl("del", key)
    wait_for(lambda: site.host.keys(key).get(key) == own, "own record, written again")


def test_what_another_calls_its_host_is_a_remote_node(
    site: Site, put: Callable[[Mapping[str, str]], None]
) -> None:
    put({"cilium/state/ip/v1/default/10.77.9.6": record("10.77.9.6", 1)})
    wait_for(lambda: "10.77.9.6/32" in site.json("bpf", "ipcache", "list"), "entry")
    assert site.json("bpf", "ipcache", "list")["10.77.9.6/32"]["identity"] == 6


# --- endpoints of the API


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"netns": "/nowhere", "labels": ["app=x"]}, "/nowhere"),
        ({"netns": "/proc/1/ns/net", "labels": []}, "labels"),
        ({"netns": "/proc/1/ns/net", "labels": ["a;b=c"]}, "a;b"),
        ({"netns": "/proc/1/ns/net", "labels": ["app=x"], "ipv4": "10.300.0.1"}, "10.300.0.1"),
        ({"netns": "/proc/1/ns/net", "labels": ["app=x"], "ipv4": "192.0.2.7"}, "192.0.2.7"),
        ({"netns": "/proc/1/ns/net", "labels": ["app=x"], "ipv4": "10.50.0.1"}, "10.50.0.1"),
        ({"netns": "/proc/1/status", "labels": ["app=x"]}, "/proc/1/status"),
        ({"netns": 7}, "netns"),
        ({"network": "x"}, "network"),
    ],
)
def test_endpoint_that_can_not_be_made_leaves_nothing(site: Site, body: dict[str, Any], said: str) -> None:
    before = site.status()["ipam"]["used"]
    done = site.host.exec(
        *("curl", "-s", "--unix-socket", str(site.host.socket), "-X", "PUT"),
        *("-d", json.dumps(body), "-w", "%{http_code}", "http://holdfast/v1/endpoint/60002"),
    )
    assert int(done.stdout[-3:]) in (400, 409), done.stdout
    assert said in json.loads(done.stdout[:-3])["error"]
    assert site.status()["ipam"]["used"] == before
    assert 60002 not in {each["id"] for each in site.host.api("/v1/endpoint")}


def test_policy_map_of_another_layout_stops_its_endpoint_only(site: Site) -> None:
    """It is named with every difference; the endpoint is not made, and can be once the pin is gone."""
    pin = "/sys/fs/bpf/tc/globals/cilium_policy_60003"
    site.host.exec(*f"bpftool map create {pin} type hash key 8 value 8 entries 10 name wrong".split())
    try:
        body = json.dumps({"netns": "/proc/1/ns/net", "labels": ["app=x"]})
        put = ("curl", "-s", "--unix-socket", str(site.host.socket), "-X", "PUT", "-d", body)
        answer = json.loads(site.host.exec(*put, "http://holdfast/v1/endpoint/60003").stdout)
        for words in (pin, "value size is 8", "max entries is 10"):
            assert words in answer["error"]
        wait_for(lambda: site.status()["holdfast"]["state"] == "Ok", "end of the endpoint")
        assert 60003 not in {each["id"] for each in site.host.api("/v1/endpoint")}
    finally:
        site.host.exec("rm", "-f", pin)
