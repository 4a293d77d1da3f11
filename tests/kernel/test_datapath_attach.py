# SPDX-License-Identifier: Apache-2.0
"""Filters on devices: ours are replaced and removed, others' are never touched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from datapath import testrun
from datapath.attach import HANDLE, PLACES, Attacher, Filter, Hook, install_policy, remove_policy
from datapath.errors import AttachError
from datapath.netlink import Netlink
from datapath.testrun import ACT_OK, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, LOOPBACK, OBJECTS, Lab, address, lab
from tests.support.netns import Netns, inside_new_netns
from tests.support.require import require_root, require_tools

DEVICE = "d0"


@pytest.fixture
def netns() -> Iterator[Netns]:
    require_root()
    require_tools("ip", "tc", "nsenter")
    with inside_new_netns() as made:
        made.run("ip", "link", "add", DEVICE, "type", "veth", "peer", "name", "d1")
        yield made


@pytest.fixture
async def attacher(netns: Netns) -> AsyncIterator[Attacher]:
    async with Netlink() as netlink:
        yield Attacher(netlink)


@pytest.fixture
def host() -> Iterator[Lab]:
    with lab(1, 2) as made:
        yield made


def index(netns: Netns) -> int:
    return int(netns.run("ip", "-o", "link", "show", DEVICE).split(":")[0])


def shown(netns: Netns, hook: str = "ingress") -> str:
    return netns.run("tc", "filter", "show", "dev", DEVICE, hook)


def add_theirs(netns: Netns, *place: str) -> None:
    """Attach a program as another tool would."""
    program = ("bpf", "da", "obj", str(OBJECTS / "netdev.o"), "sec", "tc")
    netns.run("tc", "filter", "add", "dev", DEVICE, "ingress", *place, *program)


async def test_a_program_is_attached_under_our_number_and_listed(
    netns: Netns, attacher: Attacher, host: Lab
) -> None:
    device = index(netns)
    assert await attacher.filters(device) == []
    await attacher.attach(device, Hook.INGRESS, host.programs[1]["from_endpoint"], "from_endpoint")
    name = "holdfast:from_endpoint"
    assert await attacher.filters(device) == [Filter(device, Hook.INGRESS, PLACES[4], HANDLE, name)]
    assert "pref 2 bpf" in shown(netns)
    assert f"handle {HANDLE:#x} {name} direct-action" in shown(netns)


async def test_attaching_again_replaces(netns: Netns, attacher: Attacher, host: Lab) -> None:
    device = index(netns)
    for number in (1, 2, 2):
        await attacher.attach(device, Hook.EGRESS, host.programs[number]["to_endpoint"], "to_endpoint")
        (line,) = [line for line in shown(netns, "egress").splitlines() if "holdfast" in line]
    assert len(await attacher.filters(device)) == 1
    assert "to_endpoint" in line


async def test_filters_of_others_stay(netns: Netns, attacher: Attacher, host: Lab) -> None:
    device = index(netns)
    netns.run("tc", "qdisc", "add", "dev", DEVICE, "clsact")
    for priority in ("1", "7"):
        add_theirs(netns, "pref", priority)
    before = shown(netns)
    await attacher.attach(device, Hook.INGRESS, host.programs[1]["from_endpoint"], "from_endpoint")
    assert [one.ours for one in await attacher.filters(device)].count(True) == 1
    await attacher.release(device)
    assert shown(netns) == before
    assert "clsact" in netns.run("tc", "qdisc", "show", "dev", DEVICE)


async def test_hooks_stay_for_filters_of_another_kind(netns: Netns, attacher: Attacher, host: Lab) -> None:
    device = index(netns)
    netns.run("tc", "qdisc", "add", "dev", DEVICE, "clsact")
    theirs = ("protocol", "ip", "pref", "50", "u32", "match", "u32", "0", "0", "flowid", "1:1")
    netns.run("tc", "filter", "add", "dev", DEVICE, "egress", *theirs)
    before = shown(netns, "egress")
    assert "u32" in before
    await attacher.attach(device, Hook.EGRESS, host.programs[1]["to_endpoint"], "to_endpoint")
    await attacher.release(device)
    assert shown(netns, "egress") == before


async def test_release_leaves_nothing_of_ours(netns: Netns, attacher: Attacher, host: Lab) -> None:
    device = index(netns)
    for hook in Hook:
        await attacher.attach(device, hook, host.programs[1]["to_endpoint"], "to_endpoint")
    await attacher.release(device)
    assert await attacher.filters(device) == []
    assert "clsact" not in netns.run("tc", "qdisc", "show", "dev", DEVICE)
    await attacher.release(device)


async def test_a_device_that_is_gone_is_named(netns: Netns, attacher: Attacher, host: Lab) -> None:
    with pytest.raises(AttachError, match="device 4711"):
        await attacher.attach(4711, Hook.INGRESS, host.programs[1]["from_endpoint"], "from_endpoint")


async def test_a_filter_that_holds_our_priority_for_itself_is_reported(
    netns: Netns, attacher: Attacher, host: Lab
) -> None:
    """The kernel has one protocol a priority: theirs is for IPv4 only."""
    netns.run("tc", "qdisc", "add", "dev", DEVICE, "clsact")
    add_theirs(netns, "protocol", "ip", "pref", "2")
    with pytest.raises(AttachError, match="attach from_endpoint to ingress"):
        await attacher.attach(index(netns), Hook.INGRESS, host.programs[1]["from_endpoint"], "from_endpoint")


def test_an_ingress_policy_is_installed_replaced_and_removed(host: Lab) -> None:
    host.allow(1, EGRESS)
    host.allow(2, INGRESS)
    frame = frames.udp(address(1), address(2), 4000, 53)
    assert remove_policy(host.call_policy[4], 2)
    assert not remove_policy(host.call_policy[4], 2)
    assert host.send(1, frame).verdict == ACT_SHOT
    install_policy(host.call_policy[4], 2, host.programs[2]["policy_ingress"])
    install_policy(host.call_policy[4], 2, host.programs[2]["policy_ingress"])
    assert host.send(1, frame).verdict == testrun.ACT_REDIRECT
    assert host.deliver(2, frame, arrived_by=LOOPBACK).verdict == ACT_OK
