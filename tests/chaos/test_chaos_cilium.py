# SPDX-License-Identifier: Apache-2.0
"""What has brought clusters of Cilium down, done to two hosts with traffic: each test names the issue.

Those of them that other tests show already are in the table of docs/chaos.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from agent.departures import LOOK_S, SETTLED_S, SOON_S, TRIES
from agent.health import FIRST_S
from kvstore import schema
from kvstore.sink import HOLD_S
from tests.support.chaos import GRACE_S, RECOVERED_S, SLOW_S, Scene, new_scene
from tests.support.engine_fixtures import engine_parts
from tests.support.fleet import FleetHost
from tests.support.host import wait_for
from tests.support.saved import Saved

__all__ = ["engine_parts"]

# A host that did not answer would be forgotten, and what is behind it as well.
FORGOTTEN_S = HOLD_S + (TRIES + 1) * (SOON_S + LOOK_S) + FIRST_S
EXPIRED_S = max(GRACE_S, SETTLED_S) + 20


@pytest.fixture(scope="module")
def scene(engine_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with new_scene(tmp_path_factory.mktemp("chaos")) as made:
        yield made


def node_key(host: FleetHost) -> str:
    return f"{schema.NODES}default/{host.name}"


def kept(host: FleetHost) -> bool:
    """True when a host keeps a node and an address that etcd has not."""
    missing = {table["name"]: table["missing"] for table in host.api("/v1/healthz")["tables"]}
    return bool(missing["nodes"] and missing["ipcache"])


def own_keys(scene: Scene, host: FleetHost) -> list[str]:
    """Return the keys on a host's lease."""
    stored = scene.checker.stored()
    lease = stored[node_key(host)].lease
    return [key for key, each in stored.items() if each.lease == lease]


def test_a_lease_that_ended_while_its_host_was_away(scene: Scene) -> None:
    """cilium#42596: an agent said "lease not found" for 16 hours, and had no keys in etcd until a restart.

    cilium#7214, #9422: a host that had no etcd for longer than its lease lost its connections for good.  Here
    the others see that it still answers them.
    """
    before = own_keys(scene, scene.one)
    lease = scene.checker.stored()[node_key(scene.one)].lease
    known = scene.ipcache(scene.two)
    with scene.watched():
        with scene.cut(scene.wires[0]):
            scene.etcd.ctl("lease", "revoke", f"{lease:x}")
            assert node_key(scene.one) not in scene.checker.stored()
            wait_for(
                lambda: kept(scene.two), "node and address that are kept", seconds=SETTLED_S + 2 * HOLD_S
            )
            time.sleep(FORGOTTEN_S)
            assert scene.ipcache(scene.two) == known
            listed = {
                each["name"]: each["source"]
                for each in json.loads(scene.two.cli("node", "list", "-o", "json").stdout)
            }
            assert listed[scene.one.name] == "missing"
        wait_for(lambda: node_key(scene.one) in scene.checker.stored(), "node in etcd", seconds=RECOVERED_S)
        scene.checker.wait_agreed()
        assert own_keys(scene, scene.one) == before
        assert scene.checker.stored()[node_key(scene.one)].lease != lease


def test_keys_of_a_host_that_somebody_else_deletes(scene: Scene) -> None:
    """cilium#7222, #7246: one agent took the keys of another for stale and deleted them; they stayed away.

    cilium#7517: after a wipe nobody wrote identities again.
    """
    keys = own_keys(scene, scene.one)
    with scene.watched():
        for prefix in (schema.IPS, schema.NODES, schema.IDENTITY_VALUES, schema.IDENTITY_IDS):
            scene.etcd.ctl("del", "--prefix", prefix)
        wait_for(lambda: set(keys) <= scene.checker.stored().keys(), "keys of host 1", seconds=RECOVERED_S)


@pytest.mark.rare
def test_keys_that_somebody_deletes_just_before_etcd_hangs(scene: Scene) -> None:
    """Their owner can not write them again, and the others hold them for longer than they would.

    When etcd goes on, the owner's word and the look that ends what is held come in the same seconds.
    """
    keys = own_keys(scene, scene.one)
    known = scene.ipcache(scene.two)
    with scene.watched(pause=True):
        scene.wires[0].delay = SLOW_S  # host 1 hears of it when etcd hangs
        try:
            scene.etcd.ctl("del", "--prefix", schema.IPS)
            scene.etcd.pause()
        finally:
            scene.wires[0].delay = 0.0
        try:
            time.sleep(2 * HOLD_S)  # found out after three times as long
            assert scene.ipcache(scene.two) == known
        finally:
            scene.etcd.resume()
        wait_for(lambda: set(keys) <= scene.checker.stored().keys(), "keys of host 1", seconds=RECOVERED_S)


@pytest.mark.rare
def test_a_restart_with_a_slow_etcd_and_long_after_it(scene: Scene) -> None:
    """cilium#26462: packets were dropped at a restart until the last source of addresses had been heard.

    cilium#24502: ten minutes after a restart what had been restored, and confirmed since, was removed.
    """
    host, wire = scene.two, scene.wires[1]
    with scene.watched(host):
        host.kill_agent()
        wire.delay = 2.0
        try:
            host.start_agent(**scene.options)
        finally:
            wire.delay = 0.0
        scene.checker.wait_agreed()
        time.sleep(EXPIRED_S)
        assert scene.checker.differences() == []


@pytest.mark.rare
def test_a_lock_of_somebody_who_died(scene: Scene) -> None:
    """cilium#9046, #9855: a lock whose holder was dead kept everybody from that identity, and stayed.

    It ends with its lease; what starts meanwhile runs as `init`, and everything else goes on.
    """
    labels = "container:app=client;container:env=locked;container:holdfast.network=holdfast;"
    lease = int(scene.etcd.ctl("lease", "grant", "45").split()[1], 16)
    with scene.watched(), scene.containers("locked", "free"):
        lock = schema.identity_lock_key(labels, lease)
        scene.etcd.ctl("put", "--lease", f"{lease:x}", lock, stdin="dead")
        started = {"locked": {"app": "client", "env": "locked"}, "free": {"app": "client", "env": "free"}}
        with scene.starting(started) as ends:
            wait_for(lambda: scene.reaches("free"), "a number for others", seconds=RECOVERED_S)
            assert not scene.reaches("locked")
            assert lock in scene.checker.stored()
            wait_for(lambda: scene.reaches("locked"), "a number for its labels", seconds=RECOVERED_S)
            assert lock not in scene.checker.stored()
            assert [each.result() for each in ends.values()] == [0, 0]
        scene.checker.wait_agreed()


@pytest.mark.rare
def test_who_lost_etcd_asks_for_it_less_and_less(scene: Scene) -> None:
    """cilium#22037: all nodes came back at once, again and again, to an etcd that was down for it."""
    with scene.watched():
        asked = []
        with scene.cut():
            scene.wait_trouble()
            for seconds in (10, 30):
                before = [wire.attempts for wire in scene.wires]
                time.sleep(seconds)
                asked.append([wire.attempts - each for wire, each in zip(scene.wires, before, strict=True)])
        sooner, later = asked
        assert all(0 < after < 3 * before for before, after in zip(sooner, later, strict=True)), asked


@pytest.mark.rare
def test_a_first_list_that_takes_longer_than_its_time(scene: Scene) -> None:
    """cilium#7248, #8283: "timeout while retrieving initial list" ended the agent, again and again.

    Here the host has lost its checkpoint besides: status says what is late, and the maps enforce.
    """
    host = scene.one
    with scene.watched(host):
        host.kill_agent()
        Saved(host.state).path.unlink()
        scene.etcd.pause()
        try:
            started = host.launch_agent(**scene.options, allocator_list_timeout="1s")
            wait_for(lambda: bool(host.api("/v1/endpoint", check=False)), "endpoints restored")
            wait_for(lambda: failure(host) == "Failure", "failure in status")
            scene.flows.wait_progress(300)
            assert started.running
        finally:
            scene.etcd.resume()
        wait_for(host.healthy, "healthy agent", seconds=RECOVERED_S)
        assert host.agent is started


def failure(host: FleetHost) -> str:
    return str(host.api("/v1/healthz")["holdfast"]["state"])
