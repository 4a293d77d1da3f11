# SPDX-License-Identifier: Apache-2.0
"""Hosts under traffic, and between each and etcd a wire: where etcd's failures are tried.

    host 1   client, stranger, and what starts meanwhile   ── Wire ──┐
    host 2   server                                        ── Wire ──┴─ etcd, with TLS
    host 3 … if wanted

`Scene.watched` is the promise that each scenario keeps: from its begin to its end nothing allowed is reset or
lost and nothing denied passes, the agents are the same processes, and in the end the checker finds etcd, the
agents' tables and the kernels' maps equal.  Used by tests/chaos; needs root.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datapath.maps import IpcacheMap
from datapath.records import IpcacheEntry
from kvstore import schema
from tests.support.agent import ETCD_PORT
from tests.support.checker import Checker, opened, pins
from tests.support.engine import WORKLOAD_IMAGE
from tests.support.etcd import EtcdServer
from tests.support.fleet import Fleet, FleetHost, new_fleet
from tests.support.host import wait_for
from tests.support.pki import TestPki
from tests.support.stream import POLICY, Flows
from tests.support.wire import Wire

QUOTA = 8 << 20  # bytes of etcd's database: soon full
# Seconds for which the hosts keep what a list lacks; an hour for users, who have to bring it back by hand.
GRACE_S = 20
# An agent's patience grows to half a minute.
RECOVERED_S = 90.0
POLICY_KEY = f"{schema.POLICIES}server"
INIT = 5
MEGABYTE = "x" * 1_000_000
SLOW_S = 2.0


class Scene:
    """All of it; `wires` in the order of the hosts."""

    def __init__(self, fleet: Fleet, etcd: EtcdServer, wires: list[Wire], directory: Path) -> None:
        self.fleet, self.etcd, self.wires = fleet, etcd, wires
        self.one, self.two = fleet.hosts[:2]
        self.certificates = directory
        self.show_certificate(etcd.directory / "agent.crt", etcd.directory / "agent.key")
        assert etcd.pki is not None
        self._config = directory / "etcd.config"
        files = {"cert-file": f"{directory}/agent.crt", "key-file": f"{directory}/agent.key"}
        endpoints = {"endpoints": [f"https://127.0.0.1:{ETCD_PORT}"], "trusted-ca-file": str(etcd.pki.ca)}
        self._config.write_text(json.dumps(endpoints | files))
        self.checker = Checker(fleet.hosts, etcd.ctl)
        self.put_policy()
        fleet.start(**self.options)
        self.flows = Flows(self.one, elsewhere={"server": self.two})
        self.checker.wait_agreed()

    @property
    def options(self) -> dict[str, str]:
        """What the agents are started with."""
        return {
            "tunnel": "vxlan",
            "kvstore_opt": f"etcd.config={self._config}",
            "kvstore_missing_grace_period": f"{GRACE_S}s",
        }

    @contextlib.contextmanager
    def watched(self, *dying: FleetHost, pause: bool = False) -> Iterator[None]:
        """See the module's text; the agents of `dying` may be other processes afterwards.

        `pause`: what is allowed may be lost for a while, and goes on.
        """
        self.flows.check()
        living = [host for host in self.fleet.hosts if host not in dying]
        pids = [host.agent.pid for host in living if host.agent]
        yield
        for host in self.fleet.hosts:
            wait_for(host.healthy, f"healthy agent on {host.name}", seconds=RECOVERED_S)
        self.checker.wait_agreed()
        assert [host.agent.pid for host in living if host.agent and host.agent.running] == pids
        self.flows.wait_progress(100)
        if pause:
            self.flows.check_unbroken()
            self.flows.check_denied()
            self.flows.forgive()
        self.flows.check()

    # --- etcd

    def put_policy(self) -> None:
        self.etcd.ctl("put", POLICY_KEY, stdin=POLICY)

    def show_certificate(self, certificate: Path, key: Path) -> None:
        """Have agents that connect from now on show this one."""
        shutil.copy(key, self.certificates / "agent.key")
        shutil.copy(certificate, self.certificates / "agent.crt")

    @contextlib.contextmanager
    def cut(self, *wires: Wire) -> Iterator[None]:
        """Have no way to etcd in the block, on these wires or all."""
        for wire in wires or self.wires:
            wire.cut()
        try:
            yield
        finally:
            for wire in wires or self.wires:
                wire.mend()

    def wait_trouble(self) -> None:
        """Wait until both agents say that something is wrong with etcd."""
        for host in self.fleet.hosts:
            what = f"word of trouble with etcd on {host.name}"
            wait_for(lambda: self.kvstore(host) != "Ok", what, seconds=RECOVERED_S)  # noqa: B023

    def kvstore(self, host: FleetHost) -> str:
        return str(host.api("/v1/healthz")["kvstore"]["state"])

    def ipcache(self, host: FleetHost) -> dict[str, IpcacheEntry]:
        """Return what the kernel of a host holds."""
        with opened(IpcacheMap, "cilium_ipcache", pins(host)) as kernel:
            return dict(kernel.items())

    # --- containers of host 1

    @contextlib.contextmanager
    def containers(self, *names: str) -> Iterator[None]:
        """Remove these in the end."""
        try:
            yield
        finally:
            self.one.engine.docker("rm", "-f", *names, check=False)

    @contextlib.contextmanager
    def starting(self, containers: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Future[int]]]:
        """Have containers (name → labels) started beside the block, which is given how each start ends."""
        with ThreadPoolExecutor(len(containers)) as pool:
            yield {name: pool.submit(self._start, name, labels) for name, labels in containers.items()}

    def _start(self, name: str, labels: Mapping[str, str]) -> int:
        docker = self.one.engine.docker
        words = [part for label in labels.items() for part in ("-l", "=".join(label))]
        create = ("create", "--init", "--name", name, "--network", "holdfast", *words)
        docker(*create, WORKLOAD_IMAGE, "sleep", "infinity")
        return docker("start", name, check=False).returncode

    def identity(self, container: str, host: FleetHost | None = None) -> int:
        return int((host or self.one).endpoint_of(container)["status"]["identity"]["id"])

    def state(self, container: str) -> str:
        found: Any = self.one.api(f"/v1/endpoint/container-name:{container}", check=False)
        return str(found["status"]["state"]) if found else ""

    def reaches(self, container: str) -> bool:
        """True when a container of host 1 gets an answer of the server on host 2."""
        ping = ("ping", "-n", "-c1", "-W1", self.flows.server_ip)
        return bool(self.one.inside(container, *ping, check=False).returncode == 0)


@contextlib.contextmanager
def new_scene(directory: Path, *, hosts: int = 2) -> Iterator[Scene]:
    """Make all of it, in force and in agreement."""
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(new_fleet(hosts, etcd=False))
        etcd = EtcdServer(directory / "etcd", tls=True, options=(f"--quota-backend-bytes={QUOTA}",))
        stack.callback(etcd.stop)
        etcd.start()
        wires = [stack.enter_context(Wire(host, etcd.client_port)) for host in fleet.hosts]
        yield Scene(fleet, etcd, wires, directory)


# --- failures of etcd that take more than a signal


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
        yield
    finally:
        scene.show_certificate(scene.etcd.directory / "agent.crt", scene.etcd.directory / "agent.key")


@contextlib.contextmanager
def slow(scene: Scene) -> Iterator[None]:
    """Each answer takes two seconds."""
    for wire in scene.wires:
        wire.delay = SLOW_S
        wire.drop()  # sessions and views begin anew, as slowly
    try:
        yield
    finally:
        for wire in scene.wires:
            wire.delay = 0.0


def missing(scene: Scene) -> int:
    """Return how many records the hosts keep although a list lacked them."""
    tables = [table for host in scene.fleet.hosts for table in host.api("/v1/healthz")["tables"]]
    return sum(table["missing"] for table in tables)
