# SPDX-License-Identifier: Apache-2.0
"""The commands that write to etcd, as real processes against a real etcd: policy, kvstore, vm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from policy.language import MAX_STORED, stored_text
from tests.support.cli import run
from tests.support.etcd import EtcdServer

RULE = '[{"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]}]'
NAMESPACED = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: allow, namespace: shop}
spec: {endpointSelector: {}, ingress: [{}]}
"""


@pytest.fixture
def config(etcd: EtcdServer, tmp_path: Path) -> Path:
    """An etcd.config for the running etcd."""
    path = tmp_path / "etcd.config"
    path.write_text(f"endpoints: [{json.dumps(etcd.endpoint)}]\n")
    return path


def holdfast(config: Path, *words: str, stdin: str | None = None) -> tuple[int, str, str]:
    """Run one command with the credentials and no agent; return (exit code, stdout, stderr)."""
    done = run(*words, "--etcd-config", str(config), socket=config.parent / "none.sock", stdin=stdin)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_policy_apply_get_delete(config: Path, tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(RULE)
    apply = ["policy", "apply", "-f", str(tmp_path / "web.json")]
    assert holdfast(config, *apply)[1].startswith("web: created in etcd at revision ")
    assert holdfast(config, *apply)[1] == "web: unchanged\n"
    (tmp_path / "web.json").write_text(RULE.replace("web", "api"))
    assert holdfast(config, *apply)[1].startswith("web: updated in etcd")
    stored = json.loads(holdfast(config, "policy", "get", "--etcd", "-o", "json")[1])
    assert [each["name"] for each in stored["policies"]] == ["web"]
    assert stored["policies"][0]["document"][0]["endpointSelector"]["matchLabels"] == {"app": "api"}
    assert holdfast(config, "policy", "delete", "web", "none")[0] == 4
    assert holdfast(config, "policy", "delete", "web")[:2] == (0, "web: deleted\n")
    assert holdfast(config, "policy", "delete", "web")[0] == 4


def test_several_policies_are_one_revision(config: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.json").write_text(RULE)
    code, _, _ = holdfast(
        config, "policy", "apply", *(w for n in "abc" for w in ("-f", str(tmp_path / f"{n}.json")))
    )
    assert code == 0
    stored = json.loads(holdfast(config, "policy", "get", "--etcd", "-o", "json")[1])
    assert len(stored["policies"]) == 3


def test_a_policy_is_stored_without_blanks(config: Path, etcd: EtcdServer) -> None:
    holdfast(
        config, "policy", "apply", "-f", "-", "--name", "web", stdin=json.dumps(json.loads(RULE), indent=4)
    )
    assert etcd.ctl("get", "--print-value-only", "holdfast/policies/v1/web") == RULE.replace(" ", "") + "\n"


def test_the_largest_policy_fits_into_etcd(config: Path, etcd: EtcdServer) -> None:
    """In the form that people write, which is larger still; what is larger as it is stored writes nothing."""

    def policy(note: int) -> Any:
        metadata = {"name": "large", "annotations": {"note": "x" * note}}
        return {"kind": "CiliumNetworkPolicy", "metadata": metadata, "specs": json.loads(RULE) * 5000}

    room = MAX_STORED - len(stored_text(policy(0)))
    code, output, errors = holdfast(
        config, "policy", "apply", "-f", "-", stdin=json.dumps(policy(room), indent=2)
    )
    assert (code, errors) == (0, "")
    assert output.startswith("large: created in etcd")
    stored = etcd.ctl("get", "--print-value-only", "holdfast/policies/v1/large")
    assert stored == stored_text(policy(room)) + "\n"
    code, output, errors = holdfast(
        config, "policy", "apply", "-f", "-", stdin=json.dumps(policy(room + 1), indent=2)
    )
    assert (code, output) == (1, "")
    assert f"policy large takes {MAX_STORED + 1} bytes" in errors
    assert etcd.ctl("get", "--print-value-only", "holdfast/policies/v1/large") == stored


def test_one_bad_document_among_many_writes_nothing(config: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(RULE)
    (tmp_path / "b.json").write_text(RULE.replace("ingress", "ingres"))
    code, _, errors = holdfast(config, "policy", "apply", "-f", str(tmp_path))
    assert (code, "ingres" in errors, "b.json" in errors) == (1, True, True)
    assert json.loads(holdfast(config, "policy", "get", "--etcd", "-o", "json")[1])["policies"] == []


def test_a_namespaced_policy(config: Path) -> None:
    code, output, errors = holdfast(config, "policy", "apply", "-f", "-", stdin=NAMESPACED)
    assert (code, errors) == (0, "")
    assert output.startswith("shop/allow: created")
    assert holdfast(config, "policy", "delete", "shop/allow")[0] == 0


def test_local_refuses_what_etcd_has(config: Path) -> None:
    assert holdfast(config, "policy", "apply", "-f", "-", "--name", "web", stdin=RULE)[0] == 0
    code, _, errors = holdfast(config, "policy", "apply", "--local", "-f", "-", "--name", "web", stdin=RULE)
    assert (code, "in etcd already" in errors) == (1, True)


def test_delete_all(config: Path) -> None:
    for name in ("a", "b"):
        holdfast(config, "policy", "apply", "-f", "-", "--name", name, stdin=RULE)
    assert holdfast(config, "policy", "delete", "--all")[0] == 1
    gone = json.loads(holdfast(config, "policy", "delete", "--all", "-f", "-o", "json")[1])
    assert gone == [{"name": name, "change": "deleted"} for name in "ab"]


def test_delete_by_labels(config: Path) -> None:
    """Every rule of a policy must have them all; without a source a label is meant with any."""
    labelled = {
        "mine": ["k8s:team=shop", "tier=1"],
        "also": ["team=shop", "tier=1"],
        "other": ["team=shop", "tier=2"],
        "none": [],
    }
    for name, labels in labelled.items():
        rule = json.dumps([{**json.loads(RULE)[0], "labels": labels}])
        assert holdfast(config, "policy", "apply", "-f", "-", "--name", name, stdin=rule)[0] == 0
    delete = ["policy", "delete", "-l"]
    assert holdfast(config, *delete, "team=nobody")[0] == 4
    assert holdfast(config, *delete, "team=shop", "other")[0] == 2
    assert holdfast(config, *delete, "te;am")[0] == 2
    assert holdfast(config, *delete, "team=shop", "-l", "tier=1")[1] == "also: deleted\nmine: deleted\n"
    assert holdfast(config, *delete, "k8s:team=shop")[0] == 4
    stored = json.loads(holdfast(config, "policy", "get", "--etcd", "-o", "json")[1])
    assert [each["name"] for each in stored["policies"]] == ["none", "other"]


def test_delete_by_labels_takes_no_policy_apart(config: Path) -> None:
    rules = json.dumps([{**json.loads(RULE)[0], "labels": ["team=shop"]}, json.loads(RULE)[0]])
    assert holdfast(config, "policy", "apply", "-f", "-", "--name", "mixed", stdin=rules)[0] == 0
    code, _, errors = holdfast(config, "policy", "delete", "-l", "team=shop")
    assert (code, "1 of the 2 rules of policy mixed" in errors) == (1, True)
    assert holdfast(config, "policy", "get", "--etcd", "mixed")[0] == 0


def test_kvstore_verbs(config: Path) -> None:
    written = json.loads(holdfast(config, "kvstore", "set", "test/a", "1", "-o", "json")[1])
    assert (written["key"], written["revision"] > 1) == ("test/a", True)
    assert holdfast(config, "kvstore", "set", "--key", "test/b", "--value", "x\x1b[31m")[0] == 0
    assert holdfast(config, "kvstore", "get", "test/a")[1] == "test/a => 1\n"
    assert (
        holdfast(config, "kvstore", "get", "--recursive", "test/")[1] == "test/a => 1\ntest/b => x\\x1b[31m\n"
    )
    assert holdfast(config, "kvstore", "list", "test/")[1] == "test/a\ntest/b\n"
    assert json.loads(holdfast(config, "kvstore", "list", "test/", "-o", "json")[1]) == ["test/a", "test/b"]
    assert json.loads(holdfast(config, "kvstore", "get", "test/a", "-o", "json")[1]) == {"test/a": "1"}
    assert holdfast(config, "kvstore", "get", "test/c")[0] == 4
    assert holdfast(config, "kvstore", "delete", "test/a")[1] == "1 key deleted\n"
    assert holdfast(config, "kvstore", "delete", "--recursive", "test/")[0] == 1
    gone = json.loads(holdfast(config, "kvstore", "delete", "--recursive", "-f", "test/", "-o", "json")[1])
    assert gone == {"key": "test/", "deleted": 1}
    assert holdfast(config, "kvstore", "delete", "--recursive", "-f", "")[0] == 2


def test_an_etcd_that_is_away_is_exit_code_3(config: Path, etcd: EtcdServer) -> None:
    etcd.stop()
    code, _, errors = holdfast(config, "kvstore", "get", "a")
    assert (code, errors.startswith("Error: ")) == (3, True)


def test_vm_register_list_unregister(config: Path, etcd: EtcdServer) -> None:
    words = ["vm", "register", "legacy-1", "--ip", "10.1.2.3", "-l", "app=legacy"]
    code, output, errors = holdfast(config, *words)
    assert (code, errors) == (0, "")
    assert output.startswith("legacy-1: registered, identity ")
    assert "unchanged" in holdfast(config, *words)[1]
    assert '"IP":"10.1.2.3"' in etcd.ctl("get", "cilium/state/ip/v1/default/10.1.2.3")
    table = holdfast(config, "vm", "list")[1].splitlines()
    assert table[0] == "NAME       IDENTITY   LABELS                 ADDRESSES   HOST"
    number = output.split("identity ")[1].split(",")[0]
    assert table[1].split() == ["legacy-1", number, "container:app=legacy", "10.1.2.3"]
    assert holdfast(config, "vm", "list", "--no-headers")[1].split() == table[1].split()
    assert json.loads(holdfast(config, "vm", "list", "-o", "json")[1])[0]["addresses"] == ["10.1.2.3"]
    taken = holdfast(config, "vm", "register", "other", "--ip", "10.1.2.3", "-l", "app=x")
    assert (taken[0], "legacy-1" in taken[2]) == (1, True)
    assert holdfast(config, "vm", "register", "bad", "--ip", "florp", "-l", "app=x")[0] == 1
    gone = json.loads(holdfast(config, "vm", "unregister", "legacy-1", "-o", "json")[1])
    assert gone == {"name": "legacy-1", "deleted": True}
    assert holdfast(config, "vm", "unregister", "legacy-1")[0] == 4
    assert etcd.ctl("get", "--prefix", "--keys-only", "cilium/state/ip/").strip() == ""
