# SPDX-License-Identifier: Apache-2.0
"""Traffic between processes that no test can disturb, and what became of its packets meanwhile.

    client ◀──▶ server             a stream of container to container
    machine ◀──▶ host:8900 → server    one through a published port     (with a machine only)
    client ◀──▶ machine            one of a container to a VM         (with a machine only)
    client ◀──▶ server             numbered datagrams with answers, each way
    client ──▶ server              datagrams, echo requests, SYNs: they pass
    stranger ─✗─▶ server           the same: ingress of server denies them
    client ─✗─▶ stranger           the same: egress of client denies them

Both ends of each stream send all the time, and each notes when nothing came in.  Used by tests/chaos and
tests/engine; the programs are in `tests.support.stream_programs`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.agent import ETCD_PORT, AgentHost
from tests.support.host import Hub, wait_for
from tests.support.places import Neighbour
from tests.support.stream_programs import CLIENT, CONTROL, COUNTER, MACHINE, PROBER, SENDER, SERVER

PAUSE_MS = 100.0
LATE_S = 1.0  # a datagram without an answer for so long is late
LOST_S = 5.0  # one without an answer for so much longer is lost: the machine may have let a prober wait
PORT, PUBLISHED = 9000, 8900
PROTOCOLS = ("1", "6", "17")  # ICMP, TCP, UDP
POLICY = """
- endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}, {matchLabels: {app: machine}}]
- endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}, {matchLabels: {app: machine}}]
"""


@dataclass(frozen=True)
class Program:
    """One running program; `folder` is where this process finds what it writes."""

    role: str
    folder: Path

    def facts(self) -> dict[str, Any]:
        """Return what the program wrote last, or nothing."""
        try:
            return dict(json.loads((self.folder / f"{self.role}.json").read_text()))
        except FileNotFoundError:
            return {}

    def fresh(self) -> dict[str, Any]:
        """Return what the program says of everything until now; AssertionError when it has ended."""
        asked = time.monotonic()

        def said() -> bool:
            facts = self.facts()
            return bool(facts) and (facts["now"] >= asked or bool(facts["error"]))

        wait_for(said, f"word from {self.role}", pause=0.01)
        facts = self.facts()
        assert not facts["error"], (self.role, facts["error"])
        return facts


def launch(host: AgentHost, container: str, role: str, code: str, *arguments: str) -> Program:
    """Start a program in a container and wait until it has written something."""
    state: Any = host.engine.inspect(container)["State"]
    host.engine.docker("exec", "-d", container, "python3", "-c", code, *arguments)
    program = Program(role, Path(f"/proc/{host.pid}/root/proc/{state['Pid']}/root/tmp"))
    wait_for(lambda: bool(program.facts()), f"{role} in {container}")
    return program


class Machine(Neighbour):
    """A machine without an agent, registered as a VM, which has one stream each way."""

    def __init__(self, hub: Hub, host: AgentHost) -> None:
        super().__init__(hub)
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self._operator = host.directory / "operator.config"
        self._operator.write_text(f"endpoints: [http://127.0.0.1:{ETCD_PORT}]\n")
        self.register("machine", self.address)

    def register(self, name: str, address: str) -> None:
        """Give an address an identity by `app=<name>`, and wait until the kernel has it."""
        self.vm("register", name, "--ip", address, "-l", f"app={name}")
        wait_for(lambda: self.is_known(address), f"identity of {address}")

    def vm(self, *words: str) -> str:
        printed: str = self._host.cli("vm", *words, "--etcd-config", str(self._operator)).stdout
        return printed

    def is_known(self, address: str) -> bool:
        """True when the kernel's map has an identity for just this address."""
        found = json.loads(self._host.cli("bpf", "ipcache", "list", "-o", "json").stdout)
        return f"{address}/32" in found

    def start(self) -> Program:
        """Start its program; it waits for `client` and asks for server."""
        words = (sys.executable, "-c", MACHINE, self.address, self._host.address, str(PUBLISHED))
        self._process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.netns}", *words],
            env=os.environ | {"FACTS": str(self._host.directory)},
        )
        program = Program("machine", self._host.directory)
        wait_for(lambda: bool(program.facts()), "machine")
        return program

    def close(self) -> None:
        """End its program and remove it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.stop()


class Flows:
    """All of it, on a host where `POLICY` is in force; `check` covers the time since the last one.

    `elsewhere` names the containers that run on other hosts.
    """

    def __init__(
        self,
        host: AgentHost,
        machine: Machine | None = None,
        elsewhere: Mapping[str, AgentHost] | None = None,
    ) -> None:
        self.host = host
        self._elsewhere = elsewhere or {}
        publish = ("--publish", f"{PUBLISHED}:{PORT}") if machine else ()
        self.server_ip = self._container("server", *publish)
        self.client_ip, self.stranger_ip = self._container("client"), self._container("stranger")
        self.counters = {name: self._launch(name, "counter", COUNTER) for name in ("server", "stranger")}
        self.streams = self._streams(machine)
        self.probers = {
            f"{name} to {peer}": self._launch(name, "prober", PROBER, address, str(LATE_S))
            for name, peer, address in (
                ("client", "server", self.server_ip),
                ("server", "client", self.client_ip),
            )
        }
        self.control = self._launch("client", "control", CONTROL)
        self.allowed = self._sender("client", self.server_ip)
        self.denied = {
            "ingress": self._sender("stranger", self.server_ip),
            "egress": self._sender("client", self.stranger_ip),
        }
        self.wait_progress(20)
        wait_for(lambda: self._allowed_kinds() <= set(self._reached_server()), "packets that are allowed")
        wait_for(lambda: all(each.facts()["answered"] for each in self.probers.values()), "answers each way")
        self._since = self._undecided = time.monotonic()

    def _allowed_kinds(self) -> set[str]:
        return {f"{self.client_ip} {protocol}" for protocol in PROTOCOLS}

    def _reached_server(self) -> dict[str, int]:
        """Return how many packets reached the server, by source and protocol."""
        found: dict[str, int] = self.counters["server"].fresh()["count"]
        return found

    def _container(self, name: str, *options: str) -> str:
        return self._home(name).container(name, "sleep", "infinity", labels={"app": name}, options=options)

    def _home(self, container: str) -> AgentHost:
        return self._elsewhere.get(container, self.host)

    def _launch(self, container: str, role: str, code: str, *arguments: str) -> Program:
        return launch(self._home(container), container, role, code, *arguments)

    def _sender(self, container: str, address: str) -> Program:
        return self._launch(container, f"sender-{address}", SENDER, address)

    def _streams(self, machine: Machine | None) -> list[Program]:
        port = str(PORT)
        ends = [self._launch("server", "server", SERVER, "2" if machine else "1")]
        targets = [self.server_ip, port]
        if machine is not None:
            ends.append(machine.start())
            targets += [machine.address, port]
        return [*ends, self._launch("client", "client", CLIENT, *targets)]

    def check(self) -> None:
        """Nothing was reset or lost, nothing paused longer than the machine itself, nothing denied passed."""
        since, self._since = self._since, time.monotonic()
        pauses = {
            f"{name} at {program.role}": longest(stream, since, facts["now"])
            for program in self.streams
            for facts in (program.fresh(),)
            for name, stream in facts["streams"].items()
        }
        # A stream waits for the scheduler twice, in two processes; the control is one for both ends.
        control = self.control.fresh()
        limit = PAUSE_MS + 2 * max(
            longest(each, since, control["now"]) for each in control["streams"].values()
        )
        assert max(pauses.values()) <= limit, (pauses, limit)
        self.check_lost()
        self.check_denied()

    def check_lost(self) -> None:
        """Each datagram was answered; those of the last second are looked at the next time."""
        since, began = self._undecided, time.monotonic()
        found = self._unanswered(since)
        self._undecided = max(since, began - LATE_S)
        while found and time.monotonic() - began < LOST_S:
            time.sleep(0.1)
            found = self._unanswered(since, until=began - LATE_S)
        assert not found, f"datagrams without an answer (how many; s of the first, the last, now): {found}"

    def _unanswered(
        self, since: float, until: float = float("inf")
    ) -> dict[str, tuple[int, float, float, float]]:
        """Return how many datagrams of this time are late, and when the first and the last were sent."""
        facts = {name: program.fresh() for name, program in self.probers.items()}
        lost = {
            name: [sent - since for sent in each["lost"] if since <= sent < until]
            for name, each in facts.items()
        }
        return {
            name: (len(each), each[0], each[-1], facts[name]["now"] - since)
            for name, each in lost.items()
            if each
        }

    def forgive(self) -> None:
        """Have nothing of what was until now count in the next `check`."""
        self._since = self._undecided = time.monotonic()

    def check_unbroken(self) -> None:
        """Nothing was reset or closed; pauses do not matter."""
        for program in self.streams:
            program.fresh()

    def check_denied(self) -> None:
        """The packets that policy denies reached nobody; those beside them, that it allows, did."""
        at_server, at_stranger = self._reached_server(), self.counters["stranger"].fresh()["count"]
        assert self._allowed_kinds() <= set(at_server), at_server
        assert not [source for source in at_server if source.split()[0] == self.stranger_ip], at_server
        assert not [source for source in at_stranger if source.split()[0] == self.client_ip], at_stranger

    def wait_progress(self, received: int = 100) -> None:
        """Wait until each end received that many more bytes, and packets of each denied kind were tried."""
        wanted = {each: number + received for each, number in self._received().items()}
        tries = {name: number + 5 for name, number in self._tried().items()}
        ends = 6 if len(self.streams) == 3 else 2
        what = f"{received} more bytes at {ends} ends of streams"
        wait_for(lambda: len(self._received()) == ends and reached(self._received(), wanted), what)
        wait_for(lambda: reached(self._tried(), tries), "more packets that are denied")

    def _received(self) -> dict[str, int]:
        """Return how many bytes each end of each stream has received."""
        return {
            f"{name} at {program.role}": stream["received"]
            for program in self.streams
            for name, stream in program.facts().get("streams", {}).items()
        }

    def _tried(self) -> dict[str, int]:
        """Return how many packets of each kind were sent, for each way in which they are denied."""
        return {
            f"{direction} {protocol}": program.facts()["sent"][protocol]
            for direction, program in self.denied.items()
            for protocol in PROTOCOLS
        }


def longest(stream: Mapping[str, Any], since: float, now: float) -> float:
    """Return the longest time in milliseconds without a byte, of all that ended after `since` or have not.

    `now` is when the program wrote what it knows: later pauses may be of who reads it.
    """
    pauses: list[float] = [pause for ended, pause in stream["pauses"] if ended >= since]
    last: float = stream["last"]
    return max([*pauses, 1000 * (now - last)])


def reached(found: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    return all(found[name] >= number for name, number in wanted.items())
