# SPDX-License-Identifier: Apache-2.0
"""Several hosts on one switch, each with its own engine and agent; the first one has the etcd of all, unless
the test brings one.

fleet.hosts[0] … [n - 1]     10.77.0.1 …, fd77::1 …; pools 10.50.<n>.0/24
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from agent.departures import AGAIN_S, BEHIND_S, LOOK_S, SETTLED_S, SOON_S, TRIES
from kvstore.sink import HOLD_S
from tests.support.agent import AgentHost
from tests.support.host import Hub, wait_for
from tests.support.node import acquainted

# Within so many seconds, on a machine that does other things too, hosts know nothing any more of what etcd
# has no key of: an absence of etcd before is waited out, the node is asked, then what is behind it goes, and
# then the identities that nobody has any more.
GONE_S = SETTLED_S + HOLD_S + (TRIES + 1) * (SOON_S + LOOK_S) + 2 * BEHIND_S + 1.1 * AGAIN_S + 30


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
        wait_for(lambda: acquainted(self.hosts), "host that knows all others", seconds=30)


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
