# SPDX-License-Identifier: Apache-2.0
"""The test bed proves itself: hosts with engines start, run containers, reach each other, leave nothing."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from tests.support.engine import WORKLOAD_IMAGE, DockerHost, workload_images
from tests.support.host import run, wait_for

SERVE_ONCE = "socat TCP-LISTEN:7000,reuseaddr,fork SYSTEM:'hostname'"


def traces(name: str) -> list[str]:
    """Return what is left of a host on the machine."""
    found = [line for line in run(["ip", "netns", "list"]).stdout.splitlines() if line.startswith(name)]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if name in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"*{name}*")]
    return found


def test_container_runs_on_docker_bridge(host: DockerHost) -> None:
    done = host.engine.docker(
        "run", "--rm", "--init", WORKLOAD_IMAGE, "ip", "-4", "-o", "addr", "show", "eth0"
    )
    assert "172.17." in done.stdout


def test_hosts_share_an_image_and_nothing_that_is_written(host: DockerHost) -> None:
    """Every engine's layers are links to the same files."""

    def inside(of: DockerHost, command: str) -> str:
        return of.engine.docker("run", "--rm", WORKLOAD_IMAGE, "sh", "-c", command).stdout

    write = "echo mine >/etc/debian_version && rm /etc/shadow && chmod 0 /etc/profile"
    look = "cat /etc/debian_version; stat -c '%n %a' /etc/*"
    with DockerHost(images=workload_images()) as other:
        before = inside(other, look)
        assert inside(host, f"{write}; {look}").startswith("mine\n")
        assert inside(other, look) == inside(host, look) == before


def test_published_port_is_reached_from_the_host(host: DockerHost) -> None:
    options = ("--init", "--publish", "7000:7000", "--hostname", "answering")
    started = host.engine.docker("run", "-d", *options, WORKLOAD_IMAGE, "sh", "-c", SERVE_ONCE)
    name = started.stdout.strip()
    try:
        wait_for(lambda: "answering" in ask(host), "answer on the published port")
    finally:
        host.engine.docker("rm", "-f", name)


def ask(host: DockerHost) -> str:
    return host.exec("nc", "-w", "2", "127.0.0.1", "7000", check=False).stdout


def test_hosts_reach_each_other_over_the_hub(three_hosts: tuple[DockerHost, DockerHost, DockerHost]) -> None:
    first, second, third = three_hosts
    for other in (second, third):
        first.exec("ping", "-c", "1", "-W", "2", other.address)


def test_machine_keeps_its_own_rules(host: DockerHost) -> None:
    assert "DOCKER" not in run(["iptables", "-S"]).stdout
    assert "DOCKER" in host.exec("iptables", "-S").stdout


def test_host_has_its_own_directories(host: DockerHost) -> None:
    host.exec("sh", "-c", "echo here > /etc/holdfast/probe")
    assert (host.private("/etc/holdfast") / "probe").read_text() == "here\n"
    assert not Path("/etc/holdfast/probe").exists()
    assert host.exec("hostname").stdout.strip() == host.name
    assert " /sys/fs/bpf bpf " in host.exec("cat", "/proc/mounts").stdout


def test_signals_reach_the_process_itself(host: DockerHost) -> None:
    process = host.popen("sleep", "600")
    wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "sleep")
    process.kill(signal.SIGTERM)
    assert process.wait() in (143, -signal.SIGTERM)


def test_containers_survive_a_killed_engine_and_nothing_is_left_of_the_host(engine_parts: None) -> None:
    with DockerHost(options=["--live-restore"], images=workload_images()) as broken:
        broken.engine.docker("run", "-d", "--init", "--name", "stays", WORKLOAD_IMAGE)
        before = broken.engine.inspect("stays")["State"]
        broken.engine.kill()
        broken.engine.start()
        assert broken.engine.inspect("stays")["State"] == before
        shims = len(subprocess.run(["pgrep", "-f", broken.name], capture_output=True).stdout.split())
        assert shims > 0
    assert traces(broken.name) == []
    assert not broken.directory.exists()
    assert subprocess.run(["pgrep", "-f", broken.name], capture_output=True).stdout == b""
