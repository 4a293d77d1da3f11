# SPDX-License-Identifier: Apache-2.0
"""Certificates as files: plan and apply, what is kept, what is refused and why; the command line."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization

from certs import authority
from certs.apply import apply, survey
from certs.commands import certs
from certs.errors import CertificateError
from certs.inspect import Condition
from certs.issue import Request, issue, utc_now
from certs.layout import Holder, Layout
from certs.material import load_key, load_pair, write_certificate, write_key
from certs.plan import Action, Step, plan

REQUESTS = (
    Request(Holder.ETCD, "etcd", ("10.1.2.3",)),
    Request(Holder.AGENT, "host-1"),
    Request(Holder.OPERATOR, "admin"),
)
DAY = datetime.timedelta(days=1)


def steps_for(
    layout: Layout, requests: tuple[Request, ...] = REQUESTS, renew: str = "", days: int = 0
) -> list[Step]:
    finding, wanted = survey(layout, requests, now=utc_now() + days * DAY)
    return plan(finding, wanted, {Holder(each) for each in renew.split()})


def actions(steps: list[Step]) -> list[str]:
    return [step.action.name for step in steps]


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A complete directory: CA, member, agent, operator."""
    layout = Layout(tmp_path / "pki")
    apply(steps_for(layout))
    return layout


def test_files_lie_where_the_layout_says_with_private_keys(layout: Layout) -> None:
    expected = {"ca/ca.crt", "ca/ca.key"}
    for name in ("etcd", "agent", "operator"):
        expected |= {f"{name}/ca.crt", f"{name}/{name}.crt", f"{name}/{name}.key"}
    assert set(contents(layout.root)) == expected
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in layout.root.rglob("*.*")}
    assert modes == {".crt": 0o644, ".key": 0o600}
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in layout.root.iterdir())


def test_second_run_changes_nothing(layout: Layout) -> None:
    before = contents(layout.root)
    steps = steps_for(layout)
    assert actions(steps) == ["KEEP"] * 4
    assert apply(steps) == []
    assert contents(layout.root) == before


def test_a_further_holder_is_added_to_what_is_there(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    apply(steps_for(layout, REQUESTS[:1]))
    before = contents(layout.root)
    apply(steps_for(layout))
    assert before.items() < contents(layout.root).items()


def test_interrupted_issue_is_finished_with_the_same_key(layout: Layout) -> None:
    folder = layout.folder(Holder.AGENT)
    key = folder.key.read_bytes()
    folder.certificate.unlink()
    steps = steps_for(layout)
    assert actions(steps) == ["KEEP", "KEEP", "CERTIFY", "KEEP"]
    apply(steps)
    assert folder.key.read_bytes() == key
    load_pair(folder)


def test_member_that_moved_gets_a_certificate_for_the_same_key(layout: Layout) -> None:
    moved = Request(Holder.ETCD, "etcd", ("10.9.9.9",))
    key = layout.folder(Holder.ETCD).key.read_bytes()
    steps = steps_for(layout, (moved,))
    assert steps[1].action is Action.CERTIFY
    assert "lacks 10.9.9.9" in steps[1].reason
    apply(steps)
    assert layout.folder(Holder.ETCD).key.read_bytes() == key
    assert actions(steps_for(layout, (moved,))) == ["KEEP", "KEEP"]


def test_renew_replaces_only_who_is_named(layout: Layout) -> None:
    before = contents(layout.root)
    apply(steps_for(layout, renew="agent"))
    after = contents(layout.root)
    assert {name for name in after if after[name] != before[name]} == {"agent/agent.key", "agent/agent.crt"}


def test_new_authority_needs_everybody_renewed(layout: Layout) -> None:
    assert actions(steps_for(layout, renew="ca")) == ["REPLACE", "REFUSE", "REFUSE", "REFUSE"]
    apply(steps_for(layout, renew="ca etcd agent operator"))
    assert actions(steps_for(layout)) == ["KEEP"] * 4


def test_lost_authority_is_not_replaced_behind_the_back_of_its_leaves(layout: Layout) -> None:
    for file in layout.folder(Holder.AUTHORITY).path.iterdir():
        file.unlink()
    with pytest.raises(CertificateError, match="signed by another CA"):
        apply(steps_for(layout))
    assert not layout.folder(Holder.AUTHORITY).key.exists()


def test_authority_key_may_be_offline_until_it_is_needed(layout: Layout) -> None:
    layout.folder(Holder.AUTHORITY).key.unlink()
    assert actions(steps_for(layout)) == ["KEEP"] * 4
    layout.folder(Holder.AGENT).certificate.unlink()
    with pytest.raises(CertificateError, match=r"ca\.key does not exist, and it is needed to sign"):
        apply(steps_for(layout))


def test_old_copy_of_the_authority_is_brought_up_to_date(layout: Layout) -> None:
    folder = layout.folder(Holder.OPERATOR)
    write_certificate(folder.authority, authority.create().certificate)
    steps = steps_for(layout)
    assert actions(steps) == ["KEEP", "KEEP", "KEEP", "COPY"]
    apply(steps)
    assert folder.authority.read_bytes() == layout.folder(Holder.AUTHORITY).certificate.read_bytes()


def test_another_hosts_certificate_is_not_overwritten(layout: Layout) -> None:
    steps = steps_for(layout, (Request(Holder.AGENT, "host-2"),))
    assert actions(steps) == ["KEEP", "REFUSE"]
    assert "is for agent:host-1, not for agent:host-2" in steps[1].reason


def test_expiry_is_seen_before_and_after(layout: Layout) -> None:
    early, soon, late = (steps_for(layout, days=days)[2] for days in (300, 340, 400))
    assert (early.warning, soon.warning) == (False, True)
    assert "expires on" in soon.reason
    assert (late.action, "expired on" in late.reason) == (Action.REFUSE, True)


def damage_certificate(layout: Layout) -> None:
    layout.folder(Holder.AGENT).certificate.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")


def damage_key(layout: Layout) -> None:
    layout.folder(Holder.AGENT).key.write_bytes(b"\x00\x01")


def empty_key(layout: Layout) -> None:
    layout.folder(Holder.AGENT).key.write_bytes(b"")


def lose_key(layout: Layout) -> None:
    layout.folder(Holder.AGENT).key.unlink()


def swap_key(layout: Layout) -> None:
    write_key(layout.folder(Holder.AGENT).key, load_key(layout.folder(Holder.OPERATOR).key))


def expose_key(layout: Layout) -> None:
    layout.folder(Holder.AGENT).key.chmod(0o644)


def encrypt_key(layout: Layout) -> None:
    path = layout.folder(Holder.AGENT).key
    secret = serialization.BestAvailableEncryption(b"x")
    path.write_bytes(
        load_key(path).private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    )


def use_foreign_authority(layout: Layout) -> None:
    folder = layout.folder(Holder.AGENT)
    foreign = issue(authority.create(), Request(Holder.AGENT, "host-1"), key=load_key(folder.key))
    write_certificate(folder.certificate, foreign.certificate)


def expire(layout: Layout) -> None:
    folder, signer = layout.folder(Holder.AGENT), load_pair(layout.folder(Holder.AUTHORITY))
    old = issue(signer, Request(Holder.AGENT, "host-1"), key=load_key(folder.key), now=utc_now() - 400 * DAY)
    write_certificate(folder.certificate, old.certificate)


@pytest.mark.parametrize(
    ("damage", "file", "reason", "advice"),
    [
        (damage_certificate, "agent.crt", "is not a PEM certificate", "--renew"),
        (damage_key, "agent.key", "is not a PEM private key", "--renew"),
        (empty_key, "agent.key", "is not a PEM private key", "--renew"),
        (lose_key, "agent.key", "does not exist", "init"),
        (swap_key, "agent.crt", "was not made for the key", "--renew"),
        (expose_key, "agent.key", "has mode 0644", "chmod 600"),
        (encrypt_key, "agent.key", "is encrypted", "without a passphrase"),
        (use_foreign_authority, "agent.crt", "was not signed by the CA", "--renew"),
        (expire, "agent.crt", "expired on", "--renew"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_damage_is_named_refused_and_mended_by_renew(
    layout: Layout, damage: object, file: str, reason: str, advice: str
) -> None:
    assert callable(damage)
    damage(layout)
    before = contents(layout.root)
    with pytest.raises(CertificateError) as refused:
        apply(steps_for(layout))
    message = str(refused.value)
    assert str(layout.folder(Holder.AGENT).path / file) in message
    assert reason in message
    assert advice in message
    assert "PRIVATE KEY" not in message
    assert contents(layout.root) == before
    apply(steps_for(layout, renew="agent"))
    assert actions(steps_for(layout)) == ["KEEP"] * 4


def test_leaf_in_the_authoritys_place_is_refused(layout: Layout) -> None:
    root, leaf = layout.folder(Holder.AUTHORITY), load_pair(layout.folder(Holder.AGENT))
    write_certificate(root.certificate, leaf.certificate)
    write_key(root.key, leaf.key)
    finding, _ = survey(layout, [])
    assert finding.condition is Condition.BROKEN
    assert "is not a CA certificate" in finding.detail


def test_directory_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CertificateError, match="can not be written"):
        apply(steps_for(Layout(tmp_path / "file" / "pki")))


# --- the command line


def run(*arguments: str) -> Result:
    return CliRunner().invoke(certs, arguments)


def run_init(directory: Path, *more: str) -> Result:
    named = ["--etcd-name", "etcd", "--etcd-address", "10.1.2.3", "--agent", "host-1", "--operator", "admin"]
    return run("init", "--dir", str(directory), *named, *more)


def test_init_writes_config_with_the_paths_the_reader_sees(tmp_path: Path) -> None:
    url = "https://10.1.2.3:2379"
    result = run_init(tmp_path, "--endpoint", url, "--agent-path", "/var/lib/etcd-config")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "agent" / "etcd.config").read_text()) == {
        "endpoints": [url],
        "trusted-ca-file": "/var/lib/etcd-config/ca.crt",
        "cert-file": "/var/lib/etcd-config/agent.crt",
        "key-file": "/var/lib/etcd-config/agent.key",
    }
    operator = yaml.safe_load((tmp_path / "operator" / "etcd.config").read_text())
    assert operator["key-file"] == "/etc/holdfast/operator/operator.key"


def test_config_that_somebody_edited_stays_unless_endpoints_are_given(tmp_path: Path) -> None:
    run_init(tmp_path)
    config = tmp_path / "agent" / "etcd.config"
    config.write_text("endpoints: [https://mine:2379]\n")
    run_init(tmp_path)
    assert "mine" in config.read_text()
    run_init(tmp_path, "--endpoint", "https://other:2379")
    assert "other" in config.read_text()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run_init(tmp_path / "pki", "--dry-run")
    assert "agent: create: agent:host-1 has none yet" in result.output
    assert not (tmp_path / "pki").exists()


def test_issue_into_a_folder_for_another_host(tmp_path: Path) -> None:
    run_init(tmp_path / "pki")
    result = run(
        "issue", "agent", "host-2", "--dir", str(tmp_path / "pki"), "--into", str(tmp_path / "host-2")
    )
    assert result.exit_code == 0, result.output
    assert set(os.listdir(tmp_path / "host-2")) == {"ca.crt", "agent.crt", "agent.key", "etcd.config"}


def test_list_and_check_tell_good_from_broken(tmp_path: Path) -> None:
    run_init(tmp_path)
    rows = json.loads(run("list", "--dir", str(tmp_path), "-o", "json").output)
    assert [(row["holder"], row["state"]) for row in rows] == [
        ("ca", "good"), ("etcd", "good"), ("agent", "good"), ("operator", "good"),
    ]  # fmt: skip
    assert "agent:host-1" in run("list", "--dir", str(tmp_path)).output
    assert run("check", "--dir", str(tmp_path)).exit_code == 0
    (tmp_path / "agent" / "agent.key").chmod(0o666)
    result = run("check", "--dir", str(tmp_path))
    assert result.exit_code == 1
    assert "agent: broken: private key" in result.output


def test_check_works_on_a_host_that_has_only_its_own_folder(tmp_path: Path) -> None:
    run_init(tmp_path)
    for file in (tmp_path / "ca").iterdir():
        file.unlink()
    assert run("check", "--dir", str(tmp_path)).exit_code == 0


def test_check_of_nothing_is_a_failure(tmp_path: Path) -> None:
    assert run("check", "--dir", str(tmp_path)).exit_code == 1


@pytest.mark.parametrize("endpoint", ["10.0.0.1:2379", "ftp://a", "https://a b", "https://a:99999999", ""])
def test_senseless_endpoint_is_refused(tmp_path: Path, endpoint: str) -> None:
    result = run_init(tmp_path, "--endpoint", endpoint)
    assert isinstance(result.exception, CertificateError)
    assert "is no etcd endpoint" in str(result.exception)
