# SPDX-License-Identifier: Apache-2.0
"""A relay on the plugin socket between a container engine and the agent: holds one driver call at a fixed
point, so that a test can do to the container or to the agent what it likes, and knows when it does.

The engine knows the relay only; the agent listens elsewhere (`docker-plugin-socket`) and may be killed and
started again meanwhile.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

PATIENCE_S = 60.0


class PluginConnection(http.client.HTTPConnection):
    """HTTP over the plugin socket, as the engine speaks it."""

    def __init__(self, path: Path) -> None:
        super().__init__("plugin", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Point:
    """Where a call is held: before the agent gets it, or before the engine gets its answer."""

    method: str
    answered: bool

    def __str__(self) -> str:
        return f"{self.method}-{'answered' if self.answered else 'asked'}"


@dataclass
class Hold:
    """One call that is held, once `reached` is set, until `released` is."""

    point: Point
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Return when the call has come to the point."""
        assert self.reached.wait(PATIENCE_S), f"no call came to {self.point}"


class Relay:
    """Serves on `listens`, passes everything on to `agent`; use as a context manager."""

    def __init__(self, listens: Path, agent: Path) -> None:
        self.agent = agent
        self._hold: Hold | None = None
        self._server = _Server(str(listens), _Handler)
        self._server.relay = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @contextlib.contextmanager
    def holding(self, point: Point) -> Iterator[Hold]:
        """Hold the next call that comes to `point`, to the end of the block."""
        hold = self._hold = Hold(point)
        try:
            yield hold
        finally:
            self._hold = None
            hold.released.set()

    def pass_on(self, path: str, body: bytes) -> bytes:
        """Return the agent's answer.  Raises OSError or HTTPException when it gives none."""
        method = path.rpartition(".")[2]
        self._stop_at(Point(method, answered=False))
        connection = PluginConnection(self.agent)
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            answer = connection.getresponse().read()
        self._stop_at(Point(method, answered=True))
        return answer

    def _stop_at(self, point: Point) -> None:
        hold = self._hold
        if hold is not None and hold.point == point and not hold.reached.is_set():
            hold.reached.set()
            assert hold.released.wait(PATIENCE_S), f"nobody released {point}"


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    relay: Relay


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            answer = self.server.relay.pass_on(self.path, body)
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # the agent died of it: the engine sees the same
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: there is no client address in a unix socket."""
