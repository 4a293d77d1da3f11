# SPDX-License-Identifier: Apache-2.0
"""The API over its real socket: answers, errors, garbage, and that nobody's slowness holds up the others."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.api.errors import Conflict
from agent.api.models import MonitorEvent
from agent.api.server import ApiServer
from agent.api.wire import MAX_BODY
from cli.client import UnixConnection
from core import metrics
from policy.language import MAX_STORED, stored_text
from tests.support.agent_view import FakeAgent, Serving, serving

RULE = '[{"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]}]'


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Serving]:
    with serving(FakeAgent(), tmp_path / "h.sock") as served:
        yield served


def call(served: Serving, method: str, path: str, body: str | bytes | None = None) -> tuple[int, Any]:
    """Return (status, decoded body)."""
    connection = UnixConnection(served.path, timeout=20)
    try:
        connection.request(method, path, body=body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


GETS = [
    "/v1/healthz", "/v1/config", "/v1/debuginfo", "/v1/cleanup", "/v1/endpoint", "/v1/endpoint/373",
    "/v1/endpoint/container-name:c373", "/v1/endpoint/373/log", "/v1/endpoint/373/healthz", "/v1/identity",
    "/v1/identity/13465", "/v1/ip", "/v1/cluster/nodes", "/v1/health", "/v1/network", "/v1/policy",
    "/v1/policy/selectors", "/v1/map", "/v1/map/cilium_lxc",
]  # fmt: skip


@pytest.mark.parametrize("path", GETS)
def test_every_route_answers(agent: Serving, path: str) -> None:
    status, body = call(agent, "GET", path)
    assert status == 200
    assert body


def test_shapes_are_ciliums(agent: Serving) -> None:
    endpoint = call(agent, "GET", "/v1/endpoint/373")[1]
    assert endpoint["status"]["labels"]["security-relevant"] == ["container:app=web", "container:env=prod"]
    assert endpoint["status"]["networking"]["addressing"][0]["ipv4"] == "10.50.0.117"
    assert endpoint["status"]["policy"]["policy-enabled"] == "both"
    assert endpoint["status"]["health"]["overallHealth"] == "OK"
    assert endpoint["status"]["external-identifiers"]["container-name"] == "c373"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "named"),
    [
        ("GET", "/v1/endpoint/9", None, 404, "endpoint 9"),
        ("GET", "/v1/identity/abc", None, 400, "abc"),
        ("GET", "/v1/identity/99999999999999999999", None, 400, "not a number"),
        ("GET", "/v1/identity/-1", None, 400, "not a number"),
        ("GET", "/v1/identity/٣", None, 400, "not a number"),
        ("GET", "/v1/map/../../etc/passwd", None, 404, "Not Found"),
        ("GET", "/v1/nothing", None, 404, "/v1/nothing"),
        ("POST", "/v1/endpoint/373", None, 405, "Method Not Allowed"),
        ("PUT", "/v1/endpoint/373", '{"netns": "/proc/self/ns/net"}', 409, "373"),
        ("PUT", "/v1/endpoint/70000", '{"netns": "/x"}', 400, "70000"),
        ("PUT", "/v1/endpoint/0", "{}", 400, "netns"),
        ("PUT", "/v1/endpoint/0", '{"netns": "/x", "colour": 1}', 400, "colour"),
        ("PUT", "/v1/endpoint/0", '{"netns": 5}', 400, "$.netns"),
        ("PUT", "/v1/endpoint/0", "\x00\x01garbage", 400, "malformed"),
        ("PUT", "/v1/endpoint/0", b"\xff\xfe", 400, "refused"),
        ("PUT", "/v1/endpoint/0", '{"netns": "/no/such"}', 400, "/no/such"),
        ("PUT", "/v1/policy/in-etcd", json.dumps({"text": RULE}), 409, "in-etcd"),
        ("PUT", "/v1/policy/bad", json.dumps({"text": RULE.replace("ingress", "colour")}), 400, "colour"),
        ("PUT", "/v1/endpoint/0", '{"netns": "/proc/self/ns/net", "ipv4": "10.1"}', 400, "10.1"),
        ("DELETE", "/v1/policy/none", None, 404, "none"),
        ("DELETE", "/v1/policy/..%2f..%2fetc%2fpasswd", None, 400, "policy"),
        ("DELETE", "/v1/policy/a%00b", None, 400, "a"),
        ("GET", "/v1/monitor?type=nonsense", None, 400, "nonsense"),
        ("GET", "/v1/monitor?from=x", None, 400, "from"),
    ],
)  # fmt: skip
def test_errors_have_a_code_and_name_the_thing(
    agent: Serving, method: str, path: str, body: str | bytes | None, status: int, named: str
) -> None:
    connection_path = path.encode("utf-8").decode("latin-1") if path.isascii() else "/v1/identity/%D9%A3"
    found, answer = call(agent, method, connection_path, body)
    assert (found, set(answer)) == (status, {"error", "hint"})
    assert named in answer["error"], answer
    assert call(agent, "GET", "/v1/healthz")[0] == 200


@pytest.mark.parametrize("filling", ['"', "é", "\U0001f600", "x"], ids=["quotes", "é", "emoji", "letters"])
def test_the_largest_policy_fits_into_a_request(agent: Serving, filling: str) -> None:
    """However much its characters take inside JSON inside JSON."""
    whole = {"kind": "CiliumNetworkPolicy", "spec": json.loads(RULE)[0]}

    def noted(note: str) -> dict[str, object]:
        return {**whole, "metadata": {"name": "large", "annotations": {"note": note}}}

    room = MAX_STORED - len(stored_text(noted("")))
    largest = stored_text(noted(filling * (room // len(stored_text(filling)[1:-1].encode()))))
    status, answer = call(agent, "PUT", "/v1/policy/large", json.dumps({"text": largest}))
    assert (status, answer["name"]) == (200, "large"), answer


def test_a_body_beyond_the_limit_is_refused(agent: Serving) -> None:
    status, answer = call(agent, "PUT", "/v1/policy/large", json.dumps({"text": "x" * (MAX_BODY + 1)}))
    assert status == 413
    assert str(MAX_BODY) in answer["error"]


def test_garbage_instead_of_http_disturbs_nobody(agent: Serving) -> None:
    for junk in (b"\x00" * 100, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"\xff\xfe\r\n\r\n", b""):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(10)
            raw.connect(str(agent.path))
            raw.sendall(junk)
    assert call(agent, "GET", "/v1/healthz")[0] == 200


def test_a_half_sent_request_disturbs_nobody(agent: Serving) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(agent.path))
        raw.sendall(b"PUT /v1/policy/x HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{")
        assert call(agent, "GET", "/v1/healthz")[0] == 200


def test_changes_reach_the_view(agent: Serving) -> None:
    body = json.dumps({"netns": "/proc/self/ns/net", "labels": ["app=x"]})
    assert call(agent, "PUT", "/v1/endpoint/0", body)[0] == 201
    assert agent.view.created[0].labels == ["app=x"]
    assert call(agent, "DELETE", "/v1/endpoint/999")[0] == 200
    assert call(agent, "PUT", "/v1/policy/ns/web", json.dumps({"text": RULE}))[0] == 200
    assert agent.view.local == {"ns/web": RULE}
    assert call(agent, "DELETE", "/v1/policy/ns/web")[0] == 200


def test_an_exception_in_the_agent_is_an_answer(agent: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(agent.view, "nodes", broken)
    status, answer = call(agent, "GET", "/v1/cluster/nodes")
    assert (status, answer["error"]) == (500, "ZeroDivisionError in the agent")
    assert "secret" not in json.dumps(answer)


def test_requests_are_timed_by_route(agent: Serving) -> None:
    call(agent, "GET", "/v1/endpoint/373")
    sample = metrics.REGISTRY.get_sample_value(
        "cilium_agent_api_process_time_seconds_count",
        {"path": "/v1/endpoint/{id}", "method": "GET", "return_code": "200"},
    )
    assert sample is not None
    assert sample >= 1


# --- the socket


def test_the_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "run" / "h.sock"
    with serving(FakeAgent(), path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert os.listdir(path.parent) == ["h.sock"]
    assert not path.exists()


def test_what_a_dead_agent_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "h.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(FakeAgent(), path) as served:
        assert call(served, "GET", "/v1/healthz")[0] == 200


async def test_a_living_agents_socket_is_refused(agent: Serving) -> None:
    with pytest.raises(Conflict, match="another agent"):
        await ApiServer(FakeAgent(), agent.path).run()
    assert call(agent, "GET", "/v1/healthz")[0] == 200


def test_metrics_on_tcp_show_metrics_only(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(FakeAgent(), tmp_path / "h.sock", f"127.0.0.1:{port}"):
        for path, status in (("/metrics", 200), ("/v1/healthz", 404)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read()
            connection.close()
            assert answer.status == status
            assert (b"cilium_policy 3.0" in text) == (status == 200)


# --- the monitor


def drop(number: int, **values: Any) -> MonitorEvent:
    return MonitorEvent(time=time.time(), type="drop", summary=f"xx drop {number} " + "." * 200, **values)


def open_stream(served: Serving, query: str = "") -> tuple[UnixConnection, http.client.HTTPResponse]:
    connection = UnixConnection(served.path, timeout=20)
    connection.request("GET", f"/v1/monitor{query}")
    return connection, connection.getresponse()


def test_monitor_sends_what_the_filter_wants(agent: Serving) -> None:
    connection, answer = open_stream(agent, "?type=drop&related=373")
    agent.wait_for_listeners(1)
    trace = MonitorEvent(time=0, type="trace", summary="-> endpoint", source=373)
    agent.publish(trace, drop(1, source=5), drop(2, destination=373), drop(3, source=373))
    lines = [json.loads(answer.readline()) for _ in range(2)]
    assert [line["summary"].split(".")[0].strip() for line in lines] == ["xx drop 2", "xx drop 3"]
    answer.close()
    connection.close()
    agent.wait_for_listeners(0)


def test_a_slow_reader_loses_events_and_is_told_while_nobody_waits(tmp_path: Path) -> None:
    with serving(FakeAgent(queue_size=50), tmp_path / "h.sock") as agent:
        slow_connection, slow = open_stream(agent)
        agent.wait_for_listeners(1)
        # More than the socket's buffers and the queue hold together, in turns so that the handler can write.
        for burst in range(200):
            agent.publish(*(drop(burst * 100 + number) for number in range(100)))
            assert call(agent, "GET", "/v1/identity/1")[0] == 200
        assert agent.view.hub.lost > 0
        events = iter(lambda: json.loads(slow.readline()), None)
        lost = next(event for event in itertools.islice(events, 20_000) if event["type"] == "lost")
        assert lost["details"]["lost"] > 0
        slow.close()
        slow_connection.close()
        agent.wait_for_listeners(0)


def test_a_silent_listener_that_goes_is_noticed(agent: Serving) -> None:
    connection, answer = open_stream(agent)
    agent.wait_for_listeners(1)
    answer.close()
    connection.close()
    agent.wait_for_listeners(0)


def test_listeners_are_limited(agent: Serving) -> None:
    streams = [open_stream(agent) for _ in range(32)]
    agent.wait_for_listeners(32)
    status, answer = call(agent, "GET", "/v1/monitor")
    assert (status, "listening already" in answer["error"]) == (503, True)
    for connection, response in streams:
        response.close()
        connection.close()
    agent.wait_for_listeners(0)


def test_streams_end_with_the_server(tmp_path: Path) -> None:
    with serving(FakeAgent(), tmp_path / "h.sock") as agent:
        connection, answer = open_stream(agent)
        agent.wait_for_listeners(1)
    assert answer.read() == b""
    connection.close()
