# SPDX-License-Identifier: Apache-2.0
"""What the API shows of the agent's state: pure views of the parts, built when somebody asks."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from agent.api import models
from agent.endpoint import State
from agent.parts import Parts
from agent.report_endpoints import state_of, when
from agent.report_health import summary
from core import metrics, waiting
from core.errors import shorten
from core.reconciler import Reconciler
from core.table import Table
from datapath.allowall import Now
from identity.numbers import WORLD
from kvstore.watcher import State as ViewState
from kvstore.watcher import staleness

if TYPE_CHECKING:
    from agent.process import AgentProcess

# Records in etcd that status shows; a thousand of them have one cause more often than a thousand.
IGNORED_SHOWN = 10
DAMAGE_SHOWN = 3  # files of the last life
NAMES_SHOWN = 3  # services that can have no name
NO_IPV6 = "no IPv6: this host's kernel has none"
OK, WARNING, FAILURE, DISABLED = "Ok", "Warning", "Failure", "Disabled"


def status(process: AgentProcess) -> models.Status:
    """Return the whole of `holdfast status`."""
    parts = process.parts
    if parts is None:
        return _status_without_parts(process)
    engine = parts.policy_maps.engine
    states = Counter(state_of(parts, endpoint).value for _, endpoint in parts.endpoints.table.items())
    numbers = parts.allocator.range
    return models.Status(
        holdfast=_overall(parts),
        kvstore=_kvstore(parts),
        container_runtime=_runtime(parts),
        network_driver=_driver(parts),
        masquerading=_masquerading(parts),
        ipam=models.Ipam(
            pool=str(parts.pool.network),
            pool6=str(parts.pool.network6 or ""),
            lacking="" if parts.pool.network6 or not parts.config["enable-ipv6"] else NO_IPV6,
            used=parts.pool.used,
            available=parts.pool.capacity - parts.pool.used,
        ),
        node_monitor=_monitor(process),
        node=own_node(parts),
        version=version("holdfast"),
        uptime=time.time() - process.started,
        staleness=staleness(),
        staleness_threshold=parts.config["kvstore-staleness-threshold"],
        policy_revision=engine.revision,
        policies=len(parts.policies),
        policy_errors=_policy_errors(parts),
        endpoints=dict(states),
        identities=len(parts.identities.table),
        identity_range=f"min {numbers.start}, max {numbers.stop - 1}",
        controllers=_controllers(process, parts),
        tables=[_table(table) for table in _tables(parts)],
        waits=_waits(),
        unmanaged=_unmanaged(parts),
        ignored=len(ignored_records(parts)),
        ignored_records=[
            models.IgnoredRecord(key=shorten(key), error=error)
            for key, error in itertools.islice(ignored_records(parts).items(), IGNORED_SHOWN)
        ],
        checkpoint=_checkpoint(parts),
        allow_all=_allow_all(parts),
        allow_all_error=parts.allow_all.trouble,
        cluster_health=summary(parts.prober, parts.health_server),
        cluster_dns=_names(parts),
    )


def _status_without_parts(process: AgentProcess) -> models.Status:
    unknown = models.Component(state=DISABLED, msg="not started")
    return models.Status(
        holdfast=models.Component(state=FAILURE, msg=process.trouble),
        kvstore=unknown,
        container_runtime=unknown,
        network_driver=unknown,
        masquerading=unknown,
        ipam=models.Ipam(pool="", used=0, available=0),
        node_monitor=_monitor(process),
        node=models.Node(name="", local=True),
        version=version("holdfast"),
        uptime=time.time() - process.started,
        staleness=-1,
        policy_revision=0,
        policies=0,
        waits=_waits(),
    )


def _overall(parts: Parts) -> models.Component:
    failing = [each.name for each in _reconcilers(parts) if each.errors]
    if failing:
        return models.Component(state=WARNING, msg=f"could not write everything of {', '.join(failing)}")
    if parts.registration.refusal:
        return models.Component(state=FAILURE, msg=f"not registered: {parts.registration.refusal}")
    if parts.keeper.error:
        return models.Component(state=WARNING, msg=parts.keeper.error)
    if not parts.policy_maps.is_open:
        return _incomplete(parts)
    sentence = parts.reconcilers["endpoints"].sentence
    return models.Component(state=OK, msg=f"{len(parts.endpoints.table)} endpoints; last: {sentence}")


def _incomplete(parts: Parts) -> models.Component:
    """Policies or identities are not listed yet; after allocator-list-timeout that is called a failure."""
    waited = time.monotonic() - parts.policy_maps.waiting_since
    late = waited > parts.config["allocator-list-timeout"]
    return models.Component(
        state=FAILURE if late else WARNING,
        msg=f"policies and identities are not listed after {waited:.0f} s; the last known state is enforced",
    )


def _kvstore(parts: Parts) -> models.Component:
    followers = parts.followers
    behind = [each for each in followers if each.error]
    lease = f"lease-ID={parts.session.lease_id:x}"
    endpoints = ", ".join(parts.client.config.endpoints)
    if (left := parts.gates.closed_for) > 0:
        return models.Component(
            state=WARNING, msg=f"etcd: not asked before this host's slot, in {left:.0f} s: {endpoints}"
        )
    if any(each.state is ViewState.WAITING for each in followers):
        left = parts.gates.relist_left
        return models.Component(
            state=WARNING,
            msg="etcd: its history is not the one this host knows; what changes is followed, everything is "
            f"listed in this host's slot, in {left:.0f} s; {lease}: {endpoints}",
        )
    if behind:
        return models.Component(state=FAILURE, msg=f"etcd: {behind[0].error}; {lease}: {endpoints}")
    if parts.session.error or not parts.session.alive:
        return models.Component(
            state=WARNING, msg=f"etcd: {parts.session.error or 'no lease yet'}: {endpoints}"
        )
    if refused := parts.session.errors:  # a right is missing, or etcd's database is full
        key, reason = next(iter(refused.items()))
        what = f"{len(refused)} of this host's keys" if len(refused) > 1 else key
        return models.Component(state=FAILURE, msg=f"etcd takes no {what}: {reason}; {lease}: {endpoints}")
    return models.Component(
        state=OK,
        msg=f"etcd: {len(parts.client.config.endpoints)} configured, {lease}, has-quorum=true: {endpoints}",
    )


def _runtime(parts: Parts) -> models.Component:
    if parts.engine_watch is None:
        return models.Component(state=DISABLED, msg="docker-endpoint is empty")
    view = parts.engine_watch.view
    if view.error:
        return models.Component(state=FAILURE, msg=view.error)
    running = _counted(view.containers, "container")
    return models.Component(state=OK, msg=f"docker {view.version}, {running} running")


def _driver(parts: Parts) -> models.Component:
    if parts.driver is None:
        return models.Component(state=DISABLED, msg="no engine")
    networks = _counted(len(parts.driver.networks), "network")
    return models.Component(state=OK, msg=f"{networks} on {parts.driver.socket_path}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _masquerading(parts: Parts) -> models.Component:
    errors = parts.firewall.reconciler.errors
    if errors:
        return models.Component(state=FAILURE, msg=next(iter(errors.values())))
    families = [4, 6] if parts.pool.network6 else [4]
    on = [family for family in families if parts.config[f"enable-ipv{family}-masquerade"]]
    if not on:
        return models.Component(state=DISABLED, msg="enable-ipv4-masquerade is false")
    words = ", ".join(f"IPv{each}: {'Enabled' if each in on else 'Disabled'}" for each in families)
    return models.Component(state=OK, msg=f"nft, {' '.join(parts.pool.networks)} [{words}]")


def _checkpoint(parts: Parts) -> models.Component:
    """What the next life would begin with."""
    memory = parts.memory
    if memory.trouble:
        return models.Component(state=WARNING, msg=memory.trouble)
    damaged = [*filter(None, (memory.damage, parts.gates.handover.trouble)), *parts.checkpoint.damage]
    if damaged:
        more = f"; {len(damaged) - DAMAGE_SHOWN} more in the log" if len(damaged) > DAMAGE_SHOWN else ""
        return models.Component(state=WARNING, msg="; ".join(damaged[:DAMAGE_SHOWN]) + more)
    sizes = ", ".join(f"{view.shape.name} {len(view.source)}" for view in memory.views)
    if memory.written_at:
        saved = f"written {when(memory.written_at)}"
    else:
        saved = "unchanged since the last life" if memory.resumable else "not written yet"
    return models.Component(state=OK, msg=f"{sizes}; {saved}")


def _allow_all(parts: Parts) -> list[models.AllowAll]:
    now = Now.read()
    return [
        models.AllowAll(
            endpoint=each.endpoint,
            until=when(each.until),
            seconds=each.left(now),
            by=each.by,
            reason=each.reason,
        )
        for each in parts.allow_all.orders(now)
    ]


def _monitor(process: AgentProcess) -> models.MonitorInfo:
    hub = process.monitor
    return models.MonitorInfo(listeners=hub.listeners, seen=hub.seen, lost=hub.lost)


def _policy_errors(parts: Parts) -> list[models.PolicyError]:
    refused = [
        models.PolicyError(name=each.name, origin=each.origin, error=each.error, since=when(each.since))
        for each in parts.refusals.all()
    ]
    overflow = parts.policy_maps.engine.errors()
    return refused + [
        models.PolicyError(name=f"endpoint {number}", origin="policy map", error=str(error))
        for number, error in overflow.items()
    ]


def _controllers(process: AgentProcess, parts: Parts) -> list[models.Controller]:
    children = [
        models.Controller(
            name=child.name,
            state=child.state,
            error=child.error,
            restarts=child.restarts,
            since=when(child.since),
        )
        for child in process.supervisor.children.values()
    ]
    writers = [
        models.Controller(
            name=f"{each.name} ({len(each.table)})",
            state="failing" if each.errors else "ok",
            error=next((f"{key}: {error}" for key, error in each.errors.items()), ""),
        )
        for each in _reconcilers(parts)
    ]
    return writers + children


def _reconcilers(parts: Parts) -> list[Reconciler[Any, Any]]:
    return [
        *parts.reconcilers.values(),
        parts.policy_maps.reconciler,
        parts.ipcache,
        parts.firewall.reconciler,
        *parts.node_reconcilers,
    ]


def _tables(parts: Parts) -> list[Table[Any, Any]]:
    return [
        parts.endpoints.table,
        parts.identities.table,
        parts.documents,
        parts.policies,
        parts.addresses,
        parts.nodes,
        parts.path_mtus,
    ]


def _table(table: Table[Any, Any]) -> models.TableInfo:
    return models.TableInfo(
        name=table.name,
        entries=len(table),
        in_sync=table.in_sync,
        waiting_for=[source.name for source in table.sources if not source.in_sync],
        missing=_missing(table),
    )


def _missing(table: Table[Any, Any]) -> int:
    return sum(len(source.missing) for source in table.sources)


def _waits() -> list[models.WaitInfo]:
    return [
        models.WaitInfo(
            subject=each.subject, purpose=each.purpose, seconds=round(each.seconds, 1), note=each.note
        )
        for each in waiting.current()
    ]


def ignored_records(parts: Parts) -> dict[str, str]:
    """Return key → why, of the records in etcd that can not be used."""
    return {
        **parts.identities.ignored,
        **parts.ip_sink.ignored,
        **parts.node_sink.ignored,
        **parts.node_follower.refused,
    }


def _names(parts: Parts) -> models.ClusterDns:
    index, server = parts.name_index, parts.names_server
    if index is None or server is None:
        return models.ClusterDns(state=DISABLED, msg="enable-cluster-dns is false")
    troubles = [f"not answered at {place}: {reason}" for place, reason in server.errors.items()]
    if not index.complete:
        troubles.append("not every name is known yet")
    # Of one service several identities may speak.
    unusable = sorted(set(index.names.unusable.values()))
    return models.ClusterDns(
        state=WARNING if troubles else OK,
        msg="; ".join(troubles),
        domain=server.zone.domain,
        addresses=list(server.addresses),
        names=len(index.names),
        unusable=len(unusable),
        unusable_names=[shorten(each) for each in unusable[:NAMES_SHOWN]],
    )


def _unmanaged(parts: Parts) -> list[models.Unmanaged]:
    if parts.engine_watch is None:
        return []
    return [
        models.Unmanaged(name=name, reason=reason)
        for name, reason in sorted(parts.engine_watch.view.unmanaged.items())
    ]


# --- addresses, nodes, policies, networks


def addresses(parts: Parts) -> Sequence[models.Address]:
    """Return the ip→identity table, sorted as text."""
    table = parts.addresses
    return [
        models.Address(
            cidr=prefix,
            identity=record.identity,
            source="" if record.identity == WORLD else table.owner(prefix) or "",
            host_ip=record.host_ip,
            metadata=record.metadata,
            encrypt_key=record.key,
        )
        for prefix, record in sorted(table.items())
    ]


def own_node(parts: Parts) -> models.Node:
    return models.Node(
        name=parts.node.name,
        cluster=parts.config["cluster-name"],
        ipv4_address=str(parts.host.node_ip),
        ipv4_endpoint_cidr=str(parts.pool.network),
        ipv6_address=str(parts.host.node_ip6 or ""),
        ipv6_endpoint_cidr=str(parts.pool.network6 or ""),
        source="local",
        local=True,
    )


def nodes(parts: Parts) -> Sequence[models.Node]:
    """Return this node and the others that etcd knows."""
    own, source = own_node(parts), parts.nodes.source("kvstore")
    others = [
        models.Node(
            name=record.name,
            cluster=record.cluster,
            ipv4_address=record.address(),
            ipv4_endpoint_cidr=record.ipv4_alloc_cidr.prefix if record.ipv4_alloc_cidr else "",
            ipv6_address=record.address(ipv6=True),
            ipv6_endpoint_cidr=record.ipv6_alloc_cidr.prefix if record.ipv6_alloc_cidr else "",
            source="missing" if name in source.missing or name in source.held else "kvstore",
        )
        for name, record in sorted(parts.nodes.items())
        if (record.cluster, record.name) != (own.cluster, own.name)
    ]
    return [own, *others]


def policies(parts: Parts) -> models.PolicyRepository:
    return models.PolicyRepository(
        revision=parts.policy_maps.engine.revision,
        policies=[
            models.PolicyInfo(
                name=name,
                source="local" if parts.policies.owner(name) == "directory" else "etcd",
                origin=policy.origin,
                rules=len(policy.rules),
                document=policy.document,
            )
            for name, policy in sorted(parts.policies.items())
        ],
        errors=_policy_errors(parts),
    )


def networks(parts: Parts) -> Sequence[models.NetworkInfo]:
    if parts.driver is None:
        return []
    members = Counter(endpoint.network_id for _, endpoint in parts.endpoints.table.items())
    return [
        models.NetworkInfo(
            id=network.id,
            name=network.name,
            endpoints=members[network.id],
            pool=network.subnet or str(parts.pool.network),
        )
        for network in parts.driver.networks.values()
    ]


# --- cleanup, metrics, diagnostics


def cleanup_items(parts: Parts) -> Sequence[models.CleanupItem]:
    """Return what `holdfast cleanup --all` would remove."""
    pins = [models.CleanupItem(kind="pin", name=path.name) for path in parts.programs.root.iterdir()]
    devices = [
        models.CleanupItem(kind="device", name=each.interface) for _, each in parts.endpoints.table.items()
    ]
    programs = [
        models.CleanupItem(kind="program", name=f"from_netdev on {name}") for name in parts.keeper.devices
    ]
    rest = [
        models.CleanupItem(kind="route", name=str(parts.pool.network)),
        models.CleanupItem(kind="firewall", name="nft table holdfast, iptables chain HOLDFAST-FORWARD"),
        models.CleanupItem(kind="state", name=str(parts.checkpoint.directory)),
    ]
    return [*programs, *devices, *pins, *rest]


def set_gauges(process: AgentProcess) -> None:
    """Bring the gauges up to date that are read rather than counted."""
    waits = waiting.current()
    metrics.WAITING_SECONDS.set(waits[0].seconds if waits else 0)
    if process.parts is None:
        return
    states = Counter(
        state_of(process.parts, endpoint).value for _, endpoint in process.parts.endpoints.table.items()
    )
    for state in State:
        metrics.ENDPOINT_STATE.labels(state.value).set(states.get(state.value, 0))
    index = process.parts.name_index
    if index is not None:
        metrics.DNS_NAMES.set(len(index.names))
        metrics.DNS_UNUSABLE.set(len(index.names.unusable))
    for table in _tables(process.parts):
        metrics.KVSTORE_MISSING.labels(table.name).set(_missing(table))


def subsystems(parts: Parts) -> dict[str, Any]:
    """Return what `bugtool` adds beyond status."""
    return {
        "own-keys": {key: value.decode(errors="replace") for key, value in parts.session.own_keys.items()},
        "own-key-errors": dict(parts.session.errors),
        "followers": {
            each.prefix: {"state": each.state.value, "revision": each.revision, "error": each.error}
            for each in parts.followers
        },
        "ignored-records": ignored_records(parts),
        "leader": parts.election.is_leader,
    }
