# SPDX-License-Identifier: Apache-2.0
"""The JSON of probes between nodes: the shape is that of cilium-health's status, and so are the units.

Beyond it: `tcp` beside `http`, what length of packets arrives, what time it is there, and of each node its
state and when it was probed.
"""

from __future__ import annotations

from agent.api.models import Clock, Model


class ConnectivityStatus(Model, frozen=True, kw_only=True):
    """One probe: `latency` in nanoseconds, `status` empty for one that was answered, else what failed."""

    latency: int = 0
    status: str = ""


class PathStatus(Model, frozen=True, kw_only=True):
    """One address; `icmp` is null where this agent may not send echo requests.

    `mtu` is the longest packet that arrives there, in bytes from the IP header on; 0: not known.
    """

    ip: str
    icmp: ConnectivityStatus | None
    tcp: ConnectivityStatus
    http: ConnectivityStatus
    mtu: int = 0


class HostStatus(Model, frozen=True, kw_only=True):
    primary_address: PathStatus | None = None
    secondary_addresses: list[PathStatus]


class NodeStatus(Model, frozen=True, kw_only=True):
    """One node; `host` is empty until it was probed."""

    name: str  # <cluster>/<name>
    state: str  # reachable, unreachable, unknown
    host: HostStatus
    probed: str = ""
    age: float = -1.0  # seconds since then; -1: never
    clock_ahead: float | None = None  # seconds that its clock is ahead of this host's; null: not known
    clock_wrong: bool = False  # it differs from most


class SelfStatus(Model, frozen=True, kw_only=True):
    name: str


class HealthStatus(Model, frozen=True, kw_only=True):
    """The answer of /v1/health."""

    local: SelfStatus
    timestamp: str  # of the last probe of any node; empty before the first
    interval: float  # seconds between two probes of a node
    device_mtu: int = 0  # the longest packet that this host's devices send
    clock: Clock = Clock()
    nodes: list[NodeStatus]
