# SPDX-License-Identifier: Apache-2.0
"""Three etcd members and a further host, as docs/installation.md has it: make certs, make member, make join.

Each machine is a host of its own with its own engine; one of the members' machines joins as a host, too.  One
set of machines for the whole module, because each step stands on the one before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.composed import ComposedHost, certificates
from tests.support.engine import COMPOSE_VERSIONS, WORKLOAD_IMAGE, compose_command
from tests.support.host import REPO, Hub, run, wait_for

NAMES = ("etcd-1", "etcd-2", "etcd-3")


class Fleet:
    """Three machines with an etcd member each, `web`, a host, and the folder with all certificates."""

    def __init__(self, stack: ExitStack, hub: Hub, folder: Path) -> None:
        self.folder = folder
        self.members = {name: self._machine(stack, hub) for name in NAMES}
        self.web = self._machine(stack, hub)

    @staticmethod
    def _machine(stack: ExitStack, hub: Hub) -> ComposedHost:
        host = stack.enter_context(ComposedHost("kv"))
        host.address = hub.join(host)
        return host

    def status(self) -> dict[str, Any]:
        """Return what `holdfast kvstore status` says on the host that joined."""
        done = self.web.cli("kvstore", "status", "-o", "json", check=False)
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def serving(self) -> set[str]:
        return {each["name"] for each in self.status()["members"] if not each["error"]}


@pytest.fixture(scope="module")
def fleet(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The machines, after `make certs` on the first of them and `make member` on each."""
    with ExitStack() as stack:
        made = Fleet(stack, hub, tmp_path_factory.mktemp("fleet"))
        certificates(made.folder, made.members, [made.web, made.members["etcd-3"]])
        for name, host in made.members.items():
            done = host.make("member.sh", str(made.folder / "members" / name))
            # The first has nobody to serve with; the others may serve before they are looked at no more.
            assert "runs and waits for the others" in done.stderr or name != "etcd-1", done.stderr
        yield made


def join(fleet: Fleet, host: ComposedHost, *more: str) -> None:
    host.make("join.sh", str(fleet.folder / "hosts" / host.name), *more)


def test_host_joins_and_sees_three_members(fleet: Fleet) -> None:
    join(fleet, fleet.web, "", str(fleet.folder / "operators" / "admin"))
    assert fleet.web.cli("status").returncode == 0
    wait_for(lambda: fleet.serving() == set(NAMES), "three members that serve", seconds=90)
    networks = fleet.web.engine.docker("network", "ls", "--format", "{{.Name}}").stdout.split()
    assert "holdfast" in networks


def test_each_member_has_a_snapshot_of_its_own_that_nobody_else_reads(fleet: Fleet) -> None:
    def taken() -> bool:
        members = fleet.status()["members"]
        return all((each["maintenance"] or {}).get("snapshot") for each in members)

    wait_for(taken, "a snapshot by each", seconds=90, pause=1)
    for name, host in fleet.members.items():
        (snapshot,) = (host.private("/var/lib/holdfast-etcd") / "maintenance" / "snapshots").iterdir()
        assert snapshot.name.startswith(f"{name}-")
        assert snapshot.stat().st_mode & 0o777 == 0o600
        check = ["holdfast", "kvstore", "maintain", "--member", name, "--check"]
        host.engine.docker("exec", host.container_of("maintenance"), *check)
    assert fleet.web.cli("kvstore", "status").returncode == 0


def test_services_have_no_rights(fleet: Fleet) -> None:
    for host in fleet.members.values():
        for role in ("etcd", "maintenance"):
            found: Any = host.engine.inspect(host.container_of(role))["HostConfig"]
            assert (found["CapDrop"], found["CapAdd"], found["Privileged"]) == (["ALL"], None, False)


@pytest.mark.parametrize("version", COMPOSE_VERSIONS)
def test_file_is_valid_for_both_composes_and_says_what_it_lacks(fleet: Fleet, version: int) -> None:
    file = ["--file", str(REPO / "compose" / "kvstore" / "docker-compose.yml")]
    settings = ["--env-file", str(fleet.folder / "members" / "etcd-1" / "member.env")]
    run([*compose_command(version), *settings, *file, "config", "--quiet"])
    without = run([*compose_command(version), *file, "config", "--quiet"], check=False)
    assert without.returncode != 0
    assert "comes from member.env" in without.stderr


def test_who_may_speak_to_a_member_at_which_port(fleet: Fleet) -> None:
    """An agent's certificate is of the same CA: at the peers' port it could speak as a member."""
    agent = ("hosts", fleet.web.name, "agent")
    member = ("members", "etcd-2", "etcd")
    host = fleet.members["etcd-2"]  # a member's certificate is good from its own address only

    def answers(port: str, identity: tuple[str, str, str] | None) -> bool:
        files: list[str] = []
        if identity is not None:
            folder = fleet.folder / identity[0] / identity[1]
            files = ["--cert", f"{folder}/{identity[2]}.crt", "--key", f"{folder}/{identity[2]}.key"]
        url = f"https://{fleet.members['etcd-1'].address}:{port}/version"
        options = ("-sk", "-m", "5", "--http1.1", "--noproxy", "*")
        return "etcdserver" in host.exec("curl", *options, *files, url, check=False).stdout

    assert [answers("2379", each) for each in (member, agent, None)] == [True, True, False]
    assert [answers("2380", each) for each in (member, agent, None)] == [True, False, False]


def test_again_changes_nothing(fleet: Fleet) -> None:
    machines = [*fleet.members.values(), fleet.web]
    before = [sorted(host.engine.containers()) for host in machines]
    fleet.members["etcd-1"].make("fleet.sh", str(fleet.folder / "inventory.yaml"))
    fleet.members["etcd-1"].make("member.sh", str(fleet.folder / "members" / "etcd-1"))
    fleet.members["etcd-2"].make("member.sh")
    fleet.web.make("join.sh")
    assert [sorted(host.engine.containers()) for host in machines] == before


def test_a_members_machine_can_be_a_host_by_one_line(fleet: Fleet) -> None:
    """With its certificate in place, where etcd is is all that it has to be told."""
    third = fleet.members["etcd-3"]
    for name in ("ca.crt", "agent.crt", "agent.key"):
        target = third.private("/etc/holdfast") / "certs" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((fleet.folder / "hosts" / third.name / name).read_bytes())
        target.chmod(0o600)
    endpoints = ",".join(f"https://{host.address}:2379" for host in fleet.members.values())
    third.make("join.sh", "", endpoints)
    nodes = json.loads(fleet.web.cli("node", "list", "-o", "json").stdout)
    assert {fleet.web.name, third.name} <= {each["name"].rpartition("/")[2] for each in nodes}


RULES = """
- endpointSelector: {matchLabels: {app: server}}
  ingress: [{fromEndpoints: [{matchLabels: {app: friend}}]}]
"""


def test_workloads_of_the_two_hosts_meet_by_their_labels(fleet: Fleet) -> None:
    """What these commands set up is a fleet: identities and policy hold from host to host, by the tunnel."""
    here, there = fleet.web, fleet.members["etcd-3"]
    here.cli("policy", "apply", "--name", "fleet", "-f", "-", stdin=RULES)
    address = workload(there, "server", "python3", "-m", "http.server", "8000")
    for name in ("friend", "foe"):
        workload(here, name, "sleep", "infinity")

    def reached(name: str) -> bool:
        ask = ("curl", "-s", "-o", "/dev/null", "-m", "2", f"http://{address}:8000/")
        return here.engine.docker("exec", name, *ask, check=False).returncode == 0

    wait_for(lambda: reached("friend"), "the friend's answer", seconds=60)
    assert not any(reached("foe") for _ in range(3))
    assert reached("friend")
    for host, name in ((there, "server"), (here, "friend"), (here, "foe")):
        host.engine.docker("rm", "-f", name)


def workload(host: ComposedHost, name: str, *command: str) -> str:
    """Start a container with the label app=`name` and return its address."""
    labels = ("--label", f"app={name}")
    host.engine.docker(
        "run", "-d", "--name", name, "--network", "holdfast", *labels, WORKLOAD_IMAGE, *command
    )
    found: Any = host.engine.inspect(name)
    return str(found["NetworkSettings"]["Networks"]["holdfast"]["IPAddress"])


def test_a_member_that_is_killed_is_missed_by_nobody_and_comes_back(fleet: Fleet) -> None:
    second = fleet.members["etcd-2"]
    second.engine.docker("kill", second.container_of("etcd"))
    wait_for(lambda: fleet.serving() == {"etcd-1", "etcd-3"}, "two that serve", seconds=90)
    words = ("kvstore", "set", "test/key", "while one is away")  # where it led the others elect first
    wait_for(lambda: "revision" in fleet.web.cli(*words, check=False).stdout, "a write", seconds=90)
    wait_for(lambda: fleet.web.cli("status", check=False).returncode == 0, "healthy agent", seconds=90)
    second.engine.docker("start", second.container_of("etcd"))
    wait_for(lambda: fleet.serving() == set(NAMES), "three that serve", seconds=90)
    shown = second.engine.docker(
        "exec", second.container_of("etcd"), "etcdctl", "get", "test/key", "--print-value-only"
    )
    assert shown.stdout == "while one is away\n"


def refused(host: ComposedHost, script: str, *arguments: str) -> str:
    done = host.make(script, *arguments, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def test_mistakes_are_named_and_change_nothing(fleet: Fleet, tmp_path: Path) -> None:
    web, first = fleet.web, fleet.members["etcd-1"]
    before = sorted(web.engine.containers()), sorted(first.engine.containers())
    folder = fleet.folder / "hosts" / web.name
    others = fleet.folder / "hosts" / fleet.members["etcd-3"].name
    assert "this host is called" in refused(web, "join.sh", str(others))
    assert "has no agent.crt" in refused(web, "join.sh", str(fleet.folder / "members" / "etcd-1"))
    assert "there is no folder" in refused(web, "join.sh", str(tmp_path / "nowhere"))
    config = (web.private("/etc/holdfast") / "etcd.config").read_bytes()
    away = refused(web, "join.sh", str(folder), "https://10.77.0.200:2379")
    assert "10.77.0.200" in away
    assert (web.private("/etc/holdfast") / "etcd.config").read_bytes() == config
    wrong = refused(first, "member.sh", str(fleet.folder / "members" / "etcd-2"))
    assert "no card of this machine has that address" in wrong
    assert "there is no inventory" in refused(first, "fleet.sh", str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("members: {a: nowhere}\n")
    assert "nowhere is not an IP address" in refused(first, "fleet.sh", str(tmp_path / "bad.yaml"))
    assert (sorted(web.engine.containers()), sorted(first.engine.containers())) == before
