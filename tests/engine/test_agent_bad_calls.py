# SPDX-License-Identifier: Apache-2.0
"""The engine's side gone wrong: malformed driver calls, containers that end at once, networks that do not
fit.  Each is answered with a reason, and nothing is left behind.  Containers that are killed while they are
set up: test_agent_held_calls."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.agent import POOL
from tests.support.engine import WORKLOAD_IMAGE
from tests.support.host import wait_for
from tests.support.live import Stream
from tests.support.places import PORTS
from tests.support.relay import PluginConnection
from tests.support.site import Site
from tests.support.traces import traces

SOCKET = "/run/docker/plugins/holdfast.sock"
UNKNOWN = "f" * 64

Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stream(site: Site) -> Iterator[Stream]:
    with Stream("client to server", site.client.netns, site.server.address, PORTS[0]) as live:
        yield live


@pytest.fixture(autouse=True)
def nobody_notices(site: Site, stream: Stream) -> Iterator[None]:
    """Everybody else's traffic goes on, and afterwards there is nothing on the host that was not before."""
    before = traces(site.host)
    stream.goes_on()
    yield
    stream.goes_on()
    wait_for(lambda: traces(site.host) == before, f"end of all traces; before: {before}")
    assert site.status()["holdfast"]["state"] == "Ok"


# --- driver calls


@pytest.fixture(scope="module")
def call(site: Site) -> Iterator[Call]:
    """Return what posts a body to a driver method and returns the answer's JSON."""
    connection = PluginConnection(site.host.private("/run/docker") / "plugins" / "holdfast.sock")

    def post(method: str, body: bytes | dict[str, Any] = b"") -> dict[str, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", f"/{method}", data)
        response = connection.getresponse()
        text = response.read()
        assert response.status == 200, text
        answer = json.loads(text)
        assert isinstance(answer, dict)
        return answer

    yield post
    connection.close()


def test_call_for_an_unknown_network_says_so(call: Call) -> None:
    body: dict[str, Any] = {"NetworkID": UNKNOWN, "EndpointID": "e" * 64, "Interface": {}, "Options": {}}
    assert UNKNOWN in call("NetworkDriver.CreateEndpoint", body)["Err"]
    for method in ("Join", "EndpointOperInfo", "ProgramExternalConnectivity"):
        error = call(f"NetworkDriver.{method}", body)["Err"]
        assert body["EndpointID"][:12] in error
        assert UNKNOWN[:12] in error
    for method in ("Leave", "DeleteEndpoint", "RevokeExternalConnectivity", "DeleteNetwork"):
        assert call(f"NetworkDriver.{method}", body) == {}, "what is not there has been removed"
    assert "not supported" in call("NetworkDriver.AllocateNetwork", body)["Err"]


METHODS = (
    *("CreateNetwork", "DeleteNetwork", "CreateEndpoint", "DeleteEndpoint", "EndpointOperInfo", "Join"),
    *("Leave", "ProgramExternalConnectivity", "RevokeExternalConnectivity", "DiscoverNew", "Nonsense"),
)
# Fields of all calls, most of them of the wrong type; identifiers that are paths, and some that are right.
IDS = st.sampled_from(["", "a" * 64, "../../../etc/passwd", "x/y", "x" * 5000, "\x00", "ä"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ADDRESSES = st.sampled_from(["", "10.50.9.9/32", "10.50.0.1/32", "::1/128", "10.50.0.999", "x", "10.0.0.1"])
INTERFACES = st.fixed_dictionaries({}, optional={"Address": ADDRESSES | JSON, "MacAddress": ADDRESSES | JSON})
BINDINGS = st.fixed_dictionaries({"Proto": JSON, "Port": JSON}, optional={"HostIP": JSON, "HostPort": JSON})
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "NetworkID": IDS | JSON,
        "EndpointID": IDS | JSON,
        "IPv4Data": st.lists(st.fixed_dictionaries({"Pool": ADDRESSES | JSON}), max_size=2) | JSON,
        "Interface": INTERFACES | JSON,
        "Options": st.fixed_dictionaries({"com.docker.network.portmap": st.lists(BINDINGS) | JSON}) | JSON,
    },
)


def test_malformed_calls_are_answered(site: Site, call: Call) -> None:
    """A few hundred; whatever is said, it is an answer, it is ours, and it leaves nothing."""
    known = site.host.engine.docker("network", "inspect", "-f", "{{.Id}}", "holdfast").stdout.strip()
    real = st.just({"NetworkID": known, "EndpointID": "e" * 64})

    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.sampled_from(METHODS), BODIES | st.binary(max_size=40) | JSON, real | st.just({}))
    def try_one(method: str, body: Any, ids: dict[str, str]) -> None:
        if isinstance(body, dict) and method not in ("DeleteNetwork", "CreateNetwork"):
            body |= ids
        answer = call(f"NetworkDriver.{method}", body if isinstance(body, bytes) else json_bytes(body))
        assert "in the agent" not in answer.get("Err", ""), answer
        assert "Error:" not in answer.get("Err", ""), answer
        forget(body)

    def forget(body: Any) -> None:
        """Take back what happened to be right."""
        for network in ("a" * 64, known):
            ids = {"NetworkID": network, "EndpointID": "e" * 64}
            call("NetworkDriver.DeleteEndpoint", ids)
            call("NetworkDriver.DeleteEndpoint", ids | {"EndpointID": "a" * 64})
        for network in {"a" * 64, str(body.get("NetworkID")) if isinstance(body, dict) else ""} - {known}:
            call("NetworkDriver.DeleteNetwork", {"NetworkID": network})

    try_one()


def json_bytes(body: Any) -> bytes:
    return json.dumps(body).encode()


# --- containers that die


def test_containers_that_end_at_once_leave_nothing(site: Site) -> None:
    docker = site.host.engine.docker
    run = ("run", "--rm", "--network", "holdfast", "-l", "app=brief", WORKLOAD_IMAGE)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: docker(*run, "true"), range(20)))
        failed = list(pool.map(lambda _: docker(*run, "/nowhere", check=False), range(4)))
    assert [each.returncode for each in done] == [0] * 20
    assert {each.returncode for each in failed} == {127}


def test_container_that_is_never_started_takes_nothing(site: Site) -> None:
    docker = site.host.engine.docker
    before = traces(site.host)
    docker("create", "--name", "unborn", "--network", "holdfast", WORKLOAD_IMAGE, "true")
    assert traces(site.host) == before
    docker("rm", "unborn")


# --- networks


@pytest.mark.parametrize("arguments", [(), ("--subnet", "192.168.99.0/24"), ("--subnet", "10.0.0.0/8")])
def test_network_outside_the_pool_is_refused_with_the_command_to_type(
    site: Site, arguments: tuple[str, ...]
) -> None:
    create = ("network", "create", "-d", "holdfast")
    refused = site.host.engine.docker(*create, *arguments, "misfit", check=False)
    assert refused.returncode != 0
    assert POOL in refused.stderr
    assert all(each in refused.stderr for each in arguments[1:])
    command = refused.stderr.partition("type: docker ")[2].partition(" NAME")[0].split()
    assert site.host.engine.docker(*command, "misfit").returncode == 0
    site.host.engine.docker("network", "rm", "misfit")


def test_two_networks_share_the_pool_and_the_engine_may_assign_inside_it(site: Site) -> None:
    docker = site.host.engine.docker
    site.host.network("second")
    docker("network", "create", "-d", "holdfast", "--subnet", "10.50.200.0/24", "third")
    try:
        with (
            site.container("in-second", options=["--network", "second"]) as second,
            site.container("in-third", options=["--network", "third"]) as third,
            site.container("fixed", options=["--network", "third", "--ip", "10.50.200.77"]) as fixed,
        ):
            assert third.address.startswith("10.50.200.")
            assert fixed.address == "10.50.200.77"
            assert not second.address.startswith("10.50.200.")
            for place in (second, third, fixed):
                assert place.asks("TCP", site.server.address) == place.address
                assert site.client.asks("TCP", place.address) == site.client.address
            names = {site.identity(each) for each in (second, third)}
            assert len(names) == 2, "the network's name is a label"
            assert site.identity(fixed) == site.identity(third)
    finally:
        docker("network", "rm", "second", "third")
