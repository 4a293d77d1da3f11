# SPDX-License-Identifier: Apache-2.0
"""The line of `holdfast status` about names across hosts: there when they are on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.api import models
from cli.commands.status import cluster_dns
from tests.support.agent_view import FakeAgent, Serving, serving
from tests.support.cli import run


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Serving]:
    with serving(FakeAgent(), tmp_path / "h.sock") as served:
        yield served


def status(agent: Serving, found: models.ClusterDns) -> list[str]:
    """Return what follows the line's label."""
    agent.view.cluster_dns = found
    shown = run("status", socket=agent.path)
    assert shown.returncode == 0, "names are no failure of the agent"
    return [each.strip() for each in shown.stdout.partition("Cluster DNS:")[2].splitlines()[:3]]


def test_nothing_is_said_when_they_are_off(agent: Serving) -> None:
    assert "Cluster DNS" not in run("status", socket=agent.path).stdout
    assert list(cluster_dns(None)) == []


def test_where_they_are_answered(agent: Serving) -> None:
    found = models.ClusterDns(state="Ok", domain="holdfast", addresses=["10.50.0.1", "fd00::1"], names=12)
    assert status(agent, found)[0] == "12 names of holdfast, answered at 10.50.0.1, fd00::1"


def test_what_is_wrong_with_them(agent: Serving) -> None:
    found = models.ClusterDns(
        state="Warning",
        msg="not answered at 10.50.0.1 port 53/UDP: Address already in use",
        domain="holdfast",
        addresses=["10.50.0.1"],
        names=1,
        unusable=4,
        unusable_names=["a.b.shop", "c.d.shop", "\x1b[2J"],
    )
    assert status(agent, found) == [
        "1 name of holdfast, answered at 10.50.0.1",
        "Warning: not answered at 10.50.0.1 port 53/UDP: Address already in use",
        "4 services can have no name: a.b.shop, c.d.shop, \\x1b[2J …",
    ]
