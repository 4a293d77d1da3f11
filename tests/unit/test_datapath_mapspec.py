# SPDX-License-Identifier: Apache-2.0
"""Every map's type, sizes and flags against what a real agent of Cilium 1.11 pinned."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapath.mapspec import MapCatalogue, MapSpec, policy_map_name
from datapath.syscall import MapInfo
from datapath.uapi import MapType

DATA = Path(__file__).parents[1] / "data"
OURS_ONLY = {"holdfast_path_mtu", "holdfast_monitor", "holdfast_events_lost"}


def table(file: str) -> dict[str, tuple[str, int, int, int, int]]:
    """Return name → (type, key size, value size, max entries, flags) of a listing."""
    rows = [line.split() for line in (DATA / file).read_text().splitlines()[1:]]
    return {row[0]: (row[1], *(int(cell, 0) for cell in row[2:6])) for row in rows}  # type: ignore[misc]


def specs(catalogue: MapCatalogue, endpoint_id: int, *, v6: bool) -> dict[str, MapSpec]:
    families = (4, 6) if v6 else (4,)
    found = [
        *catalogue.shared(),
        *(catalogue.ct(tcp=tcp, family=family) for tcp in (True, False) for family in families),
        catalogue.policy(endpoint_id),
    ]
    return {spec.name: spec for spec in found}


def as_row(spec: MapSpec) -> tuple[str, int, int, int, int]:
    return (spec.type.name.lower(), spec.key.size, spec.value.size, spec.max_entries, spec.flags)


@pytest.mark.parametrize(
    ("file", "catalogue", "endpoint_id", "v6"),
    [
        ("bpf-maps-default-options-ipv6.txt", MapCatalogue(), 183, True),
        (
            "bpf-maps-no-prealloc.txt",
            MapCatalogue(ct_tcp_max=65536, ct_any_max=32768, preallocate=False),
            52,
            False,
        ),
    ],
)
def test_maps_are_those_of_a_real_agent(
    file: str, catalogue: MapCatalogue, endpoint_id: int, v6: bool
) -> None:
    wanted = table(file)
    ours = specs(catalogue, endpoint_id, v6=v6)
    assert set(ours) - OURS_ONLY <= set(wanted)
    for name in set(ours) - OURS_ONLY:
        assert as_row(ours[name]) == wanted[name], name


def test_differences_are_said_in_words() -> None:
    spec = MapCatalogue().ipcache
    info = MapInfo(MapType.HASH, 1, 24, 8, 512_000, 0, "cilium_ipcache", 0)
    assert spec.differences(info) == (
        "type is hash, expected lpm_trie",
        "value size is 8, expected 12",
        "flags is 0x0, expected 0x1",
    )
    assert spec.differences(MapInfo(99, 1, 24, 12, 512_000, 1, "x", 0)) == ("type is 99, expected lpm_trie",)


def test_policy_maps_are_numbered_in_five_digits() -> None:
    assert policy_map_name(7) == "cilium_policy_00007"
    assert policy_map_name(65535) == "cilium_policy_65535"
