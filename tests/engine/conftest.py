# SPDX-License-Identifier: Apache-2.0
"""Tests with real docker engines: the fixtures are `tests.support.engine_fixtures`."""

from collections.abc import Iterator

import pytest

from tests.support.engine_fixtures import engine_parts, host, hub, three_hosts
from tests.support.host import Hub
from tests.support.require import require_tools
from tests.support.site import Site, new_site

__all__ = ["engine_parts", "host", "hub", "three_hosts"]


@pytest.fixture(scope="session")
def whole_site(hub: Hub) -> Iterator[Site]:
    """A host with etcd, engine and agent, three containers on it and the world behind its card."""
    require_tools("etcd", "etcdctl", "curl", "nft", "iptables", "ping")
    with new_site(hub) as made:
        yield made


@pytest.fixture(scope="session")
def site(whole_site: Site, request: pytest.FixtureRequest) -> Site:
    """The site by IPv4; by each of both for what is marked `both_families`."""
    return whole_site.by(getattr(request, "param", 4))
