# SPDX-License-Identifier: Apache-2.0
"""The instruction count (bench/instructions.py): what it counts is what the kernel does with the packet.

`compared` fails unless the interpreter and the kernel agree about verdict, packet, control block and maps.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import instructions
from bench.ebpf_helpers import MAP_LOOKUP, MAP_UPDATE
from bench.ebpf_image import program_id
from bench.instructions import PATHS, RecordedLab, compared, prepared, run
from tests.support.families import Net
from tests.support.require import require, require_tools

ESTABLISHED, NEW_FLOW = PATHS[0], PATHS[2]
BEFORE_IP = 14  # bytes of a frame; a test run takes the frame's kind from them
# What the kernel calls for a map that it does not know when it translates a program.
ANY_MAP = re.compile(r"call bpf_map_(?:lookup|update)_elem#")


@pytest.fixture(scope="module")
def host() -> Iterator[RecordedLab]:
    with prepared() as made:
        yield made


@pytest.mark.parametrize("path", PATHS, ids=[path.name for path in PATHS])
def test_the_interpreter_does_what_the_kernel_does(
    host: RecordedLab, net: Net, path: instructions.PacketPath
) -> None:
    outcome = run(host, path, net)
    assert 0 < outcome.instructions <= outcome.executed.total()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS),
    changes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_of_damaged_packets_as_well(
    host: RecordedLab, net: Net, path: instructions.PacketPath, changes: list[tuple[int, int]]
) -> None:
    frame = bytearray(path.frame(net))
    for position, value in changes:
        frame[BEFORE_IP + position % (len(frame) - BEFORE_IP)] = value
    compared(host, host.program(path, net.family), bytes(frame))


def test_an_interpreter_that_errs_is_noticed(
    host: RecordedLab, net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "NANOSECONDS", 1)  # its clock says: the second after the start
    with pytest.raises(AssertionError, match="the kernel has"):
        run(host, ESTABLISHED, net)


def test_what_a_local_packet_asks_of_maps(host: RecordedLab, net: Net) -> None:
    """docs/performance.md names them: peer, connection, policy, place; connection, policy, counter."""
    assert run(host, ESTABLISHED, net).helpers[MAP_LOOKUP] == 7
    assert run(host, NEW_FLOW, net).helpers[MAP_UPDATE] == 2


def test_maps_are_the_same_after_a_count(host: RecordedLab, net: Net) -> None:
    before = instructions.state(host)
    run(host, NEW_FLOW, net)
    assert instructions.state(host) == before


def test_the_kernel_knows_the_map_of_every_call(host: RecordedLab, net: Net) -> None:
    """A call that the compiler made of two, for either of two maps, takes an indirect jump each time."""
    require_tools("bpftool")
    require(Path("/proc/sys/net/core/bpf_jit_enable").read_text().strip() != "0", "needs the BPF JIT")
    programs = host.programs_of(net.family)[1]
    for name in programs:
        dump = ["bpftool", "prog", "dump", "xlated", "id", str(program_id(programs[name]))]
        shown = subprocess.run(dump, capture_output=True, text=True, check=True, timeout=60).stdout
        assert "call" in shown
        assert not ANY_MAP.findall(shown), name
