# SPDX-License-Identifier: Apache-2.0
"""Traffic that goes on while a test breaks things: it says afterwards whether anything was noticed.

A `Stream` is one TCP connection, a `Probe` many datagrams; both ask a server of `tests.support.traffic` again
and again from a thread of their own.  Used by tests/chaos.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from tests.support.host import wait_for
from tests.support.netns import Netns
from tests.support.traffic import TCP, UDP, ask, family_of

BETWEEN_S = 0.02
ANSWER_S = 20.0  # a stream that is silent for so long is broken, whatever TCP thinks


class Live(ABC):
    """Asks until the block ends; a subclass says what one question is."""

    kind = TCP

    def __init__(self, name: str, netns: Netns, address: str, port: int) -> None:
        self.name = name
        self.answers = 0
        self.error = ""
        self._pause = 0.0
        self._last = time.monotonic()
        self._ending = threading.Event()
        self._socket = netns.socket(self.kind, family_of(address))
        self._socket.settimeout(ANSWER_S)
        self._socket.connect((address, port))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(ANSWER_S)
        self._socket.close()

    def goes_on(self, more: int = 5) -> None:
        """Wait for further answers; AssertionError when there are none, or when it broke."""
        wanted = self.answers + more
        what = f"{more} more answers, {self.name}"
        wait_for(lambda: self.answers >= wanted or bool(self.error), what, seconds=ANSWER_S)
        assert not self.error, f"{self.name}: {self.error}"

    def longest_pause(self) -> float:
        """Return, once, the longest time in seconds without an answer since the last call."""
        pause, self._pause = max(self._pause, time.monotonic() - self._last), 0.0
        return pause

    def _run(self) -> None:
        while not self._ending.wait(BETWEEN_S):
            if self._asked():
                now = time.monotonic()
                self._pause = max(self._pause, now - self._last)
                self._last = now
                self.answers += 1
            elif self.error:
                return

    @abstractmethod
    def _asked(self) -> bool:
        """Ask once and return whether there was an answer."""


class Stream(Live):
    """One TCP connection, which has an error once it is reset, closed or silent for too long."""

    def _asked(self) -> bool:
        try:
            ask(self._socket)
        except (OSError, AssertionError, ValueError) as error:
            self.error = f"{type(error).__name__}: {error}"
            return False
        return True


class Probe(Live):
    """Datagrams, each a question of its own: how long nothing comes through is how long they are stopped."""

    kind = UDP

    def __init__(self, name: str, netns: Netns, address: str, port: int) -> None:
        super().__init__(name, netns, address, port)
        self._socket.settimeout(2 * BETWEEN_S)

    def _asked(self) -> bool:
        try:
            self._socket.send(b"x")
            return bool(self._socket.recv(4096))
        except OSError:  # lost, or refused by a firewall
            return False
