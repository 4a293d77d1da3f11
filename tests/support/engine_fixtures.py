# SPDX-License-Identifier: Apache-2.0
"""Fixtures with docker engines, shared by tests/engine and tests/chaos (their conftest.py imports them).

All are lazy and last for the session: a test leaves a host as it found it.  A host that a test may break
(kill its engine, fill its disk) is made by the test itself: `with DockerHost() as host`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.engine import DockerHost, workload_images
from tests.support.host import Hub
from tests.support.require import require_root, require_tools


@pytest.fixture(scope="session")
def engine_parts() -> None:
    """What every test with an engine needs; a missing part skips it, or fails it when CI is set."""
    require_root()
    require_tools("dockerd", "docker", "ip", "nsenter", "unshare", "mmdebstrap", "slirp4netns")


@pytest.fixture(scope="session")
def hub(engine_parts: None) -> Iterator[Hub]:
    """The switch that joins the hosts."""
    with Hub() as switch:
        yield switch


@pytest.fixture(scope="session")
def host(hub: Hub) -> Iterator[DockerHost]:
    """One host with an engine and the workload image, joined to the hub."""
    with ExitStack() as stack:
        yield _joined_host(stack, hub)


@pytest.fixture(scope="session")
def three_hosts(hub: Hub) -> Iterator[tuple[DockerHost, DockerHost, DockerHost]]:
    """Three such hosts, which reach each other over the hub."""
    with ExitStack() as stack:
        yield _joined_host(stack, hub), _joined_host(stack, hub), _joined_host(stack, hub)


def _joined_host(stack: ExitStack, hub: Hub) -> DockerHost:
    new = stack.enter_context(DockerHost(images=workload_images()))
    new.address = hub.join(new)
    return new
