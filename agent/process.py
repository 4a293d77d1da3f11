# SPDX-License-Identifier: Apache-2.0
"""The agent as its API sees it (`agent.api.view.AgentView`), from the first moment on.

The API answers while the rest is still being built, so that `holdfast status` can say what the agent waits
for.  Until `parts` is there, everything but status, configuration and metrics is NotReady.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import prometheus_client

from agent import report, report_endpoints, report_health, report_maps
from agent.api import models, models_health
from agent.api.errors import BadRequest, Conflict, NotFound, NotReady
from agent.api.monitor import MonitorHub
from agent.endpoint import Endpoint
from agent.errors import EndpointNotFound
from agent.gate import Gates
from agent.health import Prober
from agent.parts import Parts
from agent.policy_sources import read_document
from agent.trace import trace
from core import log, metrics
from core.options import Config
from core.supervisor import Supervisor
from datapath.namespace import is_namespace
from identity.labels import CONTAINER, Labels


class AgentProcess:
    """Implements AgentView; `parts` is None until the agent has been built."""

    def __init__(self, config: Config, supervisor: Supervisor, monitor: MonitorHub, gates: Gates) -> None:
        self.config = config
        self.supervisor = supervisor
        self.started = time.time()
        self.trouble = "starting"  # why there are no parts yet
        self.parts: Parts | None = None
        self.gates = gates
        self._monitor = monitor

    @property
    def monitor(self) -> MonitorHub:
        return self._monitor

    def _built(self) -> Parts:
        if self.parts is None:
            raise NotReady(f"the agent is not ready: {self.trouble}", hint="see holdfast status")
        return self.parts

    # --- the agent itself

    def status(self) -> models.Status:
        return report.status(self)

    def configuration(self) -> models.Configuration:
        options = {
            name: models.OptionValue(value=each["value"], origin=each["origin"])
            for name, each in self.config.shown().items()
        }
        return models.Configuration(hash=self.config.hash, options=options)

    def start_now(self, who: str) -> models.StartedNow:
        return models.StartedNow(seconds=self.gates.open(who))

    async def metrics(self) -> bytes:
        report.set_gauges(self)
        # In a thread: the fill level of a map is found by reading all of it.
        return await asyncio.to_thread(prometheus_client.generate_latest, metrics.REGISTRY)

    async def debuginfo(self) -> models.Debuginfo:
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(("CILIUM_", "HOLDFAST_"))
        }
        return models.Debuginfo(
            status=self.status(),
            configuration=self.configuration(),
            environment=environment,
            log=list(log.ring),
            subsystems=report.subsystems(self.parts) if self.parts else {},
        )

    async def cleanup_plan(self) -> Sequence[models.CleanupItem]:
        return report.cleanup_items(self._built())

    # --- endpoints

    def endpoints(self) -> Sequence[models.Endpoint]:
        parts = self._built()
        found = sorted((endpoint for _, endpoint in parts.endpoints.table.items()), key=lambda each: each.id)
        return report_endpoints.endpoints(parts, found)

    def endpoint(self, reference: str) -> models.Endpoint:
        parts = self._built()
        return report_endpoints.endpoint(parts, find_endpoint(parts, reference))

    async def create_endpoint(self, endpoint: int, request: models.EndpointRequest) -> models.Endpoint:
        parts = self._built()
        labels = Labels.of(request.labels, source=CONTAINER)
        if not len(labels):
            raise BadRequest("an endpoint needs labels: without them it has no identity")
        if not is_namespace(Path(request.netns)):
            raise BadRequest(f"{request.netns!r} is no network namespace of this host")
        address = IPv4Address(request.ipv4) if request.ipv4 else None
        made = await parts.endpoints.create(endpoint_id=endpoint, address=address, netns=request.netns)
        try:
            made = await self._wire(parts, made, request, labels)
        except BaseException:
            await parts.endpoints.delete(made.id)
            raise
        return report_endpoints.endpoint(parts, made)

    @staticmethod
    async def _wire(
        parts: Parts, made: Endpoint, request: models.EndpointRequest, labels: Labels
    ) -> Endpoint:
        made = await parts.endpoints.connect(made.id)
        addresses = made.addresses.values()
        await parts.devices.move_inside(made.peer, Path(request.netns), request.interface, *addresses)
        await parts.endpoints.handed_over(made.id, request.name, labels)
        return await parts.endpoints.set_labels(made.id, labels)

    async def delete_endpoint(self, endpoint: int) -> None:
        parts = self._built()
        found = _get(parts, endpoint)
        if found.engine_endpoint_id:
            raise Conflict(
                f"endpoint {endpoint} belongs to container {found.container_name or found.container_id[:12]}",
                hint="stop the container",
            )
        await parts.endpoints.delete(endpoint)

    # --- identities and addresses

    def identities(self) -> Sequence[models.Identity]:
        parts = self._built()
        used = report_endpoints.reference_counts(parts)
        return [
            models.Identity(id=number, labels=labels.texts(), reference_count=used.get(number, 0))
            for number, labels in sorted(parts.identities.table.items())
        ]

    def identity(self, number: int) -> models.Identity:
        parts = self._built()
        labels = parts.identities.get(number)
        if labels is None:
            raise NotFound(f"identity {number} is not known on this host")
        used = report_endpoints.reference_counts(parts)
        return models.Identity(id=number, labels=labels.texts(), reference_count=used.get(number, 0))

    def addresses(self) -> Sequence[models.Address]:
        return report.addresses(self._built())

    def nodes(self) -> Sequence[models.Node]:
        return report.nodes(self._built())

    async def health(self) -> models_health.HealthStatus:
        # In a thread: of 10 000 nodes it takes a quarter of a second.
        return await asyncio.to_thread(report_health.health, self._prober())

    async def probe_health(self) -> models_health.HealthStatus:
        await self._prober().probe_all()
        return await self.health()

    def _prober(self) -> Prober:
        prober = self._built().prober
        if prober is None:
            raise NotFound("health probes are switched off", hint="the option cluster-health-port is 0")
        return prober

    # --- policy

    def policies(self) -> models.PolicyRepository:
        return report.policies(self._built())

    async def put_policy(self, name: str, text: str) -> models.PolicyChange:
        parts = self._built()
        for policy in await read_document(text, "policy apply --local", name):
            holder = parts.policy_names.holder(policy.name)
            if holder is not None and holder != parts.directory.origin_of(name):
                raise Conflict(f"policy {policy.name} exists already, from {holder}", hint="delete it there")
        path = await asyncio.to_thread(parts.directory.write, name, text)
        await parts.directory.rescan()
        return await self._changed(parts, name, str(path))

    async def delete_policy(self, name: str) -> models.PolicyChange:
        parts = self._built()
        path = await parts.directory.remove(name)
        if path is None:
            raise NotFound(f"policy {name} is not in {parts.directory.directory}")
        return await self._changed(parts, name, str(path))

    @staticmethod
    async def _changed(parts: Parts, name: str, path: str) -> models.PolicyChange:
        """Answer once the change is in the maps."""
        await parts.derivations.policies_enforced()
        return models.PolicyChange(name=name, revision=parts.policy_maps.engine.revision, path=path)

    def selectors(self) -> Sequence[models.Selector]:
        engine = self._built().policy_maps.engine
        return [
            models.Selector(selector=str(use.selector), users=use.users, identities=sorted(use.identities))
            for use in engine.selectors()
        ]

    def resolve(self, request: models.TraceRequest) -> models.TraceResult:
        return trace(self._built(), request)

    # --- kernel and engine

    async def maps(self) -> Sequence[models.MapInfo]:
        return await asyncio.to_thread(report_maps.maps, self._built().programs.root)

    async def map_dump(self, name: str) -> models.MapDump:
        return await asyncio.to_thread(report_maps.dump, self._built().programs.root, name)

    async def networks(self) -> Sequence[models.NetworkInfo]:
        return report.networks(self._built())


def _canonical(address: str) -> str:
    """Return an address as records have it: IPv6 has many spellings."""
    try:
        return str(ip_address(address))
    except ValueError:
        return address  # and then it is no endpoint's


def find_endpoint(parts: Parts, reference: str) -> Endpoint:
    """Return the endpoint of ``373``, ``container-name:web`` and the other forms of AgentView.endpoint."""
    kind, colon, value = reference.partition(":")
    if not colon:
        if not reference.isdigit():
            raise BadRequest(f"endpoint {reference!r} is neither a number nor prefix:name")
        return _get(parts, int(reference))
    matches = {
        "container-id": lambda each: each.container_id.startswith(value),
        "container-name": lambda each: each.container_name == value,
        "ipv4": lambda each: each.ipv4 == value,
        "ipv6": lambda each: each.ipv6 == _canonical(value),
        "docker-endpoint": lambda each: each.engine_endpoint_id.startswith(value),
    }.get(kind)
    if matches is None or not value:
        raise BadRequest(f"endpoint reference {reference!r} has no known prefix")
    for _, endpoint in parts.endpoints.table.items():
        if matches(endpoint):
            return endpoint
    raise NotFound(f"no endpoint of this host is {reference}")


def _get(parts: Parts, number: int) -> Endpoint:
    try:
        return parts.endpoints.get(number)
    except EndpointNotFound as error:
        raise NotFound(error.message) from error
