# SPDX-License-Identifier: Apache-2.0
"""One host with an agent, containers on it, and neighbours behind its network card.

    world, far 10.77.0.x ── hub ── eth0 [host: etcd, engine, agent] lxc… ── client, other, server 10.50.0.x
               fd77::x                                                       fd68:6f6c:6400:0:a4d:n:a32:x

The containers are real ones of a real engine.  Everything has an address of each family; `Site.by` is the
same site in one of them, so that a test that uses `site` runs for both.  Used by tests/engine; needs root.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.agent import ETCD_PORT, POOL, AgentHost
from tests.support.host import Hub, hub_ipv6, run, wait_for
from tests.support.netns import Netns
from tests.support.places import Neighbour, Place, opened
from tests.support.rules import Rule

FAMILIES = (4, 6)
# Marks a test, or a module, that is to run by IPv4 and by IPv6.
both_families = pytest.mark.parametrize("site", FAMILIES, ids=["IPv4", "IPv6"], indirect=True)

# Site's places, all of them.
_PLACES = ("on_host", "world", "far", "client", "other", "server")
# What the two families call things.
_HUB = {4: "10.77.0.0/24", 6: "fd77::/64"}
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}


class Monitor:
    """`holdfast monitor` as a process; its lines so far."""

    def __init__(self, site: Site, *arguments: str) -> None:
        self._site = site
        self._others = self._listeners()
        self._process = site.host.popen_cli("monitor", *arguments)
        wait_for(lambda: self._listeners() > self._others, "listening monitor")

    def lines(self) -> list[str]:
        return self._process.output().splitlines()

    def waits_for(self, *words: str, after: int = 0) -> str:
        """Return the first line beyond the first `after` that holds all `words`, once it is there."""

        def found() -> list[str]:
            return [line for line in self.lines()[after:] if all(word in line for word in words)]

        try:
            wait_for(lambda: bool(found()), f"monitor line with {words}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n" + "\n".join(self.lines()[after:])) from error
        return found()[0]

    def stop(self) -> None:
        """End it, and wait until the agent knows: the next one is counted."""
        self._process.stop()
        wait_for(lambda: self._listeners() <= self._others, "end of the monitor")

    def _listeners(self) -> int:
        return int(self._site.status()["node-monitor"]["listeners"])


class Site:
    """The whole of it, for one session of tests; a test leaves it as it found it."""

    def __init__(self, host: AgentHost, hub: Hub, stack: contextlib.ExitStack) -> None:
        self.host = host
        self.hub = hub
        self.family = 4
        self._stack = stack
        self._become_operator()
        inside = opened(Path(f"/run/netns/{host.netns}"))
        self.on_host = Place("host", host.address, inside, hub_ipv6(host.address)).serve(stack)
        self.world, self.far = self.neighbour("world"), self.neighbour("far")
        self.host.network()
        self.client, self.other, self.server = (
            self.keep(name, labels={"app": name}) for name in ("client", "other", "server")
        )

    # --- families

    def by(self, family: int) -> Self:
        """Return the same site by its addresses of one family: its places, and the containers it makes."""
        view = copy.copy(self)
        view.family = family
        for name in _PLACES:
            setattr(view, name, getattr(self, name).of(family))
        return view

    @property
    def card(self) -> str:
        """Return the host's address on the hub."""
        return self.on_host.address

    @property
    def hub_prefix(self) -> str:
        """Return the prefix of everybody on the hub."""
        return _HUB[self.family]

    @property
    def loopback(self) -> str:
        return _LOOPBACK[self.family]

    @property
    def pools(self) -> list[str]:
        """Return the prefixes that endpoints' addresses lie in, one of each family that they have."""
        ipam = self.status()["ipam"]
        return [pool for pool in (ipam["pool"], ipam.get("pool6")) if pool]

    @property
    def pool(self) -> str:
        """Return the prefix that endpoints' addresses lie in."""
        return next(pool for pool in self.pools if ip_network(pool).version == self.family)

    @property
    def router(self) -> str:
        """Return the host's address among its endpoints."""
        pool = ip_network(self.pool)
        first = ip_network(POOL).network_address + 1
        return str(pool.network_address + (1 if self.family == 4 else int(first)))

    # --- parts

    def neighbour(self, name: str) -> Place:
        """Add a machine behind the host's card, with a route to the host's endpoints."""
        new = Neighbour(self.hub)
        self._stack.callback(new.stop)
        via = {4: self.host.address, 6: hub_ipv6(self.host.address)}
        for pool in self.pools:
            run(["ip", "-n", new.netns, "route", "add", pool, "via", via[ip_network(pool).version]])
        return new.place(name).serve(self._stack).of(self.family)

    def keep(self, name: str, **how: Any) -> Place:
        """Run a container that serves for the rest of the session."""
        return self._stack.enter_context(self.container(name, **how))

    @contextlib.contextmanager
    def container(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        serve: bool = True,
    ) -> Iterator[Place]:
        """Run a container for the length of the block; its process sleeps, its servers are the test's."""
        self.host.container(name, "sleep", "infinity", labels=labels, options=options)
        try:
            inside = self.netns_of(name)
            (addresses,) = self.host.endpoint_of(name)["status"]["networking"]["addressing"]
            with contextlib.ExitStack() as stack:
                stack.callback(inside.close)
                place = Place(name, addresses["ipv4"], inside, addresses.get("ipv6", "")).of(self.family)
                yield place.serve(stack) if serve else place
        finally:
            self.host.engine.docker("rm", "-f", name, check=False)

    def netns_of(self, container: str) -> Netns:
        return self.host.netns_of(container)

    def _become_operator(self) -> None:
        """Put the configuration of etcd where commands that write look for it."""
        operator = self.host.private("/etc/holdfast") / "operator"
        operator.mkdir()
        (operator / "etcd.config").write_text(f"endpoints: [http://127.0.0.1:{ETCD_PORT}]\n")

    # --- policy

    def policy(self, *rules: Rule, name: str = "test") -> contextlib.AbstractContextManager[None]:
        """Have rules in force for the length of the block, through the agent's API for this host."""
        return self.host.policy(*rules, name=name)

    # --- looking

    def status(self) -> Any:
        return self.host.api("/v1/healthz")

    def cli(self, *arguments: str) -> str:
        """Return what `holdfast …` prints."""
        printed: str = self.host.cli(*arguments).stdout
        return printed

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "-o", "json"))

    def endpoint_id(self, place: Place) -> int:
        return int(self.host.endpoint_of(place.name)["id"])

    def identity(self, place: Place) -> int:
        return int(self.host.endpoint_of(place.name)["status"]["identity"]["id"])

    def dropped(self, reason: str, direction: str) -> int:
        return self.host.dropped(reason, direction)

    @contextlib.contextmanager
    def monitor(self, *arguments: str) -> Iterator[Monitor]:
        """Listen to `holdfast monitor` for the length of the block."""
        listening = Monitor(self, *arguments)
        try:
            yield listening
        finally:
            listening.stop()


@contextlib.contextmanager
def new_site(hub: Hub) -> Iterator[Site]:
    """Make everything; all of it ends with the block."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(AgentHost("hfs"))
        host.address = hub.join(host)
        host.start_etcd()
        agent = host.start_agent(enable_ipv6="true")
        made = Site(host, hub, stack)
        yield made
        died = {each["name"]: each["error"] for each in made.status()["controllers"] if each["restarts"]}
        assert not died, f"tasks of the agent died: {died}"
        assert "Traceback" not in agent.output(), agent.output()[-6000:]
