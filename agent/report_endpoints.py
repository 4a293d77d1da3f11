# SPDX-License-Identifier: Apache-2.0
"""What the API shows of endpoints: a pure view, built when somebody asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec

from agent.api import models
from agent.endpoint import Endpoint, State
from agent.history import Event
from agent.parts import Parts
from agent.plumbing import PolicyMapStore
from core.errors import HoldfastError
from core.reconciler import Kind
from datapath.allowall import WHOLE_HOST
from identity.labels import Labels
from policy.model import ALLOW, ANY_TRANSPORT, Direction, PolicyKey

# Nobody is behind the interface (yet, or any more).
UNCONNECTED = frozenset({State.CREATING, State.DISCONNECTING, State.DISCONNECTED})
# In Cilium's words; every other state is on its way.
HEALTH = {
    State.READY: "OK",
    State.RESTORING: "OK",
    State.NOT_READY: "Failure",
    State.DISCONNECTING: "Disabled",
    State.DISCONNECTED: "Disabled",
}


def endpoints(parts: Parts, found: Iterable[Endpoint]) -> list[models.Endpoint]:
    """Return endpoints as the API shows them."""
    used = reference_counts(parts)
    return [_shown(parts, each, used) for each in found]


def endpoint(parts: Parts, each: Endpoint) -> models.Endpoint:
    """Return one endpoint as the API shows it."""
    return endpoints(parts, [each])[0]


def _shown(parts: Parts, each: Endpoint, used: Counter[int]) -> models.Endpoint:
    number = each.enforced_identity
    labels = Labels.parse(each.labels) if each.labels else parts.identities.get(number) or Labels()
    network = parts.driver.networks.get(each.network_id) if parts.driver is not None else None
    state = state_of(parts, each)
    return models.Endpoint(
        id=each.id,
        status=models.EndpointStatus(
            state=state.value,
            identity=models.Identity(id=number, labels=labels.texts(), reference_count=used[number]),
            labels=models.EndpointLabels(
                security_relevant=labels.texts(),
                derived=[
                    label for label in Labels.parse(each.all_labels).texts() if label not in labels.texts()
                ],
            ),
            networking=models.EndpointNetworking(
                addressing=[models.EndpointAddress(ipv4=each.ipv4, ipv6=each.ipv6)],
                interface_name=each.interface,
                interface_index=_interface_index(parts, each),
                mac=each.mac,
                host_mac=each.node_mac,
                published_ports=[str(port) for port in each.ports],
            ),
            policy=msgspec.structs.replace(_policy(parts, each), allow_all_until=_allowed_until(parts, each)),
            external_identifiers=models.ExternalIdentifiers(
                container_id=each.container_id,
                container_name=each.container_name,
                docker_endpoint_id=each.engine_endpoint_id,
                docker_network_id=each.network_id,
                docker_network_name=network.name if network else "",
                netns=each.netns,
            ),
            health=_health(state),
            log=[_log(event) for event in parts.endpoints.history(each.id)],
        ),
    )


def state_of(parts: Parts, each: Endpoint) -> State:
    return parts.endpoints.state(each, parts.derivations.status(each.id))


def _interface_index(parts: Parts, each: Endpoint) -> int:
    """Return the index that the data path delivers to; 0 while it knows no interface."""
    entry = parts.programs.maps.lxc.get(each.ipv4)
    return entry.ifindex if entry is not None and entry.endpoint_id == each.id else 0


def _policy(parts: Parts, each: Endpoint) -> models.EndpointPolicy:
    if not parts.policy_maps.is_open:
        return held_policy(parts.policy_store, each.id)
    engine, revision = parts.policy_maps.engine, parts.policy_maps.revision(each.id)
    try:
        enforced = engine.enforcement(each.id)
        entries = len(engine.map_state(each.id))
    except KeyError:
        return models.EndpointPolicy(policy_enabled="both", policy_revision=revision)
    except HoldfastError as error:
        return models.EndpointPolicy(policy_enabled="both", policy_revision=revision, error=str(error))
    status = parts.policy_maps.reconciler.status(each.id)
    overflow = engine.errors().get(each.id)
    return models.EndpointPolicy(
        policy_enabled=_enabled(enforced.ingress, enforced.egress),
        policy_revision=revision,
        map_entries=entries,
        error=str(overflow) if overflow else status.error if status.kind is Kind.ERROR else "",
    )


def _allowed_until(parts: Parts, each: Endpoint) -> str:
    """Return the time until which an operator's order lets all pass; empty without one."""
    ends = [order.until for order in parts.allow_all.orders() if order.endpoint in (each.id, WHOLE_HOST)]
    return when(max(ends)) if ends else ""


def held_policy(store: PolicyMapStore, endpoint_id: int) -> models.EndpointPolicy:
    """Return what an endpoint's map enforces while this agent does not know yet what it ought to.

    Its revision is 0: that of a former life.  A direction that only lets everything through counts as not
    enforced, as it is without a policy.
    """
    try:
        held = store.held(endpoint_id)
    except HoldfastError as error:
        return models.EndpointPolicy(policy_enabled="both", error=str(error))
    restricted = {
        way: {key: entry for key, entry in held.items() if key[3] == way}
        != {PolicyKey(0, *ANY_TRANSPORT, way): ALLOW}
        for way in Direction
    }
    return models.EndpointPolicy(
        policy_enabled=_enabled(restricted[Direction.INGRESS], restricted[Direction.EGRESS]),
        map_entries=len(held),
    )


def _enabled(ingress: bool, egress: bool) -> str:
    if ingress and egress:
        return "both"
    return "ingress" if ingress else "egress" if egress else "none"


def _health(state: State) -> models.EndpointHealth:
    word = HEALTH.get(state, "Bootstrap")
    return models.EndpointHealth(
        bpf=word, policy=word, connected=state not in UNCONNECTED, overall_health=word
    )


def _log(event: Event) -> models.LogEntry:
    return models.LogEntry(
        timestamp=when(event.time),
        code="OK" if event.ok else "Failure",
        state=event.state,
        message=event.message,
    )


def reference_counts(parts: Parts) -> Counter[int]:
    """Return identity → endpoints of this host that are enforced as it; 0 for all others."""
    return Counter(each.enforced_identity for _, each in parts.endpoints.table.items() if each.connected)


def when(moment: float) -> str:
    """Return Unix seconds as the API writes times."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
