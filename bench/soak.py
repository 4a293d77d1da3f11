# SPDX-License-Identifier: Apache-2.0
"""Ten minutes of faults at random on three hosts under traffic, one or two at a time, and what came of it.

soak_faults
    Faults that were done and recovered from.  After each the promise of `tests.support.chaos` holds: no
    stream was reset, no allowed datagram lost, nothing denied passed, no agent ended that was not killed, and
    the checker finds etcd, the agents' tables and the kernels' maps equal.  The first promise that is broken
    ends the run with a failure that names it.
soak_recovery_s
    Median of the time from the end of a fault until all agree again; the longest is a comment.

Containers come and go on host 1 meanwhile.  None of a group's faults is done again before all others of it
were.  The seed of the faults is printed; give it to have them again.

Run: python -m bench.soak [seconds [seed]]
"""

from __future__ import annotations

import contextlib
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from bench import harness
from kvstore import schema
from tests.support.chaos import RECOVERED_S, Scene, full, missing, new_scene, refusing, slow
from tests.support.fleet import FleetHost
from tests.support.host import wait_for

HOSTS = 3
SECONDS = 600.0
# Seconds that a fault lasts, at random in between: shorter and longer than clients are patient.
LASTS_S = (0.5, 15.0)

Fault = Callable[["Soak"], AbstractContextManager[None]]


class Soak:
    """A scene whose engines keep their containers, a snapshot of its etcd, and what is done to it."""

    def __init__(self, scene: Scene, chance: random.Random, directory: Path) -> None:
        self.scene, self.chance = scene, chance
        self.snapshot = directory / "first.snapshot"
        self._started = 0
        for host in scene.fleet.hosts:  # containers outlive their engine
            host.engine.configure(live_restore=True)
        with self.passing_container() as address:
            self.ended = schema.ip_key(schema.DEFAULT_SPACE, address)
            scene.checker.wait_agreed()
            scene.etcd.snapshot(self.snapshot)

    def some_host(self) -> FleetHost:
        return self.chance.choice(self.scene.fleet.hosts)

    def lasts(self) -> None:
        """Let the present faults last."""
        time.sleep(self.chance.uniform(*LASTS_S))

    @contextlib.contextmanager
    def passing_container(self) -> Iterator[str]:
        """Run one for the length of the block, which is given its address."""
        name = f"passing-{self._started}"
        self._started += 1
        with self.scene.containers(name):
            app = self.chance.choice("abc")
            yield self.scene.one.container(name, "sleep", "infinity", labels={"app": app})

    def round(self, faults: list[Fault]) -> float:
        """Do these faults at once; return the seconds until all agreed.  AssertionError names what broke."""
        hosts = self.scene.fleet.hosts
        # Whose agent dies is only known once it does: pids are compared for those that none of these kills.
        killing = agent_killed in faults or agent_restarted in faults
        with self.scene.watched(*(hosts if killing else [])):
            with ExitStack() as present:
                for fault in faults:
                    present.enter_context(fault(self))
                self.lasts()
            ended = time.monotonic()
        return time.monotonic() - ended


@contextlib.contextmanager
def etcd_hangs(soak: Soak) -> Iterator[None]:
    soak.scene.etcd.pause()
    try:
        yield
    finally:
        soak.scene.etcd.resume()


@contextlib.contextmanager
def etcd_unreachable(soak: Soak) -> Iterator[None]:
    """For some of the hosts, or all."""
    wires = soak.scene.wires
    with soak.scene.cut(*soak.chance.sample(wires, soak.chance.randint(1, len(wires)))):
        yield


@contextlib.contextmanager
def etcd_killed(soak: Soak) -> Iterator[None]:
    soak.scene.etcd.kill()
    try:
        yield
    finally:
        soak.scene.etcd.start()


def etcd_slow(soak: Soak) -> AbstractContextManager[None]:
    return slow(soak.scene)


def etcd_full(soak: Soak) -> AbstractContextManager[None]:
    return full(soak.scene)


def etcd_refuses_certificate(soak: Soak) -> AbstractContextManager[None]:
    return refusing(soak.scene, expired=soak.chance.choice((True, False)))


@contextlib.contextmanager
def etcd_wiped(soak: Soak) -> Iterator[None]:
    """Policies have no owner: they are brought back while the hosts keep them."""
    soak.scene.etcd.wipe()
    wait_for(lambda: missing(soak.scene) > 0, "host that misses something", seconds=RECOVERED_S)
    soak.scene.put_policy()
    yield


@contextlib.contextmanager
def etcd_restored(soak: Soak) -> Iterator[None]:
    """From the first snapshot, which lacks one container of now and has one of then."""
    with soak.passing_container():
        soak.scene.etcd.restore(soak.snapshot)
        soak.scene.etcd.start()
        yield
    gone = "end of what had ended before"
    wait_for(lambda: not soak.scene.etcd.ctl("get", soak.ended), gone, seconds=RECOVERED_S)


@contextlib.contextmanager
def etcd_compacted(soak: Soak) -> Iterator[None]:
    soak.scene.etcd.ctl("put", "soak/compacted", "")  # what has been compacted is not compacted again
    soak.scene.etcd.compact()
    yield


@contextlib.contextmanager
def agent_killed(soak: Soak) -> Iterator[None]:
    host = soak.some_host()
    host.kill_agent()
    try:
        yield
    finally:
        host.launch_agent(**soak.scene.options)


@contextlib.contextmanager
def agent_restarted(soak: Soak) -> Iterator[None]:
    host = soak.some_host()
    host.stop_agent()
    host.launch_agent(**soak.scene.options)
    yield


@contextlib.contextmanager
def engine_killed(soak: Soak) -> Iterator[None]:
    host = soak.some_host()
    host.engine.kill()
    try:
        yield
    finally:
        host.engine.start()


@contextlib.contextmanager
def containers_come_and_go(soak: Soak) -> Iterator[None]:
    for _ in range(3):
        with soak.passing_container():
            pass
    yield


# At once: two of different groups, so that one does not undo the other.
GROUPS: tuple[tuple[Fault, ...], ...] = (
    (
        *(etcd_hangs, etcd_unreachable, etcd_killed, etcd_slow, etcd_full, etcd_refuses_certificate),
        *(etcd_wiped, etcd_restored),
    ),
    (agent_killed, agent_restarted),
    (engine_killed, etcd_compacted, containers_come_and_go),
)
# These need what the others take away: a host whose agent is dead does not write its keys again.
ALONE: frozenset[Fault] = frozenset({etcd_compacted, etcd_wiped, etcd_restored, containers_come_and_go})


def some_faults(chance: random.Random, done: Counter[str]) -> list[Fault]:
    """Return one or two, of those of their groups that were done least."""
    groups = chance.sample(GROUPS, chance.choice((1, 2)))
    faults: list[Fault] = [
        min(group, key=lambda each: (done[each.__name__], chance.random())) for group in groups
    ]
    alone: list[Fault] = [each for each in faults if each in ALONE]
    return alone or faults


def main() -> None:
    """Print the figures."""
    harness.load()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else secrets.randbelow(1 << 31)
    harness.note(f"seed {seed}")
    chance = random.Random(seed)
    done: Counter[str] = Counter()
    recoveries: list[float] = []
    with tempfile.TemporaryDirectory() as directory, new_scene(Path(directory), hosts=HOSTS) as scene:
        soak = Soak(scene, chance, Path(directory))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            faults = some_faults(chance, done)
            names = [each.__name__ for each in faults]
            harness.note(f"{until - time.monotonic():.0f} s left: {', '.join(names)}")
            recoveries.append(soak.round(faults))
            done.update(names)
    harness.emit("soak_faults", done.total(), "faults", len(recoveries))
    harness.note(", ".join(f"{name} {number}" for name, number in sorted(done.items())))
    harness.emit_median("soak_recovery_s", recoveries, "s")


if __name__ == "__main__":
    main()
