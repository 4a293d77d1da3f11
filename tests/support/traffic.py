# SPDX-License-Identifier: Apache-2.0
"""Servers and clients inside namespaces: a server answers with the address it sees, so that a test can
say what happened to the packet.  An address decides the family; a server without one has both."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.support.netns import Netns

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
MAPPED = "::ffff:"  # how a server of both families sees an IPv4 address
REFUSED_AFTER_S = 0.5  # how long a client waits before it says that nothing came through


@contextlib.contextmanager
def serving(netns: Netns, port: int, kind: socket.SocketKind = TCP, address: str = "") -> Iterator[None]:
    """Serve inside `netns` for the time of the block."""
    server = netns.socket(kind, family_of(address) if address else socket.AF_INET6)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if not address:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind((address, port))
    if kind == TCP:
        server.listen()
    thread = threading.Thread(target=_serve_tcp if kind == TCP else _serve_udp, args=(server,))
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        server.close()


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _serve_tcp(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, peer = server.accept()
            threading.Thread(target=_echo, args=(connection, peer[0]), daemon=True).start()


def _echo(connection: socket.socket, peer: str) -> None:
    """Answer each message with the peer's address and the message, until the peer closes."""
    with contextlib.suppress(OSError), connection:
        while data := connection.recv(4096):
            connection.sendall(_answer(peer, data))


def _serve_udp(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            data, peer = server.recvfrom(4096)
            if not data:
                return  # shutdown wakes the call with nothing
            server.sendto(_answer(peer[0], data), peer)


def _answer(peer: str, data: bytes) -> bytes:
    return f"{peer.removeprefix(MAPPED)} {data.decode()}".encode()


@contextlib.contextmanager
def connected(
    netns: Netns, address: str, port: int, kind: socket.SocketKind = TCP
) -> Iterator[socket.socket]:
    """Yield a client's connected socket; raises OSError when nothing answers."""
    client = netns.socket(kind, family_of(address))
    with client:
        client.settimeout(REFUSED_AFTER_S)
        client.connect((address, port))
        yield client


def ask(client: socket.socket, text: str = "x") -> str:
    """Send a message; return the address that the server saw.  Raises OSError when no answer comes."""
    client.sendall(text.encode())
    seen, _, back = client.recv(4096).decode().partition(" ")
    assert back == text
    return seen


def seen_by_server(netns: Netns, address: str, port: int, kind: socket.SocketKind = TCP) -> str | None:
    """Return the client address that a server at address:port saw, or None when nothing comes through."""
    try:
        with connected(netns, address, port, kind) as client:
            return ask(client)
    except OSError:
        return None
