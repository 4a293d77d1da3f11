# SPDX-License-Identifier: Apache-2.0
"""What the API's handlers need from the agent, and nothing else.

The agent implements `AgentView`; tests hand in a small one of their own.  Methods that only look at tables
are synchronous and must not block; those that touch the kernel, the disk or the kvstore are coroutines.
Every method may raise a `HoldfastError`; `agent.api.errors` says which HTTP code it becomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from agent.api import models, models_health
from agent.api.monitor import MonitorHub


class AgentView(Protocol):
    """The agent as its API sees it."""

    @property
    def monitor(self) -> MonitorHub:
        """The hub that datapath events are published to."""
        ...

    # --- the agent itself
    def status(self) -> models.Status: ...

    def configuration(self) -> models.Configuration: ...

    def start_now(self, who: str) -> models.StartedNow:
        """Ask etcd now, by order of `who`, whatever this host's slot is; NotReady before there is a slot."""
        ...

    async def metrics(self) -> bytes:
        """Return the metrics in Prometheus' text format (`prometheus_client.generate_latest`)."""
        ...

    async def debuginfo(self) -> models.Debuginfo: ...

    async def cleanup_plan(self) -> Sequence[models.CleanupItem]:
        """Return what `holdfast cleanup --all` would remove from this host."""
        ...

    # --- endpoints
    def endpoints(self) -> Sequence[models.Endpoint]: ...

    def endpoint(self, reference: str) -> models.Endpoint:
        """Return one endpoint by id or by a prefixed name as in Cilium (see below); NotFound otherwise.

        References: ``373``, ``container-id:<prefix>``, ``container-name:<name>``, ``ipv4:<address>``,
        ``docker-endpoint:<prefix>``.
        """
        ...

    async def create_endpoint(self, endpoint: int, request: models.EndpointRequest) -> models.Endpoint:
        """Make an endpoint for a network namespace; 0 lets the agent choose the id.

        Raises BadRequest (namespace, label, address), Conflict (id or address taken), NotReady.
        """
        ...

    async def delete_endpoint(self, endpoint: int) -> None:
        """Remove an endpoint that the API made.  Conflict for one that docker owns, NotFound."""
        ...

    # --- identities and addresses
    def identities(self) -> Sequence[models.Identity]:
        """Return reserved, cluster and local identities, by number."""
        ...

    def identity(self, number: int) -> models.Identity: ...

    def addresses(self) -> Sequence[models.Address]: ...

    def nodes(self) -> Sequence[models.Node]: ...

    async def health(self) -> models_health.HealthStatus:
        """Return what the last probes of the nodes found; NotFound where they are switched off."""
        ...

    async def probe_health(self) -> models_health.HealthStatus:
        """Probe every node now and return what was found; as `health` otherwise."""
        ...

    # --- policy
    def policies(self) -> models.PolicyRepository: ...

    async def put_policy(self, name: str, text: str) -> models.PolicyChange:
        """Write one policy into the watched directory and wait until it is in the repository.

        Raises PolicyError when it is refused (nothing is written), Conflict when etcd has that name.
        """
        ...

    async def delete_policy(self, name: str) -> models.PolicyChange:
        """Remove one policy from the watched directory; NotFound when it is not there."""
        ...

    def selectors(self) -> Sequence[models.Selector]: ...

    def resolve(self, request: models.TraceRequest) -> models.TraceResult:
        """Say what policy decides for one flow and why; nothing is changed."""
        ...

    # --- kernel and engine
    async def maps(self) -> Sequence[models.MapInfo]: ...

    async def map_dump(self, name: str) -> models.MapDump:
        """Return all entries of one BPF map, read in a thread; NotFound for a name that is not ours."""
        ...

    async def networks(self) -> Sequence[models.NetworkInfo]: ...
