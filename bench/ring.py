# SPDX-License-Identifier: Apache-2.0
"""A ring of applications: the endpoints that a full host has in a bench, and the proof that all obey.

Each application may speak to the next one on one port, both directions are enforced, and every endpoint has
an identity of its own by its label `copy`.  What policy is to make of that is known without asking the
agent: `check_maps` compares every policy map with it, `check_flows` tries real connections.

Called by the benches of hosts with hundreds of endpoints, with what they measure an agent by.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.agent_memory import resident_mb
from bench.harness import emit
from cli.client import AgentClient
from tests.support.agent import AgentHost
from tests.support.places import opened

PORT = 8000
OF_AN_APP = 10  # endpoints; a ring of fewer than MIN_APPS has no one but neighbours
MIN_APPS = 4
FLOWS = 20
LIMIT_S, DENIED_S = 5.0, 0.3
ANSWER_S = 120.0
INGRESS, EGRESS = 0, 1


@dataclass(frozen=True)
class Member:
    """One endpoint: its number, its label `copy`, and what the agent gave it."""

    id: int
    copy: int
    identity: int
    address: str
    netns: Path

    @classmethod
    def of(cls, shown: Any, copy: int, netns: Path) -> Member:
        """Return what the API shows as a member; SystemExit when it is not enforced."""
        status = shown["status"]
        if status["state"] != "ready":
            raise SystemExit(f"endpoint {shown['id']} is {status['state']}")
        address = status["networking"]["addressing"][0]["ipv4"]
        return cls(shown["id"], copy, status["identity"]["id"], address, netns)


@dataclass(frozen=True)
class Ring:
    """A ring of `size` endpoints; who they are, labels say."""

    size: int

    @property
    def apps(self) -> int:
        return max(self.size // OF_AN_APP, MIN_APPS)

    def labels(self, copy: int) -> dict[str, str]:
        return {"app": self._app(copy), "copy": str(copy)}

    def rules(self) -> str:
        """Each application may be spoken to by the one before it, and speak to the one behind it."""

        def peers(app: int) -> list[dict[str, Any]]:
            return [{"matchLabels": {"app": self._app(app)}}]

        port = [{"ports": [{"port": str(PORT), "protocol": "TCP"}]}]
        return json.dumps(
            [
                {
                    "endpointSelector": {"matchLabels": {"app": self._app(app)}},
                    "ingress": [{"fromEndpoints": peers(app - 1), "toPorts": port}],
                    "egress": [{"toEndpoints": peers(app + 1), "toPorts": port}],
                }
                for app in range(self.apps)
            ]
        )

    def check_maps(self, host: AgentHost, members: Sequence[Member]) -> int:
        """Compare every policy map with labels and rules; return the number of entries."""
        of_app: dict[int, set[int]] = {}
        for each in members:
            of_app.setdefault(each.copy % self.apps, set()).add(each.identity)
        checked = 0
        for each in members:
            found = _policy_map(host, each.id)
            expected = {
                f"identity={peer} dport={PORT} protocol=6 direction={direction}"
                for direction, app in ((INGRESS, each.copy - 1), (EGRESS, each.copy + 1))
                for peer in of_app[app % self.apps]
            }
            if found != expected:
                raise SystemExit(f"endpoint {each.id}: {sorted(found)[:3]} …, not {sorted(expected)[:3]} …")
            checked += len(found)
        return checked

    def check_flows(self, members: Sequence[Member]) -> int:
        """Each of a sample may speak to the next application, and to none other; return how many."""
        sample = members[:: max(self.size // FLOWS, 1)]
        for client in sample:
            right, wrong = (self._first(members, client.copy + step) for step in (1, 2))
            if not _connects(client, right, LIMIT_S):
                raise SystemExit(f"endpoint {client.id} does not reach {right.id}, which policy allows")
            if _connects(client, wrong, DENIED_S):
                raise SystemExit(f"endpoint {client.id} reaches {wrong.id}, which policy denies")
        return len(sample)

    def _app(self, copy: int) -> str:
        return f"app-{copy % self.apps}"

    def _first(self, members: Sequence[Member], copy: int) -> Member:
        return next(each for each in members if self._app(each.copy) == self._app(copy))


def api(host: AgentHost) -> AgentClient:
    """Return a client of the agent's API, without the process that `AgentHost.api` starts."""
    return AgentClient(host.socket, timeout=ANSWER_S)


def _policy_map(host: AgentHost, endpoint_id: int) -> set[str]:
    """Return the keys of an endpoint's map, without those of the host."""
    dump = api(host).get("map", f"cilium_policy_{endpoint_id:05d}")
    return {entry["key"] for entry in dump["entries"] if "identity=1 " not in entry["key"]}


def _connects(client: Member, server: Member, limit: float) -> bool:
    """Tell whether a connection comes about within `limit` seconds."""
    there, here = opened(server.netns), opened(client.netns)
    try:
        with there.socket(socket.SOCK_STREAM) as listening, here.socket(socket.SOCK_STREAM) as calling:
            listening.bind((server.address, PORT))
            listening.listen()
            calling.settimeout(limit)
            calling.connect((server.address, PORT))
            return True
    except TimeoutError:
        return False
    finally:
        there.close()
        here.close()


def cpu_s(process: Path, *, children: bool = False) -> float:
    """Return the seconds of CPU that a process, by its directory in /proc, took, the kernel's for it too.

    `children`: and those of its children that have ended.
    """
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if children else 13])) / os.sysconf("SC_CLK_TCK")


class AgentUse:
    """What an agent takes for endpoints that start after this was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._process = Path(f"/proc/{pid}")
        self._rss, self._cpu = resident_mb(pid), cpu_s(self._process)

    def cpu_ms(self) -> float:
        return (cpu_s(self._process) - self._cpu) * 1e3

    def emit_rss(self, prefix: str, endpoints: int) -> None:
        """Print VmRSS, and what it grew by for each endpoint."""
        now = resident_mb(self._pid)
        emit(f"{prefix}_agent_rss_mb", now, "MB", 1)
        emit(f"{prefix}_agent_rss_kb_each", (now - self._rss) * 1e3 / endpoints, "kB", 1)

    def idle_share(self, seconds: float) -> float:
        """Return the part of a CPU that the agent takes during the next seconds."""
        before = self.cpu_ms()
        time.sleep(seconds)
        return (self.cpu_ms() - before) / 1e3 / seconds


def list_s(host: AgentHost, endpoints: int) -> float:
    """Return the seconds of `holdfast endpoint list`; SystemExit when an endpoint is not in it."""
    command = [str(Path(sys.executable).with_name("holdfast")), "-H", str(host.socket), "endpoint", "list"]
    began = time.monotonic()
    done = host.exec(*command, environment={"COLUMNS": "200"})
    taken = time.monotonic() - began
    if sum(line.rstrip().endswith("ready") for line in done.stdout.splitlines()) != endpoints:
        raise SystemExit(f"endpoint list does not show {endpoints} ready: {done.stdout[:2000]}")
    return taken
