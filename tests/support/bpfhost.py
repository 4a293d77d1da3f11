# SPDX-License-Identifier: Apache-2.0
"""A host in a namespace with real devices: endpoints behind veths, and a machine ("VM") behind its NIC.

    endpoint n   10.0.0.n in a namespace of its own, host side lxc<n>
    host         10.9.0.1 on nic, forwards, masquerades what endpoints open
    VM           10.9.0.5, identity 777, reaches the endpoints through the host

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
from ipaddress import IPv4Address
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
from tests.support.bpflab import CATALOGUE, HOST, address, identity, template
from tests.support.netns import Netns, inside_new_netns, new_netns
from tests.support.require import require_root, require_tools

HOST_ADDRESS, VM_ADDRESS, VM_IDENTITY = "10.9.0.1", "10.9.0.5", 777
POOL, GATEWAY = "10.0.0.0/24", "169.254.1.1"
_NFT = f"""
table ip pool {{
  chain post {{
    type nat hook postrouting priority srcnat;
    ip saddr {POOL} ip daddr != {POOL} meta mark & 0x00080000 == 0 masquerade
  }}
}}
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
        constants = EndpointConstants(
            number, identity(number), ifindex, IPv4Address(address(number)), host_mac,
            options=options or DatapathOptions(),
        )  # fmt: skip
        maps = self.fds | {POLICY_MAP: self.policy(number).fd}

        async def attach() -> None:
            async with Netlink() as netlink:
                call_policy = {4: self.fds["cilium_call_policy"]}
                await attach_endpoint(Attacher(netlink), ifindex, number, {4: programs}, call_policy)

        with template(ENDPOINT_OBJECTS[4]).load(constants, maps) as programs:
            asyncio.run(attach())

    def netdev(self, ifindex: int) -> None:
        """Put the program on a device of the host in force."""

        async def attach() -> None:
            async with Netlink() as netlink:
                await Attacher(netlink).attach(ifindex, Hook.INGRESS, programs["from_netdev"], "from_netdev")

        with template(NETDEV_OBJECTS[4]).load(netdev_constants(DatapathOptions()), self.fds) as programs:
            asyncio.run(attach())


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
        self.vm = stack.enter_context(new_netns())
        for name in ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"):
            netns.run("sysctl", "-qw", name)
        self._add_vm()

    def _add_vm(self) -> None:
        self._pair("nic", self.vm)
        self.netns.run("ip", "addr", "add", f"{HOST_ADDRESS}/24", "dev", "nic")
        self.vm.run("ip", "addr", "add", f"{VM_ADDRESS}/24", "dev", "eth0")
        self.vm.run("ip", "route", "add", POOL, "via", HOST_ADDRESS)
        self.ipcache.upsert(
            [(f"{VM_ADDRESS}/32", IpcacheEntry(VM_IDENTITY)), (f"{HOST_ADDRESS}/32", IpcacheEntry(HOST))]
        )
        self.lxc.upsert([(HOST_ADDRESS, LxcEntry(0, 0, 1, "00:00:00:00:00:00", "00:00:00:00:00:00"))])
        self.loader.netdev(_link(self.netns, "nic")[0])
        subprocess.run(["nft", "-f", "-"], input=_NFT, text=True, check=True, timeout=10)

    def _pair(self, name: str, other: Netns) -> None:
        peer = ("peer", "name", "eth0", "netns", str(other.path))
        self.netns.run("ip", "link", "add", name, "type", "veth", *peer)
        self.netns.run("ip", "link", "set", name, "up")
        other.run("ip", "link", "set", "eth0", "up")
        self.netns.run("sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")

    def add_endpoint(self, number: int, *, load: bool = True) -> Netns:
        """Make an endpoint with an empty policy."""
        inside, name = self._stack.enter_context(new_netns()), f"lxc{number}"
        self._pair(name, inside)
        inside.run("ip", "addr", "add", f"{address(number)}/32", "dev", "eth0")
        inside.run("ip", "route", "add", GATEWAY, "dev", "eth0", "scope", "link")
        inside.run("ip", "route", "add", "default", "via", GATEWAY)
        ifindex, host_mac = _link(self.netns, name)
        mac = _link(inside, "eth0")[1]
        self.netns.run("ip", "route", "add", address(number), "dev", name)
        self.netns.run(
            *("ip", "neigh", "add", address(number), "lladdr", mac, "dev", name, "nud", "permanent")
        )
        self.lxc.upsert([(address(number), LxcEntry(ifindex, number, 0, mac, host_mac))])
        self.ipcache.upsert([(f"{address(number)}/32", IpcacheEntry(identity(number)))])
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
        """All IPv4 drops so far: (reason, direction) → packets.  Namespaces send IPv6 by themselves."""
        return {
            (k.reason, k.direction): v.packets for k, v in self.metrics.items() if k.reason not in (0, 139)
        }


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
