# SPDX-License-Identifier: Apache-2.0
"""Real etcd servers for tests: own data directory, free loopback ports, stopped by pid.

server = EtcdServer(tmp_path).start()
client = Client(server.config)
server.pause(); server.resume(); server.restart(); server.kill(); server.wipe(); server.compact()
server.snapshot(path); server.restore(path)
cluster = EtcdCluster(tmp_path).start()          # three members
server = EtcdServer(tmp_path, tls=True)          # client certificates required; server.config_for("agent")
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstore.config import EtcdConfig
from tests.support.pki import TestPki
from tests.support.require import require_tools

START_DEADLINE_S = 30.0


# A range for each process that runs tests, below what the kernel gives to connections: a port is bound a
# while after it was chosen, and none is chosen twice meanwhile.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(10_000 + _WORKER % 4 * 5_000, 15_000 + _WORKER % 4 * 5_000))


def free_ports(count: int) -> list[int]:
    """Return loopback ports that nobody listens on."""
    return list(itertools.islice(filter(_is_free, _PORTS), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class EtcdServer:
    """One member.  `directory` is where data, log and certificates go; `options` are more of etcd's."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "m0",
        tls: bool = False,
        cluster: dict[str, int] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        require_tools("etcd", "etcdctl")
        self.name = name
        self.directory = directory / name
        self.directory.mkdir(parents=True)
        self.client_port, peer_port = free_ports(2)
        self._cluster = cluster or {name: peer_port}
        self._options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.directory / "etcd.log"
        self._begun = 0  # where in the log its present life begins
        self.pki = TestPki(self.directory) if tls else None
        if self.pki is not None:
            for user in ("server", "root", "agent"):
                self.pki.issue(user)

    # --- where it is

    @property
    def endpoint(self) -> str:
        return f"{'https' if self.pki else 'http'}://127.0.0.1:{self.client_port}"

    @property
    def config(self) -> EtcdConfig:
        return self.config_for("root")

    def config_for(self, user: str) -> EtcdConfig:
        """Return a client's configuration; with TLS, with the certificate of `user`."""
        if self.pki is None:
            return EtcdConfig((self.endpoint,))
        certificate, key = self.directory / f"{user}.crt", self.directory / f"{user}.key"
        return EtcdConfig((self.endpoint,), self.pki.ca, certificate, key)

    @property
    def pid(self) -> int:
        assert self._process is not None, "etcd is not running"
        return self._process.pid

    # --- its life

    def start(self, *, wait: bool = True) -> EtcdServer:
        with open(self._log, "ab") as log:
            self._begun = log.tell()
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, start_new_session=True)
        if wait:
            self.wait_healthy()
        return self

    def wait_healthy(self) -> None:
        """Wait until a linearizable read is answered."""
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                raise AssertionError(f"etcd ended: {self.log_tail()}")
            # etcdctl that comes too early comes again after a second.
            if self._serves() and self._ctl(["get", "health"], timeout=5).returncode == 0:
                return
            time.sleep(0.02)
        raise AssertionError(f"etcd is not healthy after {START_DEADLINE_S} s: {self.log_tail()}")

    def _serves(self) -> bool:
        """True once it says so: its port takes connections long before."""
        with open(self._log, "rb") as log:
            log.seek(self._begun)
            return b"serving client" in log.read()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start again on the same data and ports."""
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Stop, lose all data, start empty."""
        self.stop()
        shutil.rmtree(self.directory / "data", ignore_errors=True)
        self.start()

    def restore(self, path: Path) -> None:
        """Stop if it runs, and take the data of a snapshot instead; `start` is the caller's."""
        self.stop()
        shutil.rmtree(self.directory / "data", ignore_errors=True)
        peers = self._peers()
        words = ["etcdctl", "snapshot", "restore", str(path), "--data-dir", str(self.directory / "data")]
        words += ["--name", self.name, "--initial-advertise-peer-urls", peers[self.name]]
        words += ["--initial-cluster", _members(peers)]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, env=environment, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"

    def pause(self) -> None:
        """Hang: the process stops, its connections stay.  Returns once none of its threads runs any more."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for each in (signal.SIGCONT, how):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, each)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)

    # --- as its operator

    def ctl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run etcdctl (as user root with TLS) and return what it printed."""
        done = self._ctl(list(arguments), timeout=30, stdin=stdin)
        assert done.returncode == 0, f"etcdctl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def revision(self) -> int:
        answer: list[dict[str, Any]] = json.loads(self.ctl("endpoint", "status", "-w", "json"))
        return int(answer[0]["Status"]["header"]["revision"])

    def counted(self, metric: str, method: str) -> int:
        """Return what a counter of gRPC says of one method: grpc_server_started_total of Range, say."""
        with urllib.request.urlopen(f"{self.endpoint}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.search(rf'^{metric}\{{grpc_method="{method}",.*\}} (\S+)$', text, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def compact(self) -> int:
        """Compact everything up to now and return that revision."""
        revision = self.revision()
        self.ctl("compact", str(revision), "--physical")
        return revision

    def snapshot(self, path: Path) -> None:
        """Save everything to a file."""
        self.ctl("snapshot", "save", str(path))

    def enable_auth(self, user: str, *prefixes: str, readable: str = "") -> None:
        """Turn on users by certificate: root, and `user` who may read and write `prefixes` only.

        What begins with `readable` it may read.
        """
        self.ctl("user", "add", "root", "--no-password")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("role", "add", user)
        for prefix in prefixes:
            self.ctl("role", "grant-permission", user, "readwrite", prefix, "--prefix=true")
        if readable:
            self.ctl("role", "grant-permission", user, "read", readable, "--prefix=true")
        self.ctl("user", "add", user, "--no-password")
        self.ctl("user", "grant-role", user, user)
        self.ctl("auth", "enable")

    def defragmentations(self) -> list[tuple[str, str]]:
        """Return begin and end of each that its log tells of; the end is "9" while it goes on."""
        found: list[tuple[str, str]] = []
        for line in self._log.read_text(errors="replace").splitlines():
            if '"starting defragment"' in line:
                found.append((json.loads(line)["ts"], "9"))
            elif '"finished defragment"' in line:
                found[-1] = (found[-1][0], json.loads(line)["ts"])
        return found

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _ctl(
        self, arguments: list[str], timeout: float, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = ["etcdctl", "--endpoints", self.endpoint, *self._ctl_tls(), *arguments]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        try:
            return subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", "timed out")

    def _ctl_tls(self) -> list[str]:
        if self.pki is None:
            return []
        files = self.config
        return ["--cacert", str(files.ca), "--cert", str(files.cert), "--key", str(files.key)]

    def _peers(self) -> dict[str, str]:
        return {name: f"http://127.0.0.1:{port}" for name, port in self._cluster.items()}

    def _command(self) -> list[str]:
        peers = self._peers()
        command = [
            "etcd",
            *("--name", self.name),
            *("--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", self.endpoint),
            *("--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", peers[self.name]),
            *("--initial-advertise-peer-urls", peers[self.name]),
            *("--initial-cluster", _members(peers)),
            *("--logger", "zap"),
            *self._options,
            "--unsafe-no-fsync" if _knows_no_fsync() else "--log-level=info",
        ]
        if self.pki is None:
            return command
        certificate, key = self.directory / "server.crt", self.directory / "server.key"
        return [
            *command,
            "--client-cert-auth",
            f"--trusted-ca-file={self.pki.ca}",
            f"--cert-file={certificate}",
            f"--key-file={key}",
        ]


class EtcdCluster:
    """Three members on loopback; `config` lists all of them."""

    def __init__(self, directory: Path, *, options: Sequence[str] = ()) -> None:
        names = ("m0", "m1", "m2")
        ports = dict(zip(names, free_ports(3), strict=True))
        self.members = [EtcdServer(directory, name=name, cluster=ports, options=options) for name in names]

    @property
    def config(self) -> EtcdConfig:
        return EtcdConfig(tuple(member.endpoint for member in self.members))

    def start(self) -> EtcdCluster:
        for member in self.members:
            member.start(wait=False)
        for member in self.members:
            member.wait_healthy()
        return self

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def defragmentations(self) -> list[tuple[str, str, str]]:
        """Return (begin, end, member) of all, in the order in which they began."""
        return sorted((*each, member.name) for member in self.members for each in member.defragmentations())

    def member_at(self, target: str) -> EtcdServer:
        """Return the member that listens on host:port."""
        return next(member for member in self.members if member.endpoint.endswith(target))


def _members(peers: Mapping[str, str]) -> str:
    return ",".join(f"{name}={url}" for name, url in peers.items())


def _knows_no_fsync() -> bool:
    """3.5 has the option; in 3.4 every write waits for the disk, which tests can live with."""
    done = subprocess.run(["etcd", "--help"], capture_output=True, text=True, check=False)
    return "--unsafe-no-fsync" in done.stdout + done.stderr
