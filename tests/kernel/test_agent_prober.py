# SPDX-License-Identifier: Apache-2.0
"""A prober and the nodes it looks at: addresses of a namespace, a real server on each, ICMP by the kernel.

Nodes are called a, b, c…; `a` is the prober's own.  Each has an address of each family.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from agent import health as health_module
from agent import probes
from agent.health import Prober, State
from agent.health_server import HealthServer
from agent.report_health import health, summary
from core.table import Table
from kvstore.schema import NodeAddress, NodeRecord
from tests.support.cli import ROOT
from tests.support.eventually import eventually
from tests.support.netns import Netns, inside_new_netns
from tests.support.require import require_root, require_tools

PORT = 4240
PERIOD_S = 0.3
NAMES = "abcd"


def ips_of(name: str) -> tuple[str, str]:
    number = NAMES.index(name) + 1
    return f"198.51.100.{number}", f"2001:db8::{number}"


def record(name: str, *ips: str) -> NodeRecord:
    return NodeRecord(name, "default", tuple(NodeAddress("InternalIP", ip) for ip in ips or ips_of(name)))


@pytest.fixture
def netns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Netns]:
    require_root()
    require_tools("ip", "nsenter")
    monkeypatch.setattr(probes, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(probes, "ECHO_WAIT_S", 0.2)
    monkeypatch.setattr(health_module, "FIRST_S", 0.1)
    with inside_new_netns() as made:
        for name in NAMES:
            for ip in ips_of(name):
                made.run("ip", "address", "add", ip, "dev", "lo", *(["nodad"] if ":" in ip else []))
        yield made


class Cluster:
    """The nodes table, a server for each node that lives, and the prober of `a`."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self.nodes: Table[str, NodeRecord] = Table("nodes", ("kvstore",))
        self.prober = Prober(self.nodes, "default/a", ips_of("a"), port=PORT, base=PERIOD_S)
        # By the first address of a server, and "prober".
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def join(self, name: str, *ips: str, answers: bool = True, ahead: float = 0.0, says: str = "") -> None:
        """Have a node join whose clock is `ahead` by so many seconds; the agent there `says` another name."""
        self.nodes.source("kvstore").upsert(f"default/{name}", record(name, *ips))
        if answers:
            own = f"default/{says or name}"
            server = HealthServer(own, ips or ips_of(name), PORT, clock=lambda: time.time() + ahead)
            self._tasks[(ips or ips_of(name))[0]] = asyncio.create_task(server.run())

    async def die(self, name: str) -> None:
        """End a node's agent; its host goes on."""
        await self._end(ips_of(name)[0])

    def leave(self, name: str) -> None:
        self.nodes.source("kvstore").delete(f"default/{name}")

    def start(self) -> None:
        self._tasks["prober"] = asyncio.create_task(self.prober.run())

    async def pause(self) -> None:
        """End the prober's task, as when it has died."""
        await self._end("prober")

    async def stop(self) -> None:
        for what in list(self._tasks):
            await self._end(what)

    async def _end(self, what: str) -> None:
        task = self._tasks.pop(what)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def states(self) -> dict[str, State]:
        return {name.partition("/")[2]: found.state for name, found in self.prober.results.nodes.items()}

    async def are(self, **states: State) -> None:
        """Wait until these nodes are what is said, and no others are known."""
        await eventually(lambda: self.states() == states, f"{states}")
        assert not self._tasks["prober"].done()

    def errors(self, name: str) -> list[str]:
        return [path.error for path in self.prober.results.nodes[f"default/{name}"].paths]


@contextlib.asynccontextmanager
async def cluster(netns: Netns, *names: str) -> AsyncIterator[Cluster]:
    made = Cluster(netns)
    for name in names:
        made.join(name)
    made.start()
    try:
        yield made
    finally:
        await made.stop()
    assert not made.nodes._subscriptions, "a task that has ended goes on noting changes"


REACHABLE, UNREACHABLE = State.REACHABLE, State.UNREACHABLE


async def test_every_address_has_its_latencies(netns: Netns) -> None:
    async with cluster(netns, "a", "b", "c") as seen:
        await seen.are(a=REACHABLE, b=REACHABLE, c=REACHABLE)
        for name in "abc":
            found = seen.prober.results.nodes[f"default/{name}"]
            assert tuple(path.ip for path in found.paths) == ips_of(name)
            for path in found.paths:
                assert path.icmp is not None, "root may send echo requests"
                assert 0 < path.tcp.latency <= path.http.latency
                assert path.icmp.latency > 0
        before = seen.prober.results.nodes["default/b"].time
        await eventually(lambda: seen.prober.results.nodes["default/b"].time > before, "it is probed again")


async def test_who_answers_is_found_out_now_and_by_all_who_ask(netns: Netns) -> None:
    async with cluster(netns, "a", "b") as seen:
        seen.join("c", answers=False)
        await seen.are(a=REACHABLE, b=REACHABLE, c=UNREACHABLE)
        names = [f"default/{name}" for name in ("b", "c", "unknown")]
        both = await asyncio.gather(*(seen.prober.who_answers(names) for _ in range(2)))
        assert both == [{"default/b"}] * 2, "a question that is under way is an answer to both"
        seen.join("d", says="z")
        await seen.are(a=REACHABLE, b=REACHABLE, c=UNREACHABLE, d=REACHABLE)
        assert await seen.prober.who_answers([*names, "default/d"]) == {"default/b"}, (
            "another is at d's address"
        )
        await seen.die("b")
        assert await seen.prober.who_answers(names) == set()
        assert await seen.prober.who_answers([]) == set()


async def test_a_node_that_comes_leaves_or_moves(netns: Netns) -> None:
    async with cluster(netns, "a", "b") as seen:
        await seen.are(a=REACHABLE, b=REACHABLE)
        seen.join("c")
        await seen.are(a=REACHABLE, b=REACHABLE, c=REACHABLE)
        seen.leave("b")
        await seen.are(a=REACHABLE, c=REACHABLE)
        seen.join("c", *ips_of("d"))
        await eventually(
            lambda: (
                [path.ip for path in seen.prober.results.nodes.get("default/c", health_module.UNKNOWN).paths]
                == list(ips_of("d"))
            ),
            "the new address is probed",
        )
        await seen.are(a=REACHABLE, c=REACHABLE)


async def test_a_clock_that_is_wrong_is_named(netns: Netns) -> None:
    async with cluster(netns, "a", "b") as seen:
        seen.join("c", ahead=3600.0)
        await seen.are(a=REACHABLE, b=REACHABLE, c=REACHABLE)
        found = seen.prober.clocks.verdict()
        assert (found.ahead, found.differing, found.others) == (0.0, 1, 2)
        assert found.wrong == {"default/c": pytest.approx(3600.0, abs=2.0)}
        said = summary(seen.prober, HealthServer("", [], PORT)).clock
        assert (said.ahead, said.wrong, said.wrong_nodes[0].name) == (0.0, 1, "default/c")
        seen.leave("c")
        await seen.are(a=REACHABLE, b=REACHABLE)
        assert seen.prober.clocks.verdict().wrong == {}


async def test_a_host_whose_own_clock_is_wrong_says_so(netns: Netns) -> None:
    async with cluster(netns, "a") as seen:
        for name in "bcd":
            seen.join(name, ahead=30.0)
        await seen.are(a=REACHABLE, b=REACHABLE, c=REACHABLE, d=REACHABLE)
        found = seen.prober.clocks.verdict()
        assert found.ahead == pytest.approx(-30.0, abs=2.0)
        assert (found.differing, found.others, found.wrong) == (3, 3, {})
        shown = {each.name: each for each in health(seen.prober).nodes}
        assert shown["default/b"].clock_ahead == pytest.approx(30.0, abs=2.0)
        assert not shown["default/b"].clock_wrong


async def test_what_left_while_the_prober_was_down_is_forgotten(netns: Netns) -> None:
    async with cluster(netns, "a", "b", "c") as seen:
        await seen.are(a=REACHABLE, b=REACHABLE, c=REACHABLE)
        await seen.pause()
        seen.leave("b")
        seen.start()
        await seen.are(a=REACHABLE, c=REACHABLE)
        assert set(seen.prober.schedule) == {"default/a", "default/c"}


async def test_an_agent_that_is_down_and_a_host_that_is_gone_differ(netns: Netns) -> None:
    async with cluster(netns, "a", "b", "c") as seen:
        await seen.are(a=REACHABLE, b=REACHABLE, c=REACHABLE)
        await seen.die("b")
        for prefix in ("198.51.100.3/32", "2001:db8::3/128"):
            netns.run("ip", "address", "del", prefix, "dev", "lo")
            netns.run("ip", "route", "add", "blackhole", prefix)
        await seen.are(a=REACHABLE, b=UNREACHABLE, c=UNREACHABLE)
        refused = ["TCP: Connection refused"] * 2
        await eventually(lambda: seen.errors("b") == refused, "connections are refused")
        b = seen.prober.results.nodes["default/b"].paths[0]
        assert b.icmp is not None
        assert b.icmp.error == "", "its host answers"
        c = seen.prober.results.nodes["default/c"].paths[0]
        assert c.icmp is not None
        assert c.icmp.error != ""
        seen.join("b")
        await seen.are(a=REACHABLE, b=REACHABLE, c=UNREACHABLE)


async def test_silence_is_an_answer_after_a_while(netns: Netns) -> None:
    netns.run("nft", "add table inet t; add chain inet t in { type filter hook input priority 0; }")
    netns.run(
        "nft", "add rule inet t in ip daddr 198.51.100.2 drop; add rule inet t in ip6 daddr 2001:db8::2 drop"
    )
    async with cluster(netns, "a", "b") as seen:
        await seen.are(a=REACHABLE, b=UNREACHABLE)
        assert seen.errors("b") == ["TCP: no connection within 0.5 s"] * 2
        icmp = seen.prober.results.nodes["default/b"].paths[1].icmp
        assert icmp is not None
        assert icmp.error.startswith("no echo reply within")
        netns.run("nft", "delete table inet t")
        await seen.are(a=REACHABLE, b=REACHABLE)


async def test_one_probe_of_all_on_demand(netns: Netns) -> None:
    made = Cluster(netns)
    for name in "abc":
        made.join(name)
    await eventually(lambda: connects(ips_of("c")[1]), "servers listen")
    made.prober.schedule.join([f"default/{name}" for name in "abc"], 0.0)
    await asyncio.gather(*(made.prober.probe_all() for _ in range(5)))
    assert made.states() == {"a": REACHABLE, "b": REACHABLE, "c": REACHABLE}
    await made.die("c")
    await made.prober.probe_all()
    assert made.states() == {"a": REACHABLE, "b": REACHABLE, "c": UNREACHABLE}
    await made.stop()


def connects(ip: str) -> bool:
    with probes._socket(ip, socket.SOCK_STREAM) as sock:
        sock.setblocking(True)
        return sock.connect_ex((ip, PORT)) == 0


async def test_a_record_that_names_other_things_than_hosts_does_no_harm(netns: Netns) -> None:
    async with cluster(netns, "a") as seen:
        seen.join("b", "127.0.0.1", "224.0.0.1", "ff02::1", "255.255.255.255", answers=False)
        seen.join("c", "127.0.0.1", "::1", answers=False)
        seen.join("d")
        await seen.are(a=REACHABLE, b=UNREACHABLE, d=REACHABLE)
        assert [path.ip for path in seen.prober.results.nodes["default/b"].paths] == ["255.255.255.255"]


# --- who may send echo requests

ASK = """
import asyncio, sys
from agent import probes
kind = probes.granted(int(sys.argv[1]))
print("not granted" if kind is None else f"{kind.name} {asyncio.run(probes.echo(sys.argv[2], kind)).error}")
"""
WITHOUT_RAW = ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")


@pytest.mark.parametrize(("family", "ip"), [(4, "198.51.100.2"), (6, "2001:db8::2")], ids=["IPv4", "IPv6"])
def test_echo_requests_are_sent_where_the_kernel_lets(netns: Netns, family: int, ip: str) -> None:
    require_tools("setpriv")

    def asked(*before: str) -> str:
        command = netns.command([*before, sys.executable, "-c", ASK, str(family), ip])
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
        ).stdout.strip()

    netns.run("sysctl", "-w", "net.ipv4.ping_group_range=1 0")
    assert asked() == "SOCK_RAW"
    assert asked(*WITHOUT_RAW) == "not granted"
    netns.run("sysctl", "-w", "net.ipv4.ping_group_range=0 0")
    assert asked(*WITHOUT_RAW) == "SOCK_DGRAM"
