# SPDX-License-Identifier: Apache-2.0
"""One service of the test application: an HTTP server that asks the services it depends on.

    server.py NAME PORT [NAME:PORT…]

GET /          this service's name
GET /deps      {"name": "ok" | what went wrong} for each service it depends on, asked over the network
GET /ask/X:N   the same for one service X, whether it depends on it or not
A service that depends on others asks them through docker's DNS by their names.
"""

import http.client
import http.server
import json
import sys

TIMEOUT_S = 2.0


def ask(target: str) -> str:
    """Return "ok" if the service of that name answers with its own name, else what went wrong."""
    name, _, port = target.partition(":")
    connection = http.client.HTTPConnection(name, int(port), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse().read().decode()
        return "ok" if answer == name else f"answered as {answer}"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the name, or with what became of the dependencies."""

    name = ""
    dependencies: tuple[str, ...] = ()

    def do_GET(self) -> None:
        body = self.name
        if self.path == "/deps":
            body = json.dumps({target.partition(":")[0]: ask(target) for target in self.dependencies})
        elif self.path.startswith("/ask/"):
            body = ask(self.path.removeprefix("/ask/"))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    Handler.name, port, Handler.dependencies = sys.argv[1], int(sys.argv[2]), tuple(sys.argv[3:])
    http.server.ThreadingHTTPServer(("", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
