# SPDX-License-Identifier: Apache-2.0
"""Instructions that a packet costs, path by path, for both address families.

instructions_local_established_ipv4, …_ipv6, and so for each of PATHS
    BPF instructions executed from the program that meets the packet to its verdict, tail calls included.
    Beside each, as a comment: calls of helpers, and how many of these look up or update a map.

Nothing here is estimated: an interpreter (bench/ebpf.py) runs the very instructions that the kernel was
given, on the same maps, and is believed because the kernel runs the same frame before it, on the same state
of the maps.  The verdict, the packet, its mark, its control block and every map must be the same afterwards.

An instruction is one of the loaded program; ld_imm64 counts as one.  A branch that constants decide is not
counted where the verifier removes it; loading its operands is.  A call of a helper counts as one, whatever
the kernel does for it.  Neither is what the kernel makes of an instruction: an access to the context becomes
one to three, and two to five stand beside the call of a lookup that it writes out.

Run: python -m bench.instructions [--where]; the latter shows which files of bpf/ they come from.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from bench import harness
from bench.ebpf import Machine, Outcome
from bench.ebpf_helpers import MAP_LOOKUP, MAP_UPDATE
from bench.ebpf_image import Image, Recorder, program_id
from datapath import testrun
from datapath.constants import DatapathOptions, netdev_constants
from datapath.handle import MapHandle
from datapath.loader import NETDEV_OBJECTS, Template
from datapath.records import IpcacheEntry, LxcEntry
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support.bpflab import CATALOGUE, EGRESS, HOST, INGRESS, VM_IDENTITY, WORLD, Lab, identity, template
from tests.support.families import NETS, Net
from tests.support.frames import (
    ACK,
    SYN,
    TCP,
    UDP,
    arp_request,
    echo,
    fragments,
    solicitation,
    tcp,
    udp_datagram,
)

WRITTEN = ("cilium_ct", "cilium_ipv", "cilium_metrics")  # how maps begin that programs write to
CLIENT, ANOTHER = 40_000, 41_000  # source ports: of every flow, and of one that is new
ECHO_ID = 7
NO_MAC = "00:00:00:00:00:00"
NANOSECONDS = 1_000_000_000
HOUR = 3600
# No flow ends while paths are counted, and no packet is reported because the last one was long ago.
OPTIONS = DatapathOptions(report_interval=HOUR, timeout_any=HOUR, timeout_tcp_syn=HOUR)


@dataclass(frozen=True)
class PacketPath:
    """A packet and where it comes in: a program, and whose (0: the host's device)."""

    name: str
    endpoint: int
    program: str
    frame: Callable[[Net], bytes]
    verdict: int


def sent(name: str, endpoint: int, frame: Callable[[Net], bytes], verdict: int = ACT_REDIRECT) -> PacketPath:
    """A packet that an endpoint sends."""
    return PacketPath(name, endpoint, "from_endpoint", frame, verdict)


def received(name: str, frame: Callable[[Net], bytes], verdict: int = ACT_REDIRECT) -> PacketPath:
    """A packet that comes in by the host's device."""
    return PacketPath(name, 0, "from_netdev", frame, verdict)


def delivered(name: str, frame: Callable[[Net], bytes]) -> PacketPath:
    """A packet that the host's stack sends to endpoint 1."""
    return PacketPath(name, 1, "to_endpoint", frame, ACT_OK)


def datagram(net: Net) -> tuple[bytes, bytes]:
    return fragments(net.a, net.b, UDP, udp_datagram(CLIENT, 53, bytes(40)))


def question(net: Net) -> bytes:
    """Who is the gateway?"""
    return arp_request(net.gateway) if net.family == 4 else solicitation(net.gateway)


PATHS = (
    sent("instructions_local_established", 1, lambda net: tcp(net.a, net.b, CLIENT, 80, ACK)),
    sent("instructions_local_reply", 2, lambda net: tcp(net.b, net.a, 80, CLIENT, ACK)),
    sent("instructions_local_new_flow", 1, lambda net: tcp(net.a, net.b, ANOTHER, 80, SYN)),
    sent("instructions_egress_established", 1, lambda net: tcp(net.a, net.outside, CLIENT, 443, ACK), ACT_OK),
    received("instructions_netdev_established", lambda net: tcp(net.vm, net.a, CLIENT, 80, ACK)),
    received("instructions_netdev_reply", lambda net: tcp(net.outside, net.a, 443, CLIENT, ACK)),
    received("instructions_netdev_for_host", lambda net: tcp(net.vm, net.node, CLIENT, 22, ACK), ACT_OK),
    delivered("instructions_stack_established", lambda net: tcp(net.node, net.a, CLIENT, 80, ACK)),
    sent("instructions_deny_egress", 1, lambda net: tcp(net.a, net.b, ANOTHER, 81, SYN), ACT_SHOT),
    sent("instructions_deny_ingress", 1, lambda net: tcp(net.a, net.b, ANOTHER, 82, SYN), ACT_SHOT),
    sent("instructions_echo", 1, lambda net: echo(net.a, net.b, ECHO_ID)),
    sent("instructions_later_fragment", 1, lambda net: datagram(net)[1]),
    sent("instructions_neighbour", 1, question),
)


class RecordedLab(Lab):
    """A lab whose programs the interpreter knows as well."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack, OPTIONS, CATALOGUE)
        self.images: dict[int, Image] = {}
        self._endpoint = {family: self._recorder(each) for family, each in self._endpoint.items()}
        for family, name in NETDEV_OBJECTS.items():
            programs = self._recorder(template(name)).load(netdev_constants(OPTIONS), self.fds)
            self._netdev[family] = stack.enter_context(programs)

    def _recorder(self, one: Template) -> Recorder:
        return Recorder(one.elf, one.name, self.images, self._stack)

    def program(self, path: PacketPath, family: int) -> int:
        """Return the descriptor of the program that meets a path's packet."""
        programs = self.programs_of(family)[path.endpoint] if path.endpoint else self._netdev[family]
        return programs[path.program]

    def written(self) -> Iterator[MapHandle]:
        """Yield every map that programs write to."""
        yield from (MapHandle(name, fd) for name, fd in self.fds.items() if name.startswith(WRITTEN))
        yield from (policy.handle for policy in self.policies.values())


State = dict[str, dict[bytes, bytes]]


def state(host: RecordedLab) -> State:
    """Return all that programs write to."""
    return {handle.name: dict(handle.items()) for handle in host.written()}


def restore(host: RecordedLab, before: State) -> None:
    for handle in host.written():
        wanted = before[handle.name]
        handle.delete_many(list(dict(handle.items()).keys() - wanted.keys()))
        handle.update_many(list(wanted), list(wanted.values()))


def visible(host: RecordedLab) -> dict[str, Any]:
    """Return what programs write to as everybody reads it: counters of all CPUs together."""
    return state(host) | {"cilium_metrics": dict(host.metrics.items())}


def compared(host: RecordedLab, program: int, frame: bytes) -> Outcome:
    """Run a frame in the kernel and in the interpreter, each on the maps as they are, and leave them so.

    The interpreter's clock is the second that the kernel's run wrote down.  AssertionError says what differs.
    """
    before = state(host)
    try:
        real = testrun.run(program, frame)
        after = visible(host)
        restore(host, before)
        image = host.images[program_id(program)]
        ours = Machine(host.images, real.cb[1] * NANOSECONDS).run(image, frame)
        found, wanted = ((each.verdict, each.packet, each.mark, each.cb) for each in (ours, real))
        assert found == wanted, f"{image.name}: the kernel has {wanted}, the interpreter {found}"
        assert visible(host) == after, f"{image.name}: the interpreter leaves other maps than the kernel"
    finally:
        restore(host, before)
    return ours


def run(host: RecordedLab, path: PacketPath, net: Net) -> Outcome:
    """Run a path's packet; it must go the path's way."""
    outcome = compared(host, host.program(path, net.family), path.frame(net))
    assert outcome.verdict == path.verdict, f"{path.name}: verdict {outcome.verdict}, not {path.verdict}"
    return outcome


def write_policy(host: Lab, net: Net) -> None:
    for number, direction, remote, port, protocol in (
        (1, EGRESS, identity(2), 80, TCP),
        (1, EGRESS, identity(2), 82, TCP),
        (1, EGRESS, identity(2), 53, UDP),
        (1, EGRESS, identity(2), net.echo, net.icmp),
        (1, EGRESS, WORLD, 443, TCP),
        (1, INGRESS, VM_IDENTITY, 80, TCP),
        (1, INGRESS, HOST, 80, TCP),
        (2, INGRESS, identity(1), 80, TCP),
        (2, INGRESS, identity(1), 53, UDP),
        (2, INGRESS, identity(1), net.echo, net.icmp),
    ):
        host.allow(number, direction, remote, port, protocol)


def open_flows(host: Lab, net: Net) -> None:
    """Let the kernel see every connection until it is established, and a denied packet for each end."""
    for there, back in ((SYN, SYN | ACK), (ACK, ACK)):
        host.send(1, tcp(net.a, net.b, CLIENT, 80, there))
        host.send(2, tcp(net.b, net.a, 80, CLIENT, back))
        host.send(1, tcp(net.a, net.outside, CLIENT, 443, there))
        host.receive(tcp(net.outside, net.a, 443, CLIENT, back))
        host.receive(tcp(net.vm, net.a, CLIENT, 80, there))
        host.send(1, tcp(net.a, net.vm, 80, CLIENT, back))
        host.deliver(1, tcp(net.node, net.a, CLIENT, 80, there))
        host.send(1, tcp(net.a, net.node, 80, CLIENT, back))
    for frame in (*datagram(net), tcp(net.a, net.b, CLIENT, 81), tcp(net.a, net.b, CLIENT, 82)):
        host.send(1, frame)
    host.send(1, echo(net.a, net.b, ECHO_ID))
    host.send(2, echo(net.b, net.a, ECHO_ID, reply=True))


@contextmanager
def prepared() -> Iterator[RecordedLab]:
    """Yield endpoints 1 and 2, a VM and the host's address, policy by identity and port, flows opened."""
    with ExitStack() as stack:
        host = RecordedLab(stack)
        for number in (1, 2):
            host.add_endpoint(number)
        for net in NETS:
            host.ipcache.upsert(
                [(net.alone(net.vm), IpcacheEntry(VM_IDENTITY)), (net.alone(net.node), IpcacheEntry(HOST))]
            )
            host.lxc.upsert([(net.node, LxcEntry(0, 0, 1, NO_MAC, NO_MAC))])
            write_policy(host, net)
            open_flows(host, net)
        yield host


def places(outcome: Outcome) -> Counter[str]:
    """Return instructions by file of the source."""
    found: Counter[str] = Counter()
    for (image, at), times in outcome.executed.items():
        if at not in image.free:
            found[image.places.get(at, ("?", 0))[0]] += times
    return found


def show(name: str, outcome: Outcome) -> None:
    calls = outcome.helpers
    harness.emit(name, outcome.instructions, "instructions", 1)
    harness.note(
        f"{name}: {calls.total()} calls of helpers, of these"
        f" {calls[MAP_LOOKUP]} lookups, {calls[MAP_UPDATE]} updates"
    )
    if "--where" in sys.argv:
        harness.note("  " + ", ".join(f"{file} {count}" for file, count in places(outcome).most_common()))


def main() -> None:
    """Print the figures."""
    with prepared() as host:
        for path in PATHS:
            for net in NETS:
                show(f"{path.name}_ipv{net.family}", run(host, path, net))


if __name__ == "__main__":
    main()
