# SPDX-License-Identifier: Apache-2.0
"""The endpoint manager: makes, identifies and removes endpoints.

It owns the table of endpoints, the address pool and the checkpoint's endpoint files.  It writes desired
state only; reconcilers put it into the kernel, and a call that promises something about the kernel waits
for them (`Kernel.settled`).  The order of a start:

    create    number, address, MACs           checkpointed before the engine hears the address
    connect   interface, programs, empty policy map: everything is denied (identity init)
    identify  labels → identity → policy map → ip→identity entry, all in the kernel on return

An identity that can not be had at once (etcd is away and its labels are not known here) is asked for in
the background for as long as it takes; until then the endpoint is enforced as reserved:init.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Protocol

import msgspec
from loguru import logger

from agent.checkpoint import Checkpoint
from agent.endpoint import ENDPOINT_ID_MAX, Endpoint, Port, State, macs_of
from agent.errors import AddressTaken, AgentError, EndpointNotFound, EndpointRefused, PoolExhausted
from agent.pool import Pool
from core import metrics
from core.backoff import Backoff
from core.errors import HoldfastError, shorten
from core.reconciler import Kind, Status
from core.table import Table
from datapath.devices import host_name, temporary_name
from identity.errors import LabelError
from identity.filter import LabelFilter
from identity.labels import CONTAINER, Labels

# How long a driver call waits for etcd before the container starts denied (the engine's patience is 30 s).
IDENTITY_PATIENCE_S = 8.0
HISTORY = 32
NETWORK_LABEL = "holdfast.network"


class Allocator(Protocol):
    """Gives numbers to label sets (identity.allocator)."""

    async def allocate(self, labels: Labels) -> int: ...

    def restore(self, labels: Labels, number: int) -> bool: ...

    async def release(self, labels: Labels) -> None: ...


class Kernel(Protocol):
    """What the manager needs of the reconcilers: desired state in, the outcome out."""

    def endpoint_identified(self, endpoint: Endpoint, labels: Labels) -> None:
        """Identity and policy of an endpoint are to be enforced."""
        ...

    def endpoint_removed(self, endpoint: Endpoint) -> None: ...

    async def address_freed(self, address: str) -> None:
        """Forget the connections of an address that nobody has any more."""
        ...

    async def published(self, endpoints: Iterable[Endpoint]) -> Status:
        """Wait until the ports of these endpoints, and no others, are published; what became of it."""
        ...

    async def settled(self, endpoint_id: int) -> Status:
        """Wait until everything wanted of an endpoint was tried in the kernel; the worst status of it."""
        ...


@dataclass(frozen=True)
class Event:
    """One line of an endpoint's history."""

    time: float
    ok: bool
    state: str
    message: str


class EndpointManager:
    """Owner of every endpoint of this host."""

    def __init__(
        self,
        table: Table[int, Endpoint],
        pool: Pool,
        checkpoint: Checkpoint,
        allocator: Allocator,
        label_filter: LabelFilter,
        kernel: Kernel,
    ) -> None:
        self.table = table
        self.pool = pool
        self.last_id = 0
        self._source = table.source("agent")
        self._checkpoint = checkpoint
        self._allocator = allocator
        self._filter = label_filter
        self._kernel = kernel
        self._by_engine_id: dict[str, int] = {}
        self._history: dict[int, deque[Event]] = {}
        self._allocations: dict[int, asyncio.Task[None]] = {}
        self._restoring: set[int] = set()

    # --- looking

    def get(self, endpoint_id: int) -> Endpoint:
        endpoint = self.table.get(endpoint_id)
        if endpoint is None:
            raise EndpointNotFound(f"endpoint {endpoint_id} does not exist on this host")
        return endpoint

    def by_engine_id(self, engine_id: str) -> Endpoint | None:
        endpoint_id = self._by_engine_id.get(engine_id)
        return None if endpoint_id is None else self.table.get(endpoint_id)

    def history(self, endpoint_id: int) -> Iterable[Event]:
        return tuple(self._history.get(endpoint_id, ()))

    def state(self, endpoint: Endpoint, kernel: Status) -> State:
        """Return where an endpoint is in its life, from its record and the reconcilers' status."""
        if not endpoint.connected:
            return State.CREATING
        if kernel.kind is Kind.ERROR:
            return State.NOT_READY
        if endpoint.id in self._restoring:
            return State.RESTORING
        if not endpoint.identity:
            return State.WAITING_FOR_IDENTITY
        return State.REGENERATING if kernel.kind is Kind.PENDING else State.READY

    # --- starting

    def restore(self) -> int:
        """Take the endpoints of the checkpoint; return how many."""
        endpoints = self._checkpoint.endpoints()
        for endpoint in endpoints:
            try:
                self.pool.reserve(IPv4Address(endpoint.ipv4), _user(endpoint.id))
            except (AddressTaken, ValueError) as error:
                # The pool was changed by configuration: the endpoint keeps what it has until it stops.
                logger.warning("restored endpoint {} keeps {}: {}", endpoint.id, endpoint.ipv4, error)
            self.last_id = max(self.last_id, endpoint.id)
            self._restoring.add(endpoint.id)
            self._index(endpoint)
            self._source.upsert(endpoint.id, endpoint)
            self._note(endpoint.id, State.RESTORING, "restored from the checkpoint")
            if endpoint.identity:
                self._restore_identity(endpoint, Labels.parse(endpoint.labels))
        return len(endpoints)

    def _restore_identity(self, endpoint: Endpoint, labels: Labels) -> None:
        """Go on with the identity of the checkpoint; etcd's number wins later if it differs."""
        self._kernel.endpoint_identified(endpoint, labels)
        if not self._allocator.restore(labels, endpoint.identity):
            self._start_allocation(endpoint.id, labels)

    def restored(self) -> None:
        """Everything restored has been compared with the kernel and the engine."""
        self._restoring.clear()
        self._source.mark_in_sync()

    async def create(
        self,
        *,
        network_id: str = "",
        engine_id: str = "",
        address: IPv4Address | None = None,
        mac: str = "",
        endpoint_id: int = 0,
        netns: str = "",
    ) -> Endpoint:
        """Give an endpoint its number and address; the same engine endpoint again gives the same one."""
        known = self.by_engine_id(engine_id) if engine_id else None
        if known is not None:
            return known
        number = self._take_id(endpoint_id)
        if address is None:
            address = self.pool.allocate(_user(number))
        else:
            self.pool.reserve(address, _user(number))
        metrics.IPAM_EVENTS.labels("allocate", "ipv4").inc()
        own_mac, node_mac = macs_of(address)
        endpoint = Endpoint(
            id=number,
            ipv4=str(address),
            mac=mac or own_mac,
            node_mac=node_mac,
            interface=host_name(number),
            peer=temporary_name(number),
            network_id=network_id,
            engine_endpoint_id=engine_id,
            netns=netns,
        )
        self._index(endpoint)
        await self._store(endpoint)
        self._note(number, State.CREATING, f"address {address}")
        return endpoint

    async def connect(self, endpoint_id: int) -> Endpoint:
        """Make the interface and its programs; on return everything it sends and receives is denied."""
        endpoint = await self._change(endpoint_id, connected=True)
        await self._expect_kernel(endpoint_id, "interface")
        return endpoint

    async def identify(
        self,
        endpoint_id: int,
        container_id: str,
        name: str,
        container_labels: Mapping[str, str],
        network: str,
    ) -> Endpoint:
        """Take a container's labels, allocate its identity and put its policy into the kernel."""
        everything, relevant = self._labels(name, container_labels, network)
        endpoint = self.get(endpoint_id)
        if (
            endpoint.identity
            and endpoint.labels == relevant.serialized
            and endpoint.container_id == container_id
        ):
            await self._expect_kernel(endpoint_id, "policy")
            return endpoint
        await self._change(
            endpoint_id,
            container_id=container_id,
            container_name=name,
            all_labels=everything.serialized,
            handed_over=True,
        )
        return await self.set_labels(endpoint_id, relevant)

    async def handed_over(self, endpoint_id: int, name: str, labels: Labels) -> Endpoint:
        """Note that an endpoint of the API has its interface inside its namespace."""
        return await self._change(
            endpoint_id, handed_over=True, container_name=name, all_labels=labels.serialized
        )

    async def set_labels(self, endpoint_id: int, relevant: Labels) -> Endpoint:
        """Give an endpoint the identity of these labels; waits for etcd a few seconds, then goes on alone."""
        endpoint = self.get(endpoint_id)
        if endpoint.labels and endpoint.labels != relevant.serialized:
            await self._allocator.release(Labels.parse(endpoint.labels))
        task = self._start_allocation(endpoint_id, relevant)
        done, _ = await asyncio.wait({task}, timeout=IDENTITY_PATIENCE_S)
        if not done:
            self._note(
                endpoint_id, State.WAITING_FOR_IDENTITY, "etcd has not answered; still asking", ok=False
            )
            raise AgentError(
                f"endpoint {endpoint_id} ({shorten(relevant.serialized)}) has no identity after "
                f"{IDENTITY_PATIENCE_S:g} s",
                hint="it is denied until etcd answers; see holdfast status",
            )
        await self._expect_kernel(endpoint_id, "policy")
        return self.get(endpoint_id)

    async def publish(self, endpoint_id: int, ports: tuple[Port, ...]) -> Endpoint:
        """Publish ports of an endpoint on the host, or none."""
        if self.get(endpoint_id).ports == ports:
            return self.get(endpoint_id)
        endpoint = await self._change(endpoint_id, ports=ports)
        status = await self._kernel.published(each for _, each in self.table.items())
        if status.kind is Kind.ERROR and ports:
            await self._change(endpoint_id, ports=())
            raise AgentError(f"ports of endpoint {endpoint_id} could not be published: {status.error}")
        return endpoint

    # --- ending

    async def disconnect(self, endpoint_id: int) -> None:
        """Take the interface away; the number and the address stay until `delete`."""
        endpoint = self.table.get(endpoint_id)
        if endpoint is None:
            return
        self._cancel_allocation(endpoint_id)
        if endpoint.labels:
            await self._allocator.release(Labels.parse(endpoint.labels))
        self._kernel.endpoint_removed(endpoint)
        await self._change(
            endpoint_id,
            connected=False,
            handed_over=False,
            identity=0,
            labels="",
            all_labels="",
            ports=(),
            container_id="",
        )
        await self._kernel.settled(endpoint_id)

    async def delete(self, endpoint_id: int) -> None:
        """Remove an endpoint and give its address back once the kernel has let go of it."""
        endpoint = self.table.get(endpoint_id)
        if endpoint is None:
            return
        if endpoint.connected:
            await self.disconnect(endpoint_id)
        self._source.delete(endpoint_id)
        await self._kernel.settled(endpoint_id)
        self._by_engine_id.pop(endpoint.engine_endpoint_id, None)
        self._restoring.discard(endpoint_id)
        self._history.pop(endpoint_id, None)
        await self._kernel.address_freed(endpoint.ipv4)
        self.pool.release(IPv4Address(endpoint.ipv4), _user(endpoint_id))
        metrics.IPAM_EVENTS.labels("release", "ipv4").inc()
        self._checkpoint.drop_endpoint(endpoint_id)

    async def stop(self) -> None:
        """End the background allocations; the endpoints stay as they are."""
        for endpoint_id in list(self._allocations):
            self._cancel_allocation(endpoint_id)

    # --- identity

    def _labels(self, name: str, container_labels: Mapping[str, str], network: str) -> tuple[Labels, Labels]:
        """Return (all labels, identity labels); a malformed label that would count refuses the endpoint."""
        given = {key: value for key, value in container_labels.items() if key != NETWORK_LABEL}
        try:
            selection = self._filter.select({**given, NETWORK_LABEL: network}, source=CONTAINER)
        except LabelError as error:
            raise EndpointRefused(
                f"container {shorten(name)} has a label that can not be part of an identity: {error}",
                hint="it stays denied; start it again without that label",
            ) from error
        if selection.unusable:
            logger.warning("container {}: labels {} ignored", shorten(name), ", ".join(selection.unusable))
        return selection.identity.union(selection.info), selection.identity

    def _start_allocation(self, endpoint_id: int, labels: Labels) -> asyncio.Task[None]:
        self._cancel_allocation(endpoint_id)
        task = asyncio.create_task(self._allocate(endpoint_id, labels), name=f"identity:{endpoint_id}")
        self._allocations[endpoint_id] = task
        return task

    def _cancel_allocation(self, endpoint_id: int) -> None:
        task = self._allocations.pop(endpoint_id, None)
        if task is not None:
            task.cancel()

    async def _allocate(self, endpoint_id: int, labels: Labels) -> None:
        backoff = Backoff(base=0.5, cap=30.0)
        while True:
            try:
                number = await self._allocator.allocate(labels)
                break
            except HoldfastError as error:
                self._note(endpoint_id, State.WAITING_FOR_IDENTITY, str(error), ok=False)
                logger.warning("endpoint {} waits for an identity: {}", endpoint_id, error)
                await asyncio.sleep(backoff.next())
        await self._identified(endpoint_id, number, labels)
        self._allocations.pop(endpoint_id, None)

    async def _identified(self, endpoint_id: int, number: int, labels: Labels) -> None:
        endpoint = await self._change(endpoint_id, identity=number, labels=labels.serialized)
        self._kernel.endpoint_identified(endpoint, labels)
        self._note(endpoint_id, State.REGENERATING, f"identity {number}")

    async def renumber(self, labels: Labels, number: int) -> None:
        """Move every endpoint of these labels to the number that etcd knows them by."""
        for _, endpoint in list(self.table.items()):
            if endpoint.labels == labels.serialized and endpoint.identity != number:
                logger.warning("endpoint {}: identity {} → {}", endpoint.id, endpoint.identity, number)
                await self._identified(endpoint.id, number, labels)

    # --- keeping

    def _take_id(self, wanted: int) -> int:
        if wanted:
            if not 0 < wanted <= ENDPOINT_ID_MAX or wanted in self.table:
                raise EndpointRefused(f"endpoint number {wanted} is taken or not in 1..{ENDPOINT_ID_MAX}")
            return wanted
        for _ in range(ENDPOINT_ID_MAX):
            self.last_id = self.last_id % ENDPOINT_ID_MAX + 1
            if self.last_id not in self.table:
                return self.last_id
        raise PoolExhausted("all 65535 endpoint numbers of this host are in use")

    def _index(self, endpoint: Endpoint) -> None:
        if endpoint.engine_endpoint_id:
            self._by_engine_id[endpoint.engine_endpoint_id] = endpoint.id

    async def _change(self, endpoint_id: int, **fields: object) -> Endpoint:
        endpoint = msgspec.structs.replace(self.get(endpoint_id), **fields)
        await self._store(endpoint)
        return endpoint

    async def _store(self, endpoint: Endpoint) -> None:
        # 50 µs into the page cache: cheaper here than by way of a thread.
        self._checkpoint.save_endpoint(endpoint)
        self._source.upsert(endpoint.id, endpoint)

    async def _expect_kernel(self, endpoint_id: int, what: str) -> None:
        status = await self._kernel.settled(endpoint_id)
        if status.kind is Kind.ERROR:
            self._note(endpoint_id, State.NOT_READY, status.error, ok=False)
            raise AgentError(f"{what} of endpoint {endpoint_id} could not be put in place: {status.error}")
        self._note(endpoint_id, State.READY, f"{what} in place")

    def _note(self, endpoint_id: int, state: State, message: str, *, ok: bool = True) -> None:
        lines = self._history.setdefault(endpoint_id, deque(maxlen=HISTORY))
        if not lines or lines[-1].message != message:
            lines.append(Event(time.time(), ok, state.value, message))


def _user(endpoint_id: int) -> str:
    return f"endpoint {endpoint_id}"
