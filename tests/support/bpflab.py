# SPDX-License-Identifier: Apache-2.0
"""A host's data path without a host: maps of its own, unpinned, and programs that test runs feed.

Endpoints are 10.0.0.<id> and fd00::<id> with identity 300 + <id>; the world is everything else.  A test
writes policy entries, sends frames, and asks what became of them: the verdict, counters, conntrack, events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from datapath import testrun
from datapath.attach import install_policy
from datapath.constants import Aggregation, DatapathOptions, EndpointConstants, netdev_constants
from datapath.events import Event
from datapath.handle import MapHandle
from datapath.loader import ENDPOINT_OBJECTS, NETDEV_OBJECTS, POLICY_MAP, Programs, Template
from datapath.maps import (
    CtMap,
    EventsLost,
    IpcacheMap,
    LxcMap,
    MetricsMap,
    MonitorFlag,
    PolicyMap,
    RawPolicyEntry,
    RawPolicyKey,
)
from datapath.mapspec import MapCatalogue, create
from datapath.records import (
    CtEntry,
    CtKey,
    IpcacheEntry,
    LxcEntry,
    MetricsKey,
    MetricsValue,
    PolicyCounters,
    PolicyEntry,
    PolicyKey,
)
from datapath.ring import EventRing
from tests.support import frames
from tests.support.events import decode_many
from tests.support.families import NETS
from tests.support.require import require, require_root

OBJECTS = Path(__file__).parents[2] / "bpf" / "build"
HOST, WORLD, VM_IDENTITY = 1, 2, 777
INGRESS, EGRESS = 0, 1  # policy keys
LOOPBACK = 1  # ifindex: a device that every namespace has
CONTAINER_MAC, HOST_MAC = "02:00:00:00:00:c{:x}", "02:00:00:00:00:a{:x}"
CATALOGUE = MapCatalogue(
    ct_tcp_max=4096, ct_any_max=4096, policy_max=1024, fragments_max=1024, enable_ipv6=True
)


def template(name: str) -> Template:
    """Return a compiled object; the test is skipped without."""
    require_root()
    require((OBJECTS / name).exists(), f"needs bpf/build/{name}: make -C bpf")
    return Template.read(OBJECTS / name)


def address(endpoint_id: int, family: int = 4) -> str:
    return next(net for net in NETS if net.family == family).endpoint(endpoint_id)


def identity(endpoint_id: int) -> int:
    return 300 + endpoint_id


class Lab:
    """Maps, endpoints and the host's device; made by `lab`."""

    def __init__(
        self, stack: contextlib.ExitStack, options: DatapathOptions, catalogue: MapCatalogue = CATALOGUE
    ) -> None:
        self._stack = stack
        self._catalogue = catalogue
        self._options = options
        self.families = catalogue.families
        self._endpoint = {family: template(ENDPOINT_OBJECTS[family]) for family in self.families}
        handles = {spec.name: self._made(create(spec)) for spec in catalogue.shared()}
        self.lxc = LxcMap(handles["cilium_lxc"])
        self.ipcache = IpcacheMap(handles["cilium_ipcache"])
        self.metrics = MetricsMap(handles["cilium_metrics"])
        self.ct = {name: CtMap(handle) for name, handle in handles.items() if name.startswith("cilium_ct")}
        self.monitor = MonitorFlag(handles["holdfast_monitor"])
        self.lost = EventsLost(handles["holdfast_events_lost"])
        self.call_policy = {4: handles["cilium_call_policy"].fd}
        if 6 in self.families:
            self.call_policy[6] = handles["holdfast_call_policy6"].fd
        self.ring = stack.enter_context(EventRing.create(1 << 16))
        self.fds = {name: handle.fd for name, handle in handles.items()} | self.ring.descriptors
        self.policies: dict[int, PolicyMap] = {}
        self.programs: dict[int, Programs] = {}
        self.programs6: dict[int, Programs] = {}
        self._policy_handles: dict[int, MapHandle] = {}
        self._netdev: dict[int, Programs] = {}

    def ct_of(self, key: CtKey) -> CtMap:
        """Return the conntrack map that an entry belongs to."""
        family = 6 if ":" in key.source else 4
        return self.ct[f"cilium_ct{'' if key.protocol == frames.TCP else '_any'}{family}_global"]

    def _made(self, handle: MapHandle) -> MapHandle:
        self._stack.callback(handle.close)
        return handle

    def add_endpoint(self, number: int, **options: object) -> None:
        """Load programs for endpoint `number`, with an empty policy: nothing may pass."""
        handle = self._made(create(self._catalogue.policy(number)))
        self._policy_handles[number] = handle
        self.policies[number] = PolicyMap(handle)
        mac, host_mac = CONTAINER_MAC.format(number), HOST_MAC.format(number)
        addresses = [address(number, family) for family in self.families]
        self.lxc.upsert((each, LxcEntry(LOOPBACK, number, 0, mac, host_mac)) for each in addresses)
        self.ipcache.upsert((each, IpcacheEntry(identity(number))) for each in addresses)
        self.load(number, replace(self._options, **options))  # type: ignore[arg-type]

    def load(self, number: int, options: DatapathOptions | None = None) -> None:
        """Load the endpoint's programs and put its ingress policy in force."""
        maps = self.fds | {POLICY_MAP: self._policy_handles[number].fd}
        for family in self.families:
            constants = EndpointConstants(
                endpoint_id=number,
                identity=identity(number),
                ifindex=LOOPBACK,
                address=ip_address(address(number, family)),
                host_mac=HOST_MAC.format(number),
                options=options or self._options,
            )
            programs = self._stack.enter_context(self._endpoint[family].load(constants, maps))
            self.programs_of(family)[number] = programs
            install_policy(self.call_policy[family], number, programs["policy_ingress"])

    def _meeting(self, number: int, frame: bytes) -> Programs:
        """Return the programs that meet a frame: those for IPv4 also whatever has none of its own."""
        return self.programs_of(self._family(frame))[number]

    def _family(self, frame: bytes) -> int:
        return 6 if 6 in self.families and frame[12:14] == b"\x86\xdd" else 4

    def programs_of(self, family: int) -> dict[int, Programs]:
        """Return the endpoints' programs for 4 or 6 by endpoint."""
        return self.programs if family == 4 else self.programs6

    def allow(
        self,
        number: int,
        direction: int,
        remote: int = 0,
        port: int = 0,
        protocol: int = 0,
        *,
        deny: bool = False,
    ) -> PolicyKey:
        """Write one policy entry; without more than a direction it allows everything."""
        key = PolicyKey(remote, port, protocol, direction)
        self.policies[number].upsert([(key, PolicyEntry(deny, 0))])
        return key

    def allow_all(self, *endpoints: int) -> None:
        """Let endpoints speak with everybody."""
        for number in endpoints:
            self.allow(number, INGRESS)
            self.allow(number, EGRESS)

    def replace_policy(self, number: int, entries: Iterable[tuple[RawPolicyKey, RawPolicyEntry]]) -> None:
        """Make a policy consist of these entries, at once: no program runs meanwhile."""
        policy = self.policies[number]
        policy.delete(list(policy.keys()))
        assert not policy.upsert(entries)

    def send(self, number: int, frame: bytes, **context: int) -> testrun.Outcome:
        """Hand a frame to the program that meets what endpoint `number` sends."""
        programs = self._meeting(number, frame)
        return testrun.run(programs["from_endpoint"], frame, **context)  # type: ignore[arg-type]

    def deliver(self, number: int, frame: bytes, *, arrived_by: int = 0) -> testrun.Outcome:
        """Hand a frame to the program that meets what the host's stack sends to endpoint `number`.

        `arrived_by` is the device that the stack got it from; every endpoint's is LOOPBACK here.
        """
        programs = self._meeting(number, frame)
        return testrun.run(programs["to_endpoint"], frame, ifindex=arrived_by)

    def receive(self, frame: bytes) -> testrun.Outcome:
        """Hand a frame to the program on the host's device."""
        family = self._family(frame)
        if family not in self._netdev:
            programs = template(NETDEV_OBJECTS[family]).load(netdev_constants(self._options), self.fds)
            self._netdev[family] = self._stack.enter_context(programs)
        return testrun.run(self._netdev[family]["from_netdev"], frame)

    def counted(self, reason: int, direction: int) -> MetricsValue:
        """What cilium_metrics says of a reason (0: forwarded) and direction (1 ingress, 2 egress)."""
        return self.metrics.get(MetricsKey(reason, direction)) or MetricsValue(0, 0)

    def dropped(self) -> dict[tuple[int, int], int]:
        """All drops so far: (reason, direction) → packets."""
        return {(k.reason, k.direction): v.packets for k, v in self.metrics.items() if k.reason}

    def connections(self) -> dict[CtKey, CtEntry]:
        """Return every entry of every conntrack map."""
        return {key: entry for each in self.ct.values() for key, entry in each.items()}

    def hits(self, number: int) -> dict[PolicyKey, PolicyCounters]:
        return {one.key: one for one in self.policies[number].dump()}

    def events(self) -> list[Event]:
        """Take all events out of the ring."""
        events, refused = decode_many(self.ring.read())
        assert not refused
        return events


@contextlib.contextmanager
def lab(
    *endpoints: int,
    aggregation: Aggregation = Aggregation.MEDIUM,
    options: DatapathOptions | None = None,
    catalogue: MapCatalogue = CATALOGUE,
) -> Iterator[Lab]:
    """Yield a data path with `endpoints`, each without any policy."""
    with contextlib.ExitStack() as stack:
        made = Lab(stack, options or DatapathOptions(aggregation=aggregation), catalogue)
        for number in endpoints:
            made.add_endpoint(number)
        yield made


@contextlib.contextmanager
def lab_with_neighbours() -> Iterator[Lab]:
    """Yield endpoints 1 and 2 without any policy; of each family a known VM and the host's own address."""
    with lab(1, 2) as made:
        for net in NETS:
            made.ipcache.upsert(
                [
                    (net.alone(net.vm), IpcacheEntry(VM_IDENTITY)),
                    (net.alone(net.node), IpcacheEntry(HOST)),
                ]
            )
            made.lxc.upsert([(net.node, LxcEntry(0, 0, 1, "00:00:00:00:00:00", "00:00:00:00:00:00"))])
        yield made
