# SPDX-License-Identifier: Apache-2.0
"""The endpoint manager: whatever calls come in whatever order, nothing leaks and nobody is confused."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import checkpoint as checkpoint_module
from agent import endpoints as endpoints_module
from agent.checkpoint import Checkpoint
from agent.endpoint import Endpoint, Port, State
from agent.endpoints import EndpointManager
from agent.errors import AddressTaken, AgentError, EndpointNotFound, EndpointRefused, PoolExhausted
from agent.pool import Pool
from core.errors import HoldfastError
from core.reconciler import Kind, Status
from core.table import Table
from identity.filter import LabelFilter
from identity.labels import Labels
from tests.support.agent_models import ModelAllocator, ModelKernel
from tests.support.eventually import eventually

NETWORK = IPv4Network("10.9.0.0/29")  # five addresses
DONE = Status(Kind.DONE)


class Host:
    """A manager between the models, as one life of the agent; `restart` begins the next."""

    def __init__(self, directory: Path, kernel: ModelKernel | None = None) -> None:
        self.directory = directory
        self.kernel = kernel or ModelKernel()
        self.allocator = ModelAllocator()
        self.table: Table[int, Endpoint] = Table("endpoints", ("agent",))
        self.pool = Pool(NETWORK)
        self.manager = EndpointManager(
            self.table,
            self.pool,
            Checkpoint(directory),
            self.allocator,
            LabelFilter(()),
            self.kernel,
        )
        self.kernel.wanted = self.table.source("agent").entries()  # type: ignore[assignment]

    def restart(self) -> Host:
        """SIGKILL and a new start: the kernel and the checkpoint are what is left."""
        again = Host(self.directory, self.kernel)
        self.kernel.identities.clear()  # the reconciler writes them anew
        self.kernel.policies.clear()
        again.manager.restore()
        return again

    async def start(self, name: str, **labels: str) -> Endpoint:
        """What the engine's calls do for one container."""
        made = await self.manager.create(network_id="n", engine_id=name)
        await self.manager.connect(made.id)
        return await self.manager.identify(made.id, f"c-{name}", name, labels, "holdfast")

    def check(self) -> None:
        """What must hold whenever nothing is under way."""
        self.kernel.catch_up()
        present = {each.id: each for _, each in self.table.items()}
        connected = {number: each.ipv4 for number, each in present.items() if each.connected}
        assert self.kernel.interfaces == connected
        known = {each.ipv4: each.identity for each in present.values() if each.identity}
        assert self.kernel.identities == known
        assert self.kernel.policies.keys() == {each.id for each in present.values() if each.identity}
        assert self.pool.used == len(present)
        assert [each.id for each in Checkpoint(self.directory).endpoints()] == sorted(present)
        assert Checkpoint(self.directory).endpoints() == [present[number] for number in sorted(present)]
        used = Counter(Labels.parse(each.labels) for each in present.values() if each.identity)
        assert self.allocator.in_use() == used


@asynccontextmanager
async def a_host() -> AsyncIterator[Host]:
    with tempfile.TemporaryDirectory() as directory:
        host = Host(Path(directory))
        try:
            yield host
        finally:
            await host.manager.stop()


def run(test: Callable[[Host], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with a_host() as host:
            await test(host)

    asyncio.run(main())


def test_a_life() -> None:
    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        host.check()
        assert endpoint.identity == 256
        assert Labels.parse(endpoint.labels).get("container", "app") is not None
        assert host.manager.state(endpoint, DONE) is State.READY
        assert host.manager.by_engine_id("web") == endpoint
        await host.manager.disconnect(endpoint.id)
        host.check()
        await host.manager.delete(endpoint.id)
        host.check()
        assert host.manager.by_engine_id("web") is None
        assert host.manager.history(endpoint.id) == ()
        with pytest.raises(EndpointNotFound):
            host.manager.get(endpoint.id)

    run(story)


def test_states_of_a_life() -> None:
    async def story(host: Host) -> None:
        manager, pending = host.manager, Status(Kind.PENDING)
        made = await manager.create(network_id="n", engine_id="web")
        assert manager.state(made, pending) is manager.state(made, DONE) is State.CREATING
        assert manager.state(await manager.connect(made.id), DONE) is State.CREATING
        joined = manager.join(made.id, "/run/netns/web")
        assert manager.state(joined, DONE) is State.WAITING_FOR_IDENTITY
        ready = await manager.identify(made.id, "c-web", "web", {}, "holdfast")
        assert manager.state(ready, pending) is State.REGENERATING
        assert manager.state(ready, DONE) is State.READY
        assert manager.state(ready, Status(Kind.ERROR, "no")) is State.NOT_READY
        host.kernel.settling.clear()
        leaving = asyncio.create_task(manager.disconnect(made.id))
        while manager.get(made.id).connected:
            await asyncio.sleep(0)
        assert manager.state(manager.get(made.id), pending) is State.DISCONNECTING
        assert manager.state(manager.get(made.id), DONE) is State.DISCONNECTING, "it has its identity still"
        host.kernel.settling.set()
        await leaving
        assert manager.state(manager.get(made.id), DONE) is State.DISCONNECTED
        told = [each.state for each in manager.history(made.id)]
        wanted = "creating", "waiting-for-identity", "regenerating", "ready", "disconnecting"
        assert told == list(wanted)

    run(story)


def test_an_interface_that_does_not_exist_was_not_handed_over() -> None:
    """Somebody asks for the identity inside Join, before the interface was made."""

    async def story(host: Host) -> None:
        made = await host.manager.create(network_id="n", engine_id="web")
        host.kernel.settling.clear()
        joining = asyncio.create_task(host.manager.connect(made.id))
        identity = asyncio.create_task(host.manager.identify(made.id, "c", "web", {}, "holdfast"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not host.manager.get(made.id).handed_over
        host.kernel.settling.set()
        await joining
        assert (await identity).handed_over
        host.check()

    run(story)


def test_an_interface_that_could_not_be_made_was_not_handed_over() -> None:
    async def story(host: Host) -> None:
        made = await host.manager.create(network_id="n", engine_id="web")
        host.kernel.trouble[made.id] = "no memory"
        with pytest.raises(AgentError, match="no memory"):
            await host.manager.identify(made.id, "c", "web", {}, "holdfast")
        assert not host.manager.get(made.id).handed_over
        assert host.manager.get(made.id).identity, "others must know who it is"
        host.kernel.trouble.clear()
        await host.manager.delete(made.id)
        host.check()

    run(story)


def test_every_call_twice() -> None:
    async def story(host: Host) -> None:
        first = await host.start("web", app="web")
        assert await host.start("web", app="web") == first
        await host.manager.delete(first.id)
        await host.manager.delete(first.id)
        await host.manager.disconnect(first.id)
        host.check()

    run(story)


def test_labels_change() -> None:
    async def story(host: Host) -> None:
        web = await host.start("one", app="web")
        other = await host.start("two", app="web")
        assert web.identity == other.identity
        moved = await host.manager.identify(web.id, "c-one", "renamed", {"app": "db"}, "holdfast")
        assert moved.identity != other.identity
        assert moved.container_name == "renamed"
        host.check()

    run(story)


def test_a_malformed_label_refuses_the_container_by_name() -> None:
    async def story(host: Host) -> None:
        made = await host.manager.create(network_id="n", engine_id="evil")
        await host.manager.connect(made.id)
        with pytest.raises(EndpointRefused, match="evil"):
            await host.manager.identify(made.id, "c", "evil", {"app": "a;k8s:role=admin"}, "holdfast")
        assert host.manager.get(made.id).enforced_identity == 5
        host.check()

    run(story)


def test_a_container_can_not_choose_its_network_label() -> None:
    async def story(host: Host) -> None:
        endpoint = await host.start("web", **{"holdfast.network": "forged"})
        assert "forged" not in endpoint.labels
        assert "holdfast.network=holdfast" in endpoint.labels

    run(story)


def test_etcd_is_away_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints_module, "IDENTITY_PATIENCE_S", 0.01)

    async def story(host: Host) -> None:
        host.allocator.available.clear()
        with pytest.raises(AgentError, match="no identity after"):
            await host.start("web", app="web")
        endpoint = host.manager.by_engine_id("web")
        assert endpoint is not None
        assert host.manager.state(endpoint, DONE) is State.WAITING_FOR_IDENTITY
        with pytest.raises(AgentError, match="no identity after"):
            await host.start("web", app="web")
        host.allocator.available.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert host.manager.get(endpoint.id).identity == 256
        host.check()

    run(story)


def test_etcd_refuses_and_is_asked_again() -> None:
    async def story(host: Host) -> None:
        host.allocator.failures = 1
        assert (await host.start("web", app="web")).identity == 256
        assert any(not each.ok for each in host.manager.history(1))
        host.check()

    run(story)


def test_removed_while_etcd_is_away() -> None:
    async def story(host: Host) -> None:
        host.allocator.available.clear()
        starting = asyncio.create_task(host.start("web", app="web"))
        await asyncio.sleep(0.01)
        await host.manager.delete(1)
        with pytest.raises(EndpointNotFound):
            await starting
        host.allocator.available.set()
        await asyncio.sleep(0.01)
        host.check()
        assert len(host.table) == 0

    run(story)


def test_identified_after_it_has_left() -> None:
    """The engine watch asks the engine for labels while the container leaves."""

    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        await host.manager.disconnect(endpoint.id)
        with pytest.raises(EndpointNotFound):
            await host.manager.identify(endpoint.id, "c-web", "web", {"app": "web"}, "holdfast")
        host.check()

    run(story)


def test_a_caller_that_gives_up_does_not_stop_an_end() -> None:
    """The driver's call is cut off after its timeout; the address must not be lost for ever."""

    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        for pause in range(8):
            host.kernel.settling.clear()
            call = asyncio.create_task(host.manager.delete(endpoint.id))
            for _ in range(pause):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait({call})
            host.kernel.settling.set()
            await asyncio.sleep(0.01)
            await host.manager.delete(endpoint.id)
            host.check()
            assert len(host.table) == 0
            endpoint = await host.start("web", app="web")

    run(story)


def test_the_kernel_does_not_let_go() -> None:
    """Identity, policy and address stay until the interface is gone."""

    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        host.kernel.trouble[endpoint.id] = "device is busy"
        for _ in range(2):
            with pytest.raises(AgentError, match="device is busy"):
                await host.manager.delete(endpoint.id)
        assert host.kernel.identities == {endpoint.ipv4: endpoint.identity}
        assert host.pool.holder(IPv4Address(endpoint.ipv4)) is not None
        del host.kernel.trouble[endpoint.id]
        await host.manager.delete(endpoint.id)
        host.check()

    run(story)


def test_the_kernel_refuses_an_interface() -> None:
    async def story(host: Host) -> None:
        made = await host.manager.create(network_id="n", engine_id="web")
        host.kernel.trouble[made.id] = "no memory"
        with pytest.raises(AgentError, match=r"interface of endpoint 1 .* no memory"):
            await host.manager.connect(made.id)
        assert host.manager.history(made.id)[-1].message == "no memory"

    run(story)


def test_published_ports() -> None:
    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        port = Port(6, 80, 8080, 8080)
        await host.manager.publish(endpoint.id, (port,))
        assert host.kernel.ports == {endpoint.id: (port,)}
        host.kernel.port_trouble = "nft is not there"
        with pytest.raises(AgentError, match="nft is not there"):
            await host.manager.publish(endpoint.id, (port, Port(6, 81, 8081, 8081)))
        assert host.manager.get(endpoint.id).ports == ()
        host.check()

    run(story)


@pytest.mark.parametrize("present", [True, False], ids=["it lives", "it went with a power cut"])
def test_published_ports_of_a_former_life(present: bool) -> None:
    """Whoever is still there keeps them; those of a container that is gone are free for its next life."""

    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        port = Port(6, 80, 8080, 8080)
        await host.manager.publish(endpoint.id, (port,))
        again = Host(host.directory, host.kernel)
        again.manager.has_interface = lambda name: present and name == endpoint.interface
        again.manager.restore()
        assert again.manager.get(endpoint.id).ports == ((port,) if present else ())

    run(story)


def test_the_pool_is_exhausted_and_recovers() -> None:
    async def story(host: Host) -> None:
        for number in range(5):
            await host.start(str(number))
        with pytest.raises(PoolExhausted, match="5 of 5"):
            await host.start("one too many")
        host.check()
        await host.manager.delete(1)
        await host.start("fits again")
        host.check()

    run(story)


def test_a_full_disk_refuses_new_endpoints_and_lets_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")

        def full(path: Path, data: bytes, *, durable: bool) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(checkpoint_module, "write_atomic", full)
            with pytest.raises(OSError, match="No space"):
                await host.start("new")
            await host.manager.disconnect(endpoint.id)
            with pytest.raises(OSError, match="No space"):
                host.manager.store._checkpoint.save_unsaved()
        host.manager.store._checkpoint.save_unsaved()
        host.check()
        await host.manager.delete(endpoint.id)
        host.check()

    run(story)


def test_restart() -> None:
    async def story(host: Host) -> None:
        web = await host.start("web", app="web")
        left = await host.start("left", app="db")
        await host.manager.disconnect(left.id)
        api = await host.manager.create(endpoint_id=900, netns="/run/netns/x")
        again = host.restart()
        assert again.manager.get(web.id) == web
        assert again.manager.state(web, DONE) is State.RESTORING
        assert again.table.get(api.id) is None  # nobody was told of it
        assert not again.table.in_sync
        again.manager.restored()
        assert again.table.in_sync
        assert again.manager.state(web, DONE) is State.READY
        again.check()
        assert (await again.start("web", app="web")) == web
        await again.manager.delete(left.id)
        again.check()
        assert (await again.start("new")).id > web.id

    run(story)


def test_killed_in_the_middle_of_leaving() -> None:
    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        host.kernel.trouble[endpoint.id] = "busy"
        with pytest.raises(AgentError):
            await host.manager.disconnect(endpoint.id)
        host.kernel.trouble.clear()
        again = host.restart()
        assert again.kernel.identities == {}
        await again.manager.delete(endpoint.id)
        again.check()

    run(story)


def test_what_was_killed_in_the_middle_of_leaving_leaves() -> None:
    """The next life ends what was begun: nobody uses the identity, so the endpoint must not name it."""

    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        host.kernel.trouble[endpoint.id] = "busy"
        with pytest.raises(AgentError):
            await host.manager.disconnect(endpoint.id)
        host.kernel.trouble.clear()
        again = host.restart()
        assert again.manager.get(endpoint.id).identity, "until its interface is gone"
        await eventually(lambda: not again.manager.get(endpoint.id).identity, "it has left")
        assert again.kernel.interfaces == {}
        again.check()

    run(story)


def test_a_number_that_the_cluster_does_not_hand_out_is_replaced() -> None:
    async def story(host: Host) -> None:
        endpoint = await host.start("web", app="web")
        again = Host(host.directory, host.kernel)
        again.allocator.handed_out = range(0)
        again.manager.restore()
        await asyncio.sleep(0.01)
        assert again.manager.get(endpoint.id).identity == 256
        again.check()

    run(story)


def test_renumbered_by_etcd() -> None:
    async def story(host: Host) -> None:
        web = await host.start("web", app="web")
        gone = await host.start("gone", app="web")
        await host.manager.disconnect(gone.id)
        host.manager.renumber(Labels.parse(web.labels), 4711)
        assert host.manager.get(web.id).identity == 4711
        assert host.manager.get(gone.id).identity == 0
        host.check()

    run(story)


def test_given_numbers_and_addresses() -> None:
    async def story(host: Host) -> None:
        made = await host.manager.create(endpoint_id=77, address=IPv4Address("10.9.0.6"))
        assert (made.id, made.ipv4, made.connected) == (77, "10.9.0.6", True)
        with pytest.raises(EndpointRefused, match="77"):
            await host.manager.create(endpoint_id=77)
        with pytest.raises(EndpointRefused, match="70000"):
            await host.manager.create(endpoint_id=70000)
        with pytest.raises(AddressTaken, match="endpoint 77"):
            await host.manager.create(address=IPv4Address("10.9.0.6"))
        host.check()

    run(story)


NAMES = ("a", "b", "c")
CALLS = st.tuples(
    st.sampled_from(
        ("create", "connect", "identify", "relabel", "publish", "disconnect", "delete", "renumber", "kill")
    ),
    st.sampled_from(NAMES),
    st.integers(0, 6),  # so many turns of the loop until the next call
    st.booleans(),  # the caller gives up before the next call
)


@settings(deadline=None, max_examples=120)
@given(st.lists(CALLS, max_size=25), st.booleans())
def test_any_calls_at_any_time(calls: list[tuple[str, str, int, bool]], slow_etcd: bool) -> None:
    """Concurrent, cut off, in any order; when all is quiet everything agrees (the models check the rest)."""

    async def story() -> None:
        with tempfile.TemporaryDirectory() as directory:
            host = Host(Path(directory))
            for verb, name, turns, gives_up in calls:
                if verb == "kill":
                    await quiet(host)
                    host = host.restart()
                    continue
                if slow_etcd:
                    host.allocator.available.clear()
                task = asyncio.create_task(one_call(host, verb, name))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if gives_up:
                    task.cancel()
                host.allocator.available.set()
                under_way.append(task)
            await quiet(host)
            host.check()

    async def quiet(host: Host) -> None:
        await asyncio.gather(*under_way, return_exceptions=True)
        under_way.clear()
        for _ in range(20):
            await asyncio.sleep(0)
        await host.manager.stop()

    under_way: list[asyncio.Task[None]] = []
    asyncio.run(story())


async def one_call(host: Host, verb: str, name: str) -> None:
    manager = host.manager
    try:
        if verb == "create":
            await manager.create(network_id="n", engine_id=name)
            return
        endpoint = manager.by_engine_id(name)
        if endpoint is None:
            return
        if verb in ("identify", "relabel"):
            await manager.identify(endpoint.id, "c", name, {"app": verb}, "holdfast")
        elif verb == "publish":
            await manager.publish(endpoint.id, (Port(6, 80, 8000 + endpoint.id, 8000 + endpoint.id),))
        elif verb == "renumber" and endpoint.labels:
            manager.renumber(Labels.parse(endpoint.labels), endpoint.identity)
        elif verb != "renumber":
            await getattr(manager, verb)(endpoint.id)
    except HoldfastError:
        return
