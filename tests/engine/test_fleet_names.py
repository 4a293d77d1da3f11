# SPDX-License-Identifier: Apache-2.0
"""Two hosts: a container of one finds a compose service of the other by name, and other names elsewhere.

host 1   client, whose engine asks 10.50.1.1 and then `upstream`, a server of the world
host 2   the compose project `shop` with the service `web`
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from tests.support.engine import WORKLOAD_IMAGE
from tests.support.fleet import GONE_S, Fleet, FleetHost, new_fleet
from tests.support.host import wait_for
from tests.support.places import Neighbour
from tests.support.saved import Saved

WEB, PROJECT, NAME = "web", "shop", "web.shop.holdfast"
EXTERNAL, EXTERNAL_ADDRESS = "www.example.com", "198.51.100.7"
CLIENT = {"endpointSelector": {"matchLabels": {"app": "client"}}}
COMPOSE_FILE = {
    "version": "2.4",
    "services": {
        WEB: {
            "image": WORKLOAD_IMAGE,
            "command": ["python3", "-m", "http.server", "--bind", "::", "8000"],
            "networks": ["holdfast"],
        }
    },
    "networks": {"holdfast": {"external": True}},
}


class Upstream:
    """A name server of the world that knows one name; `asked` is what it was asked for."""

    def __init__(self, place: Neighbour) -> None:
        self.address = place.address
        self.asked: list[str] = []
        self._socket = place.place("upstream").netns.socket(socket.SOCK_DGRAM)
        self._socket.bind((place.address, 53))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while packet := (received := self._socket.recvfrom(4096))[0]:
                self._socket.sendto(self._answer(dns.message.from_wire(packet)), received[1])

    def _answer(self, query: dns.message.Message) -> bytes:
        answer = dns.message.make_response(query)
        name = query.question[0].name.to_text(omit_final_dot=True)
        self.asked.append(name)
        if name != EXTERNAL:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif query.question[0].rdtype == dns.rdatatype.A:
            answer.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", "A", EXTERNAL_ADDRESS))
        return answer.to_wire()

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # wakes whoever reads from it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()


class Scene:
    """The hosts, the client and the project."""

    def __init__(self, fleet: Fleet, upstream: Upstream) -> None:
        self.fleet, self.upstream = fleet, upstream
        self.one, self.two = fleet.hosts
        self.project = self.two.directory / PROJECT
        self.project.mkdir()
        (self.project / "docker-compose.yml").write_text(json.dumps(COMPOSE_FILE))
        servers = [part for each in (self.router, upstream.address) for part in ("--dns", each)]
        self.one.container("client", "sleep", "infinity", labels={"app": "client"}, options=servers)

    @property
    def routers(self) -> list[str]:
        """The addresses where host 1 answers, as its status has them."""
        return list(self.one.api("/v1/healthz")["cluster-dns"]["addresses"])

    @property
    def router(self) -> str:
        return self.routers[0]

    def compose(self, *arguments: str) -> None:
        self.two.engine.compose(self.project, *arguments)

    def web_addresses(self) -> set[str]:
        """Return what host 2 says the service's containers have."""
        found = set()
        for each in self.two.api("/v1/endpoint"):
            labels = each["status"]["labels"]["security-relevant"]
            if f"container:com.docker.compose.service={WEB}" in labels:
                found |= set(each["status"]["networking"]["addressing"][0].values())
        return found

    def resolved(self, name: str) -> set[str]:
        """Return what a program in the client gets for a name, by way of docker's resolver."""
        done = self.one.inside("client", "getent", "ahosts", name, check=False)
        return {line.split()[0] for line in done.stdout.splitlines()}

    def fetches(self, name: str) -> bool:
        command = ("curl", "-s", "-o", "/dev/null", "--max-time", "3", f"http://{name}:8000/")
        return bool(self.one.inside("client", *command, check=False).returncode == 0)

    def asked(self, name: str, kind: str, server: str) -> dns.message.Message:
        """Ask this host's server from inside the client's namespace, without docker in between."""
        family = socket.AF_INET if ip_address(server).version == 4 else socket.AF_INET6
        netns = self.one.netns_of("client")
        query = dns.message.make_query(name, kind)
        with contextlib.closing(netns), netns.socket(socket.SOCK_DGRAM, family) as sock:
            sock.settimeout(5)
            sock.sendto(query.to_wire(), (server, 53))
            answer = dns.message.from_wire(sock.recv(4096))
        assert query.is_response(answer)
        return answer


@pytest.fixture(scope="module")
def scene(engine_parts: None) -> Iterator[Scene]:
    with new_fleet(2) as fleet, contextlib.ExitStack() as stack:
        fleet.start(enable_cluster_dns="true")
        world = Neighbour(fleet.hub)
        stack.callback(world.stop)
        upstream = Upstream(world)
        stack.callback(upstream.stop)
        yield Scene(fleet, upstream)
        for host in fleet.hosts:
            assert host.agent is not None
            assert "Traceback" not in host.agent.output(), host.agent.output()[-4000:]


@pytest.fixture
def web(scene: Scene) -> Iterator[set[str]]:
    """The service, running on host 2 and known on host 1; its addresses of both families."""
    scene.compose("up", "-d")
    addresses = scene.web_addresses()
    assert len(addresses) == 2, addresses
    wait_for(lambda: scene.resolved(NAME) == addresses, f"{NAME} known on host 1")
    yield addresses
    scene.compose("down", "--timeout", "1")


def test_a_service_of_another_host_is_found_and_reached_by_name(scene: Scene, web: set[str]) -> None:
    wait_for(lambda: scene.fetches(NAME), "answer of the service")
    assert scene.fetches("WEB.Shop.HOLDFAST")
    assert NAME not in scene.upstream.asked
    shown = scene.one.cli("status").stdout
    assert f"1 name of holdfast, answered at {scene.router}" in shown, shown


def test_the_same_by_either_address_of_the_host(scene: Scene, web: set[str]) -> None:
    for server in scene.routers:
        found = {
            each.to_text() for kind in ("A", "AAAA") for each in scene.asked(NAME, kind, server).answer[0]
        }
        assert found == web, server


def test_other_names_are_refused_and_docker_asks_the_next_server(scene: Scene) -> None:
    assert scene.asked(EXTERNAL, "A", scene.router).rcode() == dns.rcode.REFUSED
    assert scene.resolved(EXTERNAL) == {EXTERNAL_ADDRESS}


def test_a_service_that_is_scaled_has_all_addresses_and_none_once_it_is_gone(
    scene: Scene, web: set[str]
) -> None:
    scene.compose("up", "-d", "--scale", f"{WEB}=3")
    both = scene.web_addresses()
    assert len(both) == 6
    wait_for(lambda: scene.resolved(NAME) == both, "all three containers")
    scene.compose("down", "--timeout", "1")
    wait_for(lambda: scene.asked(NAME, "A", scene.router).rcode() == dns.rcode.NXDOMAIN, "no", seconds=GONE_S)
    scene.upstream.asked.clear()
    assert scene.resolved(NAME) == set()
    assert NAME not in scene.upstream.asked, "nobody else is asked for a name that we say is none"


def test_a_vm_has_a_name_by_the_same_labels(scene: Scene) -> None:
    labels = f"container:com.docker.compose.project={PROJECT};container:com.docker.compose.service=legacy;"
    record = {"IP": "192.0.2.77", "Mask": None, "HostIP": "", "ID": 4242, "Key": 0, "Metadata": ""}
    keys = {
        "cilium/state/identities/v1/id/4242": labels,
        f"cilium/state/identities/v1/value/{labels}/192.0.2.77": "4242",
        "cilium/state/ip/v1/default/192.0.2.77": json.dumps(record),
    }
    for key, value in keys.items():
        scene.one.etcdctl("put", key, value)
    wait_for(lambda: scene.resolved(f"legacy.{PROJECT}.holdfast") == {"192.0.2.77"}, "the VM's name")
    for key in reversed(keys):
        scene.one.etcdctl("del", key)
    wait_for(lambda: not scene.resolved(f"legacy.{PROJECT}.holdfast"), "no VM, no name", seconds=GONE_S)


def test_where_policy_lets_little_out_names_take_a_rule(scene: Scene, web: set[str]) -> None:
    """Questions are for the host: by policy as well."""
    ports = [{"ports": [{"port": "53", "protocol": "UDP"}, {"port": "53", "protocol": "TCP"}]}]
    with scene.one.policy(CLIENT | {"egress": [{}]}):
        assert scene.resolved(NAME) == set()
    with scene.one.policy(CLIENT | {"egress": [{"toEntities": ["host"], "toPorts": ports}]}):
        assert scene.resolved(NAME) == web
        assert not scene.fetches(NAME), "a name is no permission"


def test_what_was_known_is_answered_while_etcd_is_away(scene: Scene, web: set[str]) -> None:
    router = scene.router
    scene.one.stop_etcd()
    try:
        wait_for(lambda: scene.one.api("/v1/healthz")["kvstore"]["state"] != "Ok", "etcd missed")
        assert scene.resolved(NAME) == web
        wait_for(lambda: scene.fetches(NAME), "answer of the service")
        assert scene.asked("db.shop.holdfast", "A", router).rcode() == dns.rcode.NXDOMAIN
        saved = Saved(scene.one.state)
        prefixes = [f"{each}/{ip_address(each).max_prefixlen}" for each in web]
        wait_for(
            lambda: all(saved.knows("addresses", each) for each in prefixes), f"{prefixes} in the checkpoint"
        )
        scene.one.kill_agent()
        scene.one.launch_agent(enable_cluster_dns="true")
        wait_for(lambda: scene.resolved(NAME) == web, "answers of an agent that began without etcd")
        for name, kind in (("db.shop.holdfast", "A"), (NAME, "MX")):
            assert scene.asked(name, kind, router).rcode() == dns.rcode.SERVFAIL, "it can not know"
    finally:
        scene.one.start_etcd(shared=True)
        wait_for(lambda: all(map(FleetHost.healthy, scene.fleet.hosts)), "etcd back", seconds=90)
    wait_for(
        lambda: scene.asked("db.shop.holdfast", "A", router).rcode() == dns.rcode.NXDOMAIN, "a no once it can"
    )
