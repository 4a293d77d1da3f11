# SPDX-License-Identifier: Apache-2.0
"""Network namespaces for tests: one that the test itself stands in as "the host", others as containers.

Nothing gets a name under /run/netns: a namespace ends with its last descriptor, however a test ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Netns:
    """A namespace held by a descriptor; `run` runs commands inside."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @property
    def path(self) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self.fd}")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs `arguments` inside."""
        return ["nsenter", f"--net={self.path}", *arguments]

    def run(self, *arguments: str, timeout: float = 10) -> str:
        """Run a command inside and return what it printed; fails the test with its words otherwise."""
        done = subprocess.run(self.command(arguments), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr or done.stdout}"
        return done.stdout

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command inside, its output to read from pipes; the caller ends it."""
        return subprocess.Popen(
            self.command(arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def socket(
        self, kind: socket.SocketKind, family: socket.AddressFamily = socket.AF_INET, protocol: int = 0
    ) -> socket.socket:
        """Return a socket that belongs inside; it may be used from anywhere."""

        def make() -> socket.socket:
            _check(_libc.setns(self.fd, _CLONE_NEWNET), "enter network namespace")
            return socket.socket(family, kind, protocol)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make).result()

    def narrow(self, device: str, size: int, *, but: str = "") -> None:
        """Lose, in silence, what comes in by a device and is longer than `size`, counted from the IP header.

        Whoever sends there has to send packets as the wire would carry them: `cut_on_the_wire`.  `but` is
        what passes all the same, in nft's words.
        """
        hook = f"{{ type filter hook ingress device {device} priority 0; }}"
        # Behind tc's ingress: a device with a program on it would be no wire.
        self.run("nft", "add", "table", "netdev", "narrow")
        self.run("nft", f"add chain netdev narrow {device} {hook}")
        if but:
            self.run("nft", f"add rule netdev narrow {device} {but} accept")
        self.run("nft", f"add rule netdev narrow {device} meta length > {size} drop")

    def widen(self) -> None:
        """End what `narrow` began."""
        self.run("nft", "delete", "table", "netdev", "narrow")

    def cut_on_the_wire(self, device: str) -> None:
        """Have a device cut large packets itself, as a card does, and not leave it to who receives them."""
        offloads = ("tso", "gso", "tx-udp-segmentation", "tx-udp_tnl-segmentation")
        words = [word for each in (*offloads, "tx-udp_tnl-csum-segmentation") for word in (each, "off")]
        self.run("ethtool", "-K", device, *words)

    def close(self) -> None:
        os.close(self.fd)


def _make() -> int:
    _check(_libc.unshare(_CLONE_NEWNET), "unshare network namespace")
    return _own()


@contextlib.contextmanager
def new_netns() -> Iterator[Netns]:
    """Yield a fresh namespace with its loopback up; the calling thread stays where it is."""
    with ThreadPoolExecutor(1) as thread:
        netns = Netns(thread.submit(_make).result())
    try:
        netns.run("ip", "link", "set", "lo", "up")
        yield netns
    finally:
        netns.close()


@contextlib.contextmanager
def inside_new_netns() -> Iterator[Netns]:
    """Move the calling thread into a fresh namespace for the time of the block.

    Sockets and processes that the thread makes meanwhile belong there.
    """
    before = _own()
    try:
        with new_netns() as netns:
            _check(_libc.setns(netns.fd, _CLONE_NEWNET), "enter network namespace")
            try:
                yield netns
            finally:
                _check(_libc.setns(before, _CLONE_NEWNET), "leave network namespace")
    finally:
        os.close(before)
