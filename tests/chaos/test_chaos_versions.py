# SPDX-License-Identifier: Apache-2.0
"""Two versions on one etcd: hosts are upgraded one by one and taken back, in either order, under traffic.

The next version is this one with what a later one may add (`tests.support.nextversion`): fields in the
records of etcd and of the checkpoint, and another layout of the view file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore import schema
from tests.support.chaos import Scene, new_scene
from tests.support.engine_fixtures import engine_parts
from tests.support.fleet import FleetHost
from tests.support.host import REPO, wait_for
from tests.support.nextversion import next_version

__all__ = ["engine_parts"]

pytestmark = pytest.mark.rare


@pytest.fixture(scope="module")
def scene(engine_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with new_scene(tmp_path_factory.mktemp("versions")) as made:
        yield made


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next_version(tmp_path_factory.mktemp("source"))


def replaced(scene: Scene, host: FleetHost, source: Path) -> None:
    """Have another version run on a host; nothing is noticed, and all agree afterwards."""
    with scene.watched(host):
        host.stop_agent()
        host.source = source
        host.start_agent(**scene.options)


def speaks_next(scene: Scene, host: FleetHost) -> bool:
    """True when what a host says of itself in etcd has the fields of the next version."""
    stored = scene.checker.stored()
    node = stored[schema.node_key("default", host.name)]
    addresses = [
        each
        for key, each in stored.items()
        if key.startswith(schema.IPS) and json.loads(each.value)["HostIP"] == host.address
    ]
    found = {"HoldfastNext" in json.loads(each.value) for each in (node, *addresses)}
    assert len(found) == 1, "all of its keys, or none"
    assert addresses
    return found.pop()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["clients first", "server first"])
def test_hosts_are_upgraded_and_taken_back_one_by_one(
    scene: Scene, newer: Path, order: tuple[int, int]
) -> None:
    first, second = (scene.fleet.hosts[number] for number in order)
    before = {host.name: endpoints(host) for host in (first, second)}
    for host in (first, second):
        replaced(scene, host, newer)
        assert speaks_next(scene, host)
    first.container("newborn", "sleep", "infinity", labels={"app": "newborn"})
    number = first.endpoint_of("newborn")["id"]
    try:
        replaced(scene, first, REPO)
        assert speaks_next(scene, second)
        assert list(first.state.glob("views.db.damaged-*")), "a view of another layout is set aside"
        first.engine.docker("rename", "newborn", "renamed")
        wait_for(
            lambda: checkpoint(first, number)["container_name"] == "renamed", "checkpoint of the new name"
        )
        assert checkpoint(first, number)["next"] == ["x"], "what only the newer version knows stays"
    finally:
        first.engine.docker("rm", "-f", "newborn", "renamed", check=False)
    replaced(scene, second, REPO)
    wait_for(lambda: {host.name: endpoints(host) for host in (first, second)} == before, "the same endpoints")
    assert not any(speaks_next(scene, host) for host in (first, second)), "as this version writes them"


def endpoints(host: FleetHost) -> list[int]:
    return sorted(each["id"] for each in host.api("/v1/endpoint"))


def checkpoint(host: FleetHost, number: int) -> dict[str, Any]:
    return dict(json.loads((host.state / "endpoints" / f"{number:05d}.json").read_text()))
