# SPDX-License-Identifier: Apache-2.0
"""etcd is itself a workload of the network that needs it: when both are gone, both come up.

    host   agent ──▶ 127.0.0.1:2379 ──▶ etcd, a container that publishes its port
           stranger, which may not reach etcd

cilium#45844: etcd stood behind the network that it serves, and neither came up without the other.  Nobody
should build that (cilium#25632, #33030); who has must not lose the host by it.  The first start of all needs
another etcd: before etcd has ever answered, nobody knows which policies there are, and nothing may pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.agent import ETCD_PORT, AgentHost
from tests.support.checker import Checker
from tests.support.engine_fixtures import engine_parts, hub
from tests.support.host import Hub, wait_for
from tests.support.saved import Saved

__all__ = ["engine_parts", "hub"]

pytestmark = pytest.mark.rare

POLICY = """
- endpointSelector: {matchLabels: {app: etcd}}
  ingress: [{fromEntities: [host]}]
"""


@pytest.fixture(scope="module")
def host(hub: Hub) -> Iterator[AgentHost]:
    """A host whose etcd has moved from a process of its own into a container."""
    with AgentHost("hfb") as new:
        new.address = hub.join(new)
        (new.policies / "etcd.yaml").write_text(POLICY)
        new.start_etcd()
        new.start_agent()
        new.network()
        for name in ("etcd", "stranger"):
            new.container(name, "sleep", "infinity", labels={"app": name})
        number = identity(new, "etcd")
        wait_for(lambda: Saved(new.state).knows("identities", number), "etcd's labels in the checkpoint")
        new.engine.docker("rm", "-f", "etcd")
        new.stop_etcd()
        move_etcd(new)
        yield new


def move_etcd(host: AgentHost) -> None:
    mounts = ("/usr/bin/etcd:/usr/bin/etcd:ro", f"{host.directory}/etcd-data:/data")
    listens, advertised = f"http://0.0.0.0:{ETCD_PORT}", f"http://127.0.0.1:{ETCD_PORT}"
    urls = ("--listen-client-urls", listens, "--advertise-client-urls", advertised)
    host.container(
        "etcd",
        *("etcd", "--data-dir", "/data", *urls),
        labels={"app": "etcd"},
        options=("--publish", f"{ETCD_PORT}:{ETCD_PORT}", *(f"--volume={each}" for each in mounts)),
    )


def identity(host: AgentHost, container: str) -> int:
    return int(host.endpoint_of(container)["status"]["identity"]["id"])


def reaches_etcd(host: AgentHost, container: str) -> bool:
    (addresses,) = host.endpoint_of("etcd")["status"]["networking"]["addressing"]
    ping = ("ping", "-n", "-c1", "-W1", addresses["ipv4"])
    return bool(host.inside(container, *ping, check=False).returncode == 0)


def settled(host: AgentHost) -> None:
    wait_for(host.healthy, "healthy agent", seconds=90)
    wait_for(lambda: identity(host, "etcd") > 255, "identity of etcd", seconds=60)
    Checker([host], host.etcdctl).wait_agreed()
    assert not reaches_etcd(host, "stranger")


def test_etcd_in_a_container_serves_its_own_host(host: AgentHost) -> None:
    settled(host)


def test_everything_went_and_comes_back(host: AgentHost) -> None:
    """The containers first, then the agent; etcd has its number at once, its labels are in the checkpoint."""
    known = identity(host, "etcd")
    host.engine.docker("kill", "etcd", "stranger")
    wait_for(lambda: host.api("/v1/endpoint") == [], "no endpoints")
    host.kill_agent()
    host.launch_agent()
    wait_for(lambda: host.api("/v1/endpoint", check=False) is not None, "answer of the agent")
    host.engine.docker("start", "etcd")
    assert identity(host, "etcd") == known
    host.engine.docker("start", "stranger")
    settled(host)
