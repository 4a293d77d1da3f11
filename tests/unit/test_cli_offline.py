# SPDX-License-Identifier: Apache-2.0
"""The commands that need no agent: policies checked, configurations checked, the engine's socket."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agent.options import OPTIONS
from policy.language import MAX_STORED
from tests.support.cli import run

GOOD = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: allow-web}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
"""


# --- policy files


def test_validate_good_files_directories_and_standard_input(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("not a policy")
    for words in (["-f", str(tmp_path)], ["-f", str(tmp_path / "a.yaml")], [str(tmp_path / "a.yaml")]):
        result = run("policy", "validate", *words)
        assert (result.stdout, result.returncode) == ("All policy elements are valid.\n", 0)
    assert run("policy", "validate", "-f", "-", stdin=GOOD).returncode == 0
    printed = json.loads(run("policy", "validate", "-f", "-", "-o", "json", stdin=GOOD).stdout)
    assert printed["policies"][0]["metadata"]["name"] == "allow-web"
    assert printed["warnings"] == []
    shown, _, said = run("policy", "validate", "-f", "-", "--print", stdin=GOOD).stdout.rpartition("]")
    assert json.loads(f"{shown}]") == printed["policies"]
    assert said.strip() == "All policy elements are valid."


def test_validate_warns_of_what_is_hardly_meant() -> None:
    """It is valid all the same: a script that looks at the exit code goes on."""
    doubtful = GOOD.replace("[{matchLabels: {app: web}}]", "null\n    toPorts: [{ports: [{port: 80}]}]")
    result = run("policy", "validate", "-f", "-", stdin=doubtful)
    assert (result.stdout, result.returncode) == ("All policy elements are valid.\n", 0)
    assert result.stderr.startswith("Warning: standard input, line 8: spec.ingress[0].fromEndpoints: null ")
    (warning,) = json.loads(run("policy", "validate", "-f", "-", "-o", "json", stdin=doubtful).stdout)[
        "warnings"
    ]
    assert (warning["line"], warning["path"]) == (8, "spec.ingress[0].fromEndpoints")


def test_validate_refuses_what_could_not_be_applied(tmp_path: Path) -> None:
    """A policy that is larger than etcd's requests, by name, with its size, the limit and what to do."""
    rule = {"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]}
    large = {
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "large", "annotations": {"note": "x" * MAX_STORED}},
        "spec": rule,
    }
    (tmp_path / "large.json").write_text(json.dumps(large))
    for command in (["validate"], ["apply", "--etcd-config", "/none"], ["apply", "--local"]):
        result = run("policy", *command, "-f", str(tmp_path / "large.json"))
        assert result.returncode == 1
        assert "large.json: policy large takes 15" in result.stderr
        assert str(MAX_STORED) in result.stderr
        assert "split its rules into several policies" in result.stderr


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD.replace("ingress", "ingres"), "ingres"),
        (GOOD.replace("fromEndpoints: [{matchLabels: {app: web}}]", "toFQDNs: []"), "toFQDNs"),
        ("{", ""),
        ("", "no policy"),
        ("- 5", ""),
        ("\x00", ""),
    ],
)
def test_validate_names_what_is_wrong(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = run("policy", "validate", "-f", str(path))
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "bad.yaml" in result.stderr
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(GOOD)
    result = run("policy", "validate", "-f", str(tmp_path))
    assert result.returncode == 1
    assert "a.yaml" in result.stderr
    assert "b.yaml" in result.stderr


@pytest.mark.parametrize("name", ["missing.yaml", "empty", "binary.yaml"])
def test_files_that_can_not_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    result = run("policy", "validate", "-f", str(tmp_path / name))
    assert result.returncode in (1, 4)
    assert name in result.stderr


def test_apply_without_credentials_says_so(tmp_path: Path) -> None:
    config = tmp_path / "etcd.config"
    result = run(
        "policy", "apply", "-f", "-", "--etcd-config", str(config), socket=tmp_path / "none", stdin=GOOD
    )
    assert (result.returncode, str(config) in result.stderr) == (4, True)


# --- configuration


def test_list_options_and_sample_name_every_option() -> None:
    listed, sample = run("config", "--list-options").stdout, run("config", "generate-sample").stdout
    for option in OPTIONS:
        assert f"--{option.name}=" in listed
        assert f"#{option.name}: " in sample


def test_validate_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "holdfast.yaml"
    path.write_text("cluster-name: dc1\ncluster-id: 3\n")
    assert "is valid" in run("config", "validate", "--config", str(path)).stdout
    checked = json.loads(run("config", "validate", "--config", str(path), "-o", "json").stdout)
    assert checked["valid"] is True
    assert checked["options"]["cluster-id"] == {"value": "3", "origin": f"file {path} line 2"}
    assert checked["options"]["cluster-name"]["value"] == "dc1"
    path.write_text("cluster-id: 300\n")
    result = run("config", "validate", "--config", str(path))
    assert result.returncode == 1
    for part in ("cluster-id", "300", str(path), "line 1", "at most 255"):
        assert part in result.stderr


def test_sample_as_json_is_a_configuration_that_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "holdfast.yaml"
    path.write_text(run("config", "generate-sample", "-o", "json").stdout)
    checked = json.loads(run("config", "validate", "--config", str(path), "-o", "json").stdout)["options"]
    without = json.loads(run("config", "validate", "-o", "json").stdout)["options"]
    changed = {name for name in checked if checked[name]["value"] != without[name]["value"]}
    assert changed == {"config"}, "only where the file itself is"


# --- the engine's socket


class Engine(http.server.BaseHTTPRequestHandler):
    """Answers as the engine does to what `holdfast network` asks."""

    requests: ClassVar[list[tuple[str, str, Any]]] = []

    def _answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.requests.append(("GET", self.path, None))
        created = "2026-01-01T00:00:00.123456789Z"
        self._answer(200, [{"Id": "a" * 64, "Name": "web", "Scope": "local", "Created": created}])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(("POST", self.path, body))
        if body["Name"] == "taken":
            self._answer(409, {"message": "network with name taken already exists"})
        else:
            self._answer(201, {"Id": "b" * 64, "Warning": ""})

    def do_DELETE(self) -> None:
        self.requests.append(("DELETE", self.path, None))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def get_request(self) -> tuple[Any, Any]:
        return super().get_request()[0], ("local", 0)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "docker.sock"
    Engine.requests.clear()
    with UnixServer(str(path), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield path
        server.shutdown()
        thread.join(10)


def test_network_create_asks_for_driver_and_null_ipam(engine: Path) -> None:
    result = run("network", "create", "web", "--label", "a=b", "--docker", f"unix://{engine}")
    assert (result.stdout, result.stderr) == ("b" * 64 + "\n", "")
    method, path, body = Engine.requests[0]
    assert (method, path) == ("POST", "/networks/create")
    assert (body["Driver"], body["IPAM"], body["Labels"]) == ("holdfast", {"Driver": "null"}, {"a": "b"})


def test_network_errors_are_the_engines_words(engine: Path, tmp_path: Path) -> None:
    taken = run("network", "create", "taken", "--docker", f"unix://{engine}")
    assert (taken.returncode, taken.stderr) == (1, "Error: network with name taken already exists\n")
    nobody = run("network", "list", "--docker", f"unix://{tmp_path}/none.sock")
    assert (nobody.returncode, "is docker running" in nobody.stderr) == (3, True)
    assert run("network", "list", "--docker", "tcp://10.0.0.1:2375").returncode == 1


def test_network_list(engine: Path) -> None:
    result = run("network", "list", "--docker", str(engine))
    assert result.stdout.splitlines()[0] == "NETWORK ID     NAME   SCOPE   CREATED"
    assert "driver" in Engine.requests[0][1]
    assert result.stdout.splitlines()[1:] == ["a" * 12 + "   web    local   2026-01-01T00:00:00"]
    bare = run("network", "list", "--docker", str(engine), "--no-headers").stdout
    assert bare.split() == result.stdout.splitlines()[1].split()
    (found,) = json.loads(run("network", "list", "--docker", str(engine), "-o", "json").stdout)
    assert (found["Id"], found["Name"]) == ("a" * 64, "web")


def test_network_delete(engine: Path) -> None:
    where = ("--docker", str(engine))
    assert run("network", "delete", "web", *where).stdout == "Network web is removed\n"
    said = json.loads(run("network", "delete", "a/b", "-o", "json", *where).stdout)
    assert said == {"name": "a/b", "deleted": True}
    assert [path for _, path, _ in Engine.requests] == ["/networks/web", "/networks/a%2Fb"]


# --- certificates


def test_certs_make_and_list(tmp_path: Path) -> None:
    where = ["--dir", str(tmp_path / "pki")]
    assert (
        run("certs", "init", *where, "--etcd-name", "etcd", "--agent", "host1", "--operator").returncode == 0
    )
    assert "agent:host1" in run("certs", "list", *where).stdout
    assert run("certs", "check", *where).stdout == "4 checked, 0 broken\n"
    checked = json.loads(run("certs", "check", *where, "-o", "json").stdout)
    assert (checked["checked"], checked["broken"]) == (4, 0)
    assert {each["state"] for each in checked["certificates"]} == {"good"}
    into = tmp_path / "host2"
    issued = json.loads(
        run("certs", "issue", *where, "agent", "host2", "--into", str(into), "-o", "json").stdout
    )
    assert [(each["holder"], each["action"]) for each in issued["steps"]] == [
        ("ca", "keep"),
        ("agent", "create"),
    ]
    assert sorted(issued["written"]) == sorted(map(str, into.iterdir()))
    shown = json.loads(run("certs", "init", *where, "--agent", "host1", "--dry-run", "-o", "json").stdout)
    assert shown["written"] == []
    refused = run("certs", "issue", *where, "agent", "a b")
    assert (refused.returncode, refused.stderr.startswith("Error: ")) == (1, True)
