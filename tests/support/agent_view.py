# SPDX-License-Identifier: Apache-2.0
"""A small agent for tests of the API and the command line: it holds values and remembers changes.

It is served by the real server on a real socket; `serving` does that in a thread with a loop of its own, so
that a test may run the real command as a process beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import structs

from agent.api import models, models_health
from agent.api.errors import BadRequest, Conflict, NotFound
from agent.api.monitor import MonitorHub
from agent.api.server import ApiServer
from agent.limits import Limits
from policy.language import parse_policies

WEB = ["container:app=web", "container:env=prod"]
NODE = models.Node(
    name="vm", ipv4_address="10.99.0.2", ipv4_endpoint_cidr="10.50.0.0/16", source="local", local=True
)


def make_endpoint(number: int, labels: Sequence[str] = (), enabled: str = "both") -> models.Endpoint:
    """Return a ready endpoint with address 10.50.0.<number>."""
    return models.Endpoint(
        id=number,
        status=models.EndpointStatus(
            state="ready",
            identity=models.Identity(id=13465, labels=list(labels)),
            labels=models.EndpointLabels(security_relevant=list(labels)),
            networking=models.EndpointNetworking(
                addressing=[models.EndpointAddress(ipv4=f"10.50.0.{number % 256}")],
                interface_name=f"lxc{number:05x}",
            ),
            policy=models.EndpointPolicy(policy_enabled=enabled, policy_revision=3),
            external_identifiers=models.ExternalIdentifiers(container_name=f"c{number}"),
            health=models.EndpointHealth(bpf="OK", policy="OK", connected=True, overall_health="OK"),
            log=[models.LogEntry(timestamp="2026-01-01T00:00:00Z", code="OK", state="ready", message="done")],
        ),
    )


def make_health(nodes: Mapping[str, Mapping[str, str]]) -> models_health.HealthStatus:
    """Return what probes found: node → address → the error of HTTP; the first node is the agent's own."""
    return models_health.HealthStatus(
        local=models_health.SelfStatus(name=next(iter(nodes))),
        timestamp="2026-01-01T00:00:00Z",
        interval=65.9,
        nodes=[
            _node_status(name, [_path_status(*each) for each in ips.items()]) for name, ips in nodes.items()
        ],
    )


def _node_status(name: str, paths: list[models_health.PathStatus]) -> models_health.NodeStatus:
    if not paths:
        host = models_health.HostStatus(secondary_addresses=[])
        return models_health.NodeStatus(name=name, state="unknown", host=host)
    return models_health.NodeStatus(
        name=name,
        state="unreachable" if any(path.http.status for path in paths) else "reachable",
        host=models_health.HostStatus(primary_address=paths[0], secondary_addresses=paths[1:]),
        probed="2026-01-01T00:00:00Z",
        age=75.0,
    )


def _path_status(ip: str, error: str) -> models_health.PathStatus:
    answered = models_health.ConnectivityStatus(latency=350_500)
    http = models_health.ConnectivityStatus(status=error) if error else answered
    return models_health.PathStatus(ip=ip, icmp=None, tcp=answered, http=http)


class FakeAgent:
    """An `AgentView` of plain values; tests change the attributes."""

    def __init__(self, queue_size: int = 100) -> None:
        self.hub = MonitorHub(queue_size)
        self.kvstore = models.Component(state="Ok", msg="etcd: 1/1 connected, has-quorum=true")
        self.known = {373: make_endpoint(373, WEB), 512: make_endpoint(512, ["container:app=db"], "none")}
        self.local: dict[str, str] = {}
        self.revision = 3
        self.taken = {"in-etcd"}
        self.created: list[models.EndpointRequest] = []
        self.cluster_health = models.ClusterHealth(
            state="Ok", nodes=2, reachable=2, unreachable=0, interval=65.9, age=12.0
        )
        self.cluster_dns = models.ClusterDns(state="Disabled", msg="enable-cluster-dns is false")
        self.ordered_by = ""
        self.found = make_health({"default/vm": {"10.99.0.2": ""}, "default/b": {"10.99.0.3": ""}})

    @property
    def monitor(self) -> MonitorHub:
        return self.hub

    def status(self) -> models.Status:
        return models.Status(
            holdfast=models.Component(state="Ok", msg="2 endpoints, all in sync"),
            kvstore=self.kvstore,
            container_runtime=models.Component(state="Ok", msg="docker 20.10.24"),
            network_driver=models.Component(state="Ok", msg="1 network"),
            masquerading=models.Component(state="Ok", msg="nft [IPv4: Enabled]"),
            ipam=models.Ipam(pool="10.50.0.0/16", used=2, available=65533),
            node_monitor=models.MonitorInfo(
                listeners=self.hub.listeners, seen=self.hub.seen, lost=self.hub.lost
            ),
            node=NODE,
            version="0.1.0",
            uptime=4000.0,
            staleness=1.0,
            policy_revision=self.revision,
            policies=1,
            endpoints={"ready": 2},
            identities=12,
            identity_range="min 256, max 65535",
            controllers=[models.Controller(name="ipcache", state="running")],
            tables=[models.TableInfo(name="ip", entries=4, in_sync=True)],
            waits=[models.WaitInfo(subject="etcd", purpose="first list", seconds=61)],
            unmanaged=[models.Unmanaged(name="old", reason="on docker's own bridge")],
            maps=[models.MapInfo(name="cilium_lxc", type="hash", entries=2, max_entries=65535)],
            cluster_health=self.cluster_health,
            cluster_dns=self.cluster_dns,
        )

    def configuration(self) -> models.Configuration:
        value = models.OptionValue(value="default", origin="default")
        return models.Configuration(hash="abc", options={"cluster-name": value})

    async def metrics(self) -> bytes:
        return b'# HELP x y\ncilium_policy 3.0\ncilium_drop_count_total{reason="Policy denied"} 2.0\n'

    async def debuginfo(self) -> models.Debuginfo:
        return models.Debuginfo(
            status=self.status(), configuration=self.configuration(), environment={}, log=["started"]
        )

    async def cleanup_plan(self) -> Sequence[models.CleanupItem]:
        return [models.CleanupItem(kind="device", name="lxc00175")]

    def endpoints(self) -> Sequence[models.Endpoint]:
        return list(self.known.values())

    def endpoint(self, reference: str) -> models.Endpoint:
        for each in self.known.values():
            if reference in (
                str(each.id),
                f"container-name:{each.status.external_identifiers.container_name}",
            ):
                return each
        raise NotFound(f"there is no endpoint {reference}")

    async def create_endpoint(self, endpoint: int, request: models.EndpointRequest) -> models.Endpoint:
        if endpoint in self.known:
            raise Conflict(f"endpoint {endpoint} exists")
        if not Path(request.netns).exists():
            raise BadRequest(f"netns {request.netns} does not exist")
        self.created.append(request)
        self.known[endpoint or 999] = make_endpoint(endpoint or 999, request.labels)
        return self.known[endpoint or 999]

    async def delete_endpoint(self, endpoint: int) -> None:
        if self.known.pop(endpoint, None) is None:
            raise NotFound(f"there is no endpoint {endpoint}")

    def identities(self) -> Sequence[models.Identity]:
        return [
            models.Identity(id=1, labels=["reserved:host"]),
            models.Identity(id=13465, labels=WEB, reference_count=1),
        ]

    def identity(self, number: int) -> models.Identity:
        for each in self.identities():
            if each.id == number:
                return each
        raise NotFound(f"there is no identity {number}")

    def addresses(self) -> Sequence[models.Address]:
        return [
            models.Address(cidr="10.50.0.117/32", identity=13465, source="local"),
            models.Address(cidr="10.78.0.0/24", identity=1, source="kvstore", host_ip="192.0.2.10"),
        ]

    def nodes(self) -> Sequence[models.Node]:
        return [NODE]

    async def health(self) -> models_health.HealthStatus:
        return self.found

    def start_now(self, who: str) -> models.StartedNow:
        self.ordered_by = who
        return models.StartedNow(seconds=1234.0)

    async def probe_health(self) -> models_health.HealthStatus:
        self.found = structs.replace(self.found, timestamp="2026-01-02T00:00:00Z")
        return self.found

    def policies(self) -> models.PolicyRepository:
        documents = [
            models.PolicyInfo(
                name=name, source="local", origin=f"/policies/{name}.yaml", rules=1, document=text
            )
            for name, text in self.local.items()
        ]
        return models.PolicyRepository(revision=3, policies=documents)

    async def put_policy(self, name: str, text: str) -> models.PolicyChange:
        if name in self.taken:
            raise Conflict(f"policy {name} exists in etcd", hint="delete it there first")
        parse_policies(text, "request", name=name)
        self.local[name] = text
        return models.PolicyChange(name=name, revision=4)

    async def delete_policy(self, name: str) -> models.PolicyChange:
        if self.local.pop(name, None) is None:
            raise NotFound(f"there is no policy {name} in the directory")
        return models.PolicyChange(name=name, revision=5)

    def selectors(self) -> Sequence[models.Selector]:
        return [models.Selector(selector="container:app=web", users=1, identities=[13465])]

    def resolve(self, request: models.TraceRequest) -> models.TraceResult:
        verdict = "ALLOWED" if request.dport == 80 else "DENIED"
        log = [f"Tracing From: {request.source_labels} => To: {request.destination_labels}"]
        log.append(f"Final verdict: {verdict}")
        return models.TraceResult(verdict=verdict, ingress=verdict.lower(), egress="allowed", log=log)

    async def maps(self) -> Sequence[models.MapInfo]:
        return self.status().maps

    async def map_dump(self, name: str) -> models.MapDump:
        if name != "cilium_lxc":
            raise NotFound(f"there is no map {name}")
        entry = models.MapEntry(key="10.50.0.117", value="id=373", state="sync")
        return models.MapDump(name=name, entries=[entry])

    async def networks(self) -> Sequence[models.NetworkInfo]:
        return [models.NetworkInfo(id="n1", name="holdfast", endpoints=2)]


class Serving:
    """A served view: `path` is the socket, `call` runs something in the server's loop."""

    def __init__(self, view: FakeAgent, path: Path) -> None:
        self.view = view
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.task: asyncio.Task[None] | None = None

    def publish(self, *events: models.MonitorEvent) -> None:
        """Publish events as the agent does, from its loop, and wait until that has happened."""

        async def work() -> None:
            for event in events:
                self.view.hub.publish(event)

        asyncio.run_coroutine_threadsafe(work(), self.loop).result(10)

    def wait_for_listeners(self, number: int) -> None:
        """Wait until so many monitors listen; AssertionError after ten seconds."""
        deadline = time.monotonic() + 10
        while self.view.hub.listeners != number:
            assert time.monotonic() < deadline, f"{self.view.hub.listeners} listeners instead of {number}"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    view: FakeAgent, path: Path, prometheus: str = "", limits: Limits | None = None
) -> Iterator[Serving]:
    """Serve `view` on `path` until the block ends."""
    served = Serving(view, path)
    ready = threading.Event()
    server = ApiServer(view, path, prometheus, limits)

    async def main() -> None:
        task = served.task = asyncio.create_task(server.run())
        await server.ready.wait()
        ready.set()
        await task

    def run() -> None:
        asyncio.set_event_loop(served.loop)
        with contextlib.suppress(asyncio.CancelledError):
            served.loop.run_until_complete(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(10), "the server did not start"
        yield served
    finally:
        if served.task is not None:
            served.loop.call_soon_threadsafe(served.task.cancel)
        thread.join(10)
        assert not thread.is_alive(), "the server did not end"
        served.loop.close()
