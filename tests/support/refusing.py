# SPDX-License-Identifier: Apache-2.0
"""A network driver that fails every call: what the engine meets while the agent is away, but at once.

Used by tests/chaos.
"""

from __future__ import annotations

import contextlib
import http.server
import socketserver
import threading
from collections.abc import Iterator

from tests.support.engine import DockerHost


class Refusal(http.server.BaseHTTPRequestHandler):
    """Answers every call of the engine with an error."""

    def do_POST(self) -> None:
        body = b'{"Err": "nobody is here"}'
        self.send_response(500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def calls_of_the_engine_fail(host: DockerHost) -> Iterator[None]:
    """Have the engine give up on the driver at once: where nobody listens it takes 45 s, and gives up too."""
    path = host.private("/run/docker") / "plugins" / "holdfast.sock"
    path.unlink(missing_ok=True)
    with socketserver.ThreadingUnixStreamServer(str(path), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            path.unlink()
