# SPDX-License-Identifier: Apache-2.0
"""The commands that speak to the agent, as real processes against a small agent on a real socket."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from agent.api import models
from cli.commands.status import NOT_KNOWN, duration, identities, ipam, node, staleness, waits
from tests.support.agent_view import FakeAgent, Serving, make_endpoint, serving
from tests.support.cli import ROOT, command, run
from tests.support.fake_engine import FakeEngine

RULE = '[{"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]}]'


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Serving]:
    with serving(FakeAgent(), tmp_path / "h.sock") as served:
        yield served


def test_start_now_says_what_was_left_of_the_wait(agent: Serving) -> None:
    result = run("start-now", "--by", "alice", socket=agent.path)
    assert (result.returncode, result.stdout) == (0, "etcd is asked now, 20m34s before this host's slot\n")
    assert agent.view.ordered_by == "alice"
    unnamed = run("start-now", "--by", "\x07", socket=agent.path)
    assert unnamed.returncode == 1
    assert "names nobody" in unnamed.stderr


def test_start_now_without_an_agent_leaves_the_order_to_the_start_hook(tmp_path: Path) -> None:
    nobody = tmp_path / "nobody.sock"
    result = run("start-now", "--by", "alice", "--state-dir", str(tmp_path), socket=nobody)
    assert result.returncode == 0
    assert str(tmp_path / "start-now") in result.stderr
    assert (tmp_path / "start-now").read_text() == "alice"
    lost = run("start-now", "--state-dir", str(tmp_path / "none"), socket=nobody)
    assert lost.returncode == 1
    assert "no agent answers, and there is no" in lost.stderr


def test_start_now_that_can_not_be_left_is_told(tmp_path: Path) -> None:
    (tmp_path / "start-now").mkdir()
    lost = run("start-now", "--by", "\udcff", "--state-dir", str(tmp_path), socket=tmp_path / "nobody.sock")
    assert lost.returncode == 1
    assert f"the order can not be left in {tmp_path}/start-now: Is a directory" in lost.stderr
    assert "Traceback" not in lost.stderr


def test_status_has_ciliums_lines(agent: Serving) -> None:
    result = run("status", socket=agent.path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = {line.partition(":")[0]: line.partition(":")[2].strip() for line in result.stdout.splitlines()}
    assert lines["KVStore"] == "Ok   etcd: 1/1 connected, has-quorum=true"
    assert lines["IPAM"] == "IPv4: 2/65535 allocated from 10.50.0.0/16"
    assert lines["Controller Status"] == "1/1 healthy"
    assert lines["Waiting"] == "1m1s for etcd (first list)"
    assert lines["Not managed"].startswith("1 container")
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_status_brief_verbose_and_json(agent: Serving) -> None:
    assert run("status", "--brief", socket=agent.path).stdout == "OK\n"
    assert "cilium_lxc" in run("status", "--verbose", socket=agent.path).stdout
    assert json.loads(run("status", "-o", "json", socket=agent.path).stdout)["ipam"]["used"] == 2


def test_status_says_what_is_not_known_yet() -> None:
    assert node({"name": ""}) == NOT_KNOWN
    assert ipam({"pool": ""}) == NOT_KNOWN
    lacking = {"pool": "10.0.0.0/24", "used": 1, "available": 2, "lacking": "no IPv6: …"}
    assert ipam(lacking) == "IPv4: 1/3 allocated from 10.0.0.0/24 (no IPv6: …)"
    assert identities({"identity-range": ""}) == NOT_KNOWN


def test_an_old_view_is_a_warning_that_names_the_option() -> None:
    assert staleness(-1, 600) == "the kvstore has not been heard since the start"
    assert staleness(600, 600) == "the kvstore confirmed this view 10m0s ago"
    assert staleness(9000, 0) == "the kvstore confirmed this view 2h30m ago"
    assert staleness(601, 600) == (
        "Warning the kvstore confirmed this view 10m1s ago: longer than kvstore-staleness-threshold, 10m0s"
    )


def test_what_waits_for_the_same_is_one_line_of_status() -> None:
    gone = "etcd at 10.0.0.1:2379 is unavailable"
    found = [
        {
            "subject": "etcd",
            "purpose": f"view of {name}",
            "seconds": 61.0,
            "note": gone if name == "b" else "",
        }
        for name in "abcde"
    ]
    found += [
        {"subject": "docker", "purpose": "first list", "seconds": 5.0, "note": ""},
        {"subject": "etcd", "purpose": "identity of app=a", "seconds": 3.0, "note": ""},
        {"subject": "etcd", "purpose": "identity of app=b", "seconds": 4.0, "note": ""},
    ]
    assert [each.split(None, 1)[1] for each in waits(found)] == [
        f"1m1s for etcd (view of a; view of b; view of c; 2 more): {gone}",
        "5s for docker (first list)",
        "4s for etcd (identity of app=a; identity of app=b)",
    ]


def test_status_of_a_failed_part_is_an_exit_code(agent: Serving) -> None:
    agent.view.kvstore = models.Component(state="Failure", msg="no endpoint answers\x1b[31m")
    result = run("status", "--brief", socket=agent.path)
    assert result.returncode == 1
    assert result.stdout == "kvstore: no endpoint answers\\x1b[31m\n"


def test_without_an_agent_the_error_says_what_to_do(tmp_path: Path) -> None:
    for words in (["status"], ["endpoint", "list"], ["monitor"], ["policy", "get"]):
        result = run(*words, socket=tmp_path / "none.sock")
        assert result.returncode == 3
        assert result.stderr.startswith("Error: the agent at ")
        assert "is the agent running" in result.stderr
        assert "Traceback" not in result.stderr


TABLES = [
    (["endpoint", "list"], "ENDPOINT   POLICY (ingress)   POLICY (egress)   IDENTITY   "
                           "LABELS (source:key[=value])   IPv6   IPv4          STATUS"),
    (["endpoint", "log", "373"], "Timestamp              Status   State   Message"),
    (["identity", "list"], "ID      LABELS               REFCOUNT"),
    (["identity", "list", "--endpoints"], "ID      LABELS               REFCOUNT"),
    (["identity", "get", "1"], "ID   LABELS"),
    (["ip", "list"], "IP               IDENTITY             SOURCE"),
    (["node", "list"], "Name   IPv4 Address   Endpoint CIDR   IPv6 Address   Endpoint CIDR   Source"),
    (["map", "list"], "Name         Num entries   Num errors   Cache enabled"),
    (["map", "get", "cilium_lxc"], "Key           Value    State   Error"),
    (["metrics", "list"], "Metric                    Labels                   Value"),
    (["policy", "selectors"], "SELECTOR            USERS   IDENTITIES"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "header"), TABLES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_headers_are_stable(agent: Serving, words: list[str], header: str) -> None:
    result = run(*words, socket=agent.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == header
    assert not [line for line in result.stdout.splitlines() if line != line.rstrip()]


@pytest.mark.parametrize("words", [words for words, _ in TABLES], ids=" ".join)
def test_every_table_is_also_json(agent: Serving, words: list[str]) -> None:
    assert json.loads(run(*words, "-o", "json", socket=agent.path).stdout)


def test_endpoint_list_has_one_label_a_line(agent: Serving) -> None:
    lines = run("endpoint", "list", socket=agent.path).stdout.splitlines()
    assert lines[1].split() == ["ENFORCEMENT", "ENFORCEMENT"]
    assert lines[2].split() == [
        "373",
        "Enabled",
        "Enabled",
        "13465",
        "container:app=web",
        "10.50.0.117",
        "ready",
    ]
    assert lines[3].split() == ["container:env=prod"]
    assert lines[4].split()[1:3] == ["Disabled", "Disabled"]
    assert run("endpoint", "list", "--no-headers", socket=agent.path).stdout.startswith("373")


def test_endpoint_get_is_an_array(agent: Serving) -> None:
    found = json.loads(run("endpoint", "get", "container-name:c373", socket=agent.path).stdout)
    assert [each["id"] for each in found] == [373]
    missing = run("endpoint", "get", "9", socket=agent.path)
    assert (missing.returncode, missing.stderr) == (4, "Error: there is no endpoint 9\n")


def test_endpoint_create_and_delete(agent: Serving) -> None:
    created = run("endpoint", "create", "/proc/self/ns/net", "-l", "app=x", socket=agent.path)
    assert created.stdout.startswith("Endpoint 999 with address")
    assert agent.view.created[0].labels == ["app=x"]
    deleted = run("endpoint", "delete", "999", "-o", "json", socket=agent.path)
    assert json.loads(deleted.stdout) == {"id": 999, "deleted": True}
    assert run("endpoint", "delete", "999", socket=agent.path).returncode == 4
    refused = run("endpoint", "create", "/no/such/netns", socket=agent.path)
    assert (refused.returncode, "/no/such/netns" in refused.stderr) == (1, True)


def test_control_characters_never_reach_the_terminal(agent: Serving) -> None:
    agent.view.known[7] = make_endpoint(7, ["container:app=\x1b]0;owned\x07"])
    output = run("endpoint", "list", socket=agent.path).stdout
    assert "\x1b" not in output
    assert "\\x1b]0;owned\\x07" in output


def test_identities_by_label(agent: Serving) -> None:
    for label in ("container:app=web", "app=web"):
        found = json.loads(run("identity", "list", label, "-o", "json", socket=agent.path).stdout)
        assert [each["id"] for each in found] == [13465]
    assert json.loads(run("identity", "list", "app=none", "-o", "json", socket=agent.path).stdout) == []
    assert run("identity", "get", socket=agent.path).returncode == 2
    assert run("identity", "get", "77", socket=agent.path).returncode == 4


def test_ip_get_takes_the_longest_prefix(agent: Serving) -> None:
    found = json.loads(run("ip", "get", "10.50.0.117", "-o", "json", socket=agent.path).stdout)
    assert found["cidr"] == "10.50.0.117/32"
    assert run("ip", "get", "192.0.2.1", socket=agent.path).returncode == 4
    assert run("ip", "get", "florp", socket=agent.path).returncode == 2


# --- policy


def test_policy_local_needs_no_etcd(agent: Serving, tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(RULE)
    config = tmp_path / "etcd.config"
    config.write_text("endpoints: ['http://127.0.0.1:1']\n")
    apply = ["policy", "apply", "--local", "-f", str(tmp_path / "web.json"), "--etcd-config", str(config)]
    assert run(*apply, socket=agent.path).returncode == 0
    assert "web" in agent.view.local


def test_policy_local_apply_get_delete(agent: Serving, tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(RULE)
    applied = run("policy", "apply", "--local", "-f", str(tmp_path / "web.json"), socket=agent.path)
    assert (applied.returncode, applied.stderr) == (0, "")
    assert applied.stdout == "web: applied on this host, revision 4\n"
    shown = run("policy", "get", socket=agent.path)
    assert shown.stdout.splitlines()[-1] == "Revision: 3"
    assert run("policy", "get", "other", socket=agent.path).returncode == 4
    assert run("policy", "delete", "--local", "web", socket=agent.path).stdout == "web: deleted\n"
    assert agent.view.local == {}


def test_policy_of_a_name_that_etcd_has_is_refused(agent: Serving) -> None:
    result = run("policy", "apply", "--local", "-f", "-", "--name", "in-etcd", socket=agent.path, stdin=RULE)
    assert (result.returncode, "in etcd" in result.stderr) == (1, True)


def test_policy_of_a_name_that_this_host_has_is_not_written_to_etcd(agent: Serving) -> None:
    agent.view.local["web"] = RULE
    result = run("policy", "apply", "-f", "-", "--name", "web", socket=agent.path, stdin=RULE)
    assert (result.returncode, "on this host already" in result.stderr) == (1, True)


def test_policy_delete_all_asks_and_no_terminal_means_no(agent: Serving) -> None:
    agent.view.local["web"] = RULE
    refused = run("policy", "delete", "--local", "--all", socket=agent.path)
    assert (refused.returncode, "nothing was changed" in refused.stderr) == (1, True)
    assert agent.view.local
    deleted = run("policy", "delete", "--local", "--all", "-f", "-o", "json", socket=agent.path)
    assert json.loads(deleted.stdout) == [{"name": "web", "change": "deleted"}]
    assert not agent.view.local


def test_policy_delete_by_labels_of_this_host(agent: Serving) -> None:
    labelled = json.dumps([{**json.loads(RULE)[0], "labels": ["team=shop"]}])
    agent.view.local.update({"mine": labelled, "other": RULE})
    gone = run("policy", "delete", "--local", "-l", "team=shop", socket=agent.path)
    assert (gone.stdout, gone.stderr) == ("mine: deleted\n", "")
    assert agent.view.local.keys() == {"other"}
    assert run("policy", "delete", "--local", "-l", "team=shop", socket=agent.path).returncode == 4


def test_policy_wait(agent: Serving) -> None:
    assert run("policy", "wait", "3", socket=agent.path).stdout.startswith("Every endpoint is at revision 3")
    assert json.loads(run("policy", "wait", "3", "-o", "json", socket=agent.path).stdout) == {"revision": 3}
    agent.view.revision = 4
    late = run("policy", "wait", "4", "--max-wait-time", "0", socket=agent.path)
    assert (late.returncode, "endpoint 373" in late.stderr) == (1, True)


def test_policy_wait_is_for_a_revision_that_there_is(agent: Serving) -> None:
    """Also where no endpoint could be late."""
    agent.view.known.clear()
    assert run("policy", "wait", "3", socket=agent.path).returncode == 0
    late = run("policy", "wait", "4", "--max-wait-time", "0.2", "--sleep-time", "0.1", socket=agent.path)
    assert (late.returncode, late.stdout) == (1, "")
    assert "the agent is at revision 3, it has no 4 yet" in late.stderr


def enforcing(number: int, revision: int, error: str = "") -> models.Endpoint:
    """Return an endpoint that enforces a revision, and why it enforces no later one."""
    made = make_endpoint(number)
    policy = structs.replace(made.status.policy, policy_revision=revision, error=error)
    return structs.replace(made, status=structs.replace(made.status, policy=policy))


def test_policy_wait_gives_up_an_endpoint_in_error_earlier(agent: Serving) -> None:
    """An endpoint that is only late is waited for."""
    words = ("policy", "wait", "4", "--fail-wait-time", "0", "--sleep-time", "0.1")
    agent.view.revision = 4
    agent.view.known = {7: enforcing(7, 3), 9: enforcing(9, 3, "needs 20000 entries\x1b[31m")}
    late = run(*words, socket=agent.path)
    assert late.returncode == 1
    assert "2 endpoints not at revision 4 yet, endpoint 9 first: needs 20000 entries" in late.stderr
    assert "\x1b" not in late.stderr
    agent.view.known = {7: enforcing(7, 3)}
    with subprocess.Popen(command(*words, socket=agent.path), cwd=ROOT, stdout=subprocess.PIPE) as waiting:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(1)
            agent.view.known = {7: enforcing(7, 4)}
            assert waiting.wait(30) == 0
        finally:
            waiting.kill()


def test_policy_trace_says_the_verdict_by_its_exit_code(agent: Serving) -> None:
    allowed = run(
        "policy",
        "trace",
        "-s",
        "container:app=a",
        "-d",
        "container:app=b",
        "--dport",
        "80/tcp",
        socket=agent.path,
    )
    assert (allowed.returncode, allowed.stdout.splitlines()[-1]) == (0, "Final verdict: ALLOWED")
    denied = run("policy", "trace", "-s", "container:app=a", "-d", "container:app=b", socket=agent.path)
    assert (denied.returncode, denied.stdout.splitlines()[-1]) == (1, "Final verdict: DENIED")
    assert run("policy", "trace", "--dport", "http", socket=agent.path).returncode == 2


# --- monitor, config, bugtool


def test_monitor_prints_lines_until_it_is_interrupted(agent: Serving) -> None:
    event = models.MonitorEvent(
        time=1.0,
        type="drop",
        summary="xx drop (Policy denied)",
        source=373,
        reason="Policy denied",
        details={"flow": "0x1"},
    )
    for words, expected in (
        (["monitor"], "xx drop (Policy denied)\n"),
        (["monitor", "-t", "drop", "--from", "373", "-v"], "xx drop (Policy denied)\n"),
    ):
        with subprocess.Popen(
            command(*words, socket=agent.path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            agent.wait_for_listeners(1)
            agent.publish(event)
            assert process.stdout is not None
            assert process.stdout.readline() == expected
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""
        agent.wait_for_listeners(0)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["-t", "drop"], [1, 4]),
        (["-t", "drop", "-t", "trace"], [1, 2, 4]),
        (["--from", "373"], [1, 3]),
        (["--from", "373", "--from", "5"], [1, 3, 4]),
        (["--to", "373"], [4]),
        (["--related-to", "373"], [1, 3, 4]),
        (["--related-to", "6", "-t", "trace"], [2]),
    ],
)
def test_monitor_shows_what_was_asked_for(agent: Serving, words: list[str], wanted: list[int]) -> None:
    events = [
        models.MonitorEvent(time=1.0, type=kind, summary=str(number), source=source, destination=destination)
        for number, (kind, source, destination) in enumerate(
            [("drop", 373, 0), ("trace", 0, 6), ("policy-verdict", 373, 0), ("drop", 5, 373)], 1
        )
    ]
    # A loss is for everybody, and ends what is read here.
    lost = models.MonitorEvent(time=1.0, type="lost", summary="CPU 00: Lost 7 events", details={"lost": 7})
    with subprocess.Popen(
        command("monitor", *words, socket=agent.path), stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        agent.wait_for_listeners(1)
        agent.publish(*events, lost)
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(len(wanted) + 1)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert lines == [*map(str, wanted), "CPU 00: Lost 7 events"]


def test_monitor_verbose_has_every_field_below_the_line(agent: Serving) -> None:
    packet = {"source": "fd00::5", "destination_port": 80}
    event = models.MonitorEvent(
        time=1.0,
        type="drop",
        summary="xx drop (Policy denied): [fd00::5]:4000 -> [fd00::6]:80 tcp SYN",
        source=373,
        details={"flow": "0x1", "packet": packet},
    )
    fields = ["time=1.0", "type=drop", "source=373", "flow=0x1", f"packet={packet}"]
    with subprocess.Popen(
        command("monitor", "-v", socket=agent.path), stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        agent.wait_for_listeners(1)
        agent.publish(event)
        assert process.stdout is not None
        lines = [process.stdout.readline().rstrip("\n") for _ in range(len(fields) + 1)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert lines == [event.summary, *(f"  {field}" for field in fields)]


@pytest.mark.parametrize("option", ["-j", "-ojson"])
def test_monitor_json_ends_with_the_agent(tmp_path: Path, option: str) -> None:
    with serving(FakeAgent(), tmp_path / "h.sock") as agent:
        process = subprocess.Popen(
            command("monitor", option, socket=agent.path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        agent.wait_for_listeners(1)
        agent.publish(models.MonitorEvent(time=1.0, type="trace", summary="-> stack"))
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["summary"] == "-> stack"
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, "ended the stream" in errors) == (0, True)


def test_a_pipe_that_is_closed_is_no_error(agent: Serving) -> None:
    line = " ".join(command("endpoint", "list", socket=agent.path)) + " | head -n 1"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert (done.stdout.startswith("ENDPOINT"), done.stderr) == (True, "")


def test_config_shows_value_and_origin(agent: Serving) -> None:
    assert run("config", socket=agent.path).stdout.splitlines()[0].split() == ["OPTION", "VALUE", "FROM"]
    assert run("config", "get", "cluster-name", socket=agent.path).stdout == "default\n"
    assert run("config", "get", "florp", socket=agent.path).returncode == 4


def test_bugtool_collects_from_the_agent(agent: Serving, tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    result = run("bugtool", "--no-commands", "--archive", str(path), socket=agent.path)
    assert result.stdout == f"Archive: {path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"agent/status.json", "agent/policy.json", "agent/metrics.txt"} <= names
    again = run("bugtool", "--no-commands", "--archive", str(path), socket=agent.path)
    assert (again.returncode, str(path) in again.stderr) == (1, True)


def test_bugtool_works_without_an_agent(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    result = run("bugtool", "--archive", str(path), "-o", "json", socket=tmp_path / "none")
    assert json.loads(result.stdout) == {"archive": str(path)}
    with tarfile.open(path) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    by_family = {f"commands/{words}.txt" for words in ("ip -6 route show table all", "ip6tables-save")}
    assert {"agent/status.error", "commands/uname -a.txt", "files/proc/meminfo"} | by_family <= names


async def test_bugtool_keeps_names_and_networks_of_the_engine_and_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    async with FakeEngine(tmp_path / "docker.sock") as engine:
        engine.add_network("n1", "shop")
        engine.add_container("c1", "till", labels={"password": "hunter2"})
        engine.broken["/version"] = (200, b"not json")
        words = ("bugtool", "--archive", str(path), "--docker", f"unix://{engine.socket}")
        result = await asyncio.to_thread(run, *words, socket=tmp_path / "none")
    assert result.returncode == 0, result
    with tarfile.open(path) as tar:
        parts = {
            name.rpartition("/")[2]: tar.extractfile(name) for name in tar.getnames() if "/engine/" in name
        }
        texts = {name: file.read().decode() for name, file in parts.items() if file}
    assert set(texts) == {"version.error", "networks.json", "containers.json"}
    assert json.loads(texts["networks.json"])[0]["Name"] == "shop"
    assert json.loads(texts["containers.json"])[0]["Names"] == ["/till"]
    assert "hunter2" not in texts["containers.json"]


def test_version_with_and_without_an_agent(agent: Serving, tmp_path: Path) -> None:
    assert json.loads(run("version", "-o", "json", socket=agent.path).stdout)["agent"] == "0.1.0"
    assert "not running" in run("version", socket=tmp_path / "none").stdout


def test_a_hung_agent_is_given_up(tmp_path: Path) -> None:
    with serving(FakeAgent(), tmp_path / "h.sock") as agent:
        agent.loop.call_soon_threadsafe(time.sleep, 3)
        result = run("status", "--timeout", "0.3", socket=agent.path)
    assert (result.returncode, "said nothing for 0.3 s" in result.stderr) == (3, True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (5, "5s"), (200, "3m20s"), (7500, "2h5m"), (356400, "4d3h"), (86400, "1d0h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
