# SPDX-License-Identifier: Apache-2.0
"""A real etcd with client certificates: ours get in, each under its own user name, and nobody else does."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from certs.apply import apply, survey
from certs.issue import Request
from certs.layout import Folder, Holder, Layout
from certs.plan import plan
from tests.support.etcd import free_ports
from tests.support.require import require_tools

REQUESTS = (
    Request(Holder.ETCD, "etcd-0"),
    Request(Holder.AGENT, "host-1"),
    Request(Holder.OPERATOR, "admin"),
)
START_PATIENCE_S = 30.0
Run = subprocess.CompletedProcess[str]


def make(root: Path, requests: tuple[Request, ...] = REQUESTS) -> Layout:
    layout = Layout(root)
    apply(plan(*survey(layout, requests)))
    return layout


def command(folder: Folder, data: Path, client: str, peer: str) -> list[str]:
    """Return etcd's command line: client and peer TLS with the files of `folder`, certificates demanded."""
    files = {"cert-file": folder.certificate, "key-file": folder.key, "trusted-ca-file": folder.authority}
    tls = [f"--{prefix}{name}={path}" for prefix in ("", "peer-") for name, path in files.items()]
    return [
        "etcd", "--name=etcd-0", f"--data-dir={data}", "--client-cert-auth", "--peer-client-cert-auth", *tls,
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=etcd-0={peer}", "--log-level=error", "--unsafe-no-fsync",
    ]  # fmt: skip


@contextlib.contextmanager
def etcd(layout: Layout, work: Path) -> Iterator[str]:
    """Run a member on free loopback ports and yield its URL."""
    client, peer = (f"https://127.0.0.1:{port}" for port in free_ports(2))
    with (work / "etcd.log").open("wb") as log:
        arguments = command(layout.folder(Holder.ETCD), work / "data", client, peer)
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
    try:
        wait_until_healthy(process, client, layout.folder(Holder.OPERATOR), work / "etcd.log")
        yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, folder: Folder, log: Path) -> None:
    end = time.monotonic() + START_PATIENCE_S
    while etcdctl(url, folder, "endpoint", "health").returncode != 0:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def etcdctl(url: str, folder: Folder | None, *arguments: str, authority: Path | None = None) -> Run:
    """Run etcdctl with a holder's certificate, or with none."""
    flags = [f"--endpoints={url}", "--dial-timeout=10s", "--command-timeout=20s"]
    if folder is not None:
        flags += [f"--cert={folder.certificate}", f"--key={folder.key}"]
    trusted = authority or (folder.authority if folder else None)
    environment = {"ETCDCTL_API": "3", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(
        ["etcdctl", *flags, f"--cacert={trusted}", *arguments],
        env=environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    require_tools("etcd", "etcdctl")
    return make(tmp_path_factory.mktemp("certs") / "pki")


@pytest.fixture(scope="module")
def member(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with etcd(layout, tmp_path_factory.mktemp("etcd")) as url:
        yield url


@pytest.mark.parametrize("holder", [Holder.AGENT, Holder.OPERATOR, Holder.ETCD])
def test_our_certificates_get_in(layout: Layout, member: str, holder: Holder) -> None:
    folder = layout.folder(holder)
    written = etcdctl(member, folder, "put", f"test/{holder.value}", "x")
    assert written.returncode == 0, written.stderr
    assert etcdctl(member, folder, "get", "--print-value-only", f"test/{holder.value}").stdout == "x\n"


def test_certificate_of_another_ca_of_the_same_name_is_refused(
    layout: Layout, member: str, tmp_path: Path
) -> None:
    foreign = make(tmp_path / "foreign").folder(Holder.AGENT)
    ours = layout.folder(Holder.AGENT).authority
    refused = etcdctl(member, foreign, "get", "test/agent", authority=ours)
    assert refused.returncode != 0
    assert refused.stdout == ""


def test_no_certificate_is_refused(layout: Layout, member: str) -> None:
    refused = etcdctl(member, None, "get", "test/agent", authority=layout.folder(Holder.AGENT).authority)
    assert refused.returncode != 0
    assert refused.stdout == ""


def test_client_does_not_talk_to_a_member_of_another_ca(layout: Layout, member: str, tmp_path: Path) -> None:
    foreign = make(tmp_path / "foreign").folder(Holder.AGENT).authority
    assert etcdctl(member, layout.folder(Holder.AGENT), "get", "x", authority=foreign).returncode != 0


def test_member_takes_a_new_certificate_without_a_restart(layout: Layout, member: str) -> None:
    """It reads its files at every handshake, so that a moved or renewed member stays up."""
    require_tools("openssl")
    moved = Request(Holder.ETCD, "etcd-0", ("10.99.0.1",))
    apply(plan(*survey(layout, (moved,))))
    assert etcdctl(member, layout.folder(Holder.AGENT), "get", "x").returncode == 0
    host, port = member.removeprefix("https://").rsplit(":", 1)
    shown = subprocess.run(
        ["openssl", "s_client", "-connect", f"{host}:{port}", "-showcerts"],
        input="", capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text"], input=shown.stdout, capture_output=True, text=True, timeout=30
    )
    assert "10.99.0.1" in text.stdout


def test_common_name_is_the_user_that_rights_are_given_to(tmp_path: Path) -> None:
    """With etcd's own roles on, the agent may do what its user may, and no more."""
    require_tools("etcd", "etcdctl")
    root = make(tmp_path / "pki", (*REQUESTS[:2], Request(Holder.OPERATOR, "admin")))
    operator, agent = root.folder(Holder.OPERATOR), root.folder(Holder.AGENT)
    with etcd(root, tmp_path) as url:
        for arguments in (
            ("user", "add", "root", "--no-password"),
            ("user", "grant-role", "root", "root"),
            ("user", "add", "operator:admin", "--no-password"),
            ("user", "grant-role", "operator:admin", "root"),
            ("role", "add", "agents"),
            ("role", "grant-permission", "agents", "--prefix=true", "readwrite", "cilium/"),
            ("user", "add", "agent:host-1", "--no-password"),
            ("user", "grant-role", "agent:host-1", "agents"),
            ("auth", "enable"),
        ):
            done = etcdctl(url, operator, *arguments)
            assert done.returncode == 0, (arguments, done.stderr)
        assert etcdctl(url, agent, "put", "cilium/x", "1").returncode == 0
        denied = etcdctl(url, agent, "put", "other/x", "1")
        assert denied.returncode != 0
        assert "permission denied" in denied.stderr
        users = json.loads(etcdctl(url, operator, "user", "list", "-w", "json").stdout)["users"]
        assert "agent:host-1" in users
