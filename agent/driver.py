# SPDX-License-Identifier: Apache-2.0
"""The engine's remote network driver protocol, served on a plugin socket.

The engine calls, for each container: CreateEndpoint → Join → ProgramExternalConnectivity →
EndpointOperInfo → (the first process starts) … RevokeExternalConnectivity → Leave → DeleteEndpoint.

* CreateEndpoint answers with an address of the node's pool (the network uses the `null` IPAM driver) and
  begins the interface, so that it is made while the engine makes the container's namespace.
* Join waits for the interface; from here on everything is denied (identity init).
* EndpointOperInfo finds the container's labels, allocates its identity and writes its policy, so that
  policy is in force before the first process runs.  It comes twice a start.  An engine that loads its
  containers answers nobody: they start denied, and the engine watch identifies them when it answers.

After an engine restart endpoints are replayed but networks are not: networks are kept in the checkpoint
and read from the engine when they are missing there.  Every handler is idempotent for that reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from ipaddress import IPv4Interface, IPv4Network, ip_network
from pathlib import Path
from typing import Any

from aiohttp import web
from loguru import logger

from agent import calls
from agent.checkpoint import Checkpoint, Network
from agent.endpoint import Endpoint
from agent.endpoints import EndpointManager
from agent.engine import DRIVER, Engine, EngineContainer, EngineNetwork
from agent.errors import AgentError, DriverError, EngineError, UnknownNetwork
from agent.limit_settings import CREATE
from agent.limits import Limits
from agent.ports import parse_portmap, taken_ports
from core import metrics
from core.errors import HoldfastError, shorten
from datapath.addresses import host_prefix
from datapath.devices import GATEWAY, GATEWAY6

CONTAINER_PREFIX = "eth"
BODY_LIMIT = 4 << 20
# The whole of a driver call; the engine itself gives up after 30 s or more and shows less of a reason.
CALL_TIMEOUT_S = 20.0
# When the agent ends, a call under way gets this long; the engine asks the next agent again.
SHUTDOWN_S = 2.0

Answer = dict[str, Any]
Handler = Callable[[Any], Awaitable[Answer]]


class Driver:
    """Serves the protocol; owns the plugin socket and the table of networks."""

    def __init__(
        self,
        socket_path: Path,
        endpoints: EndpointManager,
        engine: Engine,
        checkpoint: Checkpoint,
        limits: Limits | None = None,
    ) -> None:
        self.socket_path = socket_path
        self.endpoints = endpoints
        self.engine = engine
        self.networks: dict[str, Network] = {}
        # Endpoints whose labels were looked at in this life; the engine watch drops those that are gone.
        self.identified: set[int] = set()
        self._checkpoint = checkpoint
        self._limits = limits or Limits()
        self._handlers: dict[str, tuple[type[calls.Call], Handler]] = {
            "NetworkDriver.GetCapabilities": (calls.Call, self._capabilities),
            "NetworkDriver.CreateNetwork": (calls.CreateNetwork, self._create_network),
            "NetworkDriver.DeleteNetwork": (calls.NetworkCall, self._delete_network),
            "NetworkDriver.CreateEndpoint": (calls.CreateEndpoint, self._create_endpoint),
            "NetworkDriver.DeleteEndpoint": (calls.EndpointCall, self._delete_endpoint),
            "NetworkDriver.Join": (calls.Join, self._join),
            "NetworkDriver.Leave": (calls.EndpointCall, self._leave),
            "NetworkDriver.EndpointOperInfo": (calls.EndpointCall, self._oper_info),
            "NetworkDriver.ProgramExternalConnectivity": (calls.ProgramExternal, self._program_external),
            "NetworkDriver.RevokeExternalConnectivity": (calls.EndpointCall, self._revoke_external),
            "NetworkDriver.DiscoverNew": (calls.Call, _nothing),
            "NetworkDriver.DiscoverDelete": (calls.Call, _nothing),
            "Plugin.Activate": (calls.Call, _activate),
        }

    def restore(self) -> None:
        """Take the networks of the checkpoint."""
        for network in self._checkpoint.networks():
            self._remember(network)

    async def serve(self) -> None:
        """Serve until cancelled."""
        app = web.Application(client_max_size=BODY_LIMIT)
        app.router.add_post("/{method}", self._dispatch)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        inode = 0
        try:
            inode = await _listen(runner, self.socket_path)
            logger.info("network driver {} listens on {}", DRIVER, self.socket_path)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
            _unlink(self.socket_path, inode)

    async def _dispatch(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        started = time.perf_counter()
        answer = await self._call(method, await request.read())
        seconds = time.perf_counter() - started
        known = method if method in self._handlers else "unknown"
        metrics.DRIVER_SECONDS.labels(known.removeprefix("NetworkDriver.")).observe(seconds)
        logger.debug("driver call {} took {:.1f} ms", method, seconds * 1000)
        return web.json_response(answer)

    async def _call(self, method: str, body: bytes) -> Answer:
        known = self._handlers.get(method)
        if known is None:
            return {"Err": f"holdfast: network driver method {shorten(method)} is not supported"}
        kind, handler = known
        try:
            call = calls.decode(method, body, kind)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await handler(call)
        except TimeoutError:
            return self._refuse(method, f"{method} was not done within {CALL_TIMEOUT_S:g} s")
        except (HoldfastError, ValueError, OSError) as error:
            return self._refuse(method, str(error))
        except Exception as error:  # noqa: BLE001 - the rim: the engine shows no reason for a bare 500
            logger.opt(exception=error).error("driver call {} met a mistake of ours", method)
            return self._refuse(method, f"{type(error).__name__}: {error}")

    @staticmethod
    def _refuse(method: str, reason: str) -> Answer:
        logger.error("driver call {} failed: {}", method, reason)
        return {"Err": f"holdfast: {reason}"}

    # --- networks

    @staticmethod
    async def _capabilities(_: calls.Call) -> Answer:
        return {"Scope": "local", "ConnectivityScope": "global"}

    async def _create_network(self, call: calls.CreateNetwork) -> Answer:
        subnet = _accepted_subnet([each.pool for each in call.pools or ()], self.endpoints.pool.network)
        network = Network(call.network_id, "", subnet)
        await asyncio.to_thread(self._checkpoint.save_network, network)
        self._remember(network)
        logger.info("network {} created{}", network.id[:12], f" with subnet {subnet}" if subnet else "")
        return {}

    async def _delete_network(self, call: calls.NetworkCall) -> Answer:
        network = self.networks.pop(call.network_id, None)
        if network is not None and network.subnet:
            self.endpoints.pool.include(IPv4Network(network.subnet))
        await asyncio.to_thread(self._checkpoint.drop_network, call.network_id)
        return {}

    def _remember(self, network: Network) -> None:
        self.networks[network.id] = network
        if network.subnet:
            self.endpoints.pool.exclude(IPv4Network(network.subnet))

    async def _network(self, network_id: str) -> Network:
        """Return a known network, asking the engine where the checkpoint lacks it."""
        known = self.networks.get(network_id)
        if known is not None and known.name:
            return known
        found = await self._ask_engine(network_id)
        if found is not None:
            return await self._learn(found)
        if known is not None:
            return known
        raise UnknownNetwork(
            f"network {shorten(network_id)} is not a network of this driver on this host",
            hint="remove it and create it again with: holdfast network create NAME",
        )

    async def _ask_engine(self, network_id: str) -> EngineNetwork | None:
        try:
            found = await self.engine.hurried(partial(self.engine.network, network_id))
        except EngineError as error:
            logger.warning("network {} can not be looked up: {}", network_id[:12], error)
            return None
        return found if found is not None and found.driver == DRIVER else None

    async def learn_networks(self) -> None:
        """Take the networks that the engine has and the checkpoint lacks.  Raises EngineError."""
        for found in await self.engine.networks():
            known = self.networks.get(found.id)
            if known is None or known.name != found.name:
                await self._learn(found)

    async def _learn(self, found: EngineNetwork) -> Network:
        subnet = found.subnet if found.subnet not in ("", "0.0.0.0/0") else ""
        network = Network(found.id, found.name, subnet)
        await asyncio.to_thread(self._checkpoint.save_network, network, may_wait=True)
        self._remember(network)
        return network

    # --- endpoints

    async def _create_endpoint(self, call: calls.CreateEndpoint) -> Answer:
        # Only here: what follows is of a container half made, and a held deletion keeps an address.
        async with self._limits.turn(CREATE):
            return await self._create(call)

    async def _create(self, call: calls.CreateEndpoint) -> Answer:
        if call.network_id not in self.networks:
            await self._network(call.network_id)
        given = call.interface or calls.Interface()
        if given.address_ipv6:
            raise DriverError(
                f"IPv6 address {shorten(given.address_ipv6)} can not be had: it is made of the IPv4 one",
                hint="leave --ip6 and the network's IPv6 subnet away",
            )
        endpoint = await self.endpoints.create(
            network_id=call.network_id,
            engine_id=call.endpoint_id,
            address=IPv4Interface(given.address).ip if given.address else None,
            mac=given.mac_address,
        )
        answer: dict[str, str] = {}
        if not given.address:
            answer["Address"] = host_prefix(endpoint.ipv4)
        if endpoint.ipv6:
            answer["AddressIPv6"] = host_prefix(endpoint.ipv6)
        if not given.mac_address:
            answer["MacAddress"] = endpoint.mac
        return {"Interface": answer}

    async def _join(self, call: calls.Join) -> Answer:
        endpoint = await self.endpoints.connect(self._endpoint(call).id)
        sandbox = call.sandbox_key or ""
        self._refuse_second(sandbox, endpoint.id)
        # From the look to the record there is no pause: two joins of one container never both pass.
        endpoint = self.endpoints.join(endpoint.id, sandbox)
        gateways = {"Gateway": GATEWAY} | ({"GatewayIPv6": GATEWAY6} if endpoint.ipv6 else {})
        return {
            "InterfaceName": {"SrcName": endpoint.peer, "DstPrefix": CONTAINER_PREFIX},
            **gateways,
            "StaticRoutes": [
                {"Destination": host_prefix(gateway), "RouteType": 1, "NextHop": ""}
                for gateway in gateways.values()
            ],
            "DisableGatewayService": True,
        }

    def _refuse_second(self, sandbox: str, endpoint_id: int) -> None:
        """Raise DriverError for a container that has an interface of ours: it has one default route.

        Answers of a second interface's address would leave by the first and be dropped there.
        """
        for _, other in self.endpoints.table.items():
            if sandbox and other.sandbox == sandbox and other.connected and other.id != endpoint_id:
                raise DriverError(
                    f"container {other.container_name or other.ipv4} is on a network of Holdfast already",
                    hint="one is enough: labels and policy, not networks, keep containers apart",
                )

    async def _oper_info(self, call: calls.EndpointCall) -> Answer:
        endpoint = self._endpoint(call)
        try:
            if endpoint.identity and endpoint.container_id:
                # The second call of a start: labels never change, but the kernel may not be done yet.
                await self.endpoints.enforced(endpoint.id)
                return {"Value": {}}
            container, network = await self.engine.hurried(partial(self._container_of, endpoint))
            await self._identify(endpoint, container, network)
        except AgentError as error:
            # The container starts all the same: denied until the engine watcher has found its labels.
            logger.error("endpoint {} is not as it ought to be yet: {}", endpoint.id, error)
        return {"Value": {}}

    async def identify(self, endpoint: Endpoint) -> None:
        """Find the labels of an endpoint's container and give it its identity."""
        container, network = await self._container_of(endpoint)
        await self._identify(endpoint, container, network)

    async def _identify(self, endpoint: Endpoint, container: EngineContainer, network: str) -> None:
        await self.endpoints.identify(endpoint.id, container.id, container.name, container.labels, network)
        self.identified.add(endpoint.id)

    async def _container_of(self, endpoint: Endpoint) -> tuple[EngineContainer, str]:
        """Return an endpoint's container and its network's name, as the engine has them."""
        network = await self.engine.network(endpoint.network_id)
        if network is None:
            raise UnknownNetwork(f"the engine does not know network {endpoint.network_id[:12]}")
        if network.id not in self.networks or not self.networks[network.id].name:
            await self._learn(network)
        container_id, name = network.endpoints.get(endpoint.engine_endpoint_id, ("", ""))
        if not container_id:
            raise EngineError(f"engine endpoint {endpoint.engine_endpoint_id[:12]} has no container yet")
        container = await self.engine.container(container_id)
        if container is None:
            # Without its labels it would get the identity of a container that has none.
            raise EngineError(f"the engine does not list container {container_id[:12]} ({shorten(name)})")
        return container, network.name

    async def _program_external(self, call: calls.ProgramExternal) -> Answer:
        endpoint = self._endpoint(call)
        others = (each for _, each in self.endpoints.table.items() if each.id != endpoint.id)
        taken = taken_ports(port for each in others for port in each.ports)
        # From the choice to the record there is no pause: two containers never choose the same port.
        ports = parse_portmap(call.options or {}, taken, endpoint.ports, ipv6=bool(endpoint.ipv6))
        await self.endpoints.publish(endpoint.id, ports)
        return {}

    async def _revoke_external(self, call: calls.EndpointCall) -> Answer:
        endpoint = self.endpoints.by_engine_id(call.endpoint_id)
        if endpoint is not None:
            await self.endpoints.publish(endpoint.id, ())
        return {}

    async def _leave(self, call: calls.EndpointCall) -> Answer:
        endpoint = self.endpoints.by_engine_id(call.endpoint_id)
        if endpoint is not None:
            await self.endpoints.disconnect(endpoint.id)
        return {}

    async def _delete_endpoint(self, call: calls.EndpointCall) -> Answer:
        endpoint = self.endpoints.by_engine_id(call.endpoint_id)
        if endpoint is not None:
            await self.endpoints.delete(endpoint.id)
        return {}

    def _endpoint(self, call: calls.EndpointCall) -> Endpoint:
        endpoint = self.endpoints.by_engine_id(call.endpoint_id)
        if endpoint is None:
            raise DriverError(
                f"engine endpoint {call.endpoint_id[:12]} of network {call.network_id[:12]} "
                "is not known on this host",
                hint="stop the container and start it again",
            )
        return endpoint


def _accepted_subnet(pools: Iterable[str], node_pool: IPv4Network) -> str:
    """Return the subnet that the engine's own IPAM assigns from, or nothing for the null driver.  Pure."""
    for pool in pools:
        network = ip_network(pool)
        if network.prefixlen == 0:
            continue  # the null IPAM driver: addresses are ours to give
        if not isinstance(network, IPv4Network) or not network.subnet_of(node_pool):
            raise DriverError(
                f"subnet {pool} is not inside this node's pool {node_pool}",
                hint="type: docker network create -d holdfast --ipam-driver null NAME",
            )
        return pool
    return ""


async def _activate(_: calls.Call) -> Answer:
    return {"Implements": ["NetworkDriver"]}


async def _nothing(_: calls.Call) -> Answer:
    return {}


async def _listen(runner: web.AppRunner, path: Path) -> int:
    """Listen under a temporary name and rename: the engine never sees a socket nobody answers.

    Returns the inode, by which `_unlink` knows our socket again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    await web.UnixSite(runner, str(temporary)).start()
    os.chmod(temporary, 0o660)
    os.replace(temporary, path)
    return path.stat().st_ino


def _unlink(path: Path, inode: int) -> None:
    """Remove our socket; the one of an agent that has taken over meanwhile stays."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()
