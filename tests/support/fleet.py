# SPDX-License-Identifier: Apache-2.0
"""Several hosts on one switch, each with its own engine and agent; the first one has the etcd of all, unless
the test brings one.

fleet.hosts[0] … [n - 1]     10.77.0.1 …, fd77::1 …; pools 10.50.<n>.0/24
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.agent import AgentHost
from tests.support.host import Hub, hub_ipv6, wait_for
from tests.support.netns import Netns
from tests.support.places import Place, opened
from tests.support.rules import Rule
from tests.support.site import document


class FleetHost(AgentHost):
    """One of them."""

    def __init__(self, number: int) -> None:
        super().__init__(f"hff{number}")
        self.number = number

    @property
    def pool(self) -> str:
        return f"10.50.{self.number}.0/24"

    def options(self) -> dict[str, str]:
        return super().options() | {"ipv4-range": self.pool, "enable-ipv6": "true"}

    @contextlib.contextmanager
    def workload(self, name: str, *, app: str = "") -> Iterator[Place]:
        """Run a container with servers on all ports of both families, for the length of the block."""
        self.container(name, "sleep", "infinity", labels={"app": app or name})
        try:
            with contextlib.ExitStack() as stack:
                inside = self.netns_of(name)
                stack.callback(inside.close)
                (addresses,) = self.endpoint_of(name)["status"]["networking"]["addressing"]
                yield Place(name, addresses["ipv4"], inside, addresses["ipv6"]).serve(stack)
        finally:
            self.engine.docker("rm", "-f", name, check=False)

    def place(self, netns: Netns) -> Place:
        """Return the host itself as a place; `netns` is its namespace."""
        return Place(self.name, self.address, netns, hub_ipv6(self.address))

    @contextlib.contextmanager
    def policy(self, *rules: Rule, name: str = "test") -> Iterator[None]:
        """Have rules in force on this host for the length of the block."""
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
        """Return the packets of one row of `bpf metrics list`."""
        rows = json.loads(self.cli("bpf", "metrics", "list", "-o", "json").stdout)
        wanted = (reason, direction.upper())
        return sum(row["packets"] for row in rows if (row["reason"], row["direction"]) == wanted)

    def netns_of(self, container: str) -> Netns:
        """Return the namespace of a running container; its pid counts in the host's own pid namespace."""
        state: Any = self.engine.inspect(container)["State"]
        return opened(Path(f"/proc/{self.pid}/root/proc/{state['Pid']}/ns/net"))


class Fleet:
    """The hosts; `start` gives each of them an agent and a network."""

    def __init__(self, hub: Hub, hosts: list[FleetHost]) -> None:
        self.hub = hub
        self.hosts = hosts

    def start(self, **options: str) -> None:
        """Start every agent with these options and wait until all know each other."""
        for host in self.hosts:
            host.start_agent(**options)
        for host in self.hosts:
            host.network()
        wait_for(self.all_known, "host that knows all others", seconds=30)

    def all_known(self) -> bool:
        return all(len(host.api("/v1/cluster/nodes")) == len(self.hosts) for host in self.hosts)


@contextlib.contextmanager
def new_fleet(size: int, *, etcd: bool = True) -> Iterator[Fleet]:
    """Make hosts and, unless told otherwise, their etcd; agents are started by the test."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(Hub())
        hosts: list[FleetHost] = []
        for number in range(1, size + 1):
            host = stack.enter_context(FleetHost(number))
            host.address = hub.join(host)
            hosts.append(host)
            host.etcd_address = hosts[0].address
        if etcd:
            hosts[0].start_etcd(shared=True)
        yield Fleet(hub, hosts)
