# SPDX-License-Identifier: Apache-2.0
"""HTTP over a unix socket with the standard library alone: the agent's API, and the engine's.

The asynchronous client costs a third of a second to import, which a command line can not afford.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from cli.errors import CliError, Missing, Unreachable
from core.errors import shorten

# A monitor may be silent for as long as nothing happens.
NO_TIMEOUT = None


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a unix socket."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class HttpClient:
    """Requests to one unix socket, one connection each.  `name` is who is spoken to, for messages."""

    def __init__(self, path: Path, *, name: str, hint: str, timeout: float | None = 30.0) -> None:
        self.path = path
        self.name = name
        self.hint = hint  # what to do when nobody answers
        self.timeout = timeout

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Return the decoded answer.

        Raises Unreachable (nobody there, or no answer in time), Missing (404), CliError (any other code).
        """
        with self._send(method, path, body, self.timeout) as answer:
            text = self._read(answer)
            if answer.status >= 300:
                raise self._refusal(answer.status, text)
        return json.loads(text) if text.strip() else None

    def text(self, path: str) -> str:
        """Return an answer that is not JSON."""
        with self._send("GET", path, None, self.timeout) as answer:
            text = self._read(answer)
            if answer.status >= 300:
                raise self._refusal(answer.status, text)
        return text

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield the answer's lines as they come, for as long as the other side sends."""
        with self._send("GET", path, None, NO_TIMEOUT) as answer:
            if answer.status >= 300:
                raise self._refusal(answer.status, self._read(answer))
            while line := self._next_line(answer):
                yield line

    def _send(self, method: str, path: str, body: Any, timeout: float | None) -> http.client.HTTPResponse:
        connection = UnixConnection(self.path, timeout)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, body=data, headers=headers)
            return connection.getresponse()
        except TimeoutError as error:
            raise self._silent() from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise Unreachable(
                f"{self.name} at {self.path} does not answer: {reason}", hint=self.hint
            ) from error

    def _read(self, answer: http.client.HTTPResponse) -> str:
        try:
            return answer.read().decode("utf-8", "replace")
        except TimeoutError as error:
            raise self._silent() from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.name} at {self.path} broke off: {error}", hint=self.hint) from error

    def _next_line(self, answer: http.client.HTTPResponse) -> bytes:
        try:
            return answer.readline()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.name} at {self.path} broke off: {error}", hint=self.hint) from error

    def _silent(self) -> Unreachable:
        return Unreachable(f"{self.name} at {self.path} said nothing for {self.timeout:g} s", hint=self.hint)

    def _refusal(self, status: int, text: str) -> CliError:
        message, hint = _explanation(text)
        if not message:
            message = f"{self.name} answered {status}: {shorten(text)}"
        return Missing(message, hint=hint) if status == 404 else CliError(message, hint=hint)


def _explanation(text: str) -> tuple[str, str]:
    """Return (error, hint) of an error's body: ours has both, the engine's has ``message``."""
    try:
        body = json.loads(text)
    except ValueError:
        return "", ""
    if not isinstance(body, dict):
        return "", ""
    return str(body.get("error") or body.get("message") or ""), str(body.get("hint") or "")


class AgentClient(HttpClient):
    """The agent's API."""

    def __init__(self, path: Path, *, timeout: float | None = 30.0) -> None:
        hint = "is the agent running here, and may this user open its socket? (-H names another socket)"
        super().__init__(path, name="the agent", hint=hint, timeout=timeout)

    def get(self, *parts: str, **query: str) -> Any:
        return self.request("GET", api_path(*parts, **query))


def api_path(*parts: str, **query: str) -> str:
    """Return /v1/part/part?query with everything quoted; empty query values are left out."""
    words = {name.rstrip("_"): value for name, value in query.items() if value}
    path = "/v1/" + "/".join(quote(part, safe=":") for part in parts)
    return f"{path}?{urlencode(words)}" if words else path
