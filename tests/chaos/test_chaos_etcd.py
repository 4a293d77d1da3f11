# SPDX-License-Identifier: Apache-2.0
"""etcd fails in every way it can, under two hosts with traffic: nobody notices, and recovery needs no help.

    no answer, or no writing     hung, full, refusing the certificate, unreachable
    slow                         two seconds a call
    another history              compacted, wiped, restored from an old snapshot
    another number               what a workload is, is called otherwise in etcd afterwards

What each scenario promises is `tests.support.chaos.Scene.watched`.  One set of hosts for the whole module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.support.chaos import INIT, RECOVERED_S, Scene, new_scene
from tests.support.engine_fixtures import engine_parts
from tests.support.host import wait_for
from tests.support.pki import TestPki

__all__ = ["engine_parts"]

pytestmark = pytest.mark.timeout(600)

MEGABYTE = "x" * 1_000_000


@pytest.fixture(scope="module")
def scene(engine_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with new_scene(tmp_path_factory.mktemp("chaos")) as made:
        yield made


# --- no answer, or no writing


@contextlib.contextmanager
def hung(scene: Scene) -> Iterator[None]:
    """The process is stopped: its connections stay, and nothing comes."""
    scene.etcd.pause()
    try:
        scene.wait_trouble()
        yield
    finally:
        scene.etcd.resume()


@contextlib.contextmanager
def unreachable(scene: Scene) -> Iterator[None]:
    with scene.cut():
        scene.wait_trouble()
        yield


@contextlib.contextmanager
def full(scene: Scene) -> Iterator[None]:
    """The quota is used up: etcd answers questions and writes nothing, until an operator has made room."""
    for number in range(20):
        if "NOSPACE" in scene.etcd.ctl("alarm", "list"):
            break
        with contextlib.suppress(AssertionError):  # the one that did not fit
            scene.etcd.ctl("put", f"junk/{number}", stdin=MEGABYTE)
    assert "NOSPACE" in scene.etcd.ctl("alarm", "list")
    try:
        yield
    finally:
        scene.etcd.ctl("del", "--prefix", "junk/")
        scene.etcd.compact()
        scene.etcd.ctl("defrag")
        scene.etcd.ctl("alarm", "disarm")


@contextlib.contextmanager
def refusing(scene: Scene, *, expired: bool) -> Iterator[None]:
    """Agents show a certificate that ran out, or one of another authority of the same name."""
    pki = scene.etcd.pki
    assert pki is not None
    if not expired:
        (scene.certificates / "other").mkdir(exist_ok=True)
        pki = TestPki(scene.certificates / "other")
    scene.show_certificate(*pki.issue("bad", expired=expired))
    for wire in scene.wires:
        wire.drop()
    try:
        scene.wait_trouble()
        yield
    finally:
        scene.show_certificate(scene.etcd.directory / "agent.crt", scene.etcd.directory / "agent.key")


def expired(scene: Scene) -> contextlib.AbstractContextManager[None]:
    return refusing(scene, expired=True)


def of_another_ca(scene: Scene) -> contextlib.AbstractContextManager[None]:
    return refusing(scene, expired=False)


Trouble = Callable[[Scene], contextlib.AbstractContextManager[None]]


@pytest.mark.parametrize("trouble", [hung, unreachable, full, expired, of_another_ca])
def test_no_answer(scene: Scene, trouble: Trouble) -> None:
    """Known labels have their number at once, new ones are denied until etcd answers again."""
    env = trouble.__name__.replace("_", "-")
    known, friend, foe = f"{env}-known", f"{env}-friend", f"{env}-foe"
    new = {friend: {"app": "client", "env": env}, foe: {"app": "stranger", "env": env}}
    with scene.watched(), scene.containers(known, *new):
        with trouble(scene), scene.starting(new) as started:
            scene.one.container(known, "sleep", "infinity", labels={"app": "client"})
            assert scene.identity(known) == scene.identity("client")
            assert scene.reaches(known)
            wait_for(lambda: {scene.state(name) for name in new} == {"waiting-for-identity"}, "two that wait")
            for name, start in started.items():
                assert start.result() == 0
                assert scene.identity(name) == INIT
                assert not scene.reaches(name), "nobody knows yet who it is"
        for name in new:
            wait_for(lambda: scene.identity(name) > 255, f"identity of {name}", seconds=RECOVERED_S)  # noqa: B023
        wait_for(lambda: scene.reaches(friend), "way to the server", seconds=RECOVERED_S)
        assert not scene.reaches(foe)
        scene.checker.wait_agreed()
