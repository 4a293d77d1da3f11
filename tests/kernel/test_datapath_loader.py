# SPDX-License-Identifier: Apache-2.0
"""Objects and what the loader refuses: other versions, absent or other maps, constants out of range."""

from __future__ import annotations

import os
import time
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from datapath import constants, loader, testrun
from datapath.constants import CONFIG, DatapathOptions, EndpointConstants, netdev_constants
from datapath.errors import LoadError
from datapath.layouts import U8, Field, Layout
from datapath.loader import ENDPOINT_OBJECTS, NETDEV_OBJECTS, OVERLAY_OBJECTS, POLICY_MAP, Template
from datapath.testrun import ACT_OK, ACT_REDIRECT, ACT_SHOT
from tests.support import frames
from tests.support.bpflab import EGRESS, INGRESS, lab, template

CONSTANTS = EndpointConstants(1, 301, 1, IPv4Address("10.0.0.1"), "02:00:00:00:00:01")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_constants_table_equals_the_objects() -> None:
    for name in (*ENDPOINT_OBJECTS.values(), *NETDEV_OBJECTS.values(), *OVERLAY_OBJECTS.values()):
        template(name).check()


def test_an_object_of_another_version_is_named_with_its_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Layout("config", (*CONFIG.fields[:-1], Field("surprise", U8), Field("more", U8)))
    monkeypatch.setattr(loader, "CONFIG", other)
    where = CONFIG.offsets["track_fragments"]
    with pytest.raises(LoadError, match=rf"surprise is at None, expected {where}.*different versions"):
        template(ENDPOINT_OBJECTS[4]).check()


def test_loading_leaves_nothing_open_but_the_programs_and_their_identity() -> None:
    with lab(1) as host:
        made = template(ENDPOINT_OBJECTS[4])
        maps = host.fds | {POLICY_MAP: host.policies[1].fd}
        before = open_descriptors()
        with made.load(CONSTANTS, maps) as programs:
            assert set(programs) == {"from_endpoint", "policy_ingress", "to_endpoint"}
            assert open_descriptors() == before + 4
        assert open_descriptors() == before


def test_running_programs_take_another_identity_at_once() -> None:
    """The sender's identity stands in the connection that its packet begins."""
    with lab(1) as host:
        host.allow(1, EGRESS)
        maps = host.fds | {POLICY_MAP: host.policies[1].fd}
        seen = []
        with template(ENDPOINT_OBJECTS[4]).load(CONSTANTS, maps) as programs:
            cell = programs.take_identity()
            for port, identity in ((4000, CONSTANTS.identity), (4001, 70_000)):
                cell.set(identity)
                testrun.run(programs["from_endpoint"], frames.udp("10.0.0.1", "192.0.2.7", port, 53))
                seen += [
                    entry.source_identity
                    for key, entry in host.connections().items()
                    if key.source_port == port
                ]
            cell.close()
    assert seen == [CONSTANTS.identity, 70_000]


def test_the_hosts_own_programs_have_no_identity() -> None:
    with (
        lab(1) as host,
        template(NETDEV_OBJECTS[4]).load(netdev_constants(DatapathOptions()), host.fds) as programs,
        pytest.raises(LoadError, match="of no endpoint"),
    ):
        programs.take_identity()


def test_an_identity_changes_under_running_programs() -> None:
    with lab(1, 2) as host:
        maps = host.fds | {POLICY_MAP: host.policies[1].fd}
        with template(ENDPOINT_OBJECTS[4]).load(CONSTANTS, maps) as programs:
            cell = programs.take_identity()
            host.programs[1].close()
            host.programs[1] = programs
            host.allow(1, EGRESS)
            host.allow(2, INGRESS, 900)
            frame = frames.udp("10.0.0.1", "10.0.0.2", 4000, 53)
            assert host.send(1, frame).verdict == ACT_SHOT
            cell.set(900)
            assert host.send(1, frame).verdict == ACT_REDIRECT
            cell.set(901)
            assert host.send(1, frame).verdict == ACT_SHOT
            cell.close()
        with pytest.raises(LoadError, match="of no endpoint"):
            programs.take_identity()


def test_a_missing_map_is_named() -> None:
    with lab(1) as host:
        before = open_descriptors()
        with pytest.raises(LoadError, match="no map cilium_policy was given"):
            template(ENDPOINT_OBJECTS[4]).load(CONSTANTS, host.fds)
        assert open_descriptors() == before


def test_a_map_of_another_layout_is_named() -> None:
    with lab(1) as host:
        maps = host.fds | {POLICY_MAP: host.fds["cilium_ct4_global"]}
        with pytest.raises(LoadError, match="map cilium_policy: type, key size"):
            template(ENDPOINT_OBJECTS[4]).load(CONSTANTS, maps)


@pytest.mark.parametrize("elf", [b"", b"\x7fELF", bytes(4096)])
def test_what_is_no_object_is_refused(elf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.o"
    path.write_bytes(elf)
    with pytest.raises(LoadError, match="broken"):
        Template.read(path)


def test_an_absent_object_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="make -C bpf"):
        Template.read(tmp_path / "endpoint.o")


def test_the_verifiers_words_are_in_the_error() -> None:
    """A call of bpf_redirect_peer becomes one of a helper that no kernel has."""
    call, redirect, unknown = b"\x85\0\0\0", b"\x9b\0\0\0", b"\xff\x7f\0\0"
    elf = template(ENDPOINT_OBJECTS[4]).elf
    assert call + redirect in elf
    elf = elf.replace(call + redirect, call + unknown)
    with lab(1) as host:
        before = open_descriptors()
        with pytest.raises(LoadError, match=r"endpoint 1: Invalid argument(?s:.*)invalid func unknown#32767"):
            Template(elf, "endpoint").load(CONSTANTS, host.fds | {POLICY_MAP: host.policies[1].fd})
        assert open_descriptors() == before


def test_programs_do_without_the_coarse_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels before 5.11 have none; lifetimes are seconds of the same clock either way."""
    monkeypatch.setattr(constants, "_has_coarse_clock", lambda: False)
    with lab(1) as host:
        host.allow(1, EGRESS)
        assert host.send(1, frames.udp("10.0.0.1", "192.0.2.7", 4000, 53)).verdict == ACT_OK
        (entry,) = host.connections().values()
        assert 0 <= entry.lifetime - time.monotonic() <= 61


def test_constants_out_of_range_are_refused() -> None:
    with pytest.raises(LoadError, match="payload of 129 bytes"):
        netdev_constants(DatapathOptions(payload_length=129)).pack()
    with pytest.raises(LoadError, match="a constant of endpoint 0 does not fit"):
        netdev_constants(DatapathOptions(timeout_tcp=1 << 32)).pack()
    with pytest.raises(LoadError, match="MAC address '02:00:00'"):
        EndpointConstants(1, 301, 1, IPv4Address("10.0.0.1"), "02:00:00").pack()
