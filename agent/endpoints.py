# SPDX-License-Identifier: Apache-2.0
"""The endpoint manager: makes, identifies and removes endpoints.

It owns the table of endpoints, the address pool and the checkpoint's endpoint files.  It writes desired
state only; reconcilers put it into the kernel, and a call that promises something about the kernel waits
for them (`Kernel`).  A start:

    create      number, address, MACs         checkpointed before the engine hears the address
                interface, programs, empty policy map are begun: everything is denied (identity init)
    connect     waits for them; the engine makes its sandbox meanwhile
    join        from here on the other side may be in the container
    identify    labels → identity → policy map → ip→identity entry, all in the kernel on return

and an end, in the opposite order, so that an address never stands for nobody while packets still flow:

    disconnect  interface and programs go; then the ip→identity entry, the policy, the identity
    delete      the address's connections are forgotten; then its number and address are free again

Each record is changed without a pause in between, so callers never see half of a change; the ends, which
wait for the kernel, are queued one behind the other and go on when their caller gives up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import IPv4Address

from loguru import logger

from agent.checkpoint import Checkpoint
from agent.endpoint import Endpoint, Port, State, macs_of
from agent.endpoint_store import EndpointStore
from agent.errors import AddressTaken, AgentError, EndpointNotFound, EndpointRefused
from agent.history import Event, Histories, state_of
from agent.identity_uses import Allocator, IdentityUses
from agent.kernel import Kernel
from agent.labels import container_labels
from agent.pool import Pool
from core import metrics
from core.errors import HoldfastError, shorten
from core.reconciler import Kind, Status
from core.table import Table
from datapath.devices import host_name, temporary_name
from identity.filter import LabelFilter
from identity.labels import Labels

# How long a driver call waits for etcd before the container starts denied (the engine's patience is 30 s).
IDENTITY_PATIENCE_S = 8.0


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
        self.store = EndpointStore(table, checkpoint)
        self._filter = label_filter
        self._kernel = kernel
        self._uses = IdentityUses(allocator, self)
        self._histories = Histories()
        self._endings: dict[int, asyncio.Task[None]] = {}
        self._restoring: set[int] = set()
        # Seconds for which a start waits for its identity; afterwards the container starts denied.
        self.identity_patience = IDENTITY_PATIENCE_S
        # Why no endpoint may be made, empty when one may: this node has no standing in the cluster.
        self.refused_because: Callable[[], str] = lambda: ""
        # Whether this host has an interface of a name.
        self.has_interface: Callable[[str], bool] = lambda name: True

    # --- looking

    def get(self, endpoint_id: int) -> Endpoint:
        """Return an endpoint; EndpointNotFound for a number that this host does not have."""
        return self.store.get(endpoint_id)

    def by_engine_id(self, engine_id: str) -> Endpoint | None:
        return self.store.by_engine_id(engine_id)

    def history(self, endpoint_id: int) -> Sequence[Event]:
        return self._histories.of(endpoint_id)

    def state(self, endpoint: Endpoint, kernel: Status) -> State:
        """Return where an endpoint is in its life, from its record and the reconcilers' status."""
        return state_of(endpoint, kernel, restoring=endpoint.id in self._restoring)

    # --- starting

    def restore(self) -> int:
        """Take the endpoints of the checkpoint; return how many."""
        restored = list(self.store.restored())
        for endpoint in restored:
            self._restore(endpoint)
        return len(restored)

    def _restore(self, endpoint: Endpoint) -> None:
        if endpoint.ports and not self.has_interface(endpoint.interface):
            # Its container went with a power cut, or while nobody looked; its next life wants them at once.
            endpoint = self.store.change(endpoint.id, ports=())
        if endpoint.ipv6 and self.pool.network6 is None:
            # IPv6 was switched off meanwhile; what the container sends by it is dropped from now on.
            endpoint = self.store.change(endpoint.id, ipv6="")
        try:
            self.pool.reserve(IPv4Address(endpoint.ipv4), _user(endpoint.id))
        except AddressTaken as error:
            # The pool was changed by configuration: the endpoint keeps what it has until it stops.
            logger.warning("restored endpoint {} keeps {}: {}", endpoint.id, endpoint.ipv4, error)
        self._restoring.add(endpoint.id)
        self._histories.note(endpoint.id, State.RESTORING, "restored from the checkpoint")
        if endpoint.identity and not endpoint.connected:
            # The agent died while its interface was being taken away: that has to be ended.
            self._begin_end(endpoint.id, self._disconnect)
        elif endpoint.identity:
            labels = Labels.parse(endpoint.labels)
            self._kernel.endpoint_identified(endpoint, labels)
            self._uses.restore(endpoint.id, labels, endpoint.identity)

    def restored(self) -> None:
        """Everything restored has been compared with the kernel and the engine."""
        self._restoring.clear()
        self.store.complete()

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
        refused = self.refused_because()
        if refused:
            raise EndpointRefused(f"this node is not registered: {refused}")
        if endpoint_id in self._endings:
            raise EndpointRefused(f"endpoint {endpoint_id} is still being removed", hint="try again")
        number = self.store.free_id(endpoint_id)
        address = self._take_address(number, address)
        own_mac, node_mac = macs_of(address)
        endpoint = Endpoint(
            id=number,
            ipv4=str(address),
            ipv6=str(self.pool.ipv6_of(address) or ""),
            mac=mac or own_mac,
            node_mac=node_mac,
            interface=host_name(number),
            peer=temporary_name(number),
            network_id=network_id,
            engine_endpoint_id=engine_id,
            netns=netns,
            # Its interface is begun now and waited for in `connect`.
            connected=True,
        )
        try:
            self.store.add(endpoint)
        except OSError:
            self.pool.release(address, _user(number))
            raise
        metrics.IPAM_EVENTS.labels("allocate", "ipv4").inc()
        self._histories.note(number, State.CREATING, f"address {address}")
        return endpoint

    async def connect(self, endpoint_id: int) -> Endpoint:
        """Wait for the interface and its programs; on return all that it sends and receives is denied."""
        ending = self._endings.get(endpoint_id)
        if ending is not None:
            await asyncio.wait({ending})
        self.store.change(endpoint_id, connected=True)
        await self._expect_kernel(endpoint_id, "interface")
        return self._connected(endpoint_id)

    def join(self, endpoint_id: int, sandbox: str) -> Endpoint:
        """Note whose namespace the interface goes to.

        Not before `connect`: by this note the next life of the agent knows that the interface which it
        finds is this endpoint's, and perhaps in use already.
        """
        self._connected(endpoint_id)
        return self.store.change(endpoint_id, sandbox=sandbox)

    async def identify(
        self,
        endpoint_id: int,
        container_id: str,
        name: str,
        labels: Mapping[str, str],
        network: str,
    ) -> Endpoint:
        """Take a container's labels, allocate its identity and put its policy into the kernel."""
        self._connected(endpoint_id)
        # An interface that was not made (yet) can not have been handed over: Join may be under way.
        made = (await self._kernel.interface_settled(endpoint_id)).kind is Kind.DONE
        handed_over = self._connected(endpoint_id).handed_over or made
        self.store.change(
            endpoint_id, container_id=container_id, container_name=name, handed_over=handed_over
        )
        try:
            everything, relevant = container_labels(self._filter, name, labels, network)
        except EndpointRefused as error:
            self._histories.note(endpoint_id, State.WAITING_FOR_IDENTITY, str(error), ok=False)
            raise
        self.store.change(endpoint_id, all_labels=everything.serialized)
        return await self.set_labels(endpoint_id, relevant)

    async def handed_over(self, endpoint_id: int, name: str, labels: Labels) -> Endpoint:
        """Note that an endpoint of the API has its interface inside its namespace."""
        self._connected(endpoint_id)
        return self.store.change(
            endpoint_id, handed_over=True, container_name=name, all_labels=labels.serialized
        )

    async def set_labels(self, endpoint_id: int, relevant: Labels) -> Endpoint:
        """Give an endpoint the identity of these labels; waits for etcd a few seconds, then goes on alone."""
        endpoint = self._connected(endpoint_id)
        if not endpoint.identity or endpoint.labels != relevant.serialized:
            await self._wait_for_identity(endpoint_id, relevant)
        return await self.enforced(endpoint_id)

    async def enforced(self, endpoint_id: int) -> Endpoint:
        """Wait until an endpoint's identity and policy are in the kernel; AgentError if that failed."""
        await self._expect_kernel(endpoint_id, "policy")
        return self._connected(endpoint_id)

    async def _wait_for_identity(self, endpoint_id: int, labels: Labels) -> None:
        request = self._uses.request(endpoint_id, labels)
        done, _ = await asyncio.wait({request}, timeout=self.identity_patience)
        if not done:
            self._histories.note(
                endpoint_id, State.WAITING_FOR_IDENTITY, "etcd has not answered; still asking", ok=False
            )
            raise AgentError(
                f"endpoint {endpoint_id} ({shorten(labels.serialized)}) has no identity after "
                f"{self.identity_patience:g} s",
                hint="it is denied until etcd answers; see holdfast status",
            )
        if request.cancelled():
            raise EndpointNotFound(f"endpoint {endpoint_id} was removed, or got other labels, meanwhile")
        request.result()

    async def publish(self, endpoint_id: int, ports: tuple[Port, ...]) -> Endpoint:
        """Publish ports of an endpoint on the host, or none."""
        if self.get(endpoint_id).ports == ports:
            return self.get(endpoint_id)
        endpoint = self.store.change(endpoint_id, ports=ports)
        status = await self._kernel.published(each for _, each in self.table.items())
        if status.kind is Kind.ERROR and ports:
            self.store.change(endpoint_id, ports=())
            raise AgentError(f"ports of endpoint {endpoint_id} could not be published: {status.error}")
        return endpoint

    # --- ending

    async def disconnect(self, endpoint_id: int) -> None:
        """Take the interface away; the number and the address stay until `delete`.

        Raises AgentError while the kernel does not let go of it; everything else then stays as it is.
        """
        await self._end(endpoint_id, self._disconnect)

    async def delete(self, endpoint_id: int) -> None:
        """Remove an endpoint and give its address back once the kernel has let go of it, else AgentError."""
        await self._end(endpoint_id, self._delete)

    async def stop(self) -> None:
        """End what waits in the background; the endpoints stay as they are."""
        self._uses.stop()
        for ending in list(self._endings.values()):
            ending.cancel()

    async def _end(self, endpoint_id: int, step: Callable[[int], Awaitable[None]]) -> None:
        """Run `step` behind what ends the endpoint already; a caller that gives up does not stop it."""
        await asyncio.shield(self._begin_end(endpoint_id, step))

    def _begin_end(self, endpoint_id: int, step: Callable[[int], Awaitable[None]]) -> asyncio.Task[None]:
        before = self._endings.get(endpoint_id)

        async def in_turn() -> None:
            if before is not None:
                await asyncio.wait({before})
            await step(endpoint_id)

        task = asyncio.create_task(in_turn(), name=f"{step.__name__}:{endpoint_id}")
        self._endings[endpoint_id] = task
        task.add_done_callback(lambda done: self._ended(endpoint_id, done))
        return task

    def _ended(self, endpoint_id: int, task: asyncio.Task[None]) -> None:
        if self._endings.get(endpoint_id) is task:
            del self._endings[endpoint_id]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("endpoint {} could not be removed: {}", endpoint_id, error)

    async def _disconnect(self, endpoint_id: int) -> None:
        if self.store.find(endpoint_id) is None:
            return
        self._uses.cancel(endpoint_id)
        endpoint = self.store.change(endpoint_id, connected=False, handed_over=False, sandbox="", ports=())
        self._histories.note(endpoint_id, State.DISCONNECTING, "interface is being taken away")
        status = await self._kernel.interface_settled(endpoint_id)
        if status.kind is Kind.ERROR:
            self._histories.note(endpoint_id, State.NOT_READY, status.error, ok=False)
            raise AgentError(
                f"interface of endpoint {endpoint_id} could not be taken away: {status.error}",
                hint=f"address {endpoint.ipv4} stays reserved until it is; that is tried again",
            )
        self._kernel.endpoint_removed(endpoint)
        await self._uses.release(endpoint_id)
        endpoint = self.store.change(endpoint_id, identity=0, labels="", all_labels="", container_id="")
        await self._kernel.settled(endpoint)

    async def _delete(self, endpoint_id: int) -> None:
        await self._disconnect(endpoint_id)
        endpoint = self.store.find(endpoint_id)
        if endpoint is None:
            return
        await self._forget_connections(endpoint)
        self.store.unwant(endpoint_id)
        await self._kernel.settled(endpoint)
        self.store.forget(endpoint)
        self._restoring.discard(endpoint_id)
        self._histories.forget(endpoint_id)
        self.pool.release(IPv4Address(endpoint.ipv4), _user(endpoint_id))
        metrics.IPAM_EVENTS.labels("release", "ipv4").inc()

    async def _forget_connections(self, endpoint: Endpoint) -> None:
        try:
            for address in endpoint.addresses.values():
                await self._kernel.address_freed(address)
        except HoldfastError as error:
            # The address rests for as long as the pool can let it, longer than most connections.
            logger.error("connections of {} could not be forgotten: {}", endpoint.ipv4, error)

    # --- agent.identity_uses.Told

    def identity_known(self, endpoint_id: int, labels: Labels, number: int) -> None:
        """Enforce `number` for an endpoint from now on."""
        endpoint = self.store.change(endpoint_id, identity=number, labels=labels.serialized)
        self._kernel.endpoint_identified(endpoint, labels)
        self._histories.note(endpoint_id, State.REGENERATING, f"identity {number}")

    def identity_waits(self, endpoint_id: int, error: HoldfastError) -> None:
        self._histories.note(endpoint_id, State.WAITING_FOR_IDENTITY, str(error), ok=False)
        logger.warning("endpoint {} waits for an identity: {}", endpoint_id, error)

    def renumber(self, labels: Labels, number: int) -> None:
        """Move every endpoint of these labels to the number that etcd knows them by."""
        for _, endpoint in list(self.table.items()):
            moved = endpoint.identity != number and endpoint.labels == labels.serialized
            if moved and endpoint.connected:
                logger.warning("endpoint {}: identity {} → {}", endpoint.id, endpoint.identity, number)
                self.identity_known(endpoint.id, labels, number)

    # --- keeping

    def _take_address(self, endpoint_id: int, wanted: IPv4Address | None) -> IPv4Address:
        if wanted is None:
            return self.pool.allocate(_user(endpoint_id))
        self.pool.reserve(wanted, _user(endpoint_id))
        return wanted

    def _connected(self, endpoint_id: int) -> Endpoint:
        """Return an endpoint that is not on its way out."""
        endpoint = self.get(endpoint_id)
        if not endpoint.connected:
            raise EndpointNotFound(f"endpoint {endpoint_id} has no interface (any more)")
        return endpoint

    async def _expect_kernel(self, endpoint_id: int, what: str) -> None:
        status = await self._kernel.settled(self.get(endpoint_id))
        if status.kind is Kind.ERROR:
            self._histories.note(endpoint_id, State.NOT_READY, status.error, ok=False)
            raise AgentError(f"{what} of endpoint {endpoint_id} could not be put in place: {status.error}")
        identity = self.get(endpoint_id).identity
        state = State.READY if identity else State.WAITING_FOR_IDENTITY
        self._histories.note(endpoint_id, state, f"{what} in place")


def _user(endpoint_id: int) -> str:
    return f"endpoint {endpoint_id}"
