# SPDX-License-Identifier: Apache-2.0
"""One host with an agent, containers on it, and neighbours behind its network card.

    world, far 10.77.0.x ── hub ── eth0 [host: etcd, engine, agent] lxc… ── client, other, server 10.50.0.x

The containers are real ones of a real engine.  Used by tests/engine; needs root.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.agent import ETCD_PORT, POOL, AgentHost
from tests.support.host import Hub, run, wait_for
from tests.support.netns import Netns
from tests.support.places import Neighbour, Place, opened


class Monitor:
    """`holdfast monitor` as a process; its lines so far."""

    def __init__(self, site: Site, *arguments: str) -> None:
        self._process = site.host.popen_cli("monitor", *arguments)
        wait_for(lambda: site.status()["node-monitor"]["listeners"] > 0, "listening monitor")

    def lines(self) -> list[str]:
        return self._process.output().splitlines()

    def waits_for(self, *words: str, after: int = 0) -> str:
        """Return the first line beyond the first `after` that holds all `words`, once it is there."""

        def found() -> list[str]:
            return [line for line in self.lines()[after:] if all(word in line for word in words)]

        try:
            wait_for(lambda: bool(found()), f"monitor line with {words}", seconds=5)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n" + "\n".join(self.lines()[after:])) from error
        return found()[0]

    def stop(self) -> None:
        self._process.stop()


class Site:
    """The whole of it, for one session of tests; a test leaves it as it found it."""

    def __init__(self, host: AgentHost, hub: Hub, stack: contextlib.ExitStack) -> None:
        self.host = host
        self.hub = hub
        self._stack = stack
        self._become_operator()
        self.on_host = Place("host", host.address, opened(Path(f"/run/netns/{host.netns}"))).serve(stack)
        self.world, self.far = self.neighbour("world"), self.neighbour("far")
        self.host.network()
        self.client, self.other, self.server = (
            self.keep(name, labels={"app": name}) for name in ("client", "other", "server")
        )

    # --- parts

    def neighbour(self, name: str) -> Place:
        """Add a machine behind the host's card, with a route to the host's endpoints."""
        new = Neighbour(self.hub)
        self._stack.callback(new.stop)
        run(["ip", "-n", new.netns, "route", "add", POOL, "via", self.host.address])
        return new.place(name).serve(self._stack)

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
        address = self.host.container(name, "sleep", "infinity", labels=labels, options=options)
        try:
            inside = self.netns_of(name)
            with contextlib.ExitStack() as stack:
                stack.callback(inside.close)
                place = Place(name, address, inside)
                yield place.serve(stack) if serve else place
        finally:
            self.host.engine.docker("rm", "-f", name, check=False)

    def netns_of(self, container: str) -> Netns:
        """Return the namespace of a running container; its pid counts in the host's own pid namespace."""
        state: Any = self.host.engine.inspect(container)["State"]
        return opened(Path(f"/proc/{self.host.pid}/root/proc/{state['Pid']}/ns/net"))

    def _become_operator(self) -> None:
        """Put the configuration of etcd where commands that write look for it."""
        operator = self.host.private("/etc/holdfast") / "operator"
        operator.mkdir()
        (operator / "etcd.config").write_text(f"endpoints: [http://127.0.0.1:{ETCD_PORT}]\n")

    # --- policy

    @contextlib.contextmanager
    def policy(self, *rules: Mapping[str, Any], name: str = "test") -> Iterator[None]:
        """Have rules in force for the length of the block, through the agent's API for this host."""
        self.host.api(f"/v1/policy/{name}", method="PUT", body={"text": document(name, *rules)})
        try:
            yield
        finally:
            self.host.api(f"/v1/policy/{name}", method="DELETE")

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
        """Return the packets of one row of `bpf metrics list`; `direction` is ingress or egress."""
        wanted = (reason, direction.upper())
        rows = self.json("bpf", "metrics", "list")
        return sum(row["packets"] for row in rows if (row["reason"], row["direction"]) == wanted)

    @contextlib.contextmanager
    def monitor(self, *arguments: str) -> Iterator[Monitor]:
        """Listen to `holdfast monitor` for the length of the block."""
        listening = Monitor(self, *arguments)
        try:
            yield listening
        finally:
            listening.stop()


def document(name: str, *rules: Mapping[str, Any]) -> str:
    """Return a policy of these rules as text (JSON is YAML)."""
    return json.dumps(
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": name},
            "specs": list(rules),
        }
    )


@contextlib.contextmanager
def new_site(hub: Hub) -> Iterator[Site]:
    """Make everything; all of it ends with the block."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(AgentHost("hfs"))
        host.address = hub.join(host)
        host.start_etcd()
        agent = host.start_agent()
        made = Site(host, hub, stack)
        yield made
        died = {each["name"]: each["error"] for each in made.status()["controllers"] if each["restarts"]}
        assert not died, f"tasks of the agent died: {died}"
        assert "Traceback" not in agent.output(), agent.output()[-6000:]
