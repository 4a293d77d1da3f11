# SPDX-License-Identifier: Apache-2.0
"""A host with an agent, however that was started: its API and command, containers on it, what its tables say.

    AgentHost      tests.support.agent       agent and etcd are processes, of the checkout and without TLS
    ComposedHost   tests.support.composed    everything comes from images, by the project's own set-up

Used by tests/engine and tests/chaos; needs root.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.engine import WORKLOAD_IMAGE, DockerHost
from tests.support.host import hub_ipv6, run
from tests.support.netns import Netns
from tests.support.places import Place, opened
from tests.support.rules import Rule, document


class Node(DockerHost, ABC):
    """What is the same of both."""

    socket: Path  # of the agent's API, as this machine sees it

    @abstractmethod
    def cli(self, *arguments: str, check: bool = True, stdin: str | None = None) -> Any:
        """Run `holdfast …` in the host and return the finished process."""

    def api(self, path: str, *, method: str = "GET", body: Any = None, check: bool = True) -> Any:
        """Call the agent's API and return its JSON; None for a failure without `check`."""
        arguments = ["curl", "-s", "--fail-with-body", "--max-time", "30", "--unix-socket", str(self.socket)]
        arguments += ["-X", method, f"http://holdfast{path}"]
        if body is not None:
            arguments += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = run(arguments, check=False)
        if done.returncode != 0:
            assert not check, f"{method} {path}: {done.stdout}{done.stderr}"
            return None
        return json.loads(done.stdout) if done.stdout else None

    # --- workloads

    def network(self, name: str = "holdfast") -> None:
        self.engine.docker("network", "create", "-d", "holdfast", "--ipam-driver", "null", name)

    def container(
        self, name: str, *command: str, labels: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> str:
        """Run a container on the holdfast network; return its address."""
        label_options = [part for key, value in (labels or {}).items() for part in ("-l", f"{key}={value}")]
        has_network = any(option.startswith("--network") for option in options)
        network = [] if has_network else ["--network", "holdfast"]
        self.engine.docker(
            "run",
            "-d",
            "--init",
            "--name",
            name,
            *network,
            *label_options,
            *options,
            WORKLOAD_IMAGE,
            *command,
        )
        return str(self.endpoint_of(name)["status"]["networking"]["addressing"][0]["ipv4"])

    @contextlib.contextmanager
    def workload(self, name: str, *, app: str = "") -> Iterator[Place]:
        """Run a container with servers on all ports of both families, for the length of the block."""
        self.container(name, "sleep", "infinity", labels={"app": app or name})
        try:
            with contextlib.ExitStack() as stack:
                inside = self.netns_of(name)
                stack.callback(inside.close)
                (addresses,) = self.endpoint_of(name)["status"]["networking"]["addressing"]
                yield Place(name, addresses["ipv4"], inside, addresses.get("ipv6", "")).serve(stack)
        finally:
            self.engine.docker("rm", "-f", name, check=False)

    def endpoint_of(self, name: str) -> Any:
        """Return the endpoint of a container as the API shows it."""
        return self.api(f"/v1/endpoint/container-name:{name}")

    def inside(self, name: str, *command: str, check: bool = True, timeout: float = 30.0) -> Any:
        """Run a command in a container."""
        return self.engine.docker("exec", name, *command, check=check, timeout=timeout)

    def netns_of(self, container: str) -> Netns:
        """Return the namespace of a running container; its pid counts in the host's own pid namespace."""
        state: Any = self.engine.inspect(container)["State"]
        return opened(Path(f"/proc/{self.pid}/root/proc/{state['Pid']}/ns/net"))

    def place(self, netns: Netns) -> Place:
        """Return the host itself as a place; `netns` is its namespace."""
        return Place(self.name, self.address, netns, hub_ipv6(self.address))

    # --- policy, and what the agent knows

    @contextlib.contextmanager
    def policy(self, *rules: Rule, name: str = "test") -> Iterator[None]:
        """Have rules in force for the length of the block, through the agent's API for this host."""
        self.api(f"/v1/policy/{name}", method="PUT", body={"text": document(name, *rules)})
        try:
            yield
        finally:
            self.api(f"/v1/policy/{name}", method="DELETE")

    def knows(self, place: Place) -> bool:
        """True when this host has learned who both addresses of a place are."""
        identities = {each["cidr"]: each["identity"] for each in self.api("/v1/ip")}
        return all(identities.get(place.of(family).prefix, 0) > 255 for family in (4, 6))

    def dropped(self, reason: str, direction: str) -> int:
        """Return the packets of one row of `bpf metrics list`; `direction` is ingress or egress."""
        rows = json.loads(self.cli("bpf", "metrics", "list", "-o", "json").stdout)
        wanted = (reason, direction.upper())
        return sum(row["packets"] for row in rows if (row["reason"], row["direction"]) == wanted)


def acquainted(nodes: Sequence[Node]) -> bool:
    """True when each of these knows of all of them."""
    return all(len(node.api("/v1/cluster/nodes")) == len(nodes) for node in nodes)
