# SPDX-License-Identifier: Apache-2.0
"""`make up` on a bare host, in a host of its own: images, certificates, etcd, agent, command, `make down`.

One host for the whole module, because each step stands on the one before; the engine's containers, mounts
and files are that host's own (compose/setup runs inside it, as a person would run it there).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator

import pytest

from tests.support.composed import SETUP_SECONDS, ComposedHost
from tests.support.engine import COMPOSE_VERSIONS, compose_command
from tests.support.host import REPO, Hub, run, wait_for


@pytest.fixture(scope="module")
def bare(hub: Hub) -> Iterator[ComposedHost]:
    """A host on which `make up` has run, with images that were built before."""
    with ComposedHost("up") as host:
        hub.join(host)
        host.make("up.sh")
        yield host


def test_status_is_healthy(bare: ComposedHost) -> None:
    assert bare.cli("status").returncode == 0


def test_network_is_there_for_workloads(bare: ComposedHost) -> None:
    found = json.loads(bare.engine.docker("network", "inspect", "holdfast").stdout)[0]
    assert found["Driver"] == "holdfast"
    assert found["IPAM"]["Driver"] == "null"


def test_healthchecks_pass(bare: ComposedHost) -> None:
    for container in bare.engine.containers("com.docker.compose.project=holdfast"):
        run(["docker", "inspect", container], environment=bare.engine.environment)
        state = bare.engine.inspect(container)["State"]
        assert isinstance(state, dict)
        assert state["Health"]["Status"] in ("healthy", "starting")


def test_etcd_wants_a_certificate(bare: ComposedHost) -> None:
    answer = bare.exec("curl", "-sk", "-m", "5", "https://127.0.0.1:2379/version", check=False)
    assert answer.returncode != 0


def test_operator_writes_and_the_agent_holds_no_operators_key(bare: ComposedHost) -> None:
    assert "revision" in bare.cli("kvstore", "set", "test/key", "value").stdout
    assert "value" in bare.cli("kvstore", "get", "test/key").stdout
    bare.cli("kvstore", "delete", "test/key")
    agent = bare.container_of("agent")
    seen = bare.engine.docker("exec", agent, "ls", "/etc/holdfast").stdout.split()
    assert "operator" not in seen


def test_policy_file_of_the_host_is_handed_in_with_its_name(bare: ComposedHost) -> None:
    policy = bare.directory / "broken.yaml"
    policy.write_text("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: x}\nspec: 7\n")
    refused = bare.cli("policy", "validate", "-f", str(policy), check=False)
    assert refused.returncode == 1
    assert "broken.yaml" in refused.stderr


def test_keys_are_readable_by_root_only(bare: ComposedHost) -> None:
    keys = [*bare.directory.glob("state/certs/*/*.key"), *bare.private("/etc/holdfast").glob("*/*.key")]
    assert len(keys) == 6
    for key in keys:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key


def test_names_are_answered_with_the_capabilities_it_has(bare: ComposedHost) -> None:
    """Port 53 takes one: of the process, which is in a container."""
    option = bare.private("/etc/holdfast") / "config" / "enable-cluster-dns"
    option.write_text("true")
    agent = bare.container_of("agent")

    def answered() -> bool:
        shown = bare.cli("status", check=False).stdout
        return "names of holdfast, answered at" in shown and "not answered" not in shown

    try:
        bare.engine.docker("restart", agent)
        wait_for(answered, "an agent that answers", seconds=60)
    finally:
        option.unlink()
        bare.engine.docker("restart", agent)
        wait_for(lambda: bare.cli("status", check=False).returncode == 0, "the agent back", seconds=60)


def test_again_changes_nothing(bare: ComposedHost) -> None:
    before = bare.engine.containers()
    certificate = (bare.directory / "state/certs/agent/agent.crt").read_bytes()
    bare.make("up.sh")
    assert sorted(bare.engine.containers()) == sorted(before)
    assert (bare.directory / "state/certs/agent/agent.crt").read_bytes() == certificate


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
@pytest.mark.parametrize("role", ["all-in-one", "host", "demo"])
def test_files_are_valid_for_both_composes(version: int, role: str) -> None:
    path = REPO / "compose" / role / "docker-compose.yml"
    run([*compose_command(version), "--file", str(path), "config", "--quiet"], environment=dict(os.environ))


def test_demo_shows_an_allowed_and_a_denied_flow(bare: ComposedHost) -> None:
    demo = str(REPO / "compose" / "demo" / "demo.sh")
    shown = bare.exec(demo, timeout=SETUP_SECONDS, environment=bare.environment).stdout
    _, *steps = re.split(r"^(?:\x1b\[1m)?\d\. ", shown, flags=re.MULTILINE)
    verdicts = [re.findall(r"^  (\w+) +-> shop:8080 +(\w+)", step, re.MULTILINE) for step in steps]
    assert verdicts == [
        [],
        [("till", "allowed"), ("vm", "allowed")],
        [("till", "allowed"), ("vm", "denied")],
        [],
        [("vm", "allowed")],
    ], shown
    assert "Policy denied" in steps[3]
    assert bare.engine.containers("com.docker.compose.project=holdfast-demo") == []
    assert "holdfast-demo-vm" not in bare.exec("ip", "netns").stdout


def test_down_leaves_what_is_pinned_and_up_comes_back(bare: ComposedHost) -> None:
    pins = bare.exec("find", "/sys/fs/bpf", "-type", "f").stdout.split()
    assert pins
    bare.make("down.sh")
    assert bare.engine.containers("com.docker.compose.project=holdfast") == []
    assert set(pins) <= set(bare.exec("find", "/sys/fs/bpf", "-type", "f").stdout.split())
    gone = bare.cli("status", check=False)
    assert gone.returncode == 3
    assert "make up" in gone.stderr
    bare.make("up.sh")
    assert bare.cli("status").returncode == 0
