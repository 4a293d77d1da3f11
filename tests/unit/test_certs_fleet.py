# SPDX-License-Identifier: Apache-2.0
"""An inventory becomes a folder for each machine: what is in it, what stays, what is refused and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from certs.commands import certs
from certs.inspect import summarize
from certs.inventory import load
from certs.issue import PEER_NAME
from certs.material import load_certificate
from kvstore.config import EtcdConfig

INVENTORY = """
members:
  etcd-1: 10.0.0.1
  etcd-2: [10.0.0.2, etcd-2.example.org]
  etcd-3: "fd00:0::3"
hosts: [web-1]
operators: [admin]
settings: {snapshot-keep: 20}
"""
MEMBER = {"ca.crt", "etcd.crt", "etcd.key", "etcd.config", "member.env"}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(certs, arguments)


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    path = tmp_path / "fleet" / "inventory.yaml"
    path.parent.mkdir()
    path.write_text(INVENTORY)
    return path


def made(inventory: Path, *more: str) -> Path:
    result = run("fleet", str(inventory), *more)
    assert result.exit_code == 0, result.output
    return inventory.parent


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_machine_gets_what_it_needs_and_no_more(inventory: Path) -> None:
    root = made(inventory)
    assert names(root) == {"inventory.yaml", "ca", "members", "hosts", "operators"}
    for member in ("etcd-1", "etcd-2", "etcd-3"):
        assert names(root / "members" / member) == MEMBER
    assert names(root / "hosts" / "web-1") == {"ca.crt", "agent.crt", "agent.key", "etcd.config"}
    assert names(root / "operators" / "admin") == {"ca.crt", "operator.crt", "operator.key", "etcd.config"}
    assert [str(path) for path in root.rglob("ca.key")] == [str(root / "ca" / "ca.key")]
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*.key")} == {0o600}
    assert run("check", "--dir", str(root)).output == "6 checked, 0 broken\n"


def test_members_certificates_hold_their_addresses_and_settings_say_the_same(inventory: Path) -> None:
    folder = made(inventory) / "members" / "etcd-3"
    assert summarize(load_certificate(folder / "etcd.crt")).names == {
        "etcd-3", "fd00::3", "localhost", "127.0.0.1", "::1", PEER_NAME,
    }  # fmt: skip
    lines = (folder / "member.env").read_text().splitlines()[1:]
    settings = dict(line.split("=", 1) for line in lines)
    assert settings.pop("HOLDFAST_CLUSTER_TOKEN").startswith("holdfast-")
    assert settings == {
        "HOLDFAST_MEMBER": "etcd-3",
        "HOLDFAST_MEMBER_ADDRESS": "[fd00::3]",
        "HOLDFAST_MEMBERS": "etcd-1=https://10.0.0.1:2380,etcd-2=https://10.0.0.2:2380,"
        "etcd-3=https://[fd00::3]:2380",
        "HOLDFAST_SNAPSHOT_KEEP": "20",
    }


def test_everybody_is_told_where_etcd_is(inventory: Path) -> None:
    root = made(inventory)
    endpoints = ("https://10.0.0.1:2379", "https://10.0.0.2:2379", "https://[fd00::3]:2379")
    places = {"members/etcd-1": "/etc/etcd/certs/etcd.key", "hosts/web-1": "/etc/holdfast/certs/agent.key"}
    for place, key in places.items():
        config = EtcdConfig.load(root / place / "etcd.config")
        assert (config.endpoints, str(config.key)) == (endpoints, key)


def test_again_changes_nothing_and_a_line_more_adds_a_machine(inventory: Path) -> None:
    before = contents(made(inventory))
    assert contents(made(inventory)) == before
    inventory.write_text(INVENTORY.replace("[web-1]", "[web-1, web-2]"))
    after = contents(made(inventory))
    del before["inventory.yaml"]
    assert before.items() < after.items()
    assert "hosts/web-2/agent.key" in after


def test_a_member_that_moved_keeps_its_key_and_everybody_is_told(inventory: Path) -> None:
    before = contents(made(inventory))
    inventory.write_text(INVENTORY.replace("10.0.0.1", "10.0.0.9"))
    after = contents(made(inventory))
    assert after["members/etcd-1/etcd.key"] == before["members/etcd-1/etcd.key"]
    assert after["members/etcd-1/etcd.crt"] != before["members/etcd-1/etcd.crt"]
    assert after["members/etcd-2/etcd.crt"] == before["members/etcd-2/etcd.crt"]
    assert b"10.0.0.9" in after["hosts/web-1/etcd.config"]


def test_renewal_is_of_who_is_named(inventory: Path) -> None:
    before = contents(made(inventory))
    after = contents(made(inventory, "--renew", "web-1"))
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"hosts/web-1/agent.key", "hosts/web-1/agent.crt"}
    assert "not in the inventory" in str(run("fleet", str(inventory), "--renew", "web-7").exception)


def test_dry_run_writes_nothing(inventory: Path) -> None:
    result = run("fleet", str(inventory), "--dry-run")
    assert "etcd: create: etcd:etcd-1 has none yet" in result.output
    assert names(inventory.parent) == {"inventory.yaml"}


def test_an_even_number_of_members_is_remarked_upon(inventory: Path) -> None:
    inventory.write_text("members: {a: 10.0.0.1, b: 10.0.0.2}\n")
    assert "2 members bear no more losses than one less does" in run("fleet", str(inventory)).output


def test_a_fleets_broken_certificate_is_found(inventory: Path) -> None:
    root = made(inventory)
    (root / "hosts" / "web-1" / "agent.key").chmod(0o644)
    result = run("check", "--dir", str(root))
    assert result.exit_code == 1
    assert "hosts/web-1/agent.key has mode 0644" in result.output
    rows = json.loads(run("list", "--dir", str(root), "-o", "json").output)
    assert [row["user"] for row in rows if row["state"] == "broken"] == ["agent:web-1"]


def test_check_knows_whose_host_this_is(inventory: Path, tmp_path: Path) -> None:
    (made(inventory) / "hosts" / "web-1").rename(tmp_path / "agent")
    assert run("check", "--dir", str(tmp_path), "--agent", "web-1").exit_code == 0
    wrong = run("check", "--dir", str(tmp_path), "--agent", "web-2")
    assert wrong.exit_code == 1
    assert "agent.crt is for agent:web-1, and this host is called web-2" in wrong.output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no members"),
        ("[]", "holds no members"),
        ("a: [", "is not YAML"),
        ("hosts: [a]", "members is None"),
        ("members: []", "members is []"),
        ("members: {a: 10.0.0.1}\nmember: {}", "unknown field 'member'"),
        ("members: {a: 10.0.0}", "10.0.0"),
        ("members: {a: example.org}", "example.org is not an IP address"),
        ("members: {a: [10.0.0.1, 'x y']}", "'x y'"),
        ("members: {a: 7}", "a is 7"),
        ("members: {a: []}", "a is []"),
        ("members: {a: 10.0.0.1, b: 10.0.0.1}", "a and b both have the address 10.0.0.1"),
        ("members: {a/b: 10.0.0.1}", "a/b can not be a name"),
        ("members: {..: 10.0.0.1}", ".. can not be a name"),
        ("members: {a: 10.0.0.1}\nhosts: web", "hosts is web"),
        ("members: {a: 10.0.0.1}\nhosts: [web, web]", "web is there twice"),
        ("members: {a: 10.0.0.1}\nhosts: [1]", "hosts: 1 can not be a name"),
        ("members: {a: 10.0.0.1}\nsettings: {keep: 1}", "settings: unknown keep"),
        ("members: {a: 10.0.0.1}\nsettings: {quota: '1 --x'}", "quota can not be 1 --x"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(inventory: Path, text: str, complaint: str) -> None:
    inventory.write_text(text)
    result = run("fleet", str(inventory))
    assert result.exit_code == 1
    assert complaint in str(result.exception)
    assert names(inventory.parent) == {"inventory.yaml"}


def test_a_missing_inventory_is_named(tmp_path: Path) -> None:
    assert "none.yaml can not be read" in str(run("fleet", str(tmp_path / "none.yaml")).exception)


def test_the_example_of_the_guide_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "installation.md").read_text()
    example = page.split("cat >fleet/inventory.yaml <<EOT\n")[1].split("EOT\n")[0]
    (tmp_path / "inventory.yaml").write_text(example)
    assert load(tmp_path / "inventory.yaml").members.keys() == yaml.safe_load(example)["members"].keys()
