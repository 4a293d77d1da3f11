# SPDX-License-Identifier: Apache-2.0
"""`holdfast bugtool`: everything that helps to understand a problem, in one archive, without secrets.

What the agent says, what the engine and the kernel say, and a fixed list of commands.  A part that fails is
in the archive as its error; private keys, environments of processes and etcd's contents are never in it.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import click

from cli.base import Settings, examples, output_option
from cli.client import AgentClient, api_path
from cli.commands.network import docker_option, engine
from cli.errors import CliError
from cli.output import print_done
from core.errors import HoldfastError

# name in the archive → path below /v1
AGENT_PARTS = {
    "status": "healthz",
    "config": "config",
    "endpoints": "endpoint",
    "identities": "identity",
    "addresses": "ip",
    "nodes": "cluster/nodes",
    "health": "health",
    "policy": "policy",
    "selectors": "policy/selectors",
    "maps": "map",
    "networks": "network",
    "debuginfo": "debuginfo",
}
COMMANDS = (
    "uname -a",
    "ip -d address",
    "ip -s link",
    "ip route show table all",
    "ip -6 route show table all",
    "ip rule",
    "ip -6 rule",
    "ip neighbour",
    "ss -tnap",
    "tc -s qdisc",
    "nft list ruleset",
    "iptables-save",
    "ip6tables-save",
    "bpftool map",
    "bpftool prog",
    "bpftool net",
    "ps -eo pid,ppid,user,rss,etime,comm",
)
# name in the archive → path of the engine's API, and what of each entry is kept: labels, options and command
# lines are other people's, and may hold secrets.
ENGINE_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "version": ("/version", ("Version", "ApiVersion", "KernelVersion", "Os", "Arch")),
    "networks": ("/networks", ("Id", "Name", "Created", "Driver", "Scope", "IPAM", "Internal", "EnableIPv6")),
    "containers": (
        "/containers/json?all=1",
        ("Id", "Names", "Created", "State", "Status", "Ports", "HostConfig", "NetworkSettings"),
    ),
}
FILES = (
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/mounts",
    "/proc/cpuinfo",
    "/proc/net/dev",
    "/etc/os-release",
)
GLOBALS = Path("/sys/fs/bpf/tc/globals")
COMMAND_TIMEOUT_S = 20.0
# Dumping a conntrack map of a busy host takes more room than it tells.
LARGE_MAPS = ("cilium_ct",)


@click.command(
    epilog=examples(
        "holdfast bugtool", "holdfast bugtool --archive /tmp/host7.tar.gz", "holdfast bugtool --no-commands"
    )
)
@click.option("--archive", type=click.Path(path_type=Path), help="The file to write.  [default: in /tmp]")
@click.option("--no-commands", is_flag=True, help="Only what the agent says.")
@docker_option
@output_option
@click.pass_obj
def bugtool(
    settings: Settings, archive: Path | None, no_commands: bool, docker: str, output: str | None
) -> None:
    """Collect statuses, maps, logs and the state of the host in an archive.

    It holds no secrets, but addresses and labels.  Works with the agent stopped.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    root = f"holdfast-bugtool-{socket.gethostname()}-{stamp}"
    path = archive or Path("/tmp") / f"{root}.tar.gz"
    parts = from_agent(settings.agent(timeout=COMMAND_TIMEOUT_S))
    with create(path) as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, text in parts:
            add(tar, f"{root}/{name}", text)
        for name, text in () if no_commands else chain(from_engine(docker), from_host()):
            add(tar, f"{root}/{name}", text)
    print_done(output, {"archive": str(path)}, f"Archive: {path}")


def create(path: Path) -> IO[bytes]:
    """Open a new private file; /tmp is everybody's, so whatever lies there already is not followed."""
    try:
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
    except OSError as error:
        raise CliError(
            f"{path} can not be written: {error.strerror}", hint="--archive names another"
        ) from error


def add(tar: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode("utf-8", "replace")
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
    tar.addfile(info, io.BytesIO(data))


def from_agent(agent: AgentClient) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of what the agent says; its silence is one of the answers."""
    for name, path in AGENT_PARTS.items():
        try:
            yield f"agent/{name}.json", json.dumps(agent.get(*path.split("/")), indent=1)
        except HoldfastError as error:
            yield f"agent/{name}.error", str(error)
    try:
        yield "agent/metrics.txt", agent.text(api_path("metrics"))
    except HoldfastError as error:
        yield "agent/metrics.error", str(error)


def from_engine(address: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of what the engine says of itself, its networks and its containers."""
    for name, (path, fields) in ENGINE_PARTS.items():
        try:
            answer = engine(address).request("GET", path)
            yield f"engine/{name}.json", json.dumps(kept(answer, fields), indent=1)
        except (HoldfastError, ValueError) as error:
            yield f"engine/{name}.error", str(error)


def kept(answer: Any, fields: tuple[str, ...]) -> Any:
    """Return an object, or each object of a list, with these fields only."""
    if isinstance(answer, list):
        return [kept(each, fields) for each in answer]
    return {field: answer[field] for field in fields if field in answer} if isinstance(answer, dict) else None


def from_host() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of commands, files and pinned maps."""
    for command in COMMANDS:
        yield f"commands/{command.replace('/', '_')}.txt", run(command.split(" "))
    for path in FILES:
        yield f"files{path}", read(Path(path))
    for pin in sorted(GLOBALS.iterdir()) if GLOBALS.is_dir() else []:
        if not pin.name.startswith(LARGE_MAPS):
            yield f"maps/{pin.name}.txt", run(["bpftool", "map", "dump", "pinned", str(pin)])


def run(command: list[str]) -> str:
    """Return what a command prints; that it is missing, fails or hangs is said in its place."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not run: {error}\n"
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        text += f"\nexit code {done.returncode}: {done.stderr.decode('utf-8', 'replace')}"
    return text


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return f"not read: {error}\n"
