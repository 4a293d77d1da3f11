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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.departures import SETTLED_S
from kvstore import schema
from prestart import handover
from prestart.handover import Handover, boot_time
from tests.support.chaos import (
    GRACE_S,
    INIT,
    RECOVERED_S,
    Scene,
    full,
    missing,
    new_scene,
    refusing,
    slow,
)
from tests.support.checker import labels_of
from tests.support.engine_fixtures import engine_parts
from tests.support.fleet import FleetHost
from tests.support.host import wait_for
from tests.support.stream import POLICY

__all__ = ["engine_parts"]

# So many changes of what hosts follow come after a snapshot: more than hosts write again before all are back.
NEWER = 20


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
def expired(scene: Scene) -> Iterator[None]:
    with refusing(scene, expired=True):
        scene.wait_trouble()
        yield


@contextlib.contextmanager
def of_another_ca(scene: Scene) -> Iterator[None]:
    with refusing(scene, expired=False):
        scene.wait_trouble()
        yield


Trouble = Callable[[Scene], contextlib.AbstractContextManager[None]]


rare = pytest.mark.rare
TROUBLES = [unreachable, *(pytest.param(each, marks=rare) for each in (hung, full, expired, of_another_ca))]


@pytest.mark.parametrize("trouble", TROUBLES)
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


# --- slow


@rare
def test_two_seconds_a_call(scene: Scene) -> None:
    """A new number comes within the engine's patience, and what others write arrives, each a little later."""
    new = {"slow-friend": {"app": "client", "env": "slow"}, "slow-foe": {"app": "stranger", "env": "slow"}}
    with scene.watched(), scene.containers(*new), slow(scene):
        with scene.starting(new) as started:
            assert {name: start.result() for name, start in started.items()} == dict.fromkeys(new, 0)
        for name in new:
            wait_for(lambda: scene.identity(name) > 255, f"identity of {name}")  # noqa: B023
        wait_for(lambda: scene.reaches("slow-friend"), "way to the server", seconds=RECOVERED_S)
        assert not scene.reaches("slow-foe")
        scene.checker.wait_agreed()


# --- another history

MACHINE = f"{schema.IPS}default/10.99.0.7"


def machine_like(scene: Scene) -> str:
    """Return a record, as an injector writes it, by which the machine is one like server."""
    record = schema.ip_record("10.99.0.7", scene.identity("server", scene.two))
    return schema.encode_ip(record).decode()


def put_machine(scene: Scene) -> None:
    scene.etcd.ctl("put", MACHINE, stdin=machine_like(scene))


def machine_known(scene: Scene) -> list[str]:
    """Return the hosts whose kernel has the machine."""
    return [host.name for host in scene.fleet.hosts if "10.99.0.7/32" in scene.ipcache(host)]


@rare
def test_compacted_while_away(scene: Scene) -> None:
    """What was deleted meanwhile no event tells any more: a list lacks it, and it goes after its grace."""
    put_machine(scene)
    scene.checker.wait_agreed()
    with scene.watched():
        with scene.cut():
            scene.wait_trouble()
            scene.etcd.ctl("del", MACHINE)
            scene.etcd.ctl("put", f"{schema.POLICIES}second", stdin=POLICY)
            scene.etcd.compact()
        wait_for(lambda: missing(scene) == 2, "two hosts that miss the machine", seconds=RECOVERED_S)
        assert len(machine_known(scene)) == 2, "its grace is not over"
        wait_for(lambda: not machine_known(scene), "end of the machine", seconds=GRACE_S + SETTLED_S + 20)
        scene.checker.wait_agreed()
        scene.etcd.ctl("del", f"{schema.POLICIES}second")


@rare
def test_wiped(scene: Scene) -> None:
    """Owners write their own again; policies, which nobody owns, are in force until they are brought back."""
    put_machine(scene)
    scene.checker.wait_agreed()
    numbers = {name: scene.identity(name) for name in ("client", "stranger")}
    with scene.watched():
        scene.etcd.wipe()
        wait_for(lambda: missing(scene) > 0, "host that misses something", seconds=RECOVERED_S)
        scene.put_policy()
        put_machine(scene)
        for host in scene.fleet.hosts:
            wait_for(host.healthy, f"healthy agent on {host.name}", seconds=RECOVERED_S)
        scene.checker.wait_agreed()
        assert {name: scene.identity(name) for name in numbers} == numbers
        scene.etcd.ctl("del", MACHINE)


def test_restored_from_an_old_snapshot(scene: Scene, tmp_path: Path) -> None:
    """History goes back: what has an owner is as it was before, and what ended meanwhile does not return."""
    snapshot = tmp_path / "old.snapshot"
    put_machine(scene)
    with scene.watched(), scene.containers("ended", "begun"):
        scene.one.container("ended", "sleep", "infinity", labels={"app": "client", "env": "ended"})
        scene.checker.wait_agreed()
        scene.etcd.snapshot(snapshot)
        scene.one.engine.docker("rm", "-f", "ended")
        scene.one.container("begun", "sleep", "infinity", labels={"app": "client", "env": "begun"})
        scene.etcd.ctl("del", MACHINE)
        scene.checker.wait_agreed()
        number = scene.identity("begun")
        assert scene.reaches("begun")
        for _ in range(NEWER):
            for key, value in ((MACHINE, machine_like(scene)), (schema.identity_id_key(61_000), "test:a=;")):
                scene.etcd.ctl("put", key, stdin=value)
                scene.etcd.ctl("del", key)
        before = scene.etcd.revision()
        scene.etcd.restore(snapshot)
        scene.etcd.start()
        assert scene.etcd.revision() < before
        wait_for(lambda: len(machine_known(scene)) == 2, "machine of the snapshot", seconds=RECOVERED_S)
        for host in scene.fleet.hosts:
            wait_for(host.healthy, f"healthy agent on {host.name}", seconds=RECOVERED_S)
        scene.checker.wait_agreed()
        assert scene.identity("begun") == number
        assert scene.reaches("begun")
        scene.etcd.ctl("del", MACHINE)


def far_slots(scene: Scene) -> dict[str, str]:
    """Return what a start hook said a while ago; the next slots of both hosts are ten minutes away."""
    now = {
        handover.CONNECT: str(time.time() - 600),
        handover.CONNECT_BOOT: str(boot_time() - 600),
        handover.KIND: "resume",
    }
    names = [host.name for host in scene.fleet.hosts]
    for hours in (20, 21, 22, 23):
        said = now | {handover.WINDOW: str(hours * 3600)}
        slots = [Handover.read(said).next_relist(name, names) - boot_time() for name in names]
        if min(slots) > 600:
            return said
    raise AssertionError("each of four windows has a slot in these ten minutes")


@rare
def test_restored_while_the_slots_are_hours_away(scene: Scene, tmp_path: Path) -> None:
    """Nobody lists before its slot, and what begins meanwhile is known to all at once."""
    snapshot = tmp_path / "old.snapshot"
    put_machine(scene)
    scene.checker.wait_agreed()
    scene.etcd.snapshot(snapshot)
    scene.etcd.ctl("del", MACHINE)
    with scene.watched(*scene.fleet.hosts), scene.containers("between", "begun", "after"):
        for host in scene.fleet.hosts:
            host.kill_agent()
            host.handed_over = far_slots(scene)
            host.launch_agent(**scene.options)
        for host in scene.fleet.hosts:
            wait_for(host.healthy, f"healthy agent on {host.name}", seconds=RECOVERED_S)
        between = scene.one.container("between", "sleep", "infinity", labels={"app": "client", "env": "x"})
        scene.checker.wait_agreed()
        scene.etcd.restore(snapshot)
        scene.etcd.start()
        key = f"{schema.IPS}default/{between}"
        wait_for(lambda: bool(scene.etcd.ctl("get", key)), "its owner's word again", seconds=RECOVERED_S)
        for host in scene.fleet.hosts:
            wait_for(lambda: "in this host's slot" in kvstore_says(host), "its wait", seconds=RECOVERED_S)  # noqa: B023
            assert "its slot, before it lists etcd again" in host.cli("status", check=False).stdout
        scene.one.container("begun", "sleep", "infinity", labels={"app": "client", "env": "begun"})
        wait_for(lambda: scene.reaches("begun"), "what has begun meanwhile", seconds=RECOVERED_S)
        assert scene.reaches("between")
        other = scene.fleet.hosts[1]
        other.kill_agent()
        other.launch_agent(**scene.options)
        wait_for(lambda: "in this host's slot" in kvstore_says(other), "its wait again", seconds=RECOVERED_S)
        scene.one.container("after", "sleep", "infinity", labels={"app": "client", "env": "after"})
        wait_for(lambda: scene.reaches("after"), "what begins in the next life", seconds=RECOVERED_S)
        assert machine_known(scene) == [], "somebody has listed"
        for host in scene.fleet.hosts:
            host.handed_over = {}
            assert "before this host's slot" in host.cli("start-now", "--by", "alice").stdout
        wait_for(lambda: len(machine_known(scene)) == 2, "machine of the snapshot", seconds=RECOVERED_S)
        scene.checker.wait_agreed()
        assert scene.reaches("begun")
        scene.etcd.ctl("del", MACHINE)


def kvstore_says(host: FleetHost) -> str:
    status = host.api("/v1/healthz", check=False)
    return str(status["kvstore"]["msg"]) if status else ""


# --- another number


def renumber(scene: Scene, known: Any) -> int:
    """Have etcd call labels by another number, as if somebody else had asked for it; return that.

    `known` is the identity as an endpoint of the API has it.
    """
    labels, old = labels_of(known["labels"]), int(known["id"])
    new = old % 60_000 + 1_000
    scene.etcd.ctl("del", schema.identity_id_key(old))
    scene.etcd.ctl("del", "--prefix", schema.identity_value_prefix(labels.serialized))
    scene.etcd.ctl("put", schema.identity_id_key(new), stdin=labels.serialized)
    elsewhere = schema.identity_value_key(labels.serialized, "10.77.0.99")
    scene.etcd.ctl("put", elsewhere, stdin=str(new))
    return new


@rare
def test_number_of_etcd_wins_over_that_of_an_agent_that_was_away(scene: Scene) -> None:
    """The endpoint moves to it, and its streams go on: the other host keeps the old number meanwhile."""
    with scene.watched():
        with scene.cut(scene.wires[0]):
            wait_for(lambda: scene.kvstore(scene.one) != "Ok", "trouble with etcd", seconds=RECOVERED_S)
            number = renumber(scene, scene.one.endpoint_of("client")["status"]["identity"])
            scene.flows.wait_progress(100)
        wait_for(lambda: scene.identity("client") == number, "number of etcd", seconds=RECOVERED_S)


@rare
def test_number_of_etcd_wins_and_the_other_host_hears_of_it_later(scene: Scene) -> None:
    """Both were away: who hears of the new number first does not use it before the other has."""
    with scene.watched():
        with scene.cut(scene.wires[1]):
            with scene.cut(scene.wires[0]):
                scene.wait_trouble()
                number = renumber(scene, scene.one.endpoint_of("client")["status"]["identity"])
            assert scene.one.agent is not None
            heard, log = f"are {number} in", scene.one.agent
            wait_for(lambda: heard in log.output(), "word of the number", seconds=RECOVERED_S)
            scene.flows.wait_progress(300)
            assert number not in {entry.identity for entry in scene.ipcache(scene.two).values()}
        wait_for(lambda: scene.identity("client") == number, "number of etcd", seconds=RECOVERED_S)


@rare
def test_number_of_etcd_wins_over_that_of_a_checkpoint(scene: Scene) -> None:
    """The agent dies, and starts without etcd with the number that it knew; then etcd has another one."""
    known = scene.one.endpoint_of("client")["status"]["identity"]
    with scene.watched(scene.one), scene.containers("checkpointed"):
        with scene.cut(scene.wires[0]):
            scene.one.kill_agent()
            number = renumber(scene, known)
            scene.one.launch_agent(**scene.options)
            wait_for(lambda: bool(scene.one.api("/v1/endpoint", check=False)), "endpoints restored")
            scene.one.container("checkpointed", "sleep", "infinity", labels={"app": "client"})
            assert scene.identity("checkpointed") == scene.identity("client") == known["id"]
            assert scene.reaches("checkpointed")
        for name in ("client", "checkpointed"):
            wait_for(lambda: scene.identity(name) == number, "number of etcd", seconds=RECOVERED_S)  # noqa: B023
        assert scene.reaches("checkpointed")
