# SPDX-License-Identifier: Apache-2.0
"""The network driver's protocol over a real socket, from the engine's side."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent import driver as driver_module
from agent import endpoints as endpoints_module
from agent.checkpoint import Network
from agent.endpoint import Endpoint
from core.reconciler import Status
from tests.support.driver_host import NETWORK, DriverHost, driver_host


def run(directory: Path, test: Callable[[DriverHost], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with driver_host(directory) as host:
            await asyncio.wait_for(test(host), 20)

    asyncio.run(main())


def test_activation_and_capabilities(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        assert await host.raw("Plugin.Activate", b"") == {"Implements": ["NetworkDriver"]}
        assert (await host.call("GetCapabilities"))["Scope"] == "local"
        assert stat.S_IMODE(host.socket.stat().st_mode) == 0o660

    run(tmp_path, story)


def test_a_container_from_start_to_end(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        assert await host.call("CreateNetwork", NetworkID=NETWORK, IPv4Data=[{"Pool": "0.0.0.0/0"}]) == {}
        endpoint = await host.start("web", app="web")
        assert host.kernel.identities == {endpoint.ipv4: 256}
        assert endpoint.container_name == "web"
        assert "app=web" in endpoint.labels
        await host.stop("web")
        assert (len(host.table), host.manager.pool.used, host.kernel.identities) == (0, 0, {})
        assert await host.call("DeleteNetwork", NetworkID=NETWORK) == {}
        assert host.checkpoint.networks() == []

    run(tmp_path, story)


def test_answers_that_the_engine_acts_on(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        made = await host.on("CreateEndpoint", "e1", Interface={})
        assert made == {"Interface": {"Address": "10.9.0.2/32", "MacAddress": "0a:58:0a:09:00:02"}}
        assert await host.on("CreateEndpoint", "e1", Interface={}) == made
        joined = await host.on("Join", "e1", SandboxKey="/run/netns/1")
        assert joined["InterfaceName"] == {"SrcName": "hf00001", "DstPrefix": "eth"}
        assert joined["StaticRoutes"][0]["Destination"] == f"{joined['Gateway']}/32"
        assert host.manager.get(1).enforced_identity == 5

    run(tmp_path, story)


def test_subnets(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        refused = await host.call("CreateNetwork", NetworkID="x1", IPv4Data=[{"Pool": "172.20.0.0/16"}])
        assert "172.20.0.0/16 is not inside this node's pool 10.9.0.0/24" in refused["Err"]
        assert "--ipam-driver null" in refused["Err"]
        assert "Err" in await host.call("CreateNetwork", NetworkID="x1", IPv4Data=[{"Pool": "nonsense"}])
        assert await host.call("CreateNetwork", NetworkID="x1", IPv4Data=[{"Pool": "10.9.0.0/28"}]) == {}
        made = await host.on("CreateEndpoint", "e1", Interface={})
        assert made["Interface"]["Address"] == "10.9.0.16/32"
        given = await host.on("CreateEndpoint", "e2", Interface={"Address": "10.9.0.5/28"})
        assert given == {"Interface": {"MacAddress": "0a:58:0a:09:00:05"}}

    run(tmp_path, story)


BAD = {
    "no JSON": ("NetworkDriver.Join", b"{["),
    "a list": ("NetworkDriver.Join", b"[1]"),
    "not UTF-8": ("NetworkDriver.Join", b'{"NetworkID": "\xff"}'),
    "nothing": ("NetworkDriver.Join", b""),
    "wrong types": ("NetworkDriver.Join", b'{"NetworkID": 7, "EndpointID": []}'),
    "a path": ("NetworkDriver.CreateNetwork", b'{"NetworkID": "../../etc/passwd"}'),
    "unknown endpoint": ("NetworkDriver.Join", b'{"NetworkID": "n", "EndpointID": "e"}'),
    "unknown network": ("NetworkDriver.CreateEndpoint", b'{"NetworkID": "q", "EndpointID": "e"}'),
    "unknown method": ("NetworkDriver.Nonsense", b"{}"),
    "another plugin": ("IpamDriver.RequestPool", b"{}"),
}


@pytest.mark.parametrize(("method", "body"), BAD.values(), ids=BAD.keys())
def test_bad_calls_are_refused_with_a_reason(tmp_path: Path, method: str, body: bytes) -> None:
    async def story(host: DriverHost) -> None:
        answer = await host.raw(method, body)
        assert answer["Err"].startswith("holdfast: ")
        assert len(host.table) == 0
        assert host.checkpoint.networks() == []

    run(tmp_path, story)


def test_ends_of_what_is_not_there_are_fine(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        for method in ("RevokeExternalConnectivity", "Leave", "DeleteEndpoint"):
            assert await host.on(method, "nobody") == {}

    run(tmp_path, story)


def test_a_network_that_the_checkpoint_lost_is_read_from_the_engine(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        host.fake.add_network("m1", "other", subnet="10.9.0.0/28")
        await host.call("CreateEndpoint", NetworkID="m1", EndpointID="e1", Interface={})
        assert host.checkpoint.networks() == [Network("m1", "other", "10.9.0.0/28")]
        host.fake.add_network("m2", "bridge", driver="bridge")
        await host.driver.learn_networks()
        assert {each.name for each in host.driver.networks.values()} == {"other", "holdfast"}

    run(tmp_path, story)


def test_no_labels_no_identity(tmp_path: Path) -> None:
    """A container that the engine does not show must not get the identity of one without labels."""

    async def story(host: DriverHost) -> None:
        await host.on("CreateEndpoint", "e1", Interface={})
        await host.on("Join", "e1")
        assert await host.on("EndpointOperInfo", "e1") == {"Value": {}}
        assert host.manager.get(1).identity == 0
        host.fake.add_container("c1", "web", network=NETWORK, endpoint="e1", labels={"app": "web"})
        hidden = host.fake.containers.pop("c1")
        await host.on("EndpointOperInfo", "e1")
        assert host.manager.get(1).identity == 0
        host.fake.containers["c1"] = hidden
        await host.on("EndpointOperInfo", "e1")
        assert host.manager.get(1).identity == 256

    run(tmp_path, story)


def test_etcd_does_not_answer_and_the_container_starts_denied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints_module, "IDENTITY_PATIENCE_S", 0.02)

    async def story(host: DriverHost) -> None:
        host.allocator.available.clear()
        endpoint = await host.start("web", app="web")
        assert endpoint.enforced_identity == 5
        host.allocator.available.set()
        while not host.manager.get(endpoint.id).identity:
            await asyncio.sleep(0.005)

    run(tmp_path, story)


def test_a_call_that_takes_too_long_is_refused_and_an_end_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(host: DriverHost) -> None:
        endpoint = await host.start("web", app="web")
        host.kernel.settling.clear()
        with monkeypatch.context() as hurried:
            hurried.setattr(driver_module, "CALL_TIMEOUT_S", 0.1)
            assert "not done within" in (await host.on("Leave", "e-web"))["Err"]
            assert "not done within" in (await host.on("DeleteEndpoint", "e-web"))["Err"]
        host.kernel.settling.set()
        while len(host.table):
            await asyncio.sleep(0.005)
        assert host.manager.pool.used == 0
        assert await host.on("DeleteEndpoint", "e-web") == {}
        assert (await host.start("web2")).id != endpoint.id

    run(tmp_path, story)


def test_published_ports_never_clash(tmp_path: Path) -> None:
    def binding(low: int, high: int = 0) -> dict[str, Any]:
        ports = [{"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": low, "HostPortEnd": high}]
        return {"Options": {"com.docker.network.portmap": ports}}

    async def story(host: DriverHost) -> None:
        names = [f"c{number}" for number in range(6)]
        for name in names:
            await host.start(name)
        answers = await asyncio.gather(
            *(host.on("ProgramExternalConnectivity", f"e-{name}", **binding(0)) for name in names)
        )
        assert answers == [{}] * 6
        chosen = {each.id: each.ports for _, each in host.table.items()}
        assert len({ports[0].host_port for ports in chosen.values()}) == 6
        for name in names:
            await host.on("ProgramExternalConnectivity", f"e-{name}", **binding(0))
        assert {each.id: each.ports for _, each in host.table.items()} == chosen
        port = chosen[1][0].host_port
        refused = await host.on("ProgramExternalConnectivity", "e-c5", **binding(port, port))
        assert f"host port {port}/tcp is in use" in refused["Err"]
        await host.stop("c0")
        assert 1 not in host.kernel.ports

    run(tmp_path, story)


def test_one_interface_a_container(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        for engine_id in ("e1", "e2"):
            await host.on("CreateEndpoint", engine_id, Interface={})
        await host.on("Join", "e1", SandboxKey="/run/netns/1")
        assert "already" in (await host.on("Join", "e2", SandboxKey="/run/netns/1"))["Err"]
        assert "Err" not in await host.on("Join", "e1", SandboxKey="/run/netns/1")
        assert "Err" not in await host.on("Join", "e2", SandboxKey="/run/netns/2")

    run(tmp_path, story)


def test_two_joins_of_one_container_at_once(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        for engine_id in ("e1", "e2"):
            await host.on("CreateEndpoint", engine_id, Interface={})
        host.kernel.settling.clear()
        joins = [
            asyncio.create_task(host.on("Join", each, SandboxKey="/run/netns/1")) for each in ("e1", "e2")
        ]
        await asyncio.wait(joins, timeout=0.1)
        host.kernel.settling.set()
        answers = await asyncio.gather(*joins)
        assert sorted("Err" in each for each in answers) == [False, True]

    run(tmp_path, story)


def test_one_interface_a_container_after_a_restart_of_the_agent(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        first = await host.start("web")
        await host.restart()
        await host.on("CreateEndpoint", "e2", Interface={})
        refused = await host.on("Join", "e2", SandboxKey="/run/netns/web")
        assert "container web is on a network of Holdfast already" in refused["Err"]
        await host.on("Leave", "e-web")
        assert host.manager.get(first.id).sandbox == ""
        assert "Err" not in await host.on("Join", "e2", SandboxKey="/run/netns/web")

    run(tmp_path, story)


def test_an_interface_is_begun_with_the_endpoint_and_join_waits_for_it(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        host.kernel.settling.clear()
        await host.on("CreateEndpoint", "e1", Interface={})
        host.kernel.catch_up()  # the reconciler, which nobody waits for yet
        assert host.kernel.interfaces == {1: "10.9.0.2"}
        joining = asyncio.create_task(host.on("Join", "e1", SandboxKey="/run/netns/1"))
        await asyncio.wait({joining}, timeout=0.1)
        assert not joining.done()
        assert host.manager.get(1).sandbox == "", "by this the next agent knows that the interface was made"
        host.kernel.settling.set()
        assert "InterfaceName" in await joining
        assert host.manager.get(1).sandbox == "/run/netns/1"
        assert host.kernel.interfaces == {1: "10.9.0.2"}

    run(tmp_path, story)


def test_the_second_call_of_a_start_asks_the_engine_nothing(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        endpoint = await host.start("web", app="web")
        host.fake.asked.clear()
        assert await host.on("EndpointOperInfo", "e-web") == {"Value": {}}
        assert host.fake.asked == []
        assert host.manager.get(endpoint.id) == endpoint

    run(tmp_path, story)


def test_the_second_call_of_a_start_waits_for_the_kernel_all_the_same(tmp_path: Path) -> None:
    """The first one was given up, or its write has failed: a process must not start before the policy."""

    async def story(host: DriverHost) -> None:
        await host.on("CreateEndpoint", "e1", Interface={})
        await host.on("Join", "e1", SandboxKey="/run/netns/1")
        host.fake.add_container("c1", "web", network=NETWORK, endpoint="e1", state="created")
        writes = asyncio.Event()
        interface_settled = host.kernel.interface_settled

        async def settled(endpoint: Endpoint) -> Status:
            await writes.wait()
            return await interface_settled(endpoint.id)

        host.kernel.settled = settled  # type: ignore[method-assign]
        first = asyncio.create_task(host.on("EndpointOperInfo", "e1"))
        while not host.manager.get(1).identity:
            await asyncio.sleep(0.005)
        host.fake.asked.clear()
        second = asyncio.create_task(host.on("EndpointOperInfo", "e1"))
        await asyncio.wait({first, second}, timeout=0.2)
        assert not second.done()
        assert host.fake.asked == []
        writes.set()
        for call in (first, second):
            assert await call == {"Value": {}}

    run(tmp_path, story)


def test_networks_survive_a_restart_and_the_socket_of_a_successor_stays(tmp_path: Path) -> None:
    async def story(host: DriverHost) -> None:
        await host.call("CreateNetwork", NetworkID=NETWORK, IPv4Data=[])
        successor = driver_module.Driver(host.socket, host.manager, host.engine, host.checkpoint)
        successor.restore()
        assert set(successor.networks) == {NETWORK}
        before = host.socket.stat().st_ino
        serving = asyncio.create_task(successor.serve())
        while host.socket.stat().st_ino == before:
            await asyncio.sleep(0.005)
        driver_module._unlink(host.socket, before)
        assert host.socket.exists()
        serving.cancel()
        await asyncio.wait({serving})
        assert not host.socket.exists()

    run(tmp_path, story)
