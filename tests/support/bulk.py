# SPDX-License-Identifier: Apache-2.0
"""A connection that carries a megabyte each way: does it arrive, or does it stand still?

with contextlib.closing(Bulk(client, server, "10.50.2.2")) as bulk:
    assert bulk.arrives(3.0)       # no three seconds without a byte
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading

from tests.support.netns import Netns

PORT = 9100
SIZE = 1 << 20


class Bulk:
    """From one namespace to an address of another; `received` is what the server has got so far."""

    def __init__(self, client: Netns, server: Netns, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with server.socket(socket.SOCK_STREAM, family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, PORT))
            listener.listen()
            self._client = client.socket(socket.SOCK_STREAM, family)
            self._client.settimeout(5)
            self._client.connect((address, PORT))
            self._client.settimeout(None)
            self._peer, _ = listener.accept()
        self.received = 0
        self._threads = [threading.Thread(target=each) for each in (self._serve, self._send)]
        for thread in self._threads:
            thread.start()

    def arrives(self, seconds: float) -> bool:
        """True when everything came there and back without a silence longer than that."""
        got = 0
        while got < SIZE and select.select([self._client], [], [], seconds)[0]:
            got += len(self._client.recv(1 << 16))
        return got == SIZE

    def close(self) -> None:
        for each in (self._client, self._peer):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes who reads or writes
        for thread in self._threads:
            thread.join(10)
        self._client.close()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            self._client.sendall(bytes(SIZE))

    def _serve(self) -> None:
        with self._peer, contextlib.suppress(OSError):
            while self.received < SIZE:
                data = self._peer.recv(1 << 16)
                if not data:
                    return
                self.received += len(data)
            self._peer.sendall(bytes(SIZE))
