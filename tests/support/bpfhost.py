# SPDX-License-Identifier: Apache-2.0
"""A host in a namespace with real devices: endpoints behind veths, and a machine ("VM") behind its NIC.

    endpoint n   10.0.0.n and fd00::n in a namespace of its own, host side lxc<n>
    host         10.9.0.1 and fd09::1 on nic, forwards, masquerades what endpoints open
    VM           10.9.0.5 and fd09::5, identity 777, reaches the endpoints through the host
    beyond       10.77.0.1 and fd77::1, if a test wants it: behind the VM, over a link with a small MTU

Maps are pinned in a BPF file system of the test's own.  Run as a module (`python -m tests.support.bpfhost
ROOT NUMBER IFINDEX MAC`) it loads one endpoint's programs and dies by SIGKILL: what an agent leaves behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from datapath.attach import Attacher, Hook, attach_endpoint
from datapath.constants import DatapathOptions, EndpointConstants, netdev_constants
from datapath.handle import MapHandle
from datapath.loader import ENDPOINT_OBJECTS, NETDEV_OBJECTS, POLICY_MAP
from datapath.maps import IpcacheMap, LxcMap, MetricsMap, PolicyMap
from datapath.mapspec import MapCatalogue, open_or_create
from datapath.netlink import Netlink
from datapath.records import IpcacheEntry, LxcEntry, PolicyEntry, PolicyKey
from datapath.ring import EventRing
from tests.support.bpf import own_bpffs
from tests.support.bpflab import CATALOGUE, HOST, VM_IDENTITY, identity, template
from tests.support.families import NETS
from tests.support.netns import Netns, inside_new_netns, new_netns
from tests.support.require import require_root, require_tools

_MASQUERADE = """
table {word} pool {{
  chain post {{
    type nat hook postrouting priority srcnat;
    {word} saddr {pool} {word} daddr != {pool} meta mark & 0x00080000 == 0 masquerade
  }}
}}
"""
_FORWARDING = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
# What a stack says of itself whenever a device comes up: programs drop it, and a test would count that.
_QUIET = """
table ip6 quiet {
  chain out {
    type filter hook output priority filter;
    icmpv6 type { mld-listener-report, mld2-listener-report, nd-router-solicit } drop
  }
}
"""


class Loader:
    """Loads and attaches on maps pinned under `root`, in the namespace of the calling thread."""

    def __init__(self, stack: contextlib.ExitStack, root: Path, catalogue: MapCatalogue = CATALOGUE) -> None:
        self._stack, self._root, self._catalogue = stack, root, catalogue
        self.handles = {spec.name: self._opened(spec.name) for spec in catalogue.shared()}
        self.ring = stack.enter_context(EventRing.create(1 << 16))
        fds = {name: handle.fd for name, handle in self.handles.items()}
        self.fds = fds | self.ring.descriptors
        self.policies: dict[int, PolicyMap] = {}

    def _opened(self, name: str) -> MapHandle:
        spec = next(each for each in self._catalogue.shared() if each.name == name)
        handle = open_or_create(spec, self._root)
        self._stack.callback(handle.close)
        return handle

    def policy(self, number: int) -> PolicyMap:
        """Return the endpoint's policy map, opened or made."""
        if number not in self.policies:
            self.policies[number] = PolicyMap.of(number, self._catalogue, self._root)
            self._stack.callback(self.policies[number].close)
        return self.policies[number]

    def endpoint(
        self, number: int, ifindex: int, host_mac: str, options: DatapathOptions | None = None
    ) -> None:
        """Put an endpoint's programs in force, in the place of those it has."""
        maps = self.fds | {POLICY_MAP: self.policy(number).fd}
        call_policy = {4: self.fds["cilium_call_policy"], 6: self.fds["holdfast_call_policy6"]}

        async def attach() -> None:
            async with Netlink() as netlink:
                await attach_endpoint(Attacher(netlink), ifindex, number, programs, call_policy)

        with contextlib.ExitStack() as stack:
            programs = {}
            for net in NETS:
                constants = EndpointConstants(
                    number,
                    identity(number),
                    ifindex,
                    ip_address(net.endpoint(number)),
                    host_mac,
                    options=options or DatapathOptions(),
                )
                loaded = template(ENDPOINT_OBJECTS[net.family]).load(constants, maps)
                programs[net.family] = stack.enter_context(loaded)
            asyncio.run(attach())

    def netdev(self, ifindex: int) -> None:
        """Put the programs on a device of the host in force."""

        async def attach(program: int, family: int) -> None:
            async with Netlink() as netlink:
                await Attacher(netlink).attach(ifindex, Hook.INGRESS, program, "from_netdev", family=family)

        for family, name in NETDEV_OBJECTS.items():
            with template(name).load(netdev_constants(DatapathOptions()), self.fds) as programs:
                asyncio.run(attach(programs["from_netdev"], family))


class BpfHost:
    """The host; the calling thread stands in its namespace."""

    def __init__(self, stack: contextlib.ExitStack, netns: Netns, root: Path) -> None:
        self._stack, self.netns, self.root = stack, netns, root
        self.loader = Loader(stack, root)
        self.lxc = LxcMap(self.loader.handles["cilium_lxc"])
        self.ipcache = IpcacheMap(self.loader.handles["cilium_ipcache"])
        self.metrics = MetricsMap(self.loader.handles["cilium_metrics"])
        self.endpoints: dict[int, Netns] = {}
        self._devices: dict[int, tuple[int, str]] = {}
        _hush(self.netns)
        self.vm = self._machine()
        netns.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", *_FORWARDING)
        self._add_vm()

    def _machine(self) -> Netns:
        """Return a namespace whose stack only speaks when it has something to say."""
        made = self._stack.enter_context(new_netns())
        _hush(made)
        return made

    def _add_vm(self) -> None:
        _pair(self.netns, "nic", self.vm)
        nothing = "00:00:00:00:00:00"
        for net in NETS:
            self.netns.run("ip", "addr", "add", net.on_link(net.wire), "dev", "nic")
            self.vm.run("ip", "addr", "add", net.on_link(net.vm), "dev", "eth0")
            self.vm.run("ip", "route", "add", net.pool, "via", net.wire)
            known = ((net.vm, VM_IDENTITY), (net.wire, HOST))
            self.ipcache.upsert((net.alone(address), IpcacheEntry(number)) for address, number in known)
            self.lxc.upsert([(net.wire, LxcEntry(0, 0, 1, nothing, nothing))])
            self.netns.run("nft", _MASQUERADE.format(word="ip" if net.family == 4 else "ip6", pool=net.pool))
        self.loader.netdev(_link(self.netns, "nic")[0])

    def add_beyond(self, mtu: int) -> Netns:
        """Make a machine that the VM forwards to, over a link with a smaller MTU than all others here."""
        beyond = self._machine()
        self.vm.run("sysctl", "-qw", *_FORWARDING)
        _pair(self.vm, "far", beyond, mtu)
        for net in NETS:
            self.vm.run("ip", "addr", "add", net.on_link(net.beyond_router), "dev", "far")
            beyond.run("ip", "addr", "add", net.on_link(net.beyond), "dev", "eth0")
            beyond.run("ip", "route", "add", "default", "via", net.beyond_router)
            self.netns.run("ip", "route", "add", net.alone(net.beyond), "via", net.vm)
        return beyond

    def add_endpoint(self, number: int, *, load: bool = True) -> Netns:
        """Make an endpoint with an empty policy."""
        inside, name = self._machine(), f"lxc{number}"
        _pair(self.netns, name, inside)
        ifindex, host_mac = _link(self.netns, name)
        mac = _link(inside, "eth0")[1]
        for net in NETS:
            address = net.endpoint(number)
            inside.run("ip", "addr", "add", net.alone(address), "dev", "eth0")
            inside.run("ip", "route", "add", "default", "via", net.gateway, "dev", "eth0", "onlink")
            self.netns.run("ip", "route", "add", address, "dev", name)
            self.netns.run("ip", "neigh", "add", address, "lladdr", mac, "dev", name, "nud", "permanent")
            self.lxc.upsert([(address, LxcEntry(ifindex, number, 0, mac, host_mac))])
            self.ipcache.upsert([(net.alone(address), IpcacheEntry(identity(number)))])
        self._devices[number], self.endpoints[number] = (ifindex, host_mac), inside
        self.loader.policy(number)
        if load:
            self.load(number)
        return inside

    def load(self, number: int, options: DatapathOptions | None = None) -> None:
        """Put the endpoint's programs in force, in the place of those it has."""
        self.loader.endpoint(number, *self._devices[number], options)

    def load_and_die(self, number: int) -> None:
        """The same by a process that is killed right after."""
        ifindex, mac = self._devices[number]
        argv = [sys.executable, "-m", "tests.support.bpfhost", str(self.root), str(number), str(ifindex), mac]
        repository = Path(__file__).parents[2]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd=repository)
        assert done.returncode == -signal.SIGKILL, done.stderr

    def allow(self, number: int, direction: int, remote: int = 0, port: int = 0, protocol: int = 0) -> None:
        """Write one policy entry; without more than a direction it allows everything."""
        self.loader.policy(number).upsert(
            [(PolicyKey(remote, port, protocol, direction), PolicyEntry(False, 0))]
        )

    def forbid(self, number: int) -> None:
        """Empty an endpoint's policy."""
        self.loader.policy(number).sync([])

    def dropped(self) -> dict[tuple[int, int], int]:
        """All drops so far: (reason, direction) → packets."""
        return {(k.reason, k.direction): v.packets for k, v in self.metrics.items() if k.reason}


def _hush(netns: Netns) -> None:
    """Keep a stack from talking of its devices and from asking whether its addresses are taken."""
    netns.run("nft", _QUIET)
    netns.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.default.dad_transmits=0")


def _pair(netns: Netns, name: str, other: Netns, mtu: int = 1500) -> None:
    """Join two namespaces by a veth pair: `name` here, eth0 there, without any address."""
    size, peer = ("mtu", str(mtu)), ("peer", "name", "eth0", "netns", str(other.path))
    netns.run("ip", "link", "add", name, *size, "type", "veth", *peer, *size)
    for each, device in ((netns, name), (other, "eth0")):
        each.run("ip", "link", "set", device, "up")
    netns.run("sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")


def _link(netns: Netns, name: str) -> tuple[int, str]:
    """Return a device's number and MAC address."""
    (link,) = json.loads(netns.run("ip", "-j", "link", "show", name))
    return int(link["ifindex"]), str(link["address"])


@contextlib.contextmanager
def bpf_host(directory: Path, *endpoints: int) -> Iterator[BpfHost]:
    """Yield a host with `endpoints`; the calling thread moves into its namespace meanwhile."""
    require_root()
    require_tools("ip", "nft", "nsenter", "sysctl")
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(own_bpffs(directory))
        netns = stack.enter_context(inside_new_netns())
        host = BpfHost(stack, netns, root)
        for number in endpoints:
            host.add_endpoint(number)
        yield host


def _main(root: str, number: str, ifindex: str, mac: str) -> None:
    with contextlib.ExitStack() as stack:
        Loader(stack, Path(root)).endpoint(int(number), int(ifindex), mac)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _main(*sys.argv[1:])
