# SPDX-License-Identifier: Apache-2.0
"""Built beside the data path, which does without: probes between nodes, and names across hosts.

Called by: agent.parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent import path_mtu
from agent.health import Prober
from agent.health_server import HealthServer
from agent.names import NameIndex
from agent.names_server import NamesServer
from agent.names_zone import Zone
from agent.path_mtu import PathProber

if TYPE_CHECKING:
    from agent.parts import Ground, Knowledge


@dataclass(eq=False)
class HealthSide:
    """Probes between nodes; None where cluster-health-port is 0."""

    prober: Prober | None = None
    path_prober: PathProber | None = None
    health_server: HealthServer | None = None


@dataclass(eq=False)
class NamesSide:
    """Names across hosts; None unless enable-cluster-dns."""

    name_index: NameIndex | None = None
    names_server: NamesServer | None = None


def health(ground: Ground, known: Knowledge) -> HealthSide:
    config, addresses = ground.config, ground.host.node_ips
    port = config["cluster-health-port"]
    if not port:
        known.path_mtus.source(path_mtu.SOURCE).mark_in_sync()  # and empty: a former life's go
        return HealthSide()
    own = f"{config['cluster-name']}/{ground.node.name}"
    restored = ground.programs.maps.path_mtu.items()
    sizes = PathProber(known.path_mtus, port=port, full=ground.host.mtu, restored=restored)
    base = config["cluster-health-interval"]
    prober = Prober(known.nodes, own, addresses, port=port, base=base, sizes=sizes)
    return HealthSide(prober, sizes, HealthServer(own, addresses, port))


def names(ground: Ground, known: Knowledge) -> NamesSide:
    if not ground.config["enable-cluster-dns"]:
        return NamesSide()
    index = NameIndex(known.identities.table, known.addresses)
    zone = Zone(ground.config["cluster-dns-domain"], index)
    return NamesSide(index, NamesServer(zone, ground.pool.routers, ground.pool.networks))
