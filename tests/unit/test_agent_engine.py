# SPDX-License-Identifier: Apache-2.0
"""The engine's client against an engine that answers well, badly, half, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent import engine as engine_module
from agent.engine import Engine
from agent.errors import EngineError
from tests.support.fake_engine import FakeEngine

NETWORK, CONTAINER, ENDPOINT = "n" * 64, "c" * 64, "e" * 64


def run(directory: Path, test: Callable[[FakeEngine, Engine], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with FakeEngine(directory / "engine.sock") as fake:
            fake.add_network(NETWORK, "holdfast", subnet="10.9.1.0/24")
            fake.add_container(CONTAINER, "web", network=NETWORK, endpoint=ENDPOINT, labels={"app": "web"})
            engine = Engine(str(fake.socket))
            try:
                await asyncio.wait_for(test(fake, engine), 20)
            finally:
                await engine.close()

    asyncio.run(main())


def test_what_an_engine_says(tmp_path: Path) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        fake.add_network("bridge", "bridge", driver="bridge")
        assert await engine.version() == "20.10.24"
        network = await engine.network(NETWORK)
        assert network is not None
        assert (network.name, network.driver, network.subnet) == ("holdfast", "holdfast", "10.9.1.0/24")
        assert network.endpoints == {ENDPOINT: (CONTAINER, "web")}
        assert await engine.networks() == [network]
        container = await engine.container(CONTAINER)
        assert container is not None
        assert (container.name, container.state, container.labels) == ("web", "running", {"app": "web"})
        assert container.endpoints == {NETWORK: ENDPOINT}
        assert await engine.containers() == [container]
        assert await engine.container("d" * 64) is None
        assert await engine.network("unknown") is None

    run(tmp_path, story)


def test_the_api_version_follows_the_engine(tmp_path: Path) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        await engine.version()
        await engine.containers()
        assert fake.asked[-1] == "/v1.40/containers/json"
        fake.version = {"Version": "30", "MinAPIVersion": "1.44"}
        await engine.version()
        await engine.containers()
        assert fake.asked[-1] == "/containers/json"
        fake.version = {"Version": "30", "MinAPIVersion": "new"}
        assert await engine.version() == "30"

    run(tmp_path, story)


GARBAGE = {
    "no JSON": b"<html>",
    "binary": b"\x00\xff",
    "empty": b"",
    "a number": b"7",
    "an empty object": b"{}",
    "null": b"null",
    "a list of numbers": b"[7]",
    "a dict without anything": b'{"a": 1}',
    "wrong types inside": b'[{"Id": 1, "Names": 5, "NetworkSettings": []}]',
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_an_error_that_names_the_path(tmp_path: Path, body: bytes) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        for path in ("/containers/json", f"/networks/{NETWORK}"):
            fake.broken[path] = (200, body)
        with pytest.raises(EngineError, match="/containers/json"):
            await engine.containers()
        with pytest.raises(EngineError, match="/containers/json"):
            await engine.container(CONTAINER)
        with pytest.raises(EngineError, match="/networks/n"):
            await engine.network(NETWORK)
        with pytest.raises(EngineError, match="/networks/n"):
            await engine.networks()

    run(tmp_path, story)


def test_a_version_that_is_none(tmp_path: Path) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        fake.version = [1, 2]
        with pytest.raises(EngineError, match="/version"):
            await engine.version()

    run(tmp_path, story)


def test_refusals_half_answers_and_nobody(tmp_path: Path) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        fake.broken["/containers/json"] = (500, b'{"message": "disk is full"}')
        with pytest.raises(EngineError, match=r"500 to .*disk is full"):
            await engine.containers()
        fake.broken.clear()
        fake.cut.add("/containers/json")
        with pytest.raises(EngineError, match="did not answer /containers/json"):
            await engine.containers()
        fake.cut.clear()
        assert len(await engine.containers()) == 1
        nobody = Engine(str(tmp_path / "nobody.sock"))
        try:
            with pytest.raises(EngineError, match=r"nobody\.sock"):
                await nobody.version()
        finally:
            await nobody.close()

    run(tmp_path, story)


def test_a_hurried_question_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        assert len(await engine.hurried(engine.containers)) == 1
        fake.serving.clear()
        with monkeypatch.context() as short:
            short.setattr(engine_module, "HURRIED_TIMEOUT_S", 0.05)
            with pytest.raises(EngineError, match=r"did not answer within 0\.05 s"):
                await engine.hurried(engine.containers)
        fake.asked.clear()
        with pytest.raises(EngineError, match="is not asked again"):
            await engine.hurried(engine.containers)
        assert fake.asked == []
        patient = asyncio.create_task(engine.version())
        fake.serving.set()
        await patient  # it answers somebody: everybody may ask again
        assert len(await engine.hurried(engine.containers)) == 1

    run(tmp_path, story)


def test_a_hurried_question_is_asked_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "HOLD_OFF_S", 0.0)

    async def story(fake: FakeEngine, engine: Engine) -> None:
        fake.serving.clear()
        with monkeypatch.context() as short:
            short.setattr(engine_module, "HURRIED_TIMEOUT_S", 0.05)
            for _ in range(2):
                with pytest.raises(EngineError, match="did not answer within"):
                    await engine.hurried(engine.containers)
        fake.serving.set()
        assert len(await engine.hurried(engine.containers)) == 1

    run(tmp_path, story)


def test_events_until_the_stream_breaks(tmp_path: Path) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        seen: list[str] = []

        async def read() -> None:
            async for event in engine.events(asyncio.Event()):
                seen.append(str(event.get("Action")))

        reader = asyncio.create_task(read())
        while not fake.listeners:
            await asyncio.sleep(0.005)
        fake.emit(b'{"Action": "start"}\n{"Action": "die"}\n["no dict"]\n')
        while len(seen) < 2:
            await asyncio.sleep(0.005)
        fake.end_streams()
        with pytest.raises(EngineError, match="ended"):
            await reader
        assert seen == ["start", "die"]

    run(tmp_path, story)


def test_events_that_are_garbage(tmp_path: Path) -> None:
    async def story(fake: FakeEngine, engine: Engine) -> None:
        async def read() -> None:
            async for _ in engine.events(asyncio.Event()):
                pass

        for line in (b"half a li\n", b"x" * (4 << 20) + b"\n"):
            fake.listeners = 0
            reader = asyncio.create_task(read())
            while not fake.listeners:
                await asyncio.sleep(0.005)
            fake.emit(line)
            with pytest.raises(EngineError, match="broke"):
                await reader

    run(tmp_path, story)
