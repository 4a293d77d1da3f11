# SPDX-License-Identifier: Apache-2.0
"""The container engine's API on its unix socket, as far as the agent needs it.

Asynchronous and small: the docker SDK costs 20 MB and blocks.  Every answer is checked for its type,
because what it holds (labels, names) was chosen by whoever starts containers.

Inside a network driver call only `network` and `container` may be used: `/containers/<id>/json` of
a starting container blocks until the driver has answered.  And they are asked through `hurried`: an engine
without live-restore calls the driver for every container that it loads, and answers nobody until it has
loaded all.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError

from agent.errors import EngineError
from core.errors import shorten

API = "http://engine/v1.40"  # docker 19.03; newer engines still speak it down to API 1.44's minimum
FALLBACK_API = "http://engine"  # an engine that dropped 1.40 answers unversioned paths with its own version
ANSWER_TIMEOUT_S = 10.0
# The same inside a driver call, which holds a container's start back; answers take milliseconds.
HURRIED_TIMEOUT_S = 2.0
# So long after one driver call has waited in vain the next ones do not: a start has two, and there are many.
HOLD_OFF_S = 5.0
# A start has a dozen calls of the driver and the mounts of the image in it.
START_TIMEOUT_S = 60.0
DRIVER = "holdfast"


T = TypeVar("T")

# A line or header that is too long is none of aiohttp's client errors.
_TROUBLE = (aiohttp.ClientError, HttpProcessingError, TimeoutError, ValueError, OSError)


class EngineNetwork(msgspec.Struct, frozen=True):
    """A network of the engine: `endpoints` maps engine endpoint id → (container id, container name)."""

    id: str
    name: str
    driver: str
    subnet: str
    endpoints: dict[str, tuple[str, str]]


class EngineContainer(msgspec.Struct, frozen=True):
    """A container as `/containers/json` lists it; `endpoints` maps network id → engine endpoint id.

    `networks` are the ids of all its networks, those too that it is not connected to while it does not run.
    """

    id: str
    name: str
    state: str
    labels: dict[str, str]
    endpoints: dict[str, str]
    network_mode: str
    networks: frozenset[str] = frozenset()


class EngineEnd(msgspec.Struct, frozen=True):
    """Why a container does not run: `error` is empty for one that ended by itself or was stopped."""

    error: str
    restart_policy: str


class Engine:
    """A client of one engine socket; owns its connection pool until `close`."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self._session: aiohttp.ClientSession | None = None
        self._base = API
        self._silent_at: float | None = None  # when a hurried question was given up; None once it answers

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def version(self) -> str:
        """Return the engine's version and settle which API path it takes."""
        answer = await self._get_at(FALLBACK_API, "/version")
        minimum, version = self._read(_versions, answer, "/version")
        self._base = API if _version_tuple(minimum) <= (1, 40) else FALLBACK_API
        return version

    async def hurried(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return the answer to a question of a driver call, or raise EngineError soon.

        At once while the engine is known to be silent: the watch waits for it and repairs all of them.
        """
        if self._silent_at is not None and time.monotonic() - self._silent_at < HOLD_OFF_S:
            raise EngineError(
                f"engine {self.socket_path} is silent and is not asked again for {HOLD_OFF_S:g} s",
                hint="it may be loading its containers",
            )
        try:
            async with asyncio.timeout(HURRIED_TIMEOUT_S):
                return await ask()
        except TimeoutError as error:
            self._silent_at = time.monotonic()
            raise EngineError(
                f"engine {self.socket_path} did not answer within {HURRIED_TIMEOUT_S:g} s",
                hint="it may be loading its containers",
            ) from error

    async def network(self, network_id: str) -> EngineNetwork | None:
        """Return one network with its endpoints, or None when the engine does not have it."""
        path = f"/networks/{quote(network_id, safe='')}"
        try:
            return self._read(_network, await self._get(path), path)
        except _NotFound:
            return None

    async def networks(self) -> list[EngineNetwork]:
        """Return every network of our driver, with endpoints."""
        query = json.dumps({"driver": [DRIVER]})
        listed = self._read(_networks, await self._get("/networks", {"filters": query}), "/networks")
        # The list leaves the members of each network out.
        networks = [await self.network(each.id) for each in listed if each.driver == DRIVER]
        return [network for network in networks if network is not None]

    async def container(self, container_id: str) -> EngineContainer | None:
        """Return one container from the list (safe inside driver calls), or None."""
        query = json.dumps({"id": [container_id]})
        path = "/containers/json"
        found = self._read(_containers, await self._get(path, {"all": "1", "filters": query}), path)
        return next((each for each in found if each.id == container_id), None)

    async def containers(self) -> list[EngineContainer]:
        """Return every container, running or not."""
        path = "/containers/json"
        return self._read(_containers, await self._get(path, {"all": "1"}), path)

    async def end_of(self, container_id: str) -> EngineEnd | None:
        """Return why an exited container does not run; None when the engine does not have it.

        Never for one that may be starting: the engine answers once the driver has.
        """
        path = f"/containers/{quote(container_id, safe='')}/json"
        try:
            return self._read(_end, await self._get(path), path)
        except _NotFound:
            return None

    async def start(self, container_id: str) -> None:
        """Start a container.  Raises EngineError with what the engine says against it."""
        path = f"/containers/{quote(container_id, safe='')}/start"
        try:
            timeout = aiohttp.ClientTimeout(total=START_TIMEOUT_S)
            async with self._client().post(self._base + path, timeout=timeout) as response:
                if response.status not in (204, 304):  # started; runs already
                    said = shorten(await response.read())
                    raise EngineError(
                        f"engine {self.socket_path} answered {response.status} to {path}: {said}"
                    )
        except _TROUBLE as error:
            raise EngineError(
                f"engine {self.socket_path} did not answer {path}: {type(error).__name__} {error}"
            ) from error

    async def events(self, subscribed: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
        """Yield container and network events; none is missed from the moment that `subscribed` is set.

        Raises EngineError when the engine goes.
        """
        query = json.dumps({"type": ["container", "network"]})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_TIMEOUT_S)
        try:
            async with self._client().get(
                self._base + "/events", params={"filters": query}, timeout=timeout
            ) as response:
                subscribed.set()
                async for line in response.content:
                    event = json.loads(line)
                    if isinstance(event, dict):
                        yield event
        except _TROUBLE as error:
            raise EngineError(f"event stream of engine {self.socket_path} broke: {error}") from error
        raise EngineError(f"event stream of engine {self.socket_path} ended")

    def _read(self, parse: Callable[[Any], T], answer: Any, path: str) -> T:
        """Return what `parse` makes of an answer; EngineError for one of another shape."""
        try:
            return parse(answer)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"engine {self.socket_path} answered {path} with something else than expected: "
                f"{shorten(answer)} ({type(error).__name__} {error})"
            ) from error

    async def _get(self, path: str, query: dict[str, str] | None = None) -> Any:
        return await self._get_at(self._base, path, query)

    async def _get_at(self, base: str, path: str, query: dict[str, str] | None = None) -> Any:
        try:
            async with self._client().get(base + path, params=query) as response:
                body = await response.read()
                self._silent_at = None
                if response.status == 404:
                    raise _NotFound(f"engine {self.socket_path} has no {path}")
                if response.status != 200:
                    raise EngineError(
                        f"engine {self.socket_path} answered {response.status} to {path}: {shorten(body)}"
                    )
                return json.loads(body)
        except _TROUBLE as error:
            raise EngineError(
                f"engine {self.socket_path} did not answer {path}: {type(error).__name__} {error}",
                hint="is the container engine running?",
            ) from error

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self.socket_path, limit=16),
                timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S),
                read_bufsize=1 << 20,
            )
        return self._session


class _NotFound(EngineError):
    pass


def _version_tuple(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (1, 12)


def _versions(data: Any) -> tuple[str, str]:
    return str(data.get("MinAPIVersion", "1.12")), str(data.get("Version", "unknown"))


def _networks(data: Any) -> list[EngineNetwork]:
    return [_network(each) for each in _list(data)]


def _containers(data: Any) -> list[EngineContainer]:
    return [_container(each) for each in _list(data)]


def _list(data: Any) -> list[Any]:
    """Nothing but a list is one: an empty object taken for it would be a host without containers."""
    if not isinstance(data, list):
        raise TypeError("not a list")
    return data


def _network(data: Any) -> EngineNetwork:
    pools = (data.get("IPAM") or {}).get("Config") or []
    members = data.get("Containers") or {}
    return EngineNetwork(
        id=str(data["Id"]),
        name=str(data["Name"]),
        driver=str(data.get("Driver", "")),
        subnet=str(pools[0].get("Subnet", "")) if pools else "",
        endpoints={
            str(member.get("EndpointID")): (str(container_id), str(member.get("Name", "")))
            for container_id, member in members.items()
        },
    )


def _container(data: Any) -> EngineContainer:
    names = data.get("Names") or [""]
    networks = (data.get("NetworkSettings") or {}).get("Networks") or {}
    return EngineContainer(
        id=str(data["Id"]),
        name=str(names[0]).lstrip("/"),
        state=str(data.get("State", "")),
        labels={str(key): str(value) for key, value in (data.get("Labels") or {}).items()},
        endpoints={
            str(each.get("NetworkID")): str(each.get("EndpointID"))
            for each in networks.values()
            if each and each.get("EndpointID")
        },
        network_mode=str((data.get("HostConfig") or {}).get("NetworkMode", "")),
        networks=frozenset(str(each.get("NetworkID")) for each in networks.values() if each),
    )


def _end(data: Any) -> EngineEnd:
    policy = (data.get("HostConfig") or {}).get("RestartPolicy") or {}
    return EngineEnd(str(data["State"].get("Error") or ""), str(policy.get("Name") or ""))
