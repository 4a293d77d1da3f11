# SPDX-License-Identifier: Apache-2.0
"""The whole all-in-one project restarted under traffic, from the images that `make up` builds.

etcd and the agent go at once, by compose and by `make down`, or the engine that runs them goes: what is
allowed does not notice, what is denied stays denied, and everybody has his numbers afterwards.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import live
from tests.support.engine import (
    AGENT_IMAGE,
    ETCD_IMAGE,
    WORKLOAD_IMAGE,
    DockerHost,
    project_images,
)
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import REPO, Hub, wait_for
from tests.support.places import PORTS, PacketTap, Place, opened
from tests.support.refusing import calls_of_the_engine_fail
from tests.support.rules import document, element, rule, selects

__all__ = ["engine_parts", "hub"]

SETUP = REPO / "compose" / "setup"
ALL_IN_ONE = REPO / "compose" / "all-in-one"
UP_SECONDS = 300.0
PAUSE_S = 0.1
PORT = PORTS[0]
Restart = Callable[["Project"], None]


@dataclass
class Project:
    """A host on which `make up` has run, with an allowed and a denied flow between containers."""

    host: DockerHost
    image: str = AGENT_IMAGE

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            **self.host.engine.environment,
            "COMPOSE_PROJECT_NAME": "holdfast",
            "HOLDFAST_DOCKER_SOCKET_DIR": str(self.host.engine.socket.parent),
            "HOLDFAST_STATE_DIR": f"{self.host.directory}/state",
            "HOLDFAST_BIN_DIR": f"{self.host.directory}/bin",
            "HOLDFAST_IMAGE": self.image,
            "HOLDFAST_ETCD_IMAGE": ETCD_IMAGE,
        }

    def setup(self, script: str) -> None:
        self.host.exec(str(SETUP / script), timeout=UP_SECONDS, environment=self.environment)

    def compose(self, *arguments: str) -> None:
        self.host.engine.compose(ALL_IN_ONE, *arguments, environment=self.environment)

    def holdfast(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = f"{self.host.directory}/bin/holdfast"
        return self.host.exec(command, *arguments, check=check, environment=self.environment)

    def healthy(self) -> bool:
        return self.holdfast("status", check=False).returncode == 0

    def forget_starts(self) -> None:
        """Have the start hook take the next start for the first: after many in a row it waits ever longer."""
        (self.host.private("/var/lib/holdfast") / "prestart.json").unlink()

    def numbers(self) -> list[tuple[int, int, str]]:
        """Return (endpoint, identity, address) of every endpoint."""
        found: list[Any] = json.loads(self.holdfast("endpoint", "list", "-o", "json").stdout)
        return [
            (
                each["id"],
                each["status"]["identity"]["id"],
                each["status"]["networking"]["addressing"][0]["ipv4"],
            )
            for each in found
        ]

    def lives(self, name: str) -> list[tuple[str, int]]:
        """Return (state, identity) of every endpoint that a container of this name has, or had."""
        found: list[Any] = json.loads(self.holdfast("endpoint", "list", "-o", "json").stdout)
        return [
            (each["status"]["state"], each["status"]["identity"]["id"])
            for each in found
            if each["status"]["external-identifiers"]["container-name"] == name
        ]

    @contextlib.contextmanager
    def container(self, name: str, *options: str, app: str = "") -> Iterator[Place]:
        """Run a container that serves for the length of the block."""
        with self.running(name, *options, app=app), self.place(name) as place:
            yield place

    @contextlib.contextmanager
    def running(self, name: str, *options: str, app: str = "") -> Iterator[None]:
        """Run a container with the label `app`, by default its name."""
        docker = self.host.engine.docker
        command = ("run", "-d", "--init", "--name", name, "--network", "holdfast", *options)
        docker(*command, "-l", f"app={app or name}", WORKLOAD_IMAGE, "sleep", "infinity")
        try:
            yield
        finally:
            docker("rm", "-f", name, check=False)

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[Place]:
        """Open the namespace of a container that runs, and serve there."""
        with contextlib.ExitStack() as stack:
            state: Any = self.host.engine.inspect(name)["State"]
            inside = opened(Path(f"/proc/{self.host.pid}/root/proc/{state['Pid']}/ns/net"))
            stack.callback(inside.close)
            address = json.loads(inside.run("ip", "-j", "-4", "address", "show", "dev", "eth0"))
            yield Place(name, address[0]["addr_info"][0]["local"], inside).serve(stack)


@pytest.fixture(scope="module")
def project(hub: Hub) -> Iterator[Project]:
    with DockerHost("upc", images=project_images()) as host:
        host.address = hub.join(host)
        made = Project(host)
        made.setup("up.sh")
        yield made


@dataclass
class Traffic:
    """What goes on between server, client and stranger while the project is away."""

    server: Place
    client: Place
    stranger: Place
    streams: list[live.Stream]
    control: live.Probe
    tap: PacketTap
    end: Callable[[], None]

    def check(self) -> None:
        """No stream broke or paused longer than the machine itself did, nothing denied passed."""
        for stream in self.streams:
            stream.goes_on(20)
        limit = PAUSE_S + self.control.longest_pause()
        pauses = {stream.name: stream.longest_pause() for stream in self.streams}
        assert max(pauses.values()) <= limit, (limit, pauses)
        assert self.client.asks("TCP", self.server.address, PORT) == self.client.address
        assert self.stranger.asks("TCP", self.server.address, PORT) is None
        denied = socket.inet_aton(self.stranger.address), PORT.to_bytes(2)
        assert not [packet for packet in self.tap.packets() if (packet[12:16], packet[22:24]) == denied]


@pytest.fixture(scope="module")
def traffic(project: Project) -> Iterator[Traffic]:
    with contextlib.ExitStack() as stack:
        server, client, stranger = (
            stack.enter_context(project.container(name)) for name in ("server", "client", "stranger")
        )
        allowed = rule(server, "ingress", element("ingress", endpoints=[selects(client)]))
        policy = project.host.directory / "server.json"
        policy.write_text(document("server", allowed))
        project.holdfast("policy", "apply", "-f", str(policy))
        wait_for(lambda: stranger.asks("TCP", server.address, PORT) is None, "policy in force")
        tap = PacketTap(server)
        stack.callback(tap.close)
        streams = [
            stack.enter_context(live.Stream(name, asks.netns, address, PORT))
            for name, asks, address in (
                ("client to server", client, server.address),
                ("server to stranger", server, stranger.address),
            )
        ]
        control = stack.enter_context(live.Probe("control", client.netns, "127.0.0.1", PORT))
        yield Traffic(server, client, stranger, streams, control, tap, stack.close)


def compose_restart(project: Project) -> None:
    project.compose("restart", "--timeout", "20")


def compose_down_and_up(project: Project) -> None:
    project.compose("down", "--timeout", "20")
    project.compose("up", "--detach")


def kill_and_start(project: Project) -> None:
    """SIGKILL to both services at once, as a power cut of the machine's memory would."""
    project.compose("kill")
    project.compose("up", "--detach")


def make_down_and_up(project: Project) -> None:
    project.setup("down.sh")
    project.setup("up.sh")


def compose_up_of_another_image(project: Project) -> None:
    """What an upgrade does: compose replaces the agent's container by one of the new image."""
    docker = project.host.engine.docker
    docker("create", "--name", "next", project.image)
    docker("commit", "--change", "LABEL version=next", "next", f"{AGENT_IMAGE}-next")
    docker("rm", "next")
    before = docker("ps", "--quiet", "--filter", "label=holdfast.role=agent").stdout
    project.image = f"{AGENT_IMAGE}-next"
    project.compose("up", "--detach")
    assert docker("ps", "--quiet", "--filter", "label=holdfast.role=agent").stdout != before


RARE = [pytest.param(each, marks=pytest.mark.rare) for each in (compose_down_and_up, make_down_and_up)]


@pytest.mark.parametrize("restart", [compose_restart, kill_and_start, *RARE, compose_up_of_another_image])
def test_project_restarted(project: Project, traffic: Traffic, restart: Restart) -> None:
    before = project.numbers()
    assert len(before) == 3
    traffic.check()
    project.forget_starts()
    restart(project)
    traffic.check()
    wait_for(project.healthy, "healthy agent", seconds=120, pause=0.5)
    assert project.numbers() == before
    traffic.check()


def test_container_ends_while_the_project_is_away(project: Project, traffic: Traffic) -> None:
    """The kernel enforces meanwhile, and nobody else loses a number by it."""
    before = project.numbers()
    with project.container("passing"):
        assert len(project.numbers()) == 4
        project.forget_starts()
        project.compose("stop", "--timeout", "20")
        traffic.check()
        with calls_of_the_engine_fail(project.host):
            project.host.engine.docker("kill", "passing")
        traffic.check()
        project.compose("start")
        wait_for(project.healthy, "healthy agent", seconds=120, pause=0.5)
        assert set(before) <= set(project.numbers())
    traffic.check()


def reaches(client: Place, server: Place) -> bool:
    return client.asks("TCP", server.address, PORT) == client.address


def engine_restart(project: Project) -> None:
    project.host.engine.restart()


def engine_kill_and_start(project: Project) -> None:
    project.host.engine.kill()
    project.host.engine.start()


@pytest.mark.parametrize("restart", [engine_restart, engine_kill_and_start])
def test_engine_restarted_with_live_restore(project: Project, traffic: Traffic, restart: Restart) -> None:
    """Containers outlive the engine, and the agent's finds the new engine's socket."""
    project.host.engine.configure(live_restore=True)
    before = project.numbers()
    traffic.check()
    restart(project)
    traffic.check()
    wait_for(project.healthy, "healthy agent", seconds=60, pause=0.5)
    assert project.numbers() == before
    with project.container("fresh", app=traffic.client.name) as fresh:
        assert fresh.asks("TCP", traffic.server.address, PORT) == fresh.address
    traffic.check()


def test_engine_restarted_without_live_restore(project: Project, traffic: Traffic) -> None:
    """Containers end with the engine and come back, as new endpoints with the identities they had."""
    traffic.end()
    project.host.engine.configure(live_restore=False)
    names = ("server", "client", "stranger")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(project.running(name, "--restart", "always"))
        now = {name: project.lives(name)[0] for name in names}
        assert {state for state, _ in now.values()} == {"ready"}
        for restart in (engine_restart, engine_kill_and_start):
            project.forget_starts()
            restart(project)
            wait_for(
                lambda: all(now[name] in project.lives(name) for name in names), "identities", seconds=180
            )
            wait_for(project.healthy, "healthy agent", seconds=120, pause=0.5)
            if restart is engine_restart:  # the agent was told of their ends, so nothing is left of them
                assert {name: project.lives(name) for name in names} == {name: [now[name]] for name in names}
            with contextlib.ExitStack() as places:
                server, client, stranger = (places.enter_context(project.place(name)) for name in names)
                # Denied until the agent has read etcd, which starts anew beside it.
                wait_for(partial(reaches, client, server), "the allowed flow", seconds=60)
                assert stranger.asks("TCP", server.address, PORT) is None
