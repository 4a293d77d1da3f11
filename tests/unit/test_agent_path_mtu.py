# SPDX-License-Identifier: Apache-2.0
"""What is concluded of packets that arrive and of those that do not; and real questions over loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import path_mtu, probes
from agent.health_server import HealthServer
from agent.node_routes import Direct, Tunnelled
from agent.nodes import NodePool
from agent.path_mtu import LEAST, PathProber, carried_inside, measure, new_table
from tests.support.etcd import free_ports
from tests.support.eventually import eventually

FULL = 1500
IP, NODE = "192.0.2.7", "default/b"


class Network:
    """A way that carries `carried` bytes to a node that answers or not; counts the questions."""

    def __init__(self, carried: int, *, up: bool = True) -> None:
        self.carried, self.up = carried, up
        self.tried: list[int] = []
        self.lost_by_chance = 0  # so many long packets more are lost, whatever their length

    async def fits(self, length: int) -> bool:
        self.tried.append(length)
        if self.lost_by_chance:
            self.lost_by_chance -= 1
            return False
        return self.up and length <= self.carried

    async def small(self) -> bool:
        return self.up

    def measured(self, known: int = 0, full: int = FULL) -> int:
        return asyncio.run(measure(self.fits, self.small, full, known))


def test_full_length_takes_one_question() -> None:
    network = Network(9000)
    assert network.measured() == FULL
    assert network.tried == [FULL]


@given(carried=st.integers(LEAST, 9000), known=st.sampled_from([0, 1300, 1400, 1499]))
def test_the_longest_packet_is_found_to_the_byte(carried: int, known: int) -> None:
    network = Network(carried)
    assert network.measured(known) == min(carried, FULL)
    assert max(network.tried) == FULL, "never more than the device sends"


def test_what_is_known_is_looked_at_by_three_questions() -> None:
    network = Network(1400)
    assert network.measured(known=1400) == 1400
    assert network.tried == [FULL, 1400, 1401]


@pytest.mark.parametrize("known", [0, 1400])
def test_a_node_that_does_not_answer_says_nothing(known: int) -> None:
    assert Network(9000, up=False).measured(known) == 0


@pytest.mark.parametrize("losses", [1, 2])
def test_packets_lost_by_chance_say_nothing(losses: int) -> None:
    network = Network(9000)
    network.lost_by_chance = losses
    assert network.measured() == 0
    assert network.measured() == FULL


def test_a_way_that_carries_less_than_every_way_must_is_not_believed() -> None:
    assert Network(LEAST - 1).measured() == 0


def test_a_node_that_dies_in_the_middle_lowers_nothing() -> None:
    network = Network(1400)

    async def small() -> bool:
        return len(network.tried) < 8

    assert asyncio.run(measure(network.fits, small, FULL, 0)) == 0


# --- the prober


async def probed(
    network: Network, work: Callable[[PathProber], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a prober over a network for the time of `work`."""

    async def arrives(ip: str, port: int, length: int) -> bool:
        return await network.fits(length)

    async def hello(ip: str, port: int) -> tuple[probes.Outcome, probes.Outcome]:
        outcome = probes.Outcome(error="" if await network.small() else "no answer")
        return outcome, outcome

    monkeypatch.setattr(path_mtu, "arrives", arrives)
    monkeypatch.setattr(path_mtu, "hello", hello)
    prober = PathProber(new_table(), port=4240, full=FULL, restored=[(IP, 1300), ("192.0.2.8", FULL)])
    async with asyncio.TaskGroup() as group:
        task = group.create_task(prober.run())
        await work(prober)
        task.cancel()


async def test_it_is_lowered_and_goes_back_up(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(1400)

    async def work(prober: PathProber) -> None:
        assert prober.lowered == {IP: 1300}, "of a former life; never what is no less than the device's"
        prober.answered(NODE, [IP])
        await eventually(lambda: prober.lowered == {IP: 1400}, "what is now")
        network.up = False
        prober.answered(NODE, [IP])
        await eventually(lambda: not prober._under_way, "end of the question")
        assert prober.lowered == {IP: 1400}
        network.up, network.carried = True, FULL
        prober.answered(NODE, [IP])
        await eventually(lambda: prober.lowered == {}, "full length")
        assert prober.found == {IP: FULL}

    await probed(network, work, monkeypatch)


async def test_nothing_stays_of_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(prober: PathProber) -> None:
        prober.keep_only({"192.0.2.9"})
        assert prober.lowered == {}, "an address of a former life that nobody has"
        prober.answered(NODE, [IP])
        await eventually(lambda: prober.lowered == {IP: 1400}, "what is now")
        prober.forget(NODE)
        assert (prober.lowered, prober.found, prober.names) == ({}, {}, {})

    await probed(Network(1400), work, monkeypatch)


# --- what is made of it


def test_routes_carry_it() -> None:
    mtus = new_table()
    pool = NodePool("b", IP, "fd77::7")
    tunnelled = Tunnelled(lambda: 9, {4: "10.50.1.1", 6: "fd00::1"}, mtus)
    direct = Direct((4, 6), mtus)

    def written(prefix: str) -> tuple[int, int]:
        ways = (tunnelled.route(prefix, pool), direct.route(prefix, pool))
        one, other = (way.mtu for way in ways if way is not None)
        return one, other

    assert written("10.50.2.0/24") == written("fd00:2::/64") == (0, 0)
    mtus.source(path_mtu.SOURCE).upsert_many([(IP, 1400), ("fd77::7", 1420)])
    assert written("10.50.2.0/24") == (1350, 1400)
    assert written("fd00:2::/64") == (1350, 1420)


def test_ipv6_within_the_tunnel_is_told_no_less_than_it_believes() -> None:
    assert [carried_inside(1300, version) for version in (4, 6)] == [1250, 1280]


# --- over a real connection


async def test_a_packet_that_fits_arrives_and_one_that_is_sent_cut_does_not() -> None:
    """The listener that takes only short segments is like a way that is known to carry less."""
    (port,) = free_ports(1)
    server = HealthServer("default/a", ["127.0.0.1", "::1"], port)
    task = asyncio.create_task(server.run())
    try:
        for ip in ("127.0.0.1", "::1"):
            await eventually(partial(answers, ip, port), f"answer at {ip}")
        for ip in ("127.0.0.1", "::1"):
            for length in (LEAST, FULL, path_mtu.LONGEST):
                assert await probes.arrives(ip, port, length), (ip, length)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    with socket.create_server(("127.0.0.1", 0)) as short:
        short.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
        answering = asyncio.create_task(_answer_once(short))
        assert not await probes.arrives("127.0.0.1", short.getsockname()[1], FULL)
        assert await answering


async def answers(ip: str, port: int) -> bool:
    _, http = await probes.hello(ip, port)
    return not http.error


async def _answer_once(listener: socket.socket) -> bool:
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    connection, _ = await loop.sock_accept(listener)
    with connection:
        connection.setblocking(False)
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += await loop.sock_recv(connection, 1 << 16)
        await loop.sock_sendall(connection, b"HTTP/1.1 200 OK\r\n\r\n")
    return len(asked) > FULL


async def test_nobody_there_is_no_arrival() -> None:
    (port,) = free_ports(1)
    assert not await probes.arrives("127.0.0.1", port, FULL)
