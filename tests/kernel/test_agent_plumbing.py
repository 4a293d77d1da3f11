# SPDX-License-Identifier: Apache-2.0
"""Endpoints on real devices, over the lives of several agents: one that is killed between any two calls of
the engine, or inside one, leaves what the next one goes on with, and the container's interface stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from ipaddress import IPv4Network
from pathlib import Path

import msgspec
import pytest

from agent.checkpoint import Checkpoint
from agent.endpoint import Endpoint, Port
from agent.endpoints import EndpointManager
from agent.plumbing import EndpointTarget, Place, PolicyMapStore
from agent.pool import Pool
from agent.programs import HostMaps, HostPrograms, Templates
from core.reconciler import Kind, Reconciler, Status
from core.table import Table
from datapath.constants import DatapathOptions
from datapath.netlink import Netlink
from identity.filter import LabelFilter
from identity.labels import Labels
from policy.model import ALLOW, ANY_TRANSPORT, Direction, PolicyKey
from tests.support.agent_models import ModelAllocator
from tests.support.bpf import own_bpffs
from tests.support.bpflab import CATALOGUE, OBJECTS
from tests.support.hostnet import HOST_ON_WIRE, MTU, POOL, ROUTER, HostNet, host_net
from tests.support.netns import Netns, new_netns
from tests.support.require import require_root, require_tools
from tests.support.traffic import seen_by_server, serving

ENGINE_ID, SANDBOX, PORT = "e1", "/run/netns/web", 8000
PUBLISHED = (Port(6, 80, 8080, 8080),)


class Interfaces:
    """agent.kernel.Kernel, as far as it is interfaces."""

    def __init__(self, reconciler: Reconciler[int, Endpoint]) -> None:
        self._reconciler = reconciler

    def endpoint_identified(self, endpoint: Endpoint, labels: Labels) -> None: ...

    def endpoint_removed(self, endpoint: Endpoint) -> None: ...

    async def address_freed(self, address: str) -> None: ...

    async def published(self, endpoints: Iterable[Endpoint]) -> Status:
        return Status(Kind.DONE)

    async def interface_settled(self, endpoint_id: int) -> Status:
        return await self._reconciler.settled(endpoint_id)

    async def settled(self, endpoint: Endpoint) -> Status:
        return await self.interface_settled(endpoint.id)


class Agent:
    """One life: everything in it is new but the checkpoint and the kernel."""

    def __init__(self, directory: Path, net: HostNet, programs: HostPrograms) -> None:
        table: Table[int, Endpoint] = Table("endpoints", ("agent",))
        self.policy_maps = PolicyMapStore(CATALOGUE, programs.root)
        place = Place(programs.root, MTU, (POOL,), {4: (HOST_ON_WIRE,)})
        self.lxc = programs.maps.lxc
        self.target = EndpointTarget(place, net.devices, net.routes, self.lxc, self.policy_maps, programs)
        self.reconciler = Reconciler("endpoints", table, self.target)
        self.manager = EndpointManager(
            table,
            Pool(IPv4Network(POOL)),
            Checkpoint(directory),
            ModelAllocator(),
            LabelFilter(()),
            Interfaces(self.reconciler),
        )
        self.manager.restore()
        self._running = asyncio.create_task(self.reconciler.run())

    async def hang(self) -> None:
        """From now on nothing gets into the kernel."""
        self._running.cancel()
        await asyncio.wait({self._running})

    async def kill(self) -> None:
        await self.hang()
        await self.manager.stop()

    async def compared(self) -> None:
        """Return when what was restored is in the kernel and what nobody has was removed from it."""
        await self.reconciler.wait_idle()
        self.manager.restored()
        while not self.reconciler.has_pruned:
            await asyncio.sleep(0.005)
        assert self.reconciler.errors == {}


class Host:
    """A host with one container; its engine makes one call after the other."""

    def __init__(self, directory: Path, net: HostNet, netlink: Netlink, root: Path, inside: Netns) -> None:
        self.net, self.inside, self.root, self.directory = net, inside, root, directory
        self._netlink = netlink
        self._stack = contextlib.ExitStack()
        self.agent = self.life()
        self.eth0 = 0  # index of the container's interface once it has one
        self.allowed = False
        self.calls: dict[str, Callable[[], Awaitable[object]]] = {
            "CreateEndpoint": self.create,
            "Join": self.join,
            "move": self.move,
            "ProgramExternalConnectivity": lambda: self.agent.manager.publish(self.known.id, PUBLISHED),
            "EndpointOperInfo": self.identify,
            "EndpointOperInfo again": self.identify,
            "RevokeExternalConnectivity": lambda: self.agent.manager.publish(self.known.id, ()),
            "Leave": lambda: self.agent.manager.disconnect(self.known.id),
            "DeleteEndpoint": self.delete,
        }

    def life(self) -> Agent:
        maps = HostMaps.open(CATALOGUE, self.root)
        self._stack.callback(maps.close)
        templates = {family: Templates.read(OBJECTS, family) for family in CATALOGUE.families}
        programs = HostPrograms(CATALOGUE, self.root, maps, templates, DatapathOptions(), self._netlink)
        return Agent(self.directory, self.net, programs)

    async def next_life(self) -> None:
        await self.agent.kill()
        self.agent = self.life()
        await self.agent.compared()

    async def stop(self) -> None:
        await self.agent.kill()
        self._stack.close()

    @property
    def known(self) -> Endpoint:
        found = self.agent.manager.by_engine_id(ENGINE_ID)
        assert found is not None
        return found

    # --- what the engine does

    async def create(self) -> None:
        await self.agent.manager.create(network_id="n", engine_id=ENGINE_ID)

    async def join(self) -> None:
        await self.agent.manager.connect(self.known.id)
        self.agent.manager.join(self.known.id, SANDBOX)

    async def move(self) -> None:
        await self.net.devices.move_inside(self.known.peer, self.inside.path, "eth0", self.known.ipv4)
        self.eth0 = self.index_of("eth0")
        # The kernel's link watcher starts the host side a moment later; until then it sends nothing.
        while "state UP" not in self.net.host.run("ip", "link", "show", self.known.interface):
            await asyncio.sleep(0.005)

    async def identify(self) -> None:
        endpoint = await self.agent.manager.identify(self.known.id, "c", "web", {"app": "web"}, "holdfast")
        allow = {PolicyKey(0, *ANY_TRANSPORT, way): ALLOW for way in Direction}
        self.agent.policy_maps.get(endpoint.id).apply(allow.items(), ())
        self.allowed = True

    async def delete(self) -> None:
        found = self.agent.manager.by_engine_id(ENGINE_ID)
        if found is not None:
            await self.agent.manager.delete(found.id)

    async def call(self, name: str) -> None:
        await self.calls[name]()
        if name == "Leave":
            self.eth0 = 0
            assert self.index_of("eth0") == 0

    async def die_inside(self, name: str) -> None:
        """Make a call that the agent notes and then dies of: nothing of it gets into the kernel."""
        await self.agent.hang()
        call = asyncio.ensure_future(self.calls[name]())
        for _ in range(50):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        self.eth0 = 0 if name in ("Leave", "DeleteEndpoint") else self.eth0
        await self.next_life()

    # --- looking

    def index_of(self, device: str) -> int:
        links = json.loads(self.inside.run("ip", "-j", "link"))
        return next((link["ifindex"] for link in links if link["ifname"] == device), 0)

    async def check(self) -> None:
        """The container has the interface that it was given, and its packets are judged."""
        assert self.index_of("eth0") == self.eth0, "its interface"
        if self.eth0:
            with serving(self.net.host, PORT, address=ROUTER):
                seen = await asyncio.to_thread(seen_by_server, self.inside, ROUTER, PORT)
            assert seen == (self.known.ipv4 if self.allowed else None)

    async def is_clean(self) -> bool:
        left = [
            await self.net.devices.ours(),
            await self.net.routes.ours(),
            dict(self.agent.lxc.items()),
            self.agent.policy_maps.pinned(),
            Checkpoint(self.directory).endpoints(),
        ]
        return not any(left)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    require_root()
    require_tools("ip", "nsenter")
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(own_bpffs(tmp_path))
        async with host_net() as net, Netlink() as netlink:
            made = Host(tmp_path / "state", net, netlink, root, stack.enter_context(new_netns()))
            try:
                yield made
            finally:
                await made.stop()


CALLS = (
    *("CreateEndpoint", "Join", "move", "ProgramExternalConnectivity", "EndpointOperInfo"),
    *("EndpointOperInfo again", "RevokeExternalConnectivity", "Leave", "DeleteEndpoint"),
)
# docker run: the namespace is made, and the interface moved, when all calls of a start were answered.
RUN = tuple(name for name in CALLS if name != "move")
RUN = (*RUN[:5], "move", *RUN[5:])


@pytest.mark.parametrize("order", [CALLS, RUN], ids=["connect", "run"])
@pytest.mark.parametrize("last", CALLS)
async def test_agent_that_dies_between_two_calls(host: Host, last: str, order: tuple[str, ...]) -> None:
    for name in order:
        await host.call(name)
        if name == last:
            await host.next_life()
        await host.check()
    assert await host.is_clean()


@pytest.mark.parametrize("order", [CALLS, RUN], ids=["connect", "run"])
@pytest.mark.parametrize("inside", [name for name in CALLS if name != "move"])
async def test_agent_that_dies_inside_a_call(host: Host, inside: str, order: tuple[str, ...]) -> None:
    """The engine's call fails; it asks the next agent the same."""
    for name in order:
        if name == inside:
            await host.die_inside(name)
            await host.check()
        await host.call(name)
        await host.check()
    assert await host.is_clean()


async def test_engine_moves_the_interface_while_no_agent_runs(host: Host) -> None:
    for name in ("CreateEndpoint", "Join"):
        await host.call(name)
    await host.agent.kill()
    await host.call("move")
    await host.next_life()
    await host.check()
    for name in ("EndpointOperInfo", "Leave", "DeleteEndpoint"):
        await host.call(name)
        await host.check()
    assert await host.is_clean()


async def test_what_somebody_else_left_under_the_name_is_not_taken_over(host: Host) -> None:
    """A state directory was wiped: the number comes again while the former container still has its pair."""
    for name in ("CreateEndpoint", "Join", "move"):
        await host.call(name)
    former = (await host.net.devices.get(host.known.interface)).index
    known = host.known
    await host.agent.kill()
    Checkpoint(host.directory).drop_endpoint(known.id)
    host.agent = host.life()
    host.eth0 = 0
    await host.call("CreateEndpoint")
    assert host.known.id == known.id
    await host.call("Join")
    assert (await host.net.devices.get(host.known.interface)).index != former
    await host.call("move")
    await host.check()


async def test_pair_that_was_half_made_when_the_agent_died_in_join(host: Host) -> None:
    await host.call("CreateEndpoint")
    await host.die_inside("Join")
    endpoint = host.known
    await host.agent.kill()
    host.net.host.run("ip", "link", "set", endpoint.interface, "alias", "", "down")
    await host.next_life()
    for name in CALLS[1:]:
        await host.call(name)
        await host.check()
    assert await host.is_clean()


async def test_interface_that_is_gone_is_named(host: Host) -> None:
    """The container's namespace went while no agent ran: nothing can be put back into it."""
    for name in CALLS[:5]:
        await host.call(name)
    endpoint = host.known
    await host.agent.kill()
    await host.net.devices.delete(endpoint.interface)
    host.agent = host.life()
    await host.agent.reconciler.wait_idle()
    assert f"interface {endpoint.interface} of endpoint {endpoint.id} is gone" in str(
        host.agent.reconciler.errors
    )
    changed = msgspec.structs.replace(endpoint, handed_over=False, sandbox="")
    assert not changed.joined
    assert await host.agent.target.update([(endpoint.id, changed)]) == {}
