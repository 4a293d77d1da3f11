# SPDX-License-Identifier: Apache-2.0
"""Hosts on one machine: each has its own network, mounts, host name, process ids and docker engine.

A `Host` is made by compose/setup/private_host.sh (which says why), an `Engine` is a real dockerd inside it,
and a `Hub` is a switch in a namespace of its own that joins several hosts.  Nothing is touched in the
machine's own namespaces.  Killing a host's first process ends everything that runs in it, so teardown needs
no list of what a test started.

Used by the fixtures of `tests.support.engine`; needs root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

REPO = Path(__file__).parents[2]
PRIVATE_HOST = REPO / "compose" / "setup" / "private_host.sh"
HUB_NETWORK = "10.77.0"  # hosts are 10.77.0.1 … on the hub: no route leads there from the machine
HUB_NETWORK6 = "fd77::"  # the same host is fd77::1 …
COMMAND_TIMEOUT_S = 60.0

_numbers = itertools.count(1)


def unique_name(prefix: str) -> str:
    """Return a name that no other test process uses, short enough for a network device (15 characters)."""
    return f"{prefix}{os.getpid() % 100_000}x{next(_numbers)}"


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    stdin: str | None = None,
    timeout: float = COMMAND_TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its outcome; with `check`, a failure raises with all its output."""
    result = subprocess.run(
        list(argv),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if check and result.returncode != 0:
        raise AssertionError(
            f"{' '.join(argv)}: status {result.returncode}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
        )
    return result


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float = 30.0, pause: float = 0.05) -> None:
    """Return once `condition` holds; AssertionError naming `what` when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within {seconds:g} s")
        time.sleep(pause)


class Process:
    """A process inside a host, known by its pid as the machine sees it; its output goes to a file."""

    def __init__(self, entering: subprocess.Popen[bytes], log: Path) -> None:
        self._entering = entering
        self.log = log
        self.pid = _child_of(entering)

    @property
    def running(self) -> bool:
        return self._entering.poll() is None

    def output(self) -> str:
        """Return everything it has written so far, stderr included."""
        return self.log.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process itself (not to the one that entered the namespaces for it)."""
        if self.running:
            os.kill(self.pid, number)
        if number == signal.SIGCONT:
            self._entering.send_signal(number)  # nsenter stops itself when its child does

    def wait(self, timeout: float = 30.0) -> int:
        """Return the exit status; negative numbers or 128 + n mean a signal."""
        return self._entering.wait(timeout)

    def stop(self, timeout: float = 20.0) -> int:
        """End it politely, then not; return the exit status."""
        self.kill(signal.SIGTERM)
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.wait(timeout)


def _child_of(entering: subprocess.Popen[bytes]) -> int:
    """Return the pid of the process that nsenter forked; entering a pid namespace takes a fork."""
    children = Path(f"/proc/{entering.pid}/task/{entering.pid}/children")
    name = Path(f"/proc/{entering.pid}/comm")
    found: list[int] = []

    def forked() -> bool:
        if entering.poll() is not None:
            found.append(entering.pid)
        elif name.read_text() == "nsenter\n":  # before that it is the shell that looks for the namespaces
            found.extend(int(pid) for pid in children.read_text().split())
        return found != []

    wait_for(forked, "process in the host", seconds=10, pause=0.002)
    return found[0]


class Host:
    """A host inside this machine; `stop` (or leaving the context) ends all that runs in it."""

    def __init__(self, prefix: str = "hf", *, uplink: bool = False) -> None:
        self.name = unique_name(prefix)
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}."))
        self._base = self.directory / "host"
        self.address = ""  # on the hub, once joined
        self._processes: list[Process] = []
        arguments = ["--uplink"] if uplink else []
        run([str(PRIVATE_HOST), "start", str(self._base), self.name, *arguments])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The host's first process; its namespaces are the host's."""
        return int((self._base / "pid").read_text())

    @property
    def netns(self) -> str:
        """The host's network namespace under /run/netns of the machine."""
        return self.name

    def private(self, path: str) -> Path:
        """Return where a directory of the host's own (/etc/holdfast, /run/docker …) is for the machine."""
        return Path(f"{self._base}/fs{path}")

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` in this host."""
        return [str(PRIVATE_HOST), "exec", str(self._base), *argv]

    def exec(
        self,
        *argv: str,
        check: bool = True,
        stdin: str | None = None,
        timeout: float = COMMAND_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host and return its outcome."""
        return run(self.command(argv), check=check, stdin=stdin, timeout=timeout, environment=environment)

    def popen(self, *argv: str, environment: Mapping[str, str] | None = None) -> Process:
        """Start a process in the host; whatever is left of it ends with the host."""
        log = self.directory / f"{Path(argv[0]).name}.{len(self._processes)}.log"
        with log.open("wb") as output:
            entering = subprocess.Popen(
                self.command(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        process = Process(entering, log)
        self._processes.append(process)
        return process

    def stop(self) -> None:
        """End everything in the host and remove it; can be called twice."""
        run([str(PRIVATE_HOST), "stop", str(self._base)], check=False)
        for process in self._processes:
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def hub_ipv6(address: str) -> str:
    """Return the IPv6 address on the hub of whoever has this IPv4 address there."""
    return f"{HUB_NETWORK6}{int(address.rpartition('.')[2]):x}"


class Joinable(Protocol):
    """What can be joined to a hub: something with a namespace under /run/netns of the machine."""

    @property
    def netns(self) -> str: ...


class Hub:
    """A switch in a namespace of its own; `join` gives a host addresses on it and returns the IPv4 one."""

    def __init__(self) -> None:
        self.name = unique_name("hub")
        self._joined = 0
        run(["ip", "netns", "add", self.name])
        self._ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
        self._ip("link", "set", "br0", "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def join(self, host: Joinable, *, device: str = "eth0") -> str:
        """Give `host` a network card on this switch and default routes out of it; return its address.

        The other one is `hub_ipv6` of it.
        """
        self._joined += 1
        address, port = f"{HUB_NETWORK}.{self._joined}", f"p{self._joined}"
        self._ip(
            "link", "add", port, "type", "veth", "peer", "name", device, "netns", f"/run/netns/{host.netns}"
        )
        self._ip("link", "set", port, "master", "br0", "up")
        # Nobody else has these addresses; while the kernel looks for somebody it sends nothing by IPv6.
        for name in ("all", device):
            setting = f"echo 0 > /proc/sys/net/ipv6/conf/{name}/accept_dad"
            run(["nsenter", f"--net=/run/netns/{host.netns}", "sh", "-c", setting])
        for line in (
            f"addr add {address}/24 dev {device}",
            f"link set {device} up",
            f"route add default via {HUB_NETWORK}.254",
            f"-6 addr add {hub_ipv6(address)}/64 dev {device} nodad",
            f"-6 route add default via {HUB_NETWORK6}fe dev {device}",
        ):
            run(["ip", "-n", host.netns, *line.split()])
        return address

    def stop(self) -> None:
        """Remove the switch; its ports go with it."""
        run(["ip", "netns", "del", self.name], check=False)

    def _ip(self, *arguments: str) -> None:
        run(["ip", "-n", self.name, *arguments])
