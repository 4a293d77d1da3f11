# SPDX-License-Identifier: Apache-2.0
"""The handlers: each asks the view for one thing and sends it.  Routes are Cilium's, at the end.

Bodies, errors and timing are `wire`'s business; what things mean is the agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from ipaddress import IPv4Address

from aiohttp import web

from agent.api.errors import BadRequest, NotReady
from agent.api.models import EndpointRequest, PolicyText, StartOrder, TraceRequest
from agent.api.monitor import Listener, MonitorFilter
from agent.api.view import AgentView
from agent.api.wire import Handler, json_response, number, read_body
from agent.limits import Limits
from core.errors import shorten
from policy.language import check_name

MAX_LISTENERS = 32
# How often a silent monitor looks whether its client is still there.
LISTENER_CHECK_S = 1.0
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EVENT_TYPES = frozenset({"drop", "trace", "policy-verdict", "agent", "lost"})
ENDPOINT_MAX = 65535
NAME_MAX = 200
IDENTITY_MAX = (1 << 25) - 1  # 16 bits, cluster id, local flag


class Handlers:
    """One method a route; `view` is the agent, `limits` who has to wait."""

    def __init__(self, view: AgentView, limits: Limits) -> None:
        self.view = view
        self._limits = limits

    def routes(self) -> list[web.RouteDef]:
        """Return the table of routes."""
        return [
            web.get("/v1/healthz", self.healthz),
            web.get("/v1/config", self.config),
            web.get("/v1/debuginfo", self.debuginfo),
            web.put("/v1/start-now", self.start_now),
            web.get("/v1/cleanup", self.cleanup),
            web.get("/v1/metrics", self.metrics),
            web.get("/metrics", self.metrics),
            web.get("/v1/monitor", self.monitor),
            web.get("/v1/endpoint", self._limited("endpoint-list", self.endpoints)),
            web.get("/v1/endpoint/{id}", self._limited("endpoint-get", self.endpoint)),
            web.get("/v1/endpoint/{id}/log", self._limited("endpoint-get", self.endpoint_log)),
            web.get("/v1/endpoint/{id}/healthz", self._limited("endpoint-get", self.endpoint_health)),
            web.put("/v1/endpoint/{id}", self._limited("endpoint-create", self.put_endpoint)),
            web.delete("/v1/endpoint/{id}", self._limited("endpoint-delete", self.delete_endpoint)),
            web.get("/v1/identity", self.identities),
            web.get("/v1/identity/{id}", self.identity),
            web.get("/v1/ip", self.addresses),
            web.get("/v1/cluster/nodes", self.nodes),
            web.get("/v1/health", self.health),
            web.put("/v1/health/probe", self.probe_health),
            web.get("/v1/network", self.networks),
            web.get("/v1/policy", self.policies),
            web.get("/v1/policy/selectors", self.selectors),
            web.post("/v1/policy/resolve", self.resolve),
            web.put("/v1/policy/{name:.+}", self._limited("policy-apply", self.put_policy)),
            web.delete("/v1/policy/{name:.+}", self._limited("policy-apply", self.delete_policy)),
            web.get("/v1/map", self.maps),
            web.get("/v1/map/{name}", self.map_dump),
        ]

    def _limited(self, call: str, handler: Handler) -> Handler:
        """Return a handler whose requests wait for their turn."""

        async def limited(request: web.Request) -> web.StreamResponse:
            async with self._limits.turn(call):
                return await handler(request)

        return limited

    # --- the agent itself

    async def healthz(self, _: web.Request) -> web.Response:
        return json_response(self.view.status())

    async def config(self, _: web.Request) -> web.Response:
        return json_response(self.view.configuration())

    async def debuginfo(self, _: web.Request) -> web.Response:
        return json_response(await self.view.debuginfo())

    async def start_now(self, request: web.Request) -> web.Response:
        order = await read_body(request, StartOrder)
        who = "".join(each for each in order.by if each.isprintable()).strip()[:NAME_MAX]
        if not who:
            raise BadRequest(f"by is {shorten(order.by)!r}, which names nobody")
        return json_response(self.view.start_now(who))

    async def cleanup(self, _: web.Request) -> web.Response:
        return json_response(await self.view.cleanup_plan())

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=await self.view.metrics(), headers={"Content-Type": PROMETHEUS_TYPE})

    async def monitor(self, request: web.Request) -> web.StreamResponse:
        """Stream events as JSON lines until the client or the agent goes away."""
        hub = self.view.monitor
        wanted = monitor_filter(request.query)
        if hub.listeners >= MAX_LISTENERS:
            raise NotReady(f"{MAX_LISTENERS} monitors are listening already", hint="end one of them")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        # A client that goes between the look and the write is how a monitor ends, not an error.
        with contextlib.suppress(ConnectionError), hub.listen(wanted) as listener:
            await response.prepare(request)
            while not hub.closed and not _gone(request):
                await _send(response, listener)
        return response

    # --- endpoints

    async def endpoints(self, _: web.Request) -> web.Response:
        return json_response(self.view.endpoints())

    async def endpoint(self, request: web.Request) -> web.Response:
        return json_response(self.view.endpoint(request.match_info["id"]))

    async def endpoint_log(self, request: web.Request) -> web.Response:
        return json_response(self.view.endpoint(request.match_info["id"]).status.log)

    async def endpoint_health(self, request: web.Request) -> web.Response:
        return json_response(self.view.endpoint(request.match_info["id"]).status.health)

    async def put_endpoint(self, request: web.Request) -> web.Response:
        endpoint = number(request.match_info["id"], "endpoint", high=ENDPOINT_MAX)
        body = await read_body(request, EndpointRequest)
        _check_address(body.ipv4)
        return json_response(await self.view.create_endpoint(endpoint, body), 201)

    async def delete_endpoint(self, request: web.Request) -> web.Response:
        endpoint = number(request.match_info["id"], "endpoint", high=ENDPOINT_MAX)
        await self.view.delete_endpoint(endpoint)
        return json_response({})

    # --- identities, addresses, nodes

    async def identities(self, _: web.Request) -> web.Response:
        return json_response(self.view.identities())

    async def identity(self, request: web.Request) -> web.Response:
        wanted = number(request.match_info["id"], "identity", high=IDENTITY_MAX)
        return json_response(self.view.identity(wanted))

    async def addresses(self, _: web.Request) -> web.Response:
        return json_response(self.view.addresses())

    async def nodes(self, _: web.Request) -> web.Response:
        return json_response(self.view.nodes())

    async def health(self, _: web.Request) -> web.Response:
        return json_response(await self.view.health())

    async def probe_health(self, _: web.Request) -> web.Response:
        return json_response(await self.view.probe_health())

    async def networks(self, _: web.Request) -> web.Response:
        return json_response(await self.view.networks())

    # --- policy

    async def policies(self, _: web.Request) -> web.Response:
        return json_response(self.view.policies())

    async def selectors(self, _: web.Request) -> web.Response:
        return json_response(self.view.selectors())

    async def resolve(self, request: web.Request) -> web.Response:
        return json_response(self.view.resolve(await read_body(request, TraceRequest)))

    async def put_policy(self, request: web.Request) -> web.Response:
        name = _policy_name(request)
        body = await read_body(request, PolicyText)
        return json_response(await self.view.put_policy(name, body.text))

    async def delete_policy(self, request: web.Request) -> web.Response:
        return json_response(await self.view.delete_policy(_policy_name(request)))

    # --- maps

    async def maps(self, _: web.Request) -> web.Response:
        return json_response(await self.view.maps())

    async def map_dump(self, request: web.Request) -> web.Response:
        return json_response(await self.view.map_dump(request.match_info["name"]))


def monitor_filter(query: Mapping[str, str]) -> MonitorFilter:
    """Return the filter of ``?type=drop,trace&from=1&to=2&related=3``; BadRequest names what is wrong."""
    types = frozenset(filter(None, query.get("type", "").split(",")))
    unknown = sorted(types - EVENT_TYPES)
    if unknown:
        allowed = ", ".join(sorted(EVENT_TYPES))
        raise BadRequest(f"event type {unknown[0]!r} does not exist", hint=f"it may be {allowed}")
    return MonitorFilter(types, *(_endpoints(query, name) for name in ("from", "to", "related")))


def _endpoints(query: Mapping[str, str], name: str) -> frozenset[int]:
    words = filter(None, query.get(name, "").split(","))
    return frozenset(number(word, f"endpoint in {name!r}", high=ENDPOINT_MAX) for word in words)


def _check_address(text: str) -> None:
    try:
        IPv4Address(text or "0.0.0.0")
    except ValueError as error:
        raise BadRequest(f"ipv4 {shorten(text)!r} is not an IPv4 address") from error


def _policy_name(request: web.Request) -> str:
    """Return the name in the path; PolicyNameError for one that could lead to another file."""
    return check_name(request.match_info["name"], "the request's path")


def _gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


async def _send(response: web.StreamResponse, listener: Listener) -> None:
    """Send what is queued; a reader that does not read holds up this handler only."""
    try:
        async with asyncio.timeout(LISTENER_CHECK_S):
            lines = await listener.take()
    except TimeoutError:
        return
    if lines:
        await response.write(lines)
