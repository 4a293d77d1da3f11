# SPDX-License-Identifier: Apache-2.0
"""HTTP at its edge: bodies in and out as JSON, errors as codes, and how long each request took.

Every answer that is not 2xx is an `ErrorBody`; nothing that a client sends ends in a traceback on its side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web
from loguru import logger

from agent.api.errors import BadRequest, TooLarge, code_of
from agent.api.models import ErrorBody
from core import metrics
from core.errors import HoldfastError, shorten
from policy.language import MAX_STORED

# The longest body: a policy as text inside JSON, where a quote takes two bytes and an accented letter, of two
# bytes, six.
MAX_BODY = 3 * MAX_STORED + 1024
# A client that takes longer to send a body is given up.
BODY_TIMEOUT_S = 10.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")

_encoder = msgspec.json.Encoder()


def json_response(value: object, status: int = 200) -> web.Response:
    """Return `value`, structs or lists of them, as JSON."""
    return web.Response(body=_encoder.encode(value), status=status, content_type="application/json")


def error_response(status: int, error: str, hint: str = "") -> web.Response:
    return json_response(ErrorBody(error=error, hint=hint), status)


async def read_body(request: web.Request, type_: type[T]) -> T:
    """Return the body as `type_`; BadRequest names the field that is wrong, TooLarge the limit."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(
            f"the body of {request.method} {request.path} is longer than {MAX_BODY} bytes"
        ) from error
    except TimeoutError as error:
        raise BadRequest(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from error
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"body {shorten(body)} is refused: {error}") from error


def number(text: str, what: str, *, high: int = 0xFFFFFFFF) -> int:
    """Return a number from a path or a query; BadRequest names `what`."""
    if not (text.isascii() and text.isdigit() and int(text[:12]) <= high):
        raise BadRequest(f"{what} {shorten(text)!r} is not a number from 0 to {high}")
    return int(text)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer with a code and a sentence."""
    try:
        return await handler(request)
    except HoldfastError as error:
        return error_response(code_of(error), error.message, error.hint)
    except web.HTTPException as error:
        return error_response(error.status, f"{request.method} {shorten(request.path)}: {error.reason}")
    except ConnectionError:
        raise  # the client has gone: nobody is left to answer to
    except Exception as error:  # noqa: BLE001 - the rim: one request must not end the agent
        logger.opt(exception=error).error("API {} {} failed", request.method, request.path)
        return error_response(500, f"{type(error).__name__} in the agent", "its log has the details")


@web.middleware
async def timed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Observe each request's duration, by route (not by path: those are without bound)."""
    began = time.monotonic()
    response = await handler(request)
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unknown"
    metrics.API_SECONDS.labels(route, request.method, str(response.status)).observe(time.monotonic() - began)
    return response
