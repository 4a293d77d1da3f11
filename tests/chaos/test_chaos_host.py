# SPDX-License-Identifier: Apache-2.0
"""A host that drops what it forwards, and whose rules are rewritten by others under live traffic.

Docker's rules with FORWARD DROP, and such as ufw has: chains that come first, and reject everything.  What
policy allows goes on, what it denies stays out, the host's own ssh port is nobody's business, and what
`cleanup` leaves is what was there before the agent.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from tests.support import live, snapshot
from tests.support.agent import AgentHost
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub, wait_for
from tests.support.places import PORTS, PacketTap, Place
from tests.support.require import require_tools
from tests.support.rules import document, element, rule, selects
from tests.support.site import Site
from tests.support.traffic import serving

__all__ = ["engine_parts", "hub"]

SSH, PUBLISHED, PORT = 22, 8080, PORTS[0]
PAUSE_S = 1.0  # what was allowed passes again within this time

Flows = dict[str, tuple[Place, str, int]]  # name → who asks, address, port

DOCKER = """
*filter
:FORWARD DROP [0:0]
COMMIT
"""
# As `ufw reload` loads it, but that connections of before have no grace: only our own rules let them pass.
UFW = """
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:ufw-before-input - [0:0]
:ufw-before-forward - [0:0]
:ufw-reject-forward - [0:0]
-I INPUT 1 -j ufw-before-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -p tcp -m tcp --dport 22 -j ACCEPT
-I FORWARD 1 -j ufw-before-forward
-A ufw-before-forward -m conntrack --ctstate INVALID -j DROP
-A ufw-before-forward -j ufw-reject-forward
-A ufw-reject-forward -j REJECT --reject-with icmp-port-unreachable
COMMIT
"""
UFW_STOP = """
*filter
-D INPUT -j ufw-before-input
-D FORWARD -j ufw-before-forward
-F ufw-before-input
-F ufw-before-forward
-F ufw-reject-forward
COMMIT
"""
THEIRS = """
table inet theirs {
    chain watch {
        type filter hook forward priority 10; policy accept;
        counter comment "somebody else's"
    }
}
"""


@dataclass
class Scene:
    """The host with its traffic; `before` is what it was like without an agent."""

    site: Site
    stack: contextlib.ExitStack
    rules: str
    before: dict[str, str]
    saved: str  # everybody's iptables rules without the agent's
    streams: dict[str, live.Stream] = field(default_factory=dict)
    probes: dict[str, live.Probe] = field(default_factory=dict)
    taps: dict[str, PacketTap] = field(default_factory=dict)

    @property
    def host(self) -> AgentHost:
        return self.site.host

    def restore(self, script: str, *options: str) -> None:
        self.host.exec("iptables-restore", "-w", "5", *options, stdin=script)

    def denied(self) -> Flows:
        """Return what policy forbids."""
        site, card = self.site, self.host.address
        return {
            "far to server": (site.far, site.server.address, PORT),
            "far to the published port": (site.far, card, PUBLISHED),
            "other to server": (site.other, site.server.address, PORT),
            "other to ssh": (site.other, card, SSH),
        }

    def check(self) -> None:
        """Allowed flows go on and begin anew, denied ones do not, and ssh answers everybody it may."""
        for stream in self.streams.values():
            stream.goes_on()
        pauses = {name: probe.longest_pause() for name, probe in self.probes.items()}
        limit = PAUSE_S + pauses.pop("control")
        assert max(pauses.values()) <= limit, (limit, pauses)
        assert answered(allowed(self.site)) == set(allowed(self.site))
        assert answered(self.denied()) == set()
        strangers = [socket.inet_aton(place.address) for place in (self.site.far, self.site.other)]
        for name, tap in self.taps.items():
            passed = [packet for packet in tap.packets() if packet[12:16] in strangers]
            assert not passed, (name, passed[:3])

    def settled(self) -> None:
        """Wait until what is allowed passes again, then check everything."""
        for probe in self.probes.values():
            probe.goes_on()
        self.check()

    def begin(self, name: str) -> None:
        """Begin one allowed flow as a stream that lasts as long as the scene."""
        place, address, port = allowed(self.site)[name]
        self.streams[name] = self.stack.enter_context(live.Stream(name, place.netns, address, port))

    def watch(self, place: Place) -> None:
        """See every packet that gets through to a server."""
        self.taps[place.name] = tap = PacketTap(place)
        self.stack.callback(tap.close)


def answered(flows: Flows) -> set[str]:
    """Return the names of those flows that a new connection gets an answer for."""
    with ThreadPoolExecutor(len(flows)) as pool:
        answers = pool.map(lambda flow: flow[0].asks("TCP", flow[1], flow[2]), flows.values())
        return {name for name, answer in zip(flows, answers, strict=True) if answer}


def allowed(site: Site) -> Flows:
    """Return what policy allows; all but the first pass the host's own rules."""
    card = site.host.address
    return {
        "client to server": (site.client, site.server.address, PORT),
        "world to server": (site.world, site.server.address, PORT),
        "server to world": (site.server, site.world.address, PORT),
        "world to the published port": (site.world, card, PUBLISHED),
        "host to server": (site.on_host, site.server.address, PORT),
        "world to ssh": (site.world, card, SSH),
        "client to ssh": (site.client, card, SSH),
    }


def policy(site: Site, published: Place) -> str:
    """The world may reach server, client may reach server and the host; far and other may do nothing."""
    servers = selects(site.server, published)
    return document(
        "host",
        {
            "endpointSelector": servers,
            "ingress": [
                element("ingress", cidr=[f"{site.world.address}/32"]),
                element("ingress", entities=["host"]),
                element("ingress", endpoints=[selects(site.client)]),
            ],
        },
        rule(
            site.client,
            "egress",
            element("egress", entities=["host"]),
            element("egress", endpoints=[servers]),
        ),
        rule(site.other, "egress", element("egress", endpoints=[selects(site.client)])),
    )


def strangers_things(host: AgentHost) -> None:
    """Put on the host what somebody else has there, of every kind that the agent has too."""
    host.exec("nft", "-f", "-", stdin=THEIRS)
    for words in (
        "ip link add theirs type veth peer name theirs1",
        "ip address add 10.88.0.1/24 dev theirs",
        "ip link set theirs up",
        "ip address add 10.88.9.9/32 dev lo",
        "ip route add 198.51.100.0/24 via 10.88.0.2 proto 99",
        "ip route add unreachable 203.0.113.0/24",
        "ip neigh add 10.88.0.2 lladdr 02:00:00:00:00:02 dev theirs nud permanent",
        "tc qdisc add dev eth0 clsact",
        "tc filter add dev eth0 ingress protocol ip pref 50 u32 match u32 0 0 flowid 1:1",
        "mkdir -p /sys/fs/bpf/tc/globals",
        "bpftool map create /sys/fs/bpf/tc/globals/theirs type array key 4 value 4 entries 1 name theirs",
    ):
        host.exec(*words.split())


RULES = [pytest.param(DOCKER, id="docker"), pytest.param(UFW, id="ufw", marks=pytest.mark.rare)]


@pytest.fixture(scope="module", params=RULES)
def scene(request: pytest.FixtureRequest, hub: Hub) -> Iterator[Scene]:
    """A host with such rules from before the agent's first start, containers and traffic."""
    require_tools("etcd", "etcdctl", "curl", "nft", "iptables", "iptables-restore", "tc", "bpftool")
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(AgentHost("hfh", options=("--live-restore",)))
        host.address = hub.join(host)
        host.start_etcd()
        strangers_things(host)
        host.exec("iptables-restore", "--noflush", stdin=request.param)
        saved = host.exec("iptables-save").stdout
        host.exec("iptables-restore", stdin=saved)  # every chain that a restore makes is there already
        wait_for(lambda: addressed(host), "eth0's own IPv6 address, which the kernel gives it after a while")
        before = snapshot.taken(host)
        host.start_agent()
        site = Site(host, hub, stack)
        stack.enter_context(serving(site.on_host.netns, SSH))
        publish = ("--publish", f"{PUBLISHED}:{PORT}")
        published = site.keep("published", labels={"app": "published"}, options=publish)
        text = policy(site, published)
        host.api("/v1/policy/host", method="PUT", body={"text": text})
        made = Scene(site, stack, request.param, before, saved)
        for place in (site.server, published):
            made.watch(place)
        for name in allowed(site):
            made.begin(name)
        flows = allowed(site) | {"control": (site.on_host, "127.0.0.1", PORT)}
        for name in ("world to server", "server to world", "control"):
            place, address, port = flows[name]
            made.probes[name] = stack.enter_context(live.Probe(name, place.netns, address, port))
        yield made
        if not running(host):
            host.start_agent()  # the engine waits for the driver before it removes a container


def addressed(host: AgentHost) -> bool:
    shown = host.exec("ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "link").stdout
    return "fe80" in shown and "tentative" not in shown


def running(host: AgentHost) -> bool:
    return host.agent is not None and host.agent.running


def test_rules_from_before_the_agent(scene: Scene) -> None:
    saved = scene.host.exec("iptables-save", "-t", "filter").stdout
    assert ":FORWARD DROP" in saved
    scene.settled()


def test_rules_loaded_while_the_agent_runs(scene: Scene) -> None:
    scene.check()
    if scene.rules == UFW:
        scene.restore(UFW_STOP, "--noflush")
    scene.restore(scene.rules, "--noflush")
    scene.settled()


def test_rules_of_somebody_else_replace_all(scene: Scene) -> None:
    """`iptables-restore` of rules that were saved before the agent came, as a boot script has them."""
    scene.restore(scene.saved)
    scene.settled()


def test_chains_flushed(scene: Scene) -> None:
    for words in ("-F FORWARD", "-P FORWARD DROP"):
        scene.host.exec("iptables", "-w", "5", *words.split())
    scene.settled()


def test_whole_ruleset_flushed(scene: Scene) -> None:
    """As a reload of the service nftables does: published ports and masquerading are gone as well."""
    scene.host.exec("nft", "flush", "ruleset")
    scene.restore(DOCKER, "--noflush")
    # With the last rule of address translation the kernel forgets to translate what is under way.
    for name in ("world to the published port", "server to world"):
        scene.streams.pop(name)
    scene.settled()
    for name in ("world to the published port", "server to world"):
        scene.begin(name)
    scene.host.exec("nft", "-f", "-", stdin=THEIRS)
    scene.restore(scene.saved)
    scene.settled()


def test_docker_restarted(scene: Scene) -> None:
    scene.host.engine.restart()
    wait_for(scene.host.healthy, "healthy agent")
    scene.settled()


def test_rules_written_while_the_agent_is_away(scene: Scene) -> None:
    """They stop what is allowed until the agent is back; nothing denied passes meanwhile."""
    scene.host.kill_agent()
    scene.check()
    scene.restore(scene.saved)
    scene.host.start_agent()
    for probe in scene.probes.values():
        probe.goes_on()
        probe.longest_pause()
    scene.settled()


def test_ssh_port_can_not_be_published(scene: Scene) -> None:
    engine = scene.host.engine
    for publish in (f"{SSH}:{PORT}", f"{scene.host.address}:{SSH}:{PORT}"):
        command = ("run", "-d", "--name", "thief", "--network", "holdfast", "--publish", publish)
        refused = engine.docker(*command, "holdfast-test/workload", "sleep", "infinity", check=False)
        engine.docker("rm", "-f", "thief", check=False)
        assert f"host port {SSH}/tcp is in use" in refused.stderr, refused
    scene.settled()


def test_cleanup_leaves_what_was_there_before(scene: Scene) -> None:
    """Last of all: containers lose their network, the host and its ssh sessions lose nothing."""
    host = scene.host
    host.stop_agent()
    scene.check()
    roots = ("--state-dir", str(host.state), "--bpf-root", host.bpffs)
    shown = json.loads(host.cli("cleanup", "--all", "--dry-run", "-o", "json", *roots).stdout)
    assert {each["kind"] for each in shown} >= {"firewall", "route", "device", "program", "map", "address"}
    host.cli("cleanup", "--all", "-f", *roots)
    assert list(host.state.iterdir()) == []
    assert snapshot.differences(scene.before, snapshot.taken(host)) == []
    scene.streams["world to ssh"].goes_on()
    assert scene.site.world.asks("TCP", host.address, SSH)
