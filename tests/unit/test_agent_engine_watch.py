# SPDX-License-Identifier: Apache-2.0
"""The self-healing path: what the driver missed is repaired, what is gone is collected after its grace."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent import checkpoint, engine, engine_watch
from agent import endpoints as endpoints_module
from agent.engine import EngineContainer
from agent.engine_watch import EngineWatch, unmanaged
from tests.support.driver_host import NETWORK, DriverHost, driver_host


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "SETTLE_S", 0.0)
    monkeypatch.setattr(engine_watch, "COLLECT_AFTER_S", 0.05)


@contextlib.asynccontextmanager
async def watching(host: DriverHost) -> AsyncIterator[EngineWatch]:
    watch = EngineWatch(host.engine, host.manager, host.driver)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def run(directory: Path, test: Callable[[DriverHost], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with driver_host(directory) as host:
            await asyncio.wait_for(test(host), 20)

    asyncio.run(main())


def test_a_container_that_went_while_nobody_looked(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        await host.start("stays")
        await host.start("goes")
        host.fake.remove_container("c-goes")
        async with watching(host) as watch:
            await watch.first_list.wait()
            assert len(host.table) == 2  # within its grace
            await until(lambda: len(host.table) == 1)
        assert host.manager.by_engine_id("e-stays") is not None
        assert host.manager.pool.used == 1

    run(tmp_path, story)


def test_a_container_that_comes_back_within_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_watch, "COLLECT_AFTER_S", 60.0)

    async def story(host: DriverHost) -> None:
        await host.start("web")
        watch = EngineWatch(host.engine, host.manager, host.driver)
        host.fake.containers["c-web"]["State"] = "exited"
        await watch.refresh()
        assert watch._list_pause() < engine_watch.COLLECT_AFTER_S
        host.fake.containers["c-web"]["State"] = "created"  # it is starting
        await watch.refresh()
        assert watch._list_pause() == engine_watch.LIST_EVERY_S
        host.fake.containers["c-web"]["State"] = "exited"
        await watch.refresh()
        await host.stop("web")  # the driver was told: nothing is left to wait for
        await watch.refresh()
        assert watch._list_pause() == engine_watch.LIST_EVERY_S

    run(tmp_path, story)


def test_created_and_never_joined(tmp_path: Path) -> None:
    """The engine died between the two calls: the interface that was begun is collected as well."""

    async def story(host: DriverHost) -> None:
        await host.on("CreateEndpoint", "e1", Interface={})
        host.kernel.catch_up()
        assert host.kernel.interfaces
        async with watching(host) as watch:
            await watch.first_list.wait()
            assert len(host.table) == 1  # within its grace
            await until(lambda: not len(host.table))
        assert (host.manager.pool.used, host.kernel.interfaces) == (0, {})

    run(tmp_path, story)


def test_an_engine_that_does_not_answer_deletes_nothing(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        await host.start("web")
        async with watching(host) as watch:
            await watch.first_list.wait()
            for status, body in ((500, b"starting"), (200, b"<html>"), (200, b"{}")):
                host.fake.broken["/containers/json"] = (status, body)
                host.fake.emit(b'{"Action": "start"}\n')
                await until(lambda: watch.view.error)
                host.fake.broken.clear()
                await until(lambda: not watch.view.error)
        assert len(host.table) == 1

    run(tmp_path, story)


def test_events_are_followed_and_the_stream_is_opened_again(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        async with watching(host) as watch:
            await until(lambda: watch.view.version and host.fake.listeners)
            host.fake.end_streams()
            await until(lambda: host.fake.listeners > 1)
            host.fake.add_container("c9", "new", state="running", mode="bridge")
            host.fake.emit(b'{"Action": "exec_create: sh"}\n{"Action": "start"}\n')
            await until(lambda: watch.view.containers == 1)
            assert watch.view.error == ""

    run(tmp_path, story)


LATE = 'failed to add endpoint: legacy plugin: Post "http://%2Frun%2Fdocker%2Fplugins%2Fholdfast.sock/Plugin'


@pytest.mark.parametrize(
    "error",
    [
        LATE,
        "failed to add endpoint: legacy plugin: Plugin.Activate: nobody is here",
        "failed to create endpoint web on network hf: NetworkDriver.CreateEndpoint: nobody is here",
        'plugin "holdfast" not found',
    ],
)
def test_a_container_that_was_left_exited_is_started_again_once(tmp_path: Path, error: str) -> None:
    async def story(host: DriverHost) -> None:
        host.fake.add_container("c1", "web", network=NETWORK)
        host.fake.end("c1", error)
        host.fake.refusal = "no space left on device"
        async with watching(host) as watch:
            await until(lambda: host.fake.started)
            for _ in range(3):
                listed = watch.view.listed_at
                host.fake.emit(b'{"Action": "die"}\n')
                await until(lambda: watch.view.listed_at > listed)  # noqa: B023
            assert host.fake.started == ["c1"]
            host.fake.refusal = ""
            host.fake.end_streams()  # another engine, another chance
            await until(lambda: host.fake.containers["c1"]["State"] == "running")

    run(tmp_path, story)


def test_a_container_of_which_the_engine_tells_nothing_yet_is_asked_for_again(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        host.fake.add_container("c1", "web", network=NETWORK)
        host.fake.end("c1", LATE)
        host.fake.broken["/containers/c1/json"] = (500, b'{"message": "busy"}')
        async with watching(host) as watch:
            await until(lambda: any("c1" in each for each in host.fake.asked))
            assert host.fake.started == []
            host.fake.broken.clear()
            while not host.fake.started:
                listed = watch.view.listed_at
                host.fake.emit(b'{"Action": "die"}\n')
                await until(lambda: watch.view.listed_at > listed)  # noqa: B023
            assert host.fake.started == ["c1"]

    run(tmp_path, story)


def test_a_network_that_can_not_be_written_stops_nothing(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        def full(path: Path, data: bytes, *, durable: bool) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        kept = host.driver._checkpoint
        host.driver.networks.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(checkpoint, "write_atomic", full)
            async with watching(host) as watch:
                await watch.first_list.wait()
                assert NETWORK in host.driver.networks
                with pytest.raises(OSError, match="No space left"):
                    kept.save_unsaved()
        saved = len(kept.networks())
        kept.save_unsaved()
        assert len(kept.networks()) == saved + 1

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("network", "error", "restart_policy"),
    [
        pytest.param(NETWORK, "", "always", id="ended by itself"),
        pytest.param(NETWORK, "OCI runtime create failed: exec: no such file", "always", id="broken image"),
        pytest.param(NETWORK, LATE, "no", id="whoever started it was told"),
        pytest.param(NETWORK, LATE, "on-failure", id="not started at boot"),
        pytest.param("", LATE, "always", id="not on our network"),
    ],
)
def test_what_nobody_waits_for_is_not_started(
    tmp_path: Path, network: str, error: str, restart_policy: str
) -> None:
    async def story(host: DriverHost) -> None:
        host.fake.add_container("c1", "web", network=network)
        host.fake.end("c1", error, restart_policy)
        async with watching(host) as watch:
            await until(lambda: not network or any("c1" in each for each in host.fake.asked))
            listed = watch.view.listed_at
            host.fake.emit(b'{"Action": "die"}\n')
            await until(lambda: watch.view.listed_at > listed)
        assert host.fake.started == []
        assert host.fake.containers["c1"]["State"] == "exited"

    run(tmp_path, story)


def test_an_endpoint_without_identity_gets_it(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        await host.on("CreateEndpoint", "e1", Interface={})
        await host.on("Join", "e1", SandboxKey="/run/netns/e1")
        host.fake.add_container("c1", "web", network=NETWORK, endpoint="e1", labels={"app": "web"})
        async with watching(host):
            await until(lambda: host.manager.get(1).identity)
        assert host.manager.get(1).container_name == "web"

    run(tmp_path, story)


def test_a_label_that_refuses_one_does_not_keep_the_others_back(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        for engine_id, labels in (("e1", {"app": "a;b"}), ("e2", {"app": "web"})):
            await host.on("CreateEndpoint", engine_id, Interface={})
            await host.on("Join", engine_id, SandboxKey=f"/run/netns/{engine_id}")
            host.fake.add_container(engine_id, engine_id, network=NETWORK, endpoint=engine_id, labels=labels)
        async with watching(host):
            await until(lambda: host.manager.get(2).identity)
        assert host.manager.get(1).identity == 0

    run(tmp_path, story)


def test_an_endpoint_that_nobody_has_joined_yet_is_left_to_the_driver(tmp_path: Path) -> None:
    """The list meets a start between CreateEndpoint and Join: its interface may not exist yet."""

    async def story(host: DriverHost) -> None:
        await host.on("CreateEndpoint", "e1", Interface={})
        host.fake.add_container("c1", "web", network=NETWORK, endpoint="e1", state="created")
        watch = EngineWatch(host.engine, host.manager, host.driver)
        await watch.refresh()
        assert not host.manager.get(1).handed_over
        await host.on("Join", "e1", SandboxKey="/run/netns/e1")
        await watch.refresh()
        assert (host.manager.get(1).handed_over, host.manager.get(1).identity) == (True, 256)

    run(tmp_path, story)


def test_the_first_list_does_not_wait_for_identities_nor_they_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While etcd is away: what was restored is complete all the same, and every container is looked at."""
    monkeypatch.setattr(endpoints_module, "IDENTITY_PATIENCE_S", 3600)

    async def story(host: DriverHost) -> None:
        host.allocator.available.clear()
        names = [f"e{number}" for number in range(5)]
        for each in names:
            await host.on("CreateEndpoint", each, Interface={})
            await host.on("Join", each, SandboxKey=f"/run/netns/{each}")
            host.fake.add_container(each, each, network=NETWORK, endpoint=each, labels={"app": each})
        async with watching(host) as watch:
            await watch.first_list.wait()
            await until(lambda: len(host.allocator.in_use()) == len(names))
            assert not any(endpoint.identity for _, endpoint in host.table.items())
            host.allocator.available.set()
            await until(lambda: all(endpoint.identity for _, endpoint in host.table.items()))

    run(tmp_path, story)


def test_renamed(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        await host.start("web")
        host.fake.containers["c-web"]["Names"] = ["/api"]
        host.fake.networks[NETWORK]["Containers"]["c-web"]["Name"] = "api"
        async with watching(host):
            await until(lambda: host.manager.get(1).container_name == "api")

    run(tmp_path, story)


def test_what_the_driver_has_identified_is_not_asked_for_again(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        started = await host.start("web", app="web")
        watch = EngineWatch(host.engine, host.manager, host.driver)
        host.fake.asked.clear()
        await watch.refresh()
        assert host.fake.asked == ["/v1.40/containers/json"]
        await host.stop("web")
        await watch.refresh()
        assert started.id not in host.driver.identified

    run(tmp_path, story)


def kill(container_id: str) -> bytes:
    return b'{"Action": "kill", "Actor": {"ID": "%s"}}\n' % container_id.encode()


def test_the_agent_ends_after_the_containers_that_are_ended_with_it(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        for name in ("stays", "goes"):
            await host.start(name)
        async with watching(host) as watch:
            await until(lambda: host.fake.listeners)
            await watch.last_calls()  # nobody was asked to end: nobody is waited for
            host.fake.emit(b'{"Action": "kill"}\n{"Action": "kill", "Actor": {}}\n' + kill("c-goes"))
            await until(lambda: watch._asked_to_end)
            leaving = asyncio.create_task(watch.last_calls())
            await host.on("Leave", "e-goes")
            assert not leaving.done()
            await host.on("DeleteEndpoint", "e-goes")
            await leaving
        assert {each.container_name for _, each in host.table.items()} == {"stays"}

    run(tmp_path, story)


def test_a_container_that_does_not_end_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_watch, "LAST_CALLS_S", 0.05)

    async def story(host: DriverHost) -> None:
        await host.start("hangs")
        async with watching(host) as watch:
            await until(lambda: host.fake.listeners)
            host.fake.emit(kill("c-hangs"))
            await until(lambda: watch._asked_to_end)
            await watch.last_calls()
        assert len(host.table) == 1

    run(tmp_path, story)


def test_an_engine_that_loads_its_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls the driver and answers nobody: they start denied, and all are identified when it answers."""
    monkeypatch.setattr(engine, "HURRIED_TIMEOUT_S", 0.05)

    async def story(host: DriverHost) -> None:
        async with watching(host) as watch:
            await watch.first_list.wait()
            host.fake.serving.clear()
            host.fake.end_streams()
            host.fake.asked.clear()
            for name in ("a", "b", "c"):
                assert (await host.start(name, app=name)).enforced_identity == 5
            # The second call of each start, and what comes later, did not ask.
            assert len([path for path in host.fake.asked if "/networks/" in path]) == 1
            host.fake.serving.set()
            await until(lambda: all(each.identity for _, each in host.table.items()))
        assert {each.container_name for _, each in host.table.items()} == {"a", "b", "c"}

    run(tmp_path, story)


def container(name: str, mode: str, **endpoints: str) -> EngineContainer:
    return EngineContainer(name, name, "running", {}, endpoints, mode)


def test_what_is_not_managed() -> None:
    running = {
        each.id: each
        for each in (
            container("ours", "hf", hf="e1"),
            container("both", "hf", hf="e2", bridge="e3"),
            container("host", "host"),
            container("none", "none"),
            container("bridge", "default", bridge="e4"),
            container("sidecar", "container:ours"),
            container("shares", "container:bridge"),
            container("orphan", "container:gone"),
        )
    }
    found = unmanaged(running, {"hf"})
    assert set(found) == {"both", "host", "bridge", "shares", "orphan"}
    assert "identity host" in found["host"]
    assert "network of bridge" in found["shares"]
    assert "another container" in found["orphan"]
