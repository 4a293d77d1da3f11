# SPDX-License-Identifier: Apache-2.0
"""The checkpoint: what must survive a restart of the agent, one small file an object.

    <state-dir>/endpoints/00123.json     an Endpoint
    <state-dir>/networks/<id>.json       a Network of the driver
    <state-dir>/node.json                the node's pool and name
    <state-dir>/views.db                 what etcd said last (see agent.viewfile)

Fields of a newer version survive: what a file holds beyond what is known here is written back with it.

Each file is written whole and private (0600).  One that is damaged, or that holds what this agent can
never have written (an interface that is not an endpoint's, say: it would be deleted one day), is set aside
and reported; it never stops the start.  Blocking file work is a millisecond; callers run it in a thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TypeVar

import msgspec
from loguru import logger

from agent.endpoint import ENDPOINT_ID_MAX, Endpoint
from agent.errors import CheckpointDamaged
from core.errors import HoldfastError, shorten
from core.files import put_aside, write_atomic
from datapath.devices import host_name, temporary_name
from identity.labels import Labels
from kvstore.schema import codec
from kvstore.schema.codec import unknown_fields

VERSION = 1
T = TypeVar("T", bound=msgspec.Struct)
Check = Callable[[Path, T], None]

# What the engine calls a network; also the name of our file, so nothing that could leave the directory.
_NETWORK_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")
_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")


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
    last_address: str = ""  # the one handed out last: the next one follows it
    local_identities: dict[str, int] = {}
    lease: int = 0
    lost_leases: tuple[int, ...] = ()  # before it, the last one last: a restored etcd may have them again
    lease_address: str = ""  # the node's own when it had `lease`: a copied disk is recognised by it
    former_lease: int = 0  # of this node at another address, until its keys are gone


class Checkpoint:
    """The files under one state directory.  Writing raises OSError where that is impossible.

    `damage` says what was wrong with files that this life found.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.damage: list[str] = []
        self._unsaved: dict[Path, Callable[[], None]] = {}  # what could not be written yet
        self._newer: dict[Path, bytes] = {}  # files with fields that this version does not know, as they were
        self._endpoints = directory / "endpoints"
        self._networks = directory / "networks"
        try:
            for each in (directory, self._endpoints, self._networks):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:  # what runs is kept up without it; who wants to write is told
            logger.error("checkpoint {} can not be made: {}", directory, error.strerror)

    def endpoints(self) -> list[Endpoint]:
        """Return every endpoint that can be read and used, in order of number; no address comes twice."""
        found: dict[str, Endpoint] = {}

        def check(path: Path, endpoint: Endpoint) -> None:
            check_endpoint(endpoint)
            _require(path == self._endpoint_path(endpoint.id), f"endpoint {endpoint.id} is not of this name")
            other = found.setdefault(endpoint.ipv4, endpoint)
            _require(other is endpoint, f"address {endpoint.ipv4} is endpoint {other.id}'s as well")

        return list(self._read_all(self._endpoints, Endpoint, check))

    def save_endpoint(self, endpoint: Endpoint, *, may_wait: bool = False) -> None:
        # Not flushed: after a power cut no endpoint exists any more, whatever the file says.
        self._write(self._endpoint_path(endpoint.id), endpoint, durable=False, may_wait=may_wait)

    def drop_endpoint(self, endpoint_id: int) -> None:
        self._drop(self._endpoint_path(endpoint_id))

    def networks(self) -> list[Network]:
        return list(self._read_all(self._networks, Network, _check_network))

    def save_network(self, network: Network, *, may_wait: bool = False) -> None:
        self._write(self._network_path(network.id), network, may_wait=may_wait)

    def drop_network(self, network_id: str) -> None:
        self._drop(self._network_path(network_id))

    def node(self) -> Node | None:
        return self._read(self.directory / "node.json", Node, _check_node)

    def save_node(self, node: Node) -> None:
        self._write(self.directory / "node.json", node)

    def save_unsaved(self) -> None:
        """Write what could not be written and was allowed to wait.  Raises OSError."""
        for write in list(self._unsaved.values()):
            write()

    def _read_all(self, directory: Path, kind: type[T], check: Check[T]) -> Iterator[T]:
        for path in sorted(directory.glob("*.json")):
            record = self._read(path, kind, check)
            if record is not None:
                yield record

    def _read(self, path: Path, kind: type[T], check: Check[T]) -> T | None:
        try:
            data = path.read_bytes()
            record = msgspec.json.decode(data, type=kind)
            check(path, record)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.error("checkpoint {} can not be read: {}", path, error.strerror)
            return None
        except (msgspec.DecodeError, HoldfastError, ValueError) as error:
            self._put_aside(path, error)
            return None
        if unknown_fields(record, data):
            self._newer[path] = data
        return record

    def _put_aside(self, path: Path, error: Exception) -> None:
        self.damage.append(f"{path} is damaged ({error}); {put_aside(path)}")
        logger.error("checkpoint {}", self.damage[-1])

    def _write(
        self, path: Path, record: msgspec.Struct, *, durable: bool = True, may_wait: bool = False
    ) -> None:
        """Write a record; one that may wait, for what it tells of runs already, once there is room."""
        try:
            write_atomic(path, codec.rewrite(record, self._newer.get(path)), durable=durable)
            self._unsaved.pop(path, None)
        except OSError as error:
            if not may_wait:
                raise
            logger.error("checkpoint {} can not be written, tried again: {}", path, error.strerror)
            self._unsaved[path] = partial(self._write, path, record, durable=durable)

    def _drop(self, path: Path) -> None:
        self._unsaved.pop(path, None)
        self._newer.pop(path, None)
        path.unlink(missing_ok=True)

    def _endpoint_path(self, endpoint_id: int) -> Path:
        return self._endpoints / f"{endpoint_id:05d}.json"

    def _network_path(self, network_id: str) -> Path:
        """Raises CheckpointDamaged for an id that can not be a file's name."""
        _require(_NETWORK_ID.fullmatch(network_id) is not None, f"{shorten(network_id)} is no network's id")
        return self._networks / f"{network_id}.json"


def own_lease(node: Node, address: IPv4Address) -> int:
    """Return the lease to go on with at this address of the node, 0 when it may be another host's.

    A host whose disk is a copy of another's finds that one's lease in its checkpoint.  On one lease each of
    the two would take the other's keys for what its own former life left, and delete them.
    """
    if not node.lease or node.lease_address in ("", str(address)):
        return node.lease
    logger.warning(
        "this node's address is {} and was {} when lease {:016x} was its own: it gets a new one, and what is "
        "left under the old one goes when that ends",
        address,
        node.lease_address,
        node.lease,
    )
    return 0


# --- what a record must be: each raises HoldfastError or ValueError


def check_endpoint(endpoint: Endpoint) -> None:
    """Raise CheckpointDamaged, LabelError or ValueError for a record that this agent can not have written."""
    _require(0 < endpoint.id <= ENDPOINT_ID_MAX, f"endpoint number {endpoint.id} is not in 1..65535")
    IPv4Address(endpoint.ipv4)
    for mac in (endpoint.mac, endpoint.node_mac):
        _require(_MAC.fullmatch(mac) is not None, f"{shorten(mac)} is no MAC address")
    names = (host_name(endpoint.id), temporary_name(endpoint.id))
    given = (endpoint.interface, endpoint.peer)
    _require(given == names, f"interfaces {shorten(given)} are not those of endpoint {endpoint.id}")
    _require(not endpoint.identity or bool(endpoint.labels), "it has an identity but no labels")
    _require(0 <= endpoint.identity < 1 << 32, f"identity {endpoint.identity} is out of range")
    for labels in filter(None, (endpoint.labels, endpoint.all_labels)):
        Labels.parse(labels)


def _check_network(_: Path, network: Network) -> None:
    _require(_NETWORK_ID.fullmatch(network.id) is not None, f"{shorten(network.id)} is no network's id")
    if network.subnet:
        IPv4Network(network.subnet)


def _check_node(path: Path, node: Node) -> None:
    _require(bool(node.name), "the node has no name")
    _require(IPv4Network(node.pool).prefixlen <= 29, f"pool {node.pool} is smaller than a /29")
    numbers = (node.last_endpoint_id, node.lease, *node.lost_leases)
    _require(all(0 <= number < 1 << 63 for number in numbers), "a number is out of range")
    if node.last_address:
        IPv4Address(node.last_address)
    if node.version > VERSION:
        # Fields may be added, never change their meaning: what is known here can be used.
        logger.warning("checkpoint {} was written by a newer version ({})", path, node.version)


def _require(right: bool, reason: str) -> None:
    if not right:
        raise CheckpointDamaged(reason)
