# SPDX-License-Identifier: Apache-2.0
"""The wire from a host to an etcd of the machine: it can be made slow, and cut, while an agent uses it.

    agent ──▶ 127.0.0.1:2379 of the host ── Wire ──▶ the loopback port of an EtcdServer

Bytes pass as they are, so TLS does too.  With a `delay` everything that etcd says comes that much later; what
is under way at the same time does not wait for each other, as on a long line.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Self

from tests.support.agent import ETCD_PORT
from tests.support.host import Host
from tests.support.places import opened

CHUNK = 1 << 16


class Wire:
    """Use as a context manager; `delay` are seconds and may be changed at any time.

    `attempts` counts the connections that were begun, those that were ended at once included.
    """

    def __init__(self, host: Host, port: int) -> None:
        self.delay = 0.0
        self.attempts = 0
        self._port = port
        self._is_cut = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        netns = opened(Path(f"/run/netns/{host.netns}"))
        with contextlib.closing(netns):
            self._listener = netns.socket(socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", ETCD_PORT))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        self.drop()

    def cut(self) -> None:
        """End every connection, and each new one at once, until `mend`."""
        self._is_cut = True
        self.drop()

    def mend(self) -> None:
        self._is_cut = False

    def drop(self) -> None:
        """End every connection; new ones are welcome."""
        with self._lock:
            connections, self._open = self._open, set()
        for each in connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                agent, _ = self._listener.accept()
                self.attempts += 1
                threading.Thread(target=self._serve, args=(agent,), daemon=True).start()

    def _serve(self, agent: socket.socket) -> None:
        with contextlib.suppress(OSError), agent, socket.create_connection(("127.0.0.1", self._port)) as etcd:
            ends = {agent, etcd}
            with self._lock:
                if self._is_cut:
                    return
                self._open |= ends
            try:
                said: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                threads = [
                    threading.Thread(target=self._pass_on, args=(agent, etcd), daemon=True),
                    threading.Thread(target=self._hear, args=(etcd, said), daemon=True),
                    threading.Thread(target=self._tell, args=(said, agent), daemon=True),
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                with self._lock:
                    self._open -= ends

    @staticmethod
    def _pass_on(agent: socket.socket, etcd: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := agent.recv(CHUNK):
                etcd.sendall(data)
        with contextlib.suppress(OSError):
            etcd.shutdown(socket.SHUT_RDWR)

    def _hear(self, etcd: socket.socket, said: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"x"
        while data:
            try:
                data = etcd.recv(CHUNK)
            except OSError:
                data = b""
            said.put((time.monotonic() + self.delay, data))

    @staticmethod
    def _tell(said: queue.SimpleQueue[tuple[float, bytes]], agent: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = said.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                agent.sendall(data)
        with contextlib.suppress(OSError):
            agent.shutdown(socket.SHUT_RDWR)
