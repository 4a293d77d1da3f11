# SPDX-License-Identifier: Apache-2.0
"""Attaches programs: tc filters (clsact, cls_bpf, direct action) and ingress policies for tail calls.

Responsible for: that a live endpoint always has a program.  A filter of ours has a fixed priority and
handle of its own, so attaching again replaces it in one step of the kernel, packets meet the old program
or the new one; an element of cilium_call_policy is swapped likewise.  Filters of others are never
touched.  The kernel keeps what is attached: descriptors may be closed and the process may end.

The programs for IPv6 have a filter for that protocol before the other, which takes every protocol: so
without them IPv6 meets a program too, one that knows only IPv4 and drops it.

Called by: the agent.  `netlink` must have been opened in the device's namespace.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from datapath import syscall
from datapath.errors import AttachError, KeyAbsent
from datapath.loader import Programs
from datapath.netlink import Message, Netlink, errno_of

HANDLE = 0x486F  # ours alone: "Ho"; others number from 1
NAME_PREFIX = "holdfast:"  # of filter names, for people and for `attached`
_CALL_POLICY = "call_policy"


class Place(NamedTuple):
    """Where the filter of an address family stands; `protocol` is an Ethernet type, 3 for all of them."""

    priority: int
    protocol: int


# First of all: a filter before ours could pass packets by.
PLACES = {6: Place(1, 0x86DD), 4: Place(2, 0x0003)}


class Hook(enum.Enum):
    """The two hooks of clsact on a device, with the kernel's parent handles."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


@dataclass(frozen=True)
class Filter:
    """One bpf filter on a device."""

    ifindex: int
    hook: Hook
    place: Place
    handle: int
    name: str

    @property
    def ours(self) -> bool:
        return self.handle == HANDLE and self.name.startswith(NAME_PREFIX)


class Attacher:
    """Filters on the devices of one network namespace."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    async def attach(self, ifindex: int, hook: Hook, program: int, name: str, *, family: int = 4) -> None:
        """Attach `program` (a descriptor), replacing in one step what we had there for this family.

        Raises AttachError: no such device, or a filter of another kind holds our priority.
        """
        what = f"attach {name} to {hook.name.lower()} of device {ifindex}"
        try:
            await self._replace(what, ifindex, hook, program, name, PLACES[family])
        except AttachError as error:
            if errno_of(error) not in (errno.EINVAL, errno.ENOENT):
                raise
            await self._add_clsact(ifindex)
            await self._replace(what, ifindex, hook, program, name, PLACES[family])

    async def keep_only(self, ifindex: int, families: Iterable[int]) -> int:
        """Remove our filters of other families and of an earlier version's places; return how many."""
        wanted = {PLACES[family] for family in families}
        surplus = [one for one in await self.filters(ifindex) if one.ours and one.place not in wanted]
        for one in surplus:
            await self._remove(one)
        return len(surplus)

    async def _remove(self, one: Filter) -> None:
        what = f"detach {one.name} from {one.hook.name.lower()} of device {one.ifindex}"
        await self._netlink.request(
            what,
            AttachError,
            "tc",
            "del-filter",
            kind="bpf",
            index=one.ifindex,
            parent=one.hook.value,
            prio=one.place.priority,
            handle=one.handle,
            protocol=one.place.protocol,
        )

    async def release(self, ifindex: int) -> None:
        """Remove our filters and, when nobody else has any, the hooks themselves."""
        await self.keep_only(ifindex, ())
        if not [message for hook in Hook for message in await self._dump(ifindex, hook)]:
            with contextlib.suppress(AttachError):  # there were no hooks
                await self._netlink.request(
                    f"remove clsact of device {ifindex}",
                    AttachError,
                    "tc",
                    "del",
                    kind="clsact",
                    index=ifindex,
                )

    async def filters(self, ifindex: int) -> list[Filter]:
        """Return every bpf filter on both hooks of a device, ours and others'."""
        found: list[Filter] = []
        for hook in Hook:
            for message in await self._dump(ifindex, hook):
                found.extend(_filter_of(message, ifindex, hook))
        return found

    async def _dump(self, ifindex: int, hook: Hook) -> list[Message]:
        what = f"list {hook.name.lower()} filters of device {ifindex}"
        try:
            return await self._netlink.request(
                what, AttachError, "tc", "dump-filter", index=ifindex, parent=hook.value
            )
        except AttachError as error:
            if errno_of(error) in (errno.EINVAL, errno.ENOENT):  # no clsact: no filters
                return []
            raise

    async def _replace(
        self, what: str, ifindex: int, hook: Hook, program: int, name: str, place: Place
    ) -> None:
        await self._netlink.request(
            what,
            AttachError,
            "tc",
            "replace-filter",
            kind="bpf",
            index=ifindex,
            parent=hook.value,
            prio=place.priority,
            handle=HANDLE,
            protocol=place.protocol,
            fd=program,
            name=NAME_PREFIX + name,
            direct_action=True,
        )

    async def _add_clsact(self, ifindex: int) -> None:
        try:
            await self._netlink.request(
                f"add clsact to device {ifindex}", AttachError, "tc", "add", kind="clsact", index=ifindex
            )
        except AttachError as error:
            if errno_of(error) != errno.EEXIST:
                raise


def _filter_of(message: Message, ifindex: int, hook: Hook) -> list[Filter]:
    """Return the filter of one dumped message; none for a bare priority or another kind of filter."""
    if message.get("TCA_KIND") != "bpf" or not message["handle"]:
        return []
    options = message.get("TCA_OPTIONS")
    name = options.get("TCA_BPF_NAME") if options is not None else None
    place = Place(message["info"] >> 16, socket.ntohs(message["info"] & 0xFFFF))
    return [Filter(ifindex, hook, place, message["handle"], str(name or ""))]


async def attach_endpoint(
    attacher: Attacher,
    ifindex: int,
    endpoint_id: int,
    programs: Mapping[int, Programs],
    call_policy: Mapping[int, int],
) -> None:
    """Put all programs of an endpoint in force: the receiving side first, so that nothing arrives unjudged.

    `programs` by address family, `ifindex` is the host-side veth's, `call_policy` has the descriptor of each
    family's map.  Raises AttachError or MapError; what was in force before stays where a step did not come
    through.
    """
    for family, each in programs.items():
        install_policy(call_policy[family], endpoint_id, each["policy_ingress"])
        await attacher.attach(ifindex, Hook.EGRESS, each["to_endpoint"], "to_endpoint", family=family)
        await attacher.attach(ifindex, Hook.INGRESS, each["from_endpoint"], "from_endpoint", family=family)
    await attacher.keep_only(ifindex, programs)


def install_policy(call_policy: int, endpoint_id: int, program: int) -> None:
    """Make `program` the ingress policy that local senders call; replaces in one step.  Raises MapError."""
    syscall.map_update(call_policy, _u32(endpoint_id), _u32(program), _CALL_POLICY)


def remove_policy(call_policy: int, endpoint_id: int) -> bool:
    """Take an endpoint's ingress policy away: local packets to it are dropped.  Return whether it had one."""
    try:
        syscall.map_delete(call_policy, _u32(endpoint_id), _CALL_POLICY)
    except KeyAbsent:
        return False
    return True


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)
