# SPDX-License-Identifier: Apache-2.0
"""`holdfast cleanup` in a namespace of its own: everything of ours goes, everything else stays."""

from __future__ import annotations

import json
from pathlib import Path

from datapath.firewall import IPV6, Firewall, FirewallState
from datapath.forward import ForwardChain
from datapath.maps import CtMap, LxcMap, PolicyMap
from datapath.mapspec import MapCatalogue
from tests.support.agent_view import FakeAgent, serving
from tests.support.bpf import own_bpffs
from tests.support.cli import run
from tests.support.hostnet import POOL, ROUTER, host_net
from tests.support.require import require_root, require_tools

CATALOGUE = MapCatalogue(policy_max=256, ct_tcp_max=1024)
POOL6, ROUTER6 = "fd68::a32:0/112", "fd68::a32:1"


def cleanup(mount: Path, state: Path, *words: str) -> tuple[int, str, str]:
    done = run(
        "cleanup", "--bpf-root", str(mount), "--state-dir", str(state), *words, socket=mount.parent / "h.sock"
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def make_state(directory: Path) -> None:
    (directory / "endpoints").mkdir(parents=True)
    (directory / "endpoints" / "00005.json").write_text("{}")
    (directory / "node.json").write_text("{}")
    (directory / "etcd").mkdir()
    (directory / "etcd" / "data.json").write_text("somebody else's")


async def test_everything_goes_and_nothing_else(tmp_path: Path) -> None:
    require_root()
    require_tools("nft", "iptables", "ip6tables")
    state = tmp_path / "state"
    make_state(state)
    with own_bpffs(tmp_path) as pins:
        mount = pins.parents[1]
        async with host_net() as net:
            await net.container(5)
            await net.routes.add_unreachable(POOL)
            await Firewall().apply(FirewallState(router=ROUTER, pools=frozenset({POOL})))
            await ForwardChain().ensure()
            await net.devices.add_router(ROUTER6)
            await net.routes.add_unreachable(POOL6)
            await Firewall(IPV6).apply(FirewallState(router=ROUTER6, pools=frozenset({POOL6})))
            await ForwardChain("ip6tables").ensure()
            CtMap.open(CATALOGUE.ct(tcp=True, family=6), pins).close()
            LxcMap.open(CATALOGUE.lxc, pins).close()
            PolicyMap.of(5, CATALOGUE, pins).close()
            before = net.host.run("ip", "-br", "address", "show", "dev", "wire")

            code, shown, _ = cleanup(mount, state, "--all", "--dry-run")
            assert code == 0
            for part in (
                f"{ROUTER} on lo",
                "lxc0",
                "10.50.0.5/32",
                POOL,
                "nft table ip ",
                "iptables chain HOLDFAST-FORWARD",
                "cilium_lxc",
                f"{ROUTER6} on lo",
                POOL6,
                "nft table ip6",
                "ip6tables chain HOLDFAST-FORWARD",
                "cilium_ct6_global",
                "node.json",
            ):
                assert part in shown

            refused = cleanup(mount, state, "--all")
            assert (refused[0], "nothing was changed" in refused[2]) == (1, True)
            assert await net.devices.ours()

            code, _, errors = cleanup(mount, state, "--all", "-f")
            assert (code, errors) == (0, "")
            assert not await net.devices.ours()
            assert not await net.routes.ours()
            on_lo = net.host.run("ip", "address", "show", "dev", "lo")
            assert ROUTER not in on_lo
            assert ROUTER6 not in on_lo
            assert POOL6 not in net.host.run("ip", "-6", "route")
            assert "holdfast" not in net.host.run("nft", "list", "tables")
            for tool in ("iptables-save", "ip6tables-save"):
                assert "HOLDFAST" not in net.host.run(tool)
            assert list(pins.iterdir()) == []
            assert sorted(path.name for path in state.iterdir()) == ["etcd"]
            assert net.host.run("ip", "-br", "address", "show", "dev", "wire") == before
            assert cleanup(mount, state, "--all", "-f")[1] == "Nothing of Holdfast's is on this host\n"


async def test_bpf_alone_leaves_devices_and_rules(tmp_path: Path) -> None:
    require_root()
    require_tools("nft", "iptables")
    with own_bpffs(tmp_path) as pins:
        async with host_net() as net:
            await net.container(5)
            LxcMap.open(CATALOGUE.lxc, pins).close()
            (pins / "of_others").mkdir()
            code, shown, _ = cleanup(pins.parents[1], tmp_path / "none", "--bpf", "-f", "-o", "json")
            assert code == 0
            assert [item["kind"] for item in json.loads(shown)] == ["map"]
            assert await net.devices.ours()
            assert [path.name for path in pins.iterdir()] == ["of_others"]


def test_a_running_agent_is_not_cleaned_up_under(tmp_path: Path) -> None:
    with serving(FakeAgent(), tmp_path / "h.sock"):
        code, _, errors = cleanup(tmp_path / "bpf", tmp_path, "--all", "-f")
    assert (code, "an agent is running" in errors) == (1, True)
