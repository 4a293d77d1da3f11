# SPDX-License-Identifier: Apache-2.0
"""The checkpoint: what must survive a restart of the agent, one small file an object.

    <state-dir>/endpoints/00123.json     an Endpoint
    <state-dir>/networks/<id>.json       a Network of the driver
    <state-dir>/node.json                the node's pool and name

Each file is written whole and private (0600).  A damaged one is set aside and reported; it never stops
the start.  Blocking file work is a millisecond; callers run it in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from loguru import logger

from agent.endpoint import Endpoint
from core.files import set_aside, write_atomic

VERSION = 1
T = TypeVar("T", bound=msgspec.Struct)


class Network(msgspec.Struct, frozen=True):
    """A network made with our driver: `subnet` is empty with the null IPAM driver."""

    id: str
    name: str
    subnet: str = ""


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """What this node calls itself and the addresses it hands out."""

    name: str
    pool: str
    version: int = VERSION
    last_endpoint_id: int = 0
    local_identities: dict[str, int] = {}
    lease: int = 0


class Checkpoint:
    """The files under one state directory.  Raises OSError where the directory can not be written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._endpoints = directory / "endpoints"
        self._networks = directory / "networks"
        for each in (directory, self._endpoints, self._networks):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)

    def endpoints(self) -> list[Endpoint]:
        """Return every endpoint that can be read."""
        return list(_read_all(self._endpoints, Endpoint))

    def save_endpoint(self, endpoint: Endpoint) -> None:
        # Not flushed: after a power cut no endpoint exists any more, whatever the file says.
        write_atomic(self._endpoint_path(endpoint.id), msgspec.json.encode(endpoint), durable=False)

    def drop_endpoint(self, endpoint_id: int) -> None:
        self._endpoint_path(endpoint_id).unlink(missing_ok=True)

    def networks(self) -> list[Network]:
        return list(_read_all(self._networks, Network))

    def save_network(self, network: Network) -> None:
        write_atomic(self._networks / f"{network.id}.json", msgspec.json.encode(network))

    def drop_network(self, network_id: str) -> None:
        (self._networks / f"{network_id}.json").unlink(missing_ok=True)

    def node(self) -> Node | None:
        return _read(self.directory / "node.json", Node)

    def save_node(self, node: Node) -> None:
        write_atomic(self.directory / "node.json", msgspec.json.encode(node))

    def _endpoint_path(self, endpoint_id: int) -> Path:
        return self._endpoints / f"{endpoint_id:05d}.json"


def _read_all(directory: Path, kind: type[T]) -> Iterator[T]:
    for path in sorted(directory.glob("*.json")):
        record = _read(path, kind)
        if record is not None:
            yield record


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.error("checkpoint {} is damaged ({}); kept as {}", path, error, set_aside(path))
        return None
