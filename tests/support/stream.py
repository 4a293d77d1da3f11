# SPDX-License-Identifier: Apache-2.0
"""Programs that run inside containers and say what happened to their packets.

`STREAM` is both ends of one TCP connection: each sends a byte every 10 ms in its direction and keeps the
longest pause between two bytes that came in.  `CONTROL` does the same over the container's own loopback:
what the machine's scheduler did to everybody meanwhile.  `COUNTER` counts datagrams, `SENDER` sends them.
Each writes what it knows to /tmp/<role>.json every 50 ms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.support.agent import AgentHost
from tests.support.host import wait_for

_COMMON = """
import json, os, selectors, socket, sys, time
def report(role, **facts):
    temporary = f"/tmp/.{role}.json"
    with open(temporary, "w") as file:
        json.dump(facts, file)
    os.rename(temporary, f"/tmp/{role}.json")
def pump(connections, role):
    selector = selectors.DefaultSelector()
    last = {}
    for each in connections:
        each.setblocking(False)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(each, selectors.EVENT_READ)
        last[each] = time.monotonic()
    gap = received = 0
    error = ""
    said = tick = time.monotonic()
    while not error:
        for key, _ in selector.select(0.005):
            try:
                data = key.fileobj.recv(65536)
                error = error or ("" if data else "closed")
            except OSError as failure:
                data, error = b"", str(failure)
            now = time.monotonic()
            gap = max(gap, now - last[key.fileobj])
            last[key.fileobj] = now
            received += len(data)
        now = time.monotonic()
        if now - tick >= 0.01:
            tick = now
            for each in connections:
                try:
                    each.send(b"x")
                except BlockingIOError:
                    pass
                except OSError as failure:
                    error = str(failure)
        if now - said >= 0.05 or error:
            said = now
            silent = max(now - each for each in last.values())
            report(role, gap_ms=1000 * max(gap, silent), received=received, error=error)
"""

SERVER = (
    _COMMON
    + """
listener = socket.create_server(("0.0.0.0", 9000))
report("server", gap_ms=0, received=0, error="waiting")
connection, _ = listener.accept()
pump([connection], "server")
"""
)
CLIENT = (
    _COMMON
    + """
for _ in range(200):
    try:
        connection = socket.create_connection((sys.argv[1], 9000), 1)
        break
    except OSError:
        time.sleep(0.05)
pump([connection], "client")
"""
)
CONTROL = (
    _COMMON
    + """
listener = socket.create_server(("127.0.0.1", 9001))
here = socket.create_connection(("127.0.0.1", 9001))
there, _ = listener.accept()
pump([here, there], "control")
"""
)
COUNTER = (
    _COMMON
    + """
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 9100))
server.settimeout(0.05)
count = {}
while True:
    try:
        _, peer = server.recvfrom(2048)
        count[peer[0]] = count.get(peer[0], 0) + 1
    except TimeoutError:
        pass
    report("counter", count=count)
"""
)
SENDER = (
    _COMMON
    + """
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sent = 0
while True:
    try:
        client.sendto(b"x", (sys.argv[1], 9100))
        sent += 1
    except OSError:
        pass
    if sent % 10 == 0:
        report("sender", sent=sent)
    time.sleep(0.01)
"""
)


@dataclass(frozen=True)
class Program:
    """One of the programs in one container."""

    host: AgentHost
    container: str
    role: str

    def facts(self) -> dict[str, Any]:
        """Return what the program wrote last, or nothing."""
        done = self.host.inside(self.container, "cat", f"/tmp/{self.role}.json", check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 and done.stdout else {}


def launch(host: AgentHost, container: str, role: str, code: str, *arguments: str) -> Program:
    """Start a program in a container and wait until it has written something."""
    host.engine.docker("exec", "-d", container, "python3", "-c", code, *arguments)
    program = Program(host, container, role)
    wait_for(lambda: bool(program.facts()), f"{role} in {container}")
    return program


class Flows:
    """One allowed TCP stream and one denied datagram flow between `server`, `client` and `stranger`."""

    def __init__(self, host: AgentHost) -> None:
        self.host = host
        self.server_ip = host.container("server", "sleep", "infinity", labels={"app": "server"})
        self.client_ip = host.container("client", "sleep", "infinity", labels={"app": "client"})
        self.stranger_ip = host.container("stranger", "sleep", "infinity", labels={"app": "stranger"})
        self.counter = launch(host, "server", "counter", COUNTER)
        self.server = launch(host, "server", "server", SERVER)
        self.client = launch(host, "client", "client", CLIENT, self.server_ip)
        self.control = launch(host, "client", "control", CONTROL)
        self.allowed = launch(host, "client", "sender", SENDER, self.server_ip)
        self.denied = launch(host, "stranger", "sender", SENDER, self.server_ip)
        wait_for(lambda: self.server.facts().get("received", 0) > 20, "bytes over the stream")
        wait_for(lambda: self.client_ip in self.counter.facts().get("count", {}), "allowed datagrams")

    def check(self) -> None:
        """Nothing was reset, nothing paused longer than the machine itself, nothing denied passed."""
        server, client, control = self.server.facts(), self.client.facts(), self.control.facts()
        assert (server["error"], client["error"]) == ("", ""), (server, client)
        # The stream waits for the scheduler twice, in two processes; the control is one for both ends.
        limit = 100 + 2 * control["gap_ms"]
        assert max(server["gap_ms"], client["gap_ms"]) <= limit, (server, client, control)
        assert self.stranger_ip not in self.counter.facts()["count"], self.counter.facts()

    def progress(self) -> tuple[int, int]:
        """Return how many bytes each end has received."""
        return int(self.server.facts()["received"]), int(self.client.facts()["received"])

    def wait_progress(self, received: int = 100) -> None:
        """Wait until that many more bytes came in at both ends and denied packets were tried."""
        server, client = self.progress()
        sent = int(self.denied.facts()["sent"])
        wait_for(
            lambda: self.progress()[0] >= server + received and self.progress()[1] >= client + received,
            f"{received} more bytes in both directions",
        )
        wait_for(lambda: int(self.denied.facts()["sent"]) > sent, "more denied datagrams")


POLICY = """
- endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
"""
