# SPDX-License-Identifier: Apache-2.0
"""The option enable-policy, from the agent's command line to packets.

Three endpoints in namespaces of one host: `client` speaks to `free`, which no policy selects, and to
`closed`, which one closes.  The agent is started with each mode on the same endpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agent import AgentHost
from tests.support.host import Hub, wait_for
from tests.support.places import PORTS, Place, opened

POLICY = "[{endpointSelector: {matchLabels: {app: closed}}, ingressDeny: [{fromEntities: [all]}]}]"
NUMBERS = {"client": 1001, "free": 1002, "closed": 1003}


def placed(host: AgentHost, name: str) -> Place:
    """Make an endpoint of a namespace of its own."""
    host.exec("ip", "netns", "add", name)
    body = {"netns": f"/run/netns/{name}", "labels": [f"app={name}"], "name": name}
    made = host.api(f"/v1/endpoint/{NUMBERS[name]}", method="PUT", body=body)
    assert made["status"]["state"] == "ready"
    address = made["status"]["networking"]["addressing"][0]["ipv4"]
    return Place(name, address, opened(Path(f"/proc/{host.pid}/root/run/netns/{name}")))


@pytest.fixture(scope="module")
def host(hub: Hub) -> Iterator[AgentHost]:
    with AgentHost("hfm") as made:
        made.address = hub.join(made)
        made.start_etcd()
        (made.policies / "closed.yaml").write_text(POLICY)
        yield made


@pytest.fixture(scope="module")
def places(host: AgentHost) -> Iterator[dict[str, Place]]:
    with contextlib.ExitStack() as stack:
        host.start_agent()
        found = {name: placed(host, name) for name in NUMBERS}
        for place in found.values():
            stack.callback(place.netns.close)
        for name in ("free", "closed"):
            found[name].serve(stack)
        host.stop_agent()
        yield found


@pytest.mark.parametrize(
    ("mode", "reached", "enforced"),
    [
        ("default", {"free"}, {"client": "none", "free": "none", "closed": "ingress"}),
        ("always", set(), dict.fromkeys(NUMBERS, "both")),
        ("never", {"free", "closed"}, dict.fromkeys(NUMBERS, "none")),
    ],
    ids=["default", "always", "never"],
)
def test_mode_decides_what_passes(
    host: AgentHost, places: dict[str, Place], mode: str, reached: set[str], enforced: dict[str, str]
) -> None:
    host.start_agent(enable_policy=mode)
    wait_for(lambda: len(host.api("/v1/policy")["policies"]) == 1, "policy in force")
    host.cli("policy", "wait", str(host.api("/v1/policy")["revision"]), "--max-wait-time", "30")
    shown = {name: host.api(f"/v1/endpoint/{number}")["status"] for name, number in NUMBERS.items()}
    assert {name: each["policy"]["policy-enabled"] for name, each in shown.items()} == enforced
    asked = {
        name: places["client"].asks("TCP", places[name].address, PORTS[0]) for name in ("free", "closed")
    }
    assert {name for name, seen in asked.items() if seen == places["client"].address} == reached
    host.stop_agent()
