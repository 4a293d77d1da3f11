# SPDX-License-Identifier: Apache-2.0
"""The option api-rate-limit: what it may say, and over the real sockets of API and driver what it does."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from agent import driver as driver_module
from agent.configuration import load_config
from agent.errors import TooManyCalls
from agent.limit_settings import BUILT_IN, CREATE, Limit, LimitError, limits_of
from agent.limits import Limits
from cli.client import HttpClient
from cli.errors import CliError
from core import metrics
from core.options import OptionError
from tests.support.agent_view import FakeAgent, serving
from tests.support.driver_host import driver_host
from tests.support.eventually import eventually

RULE = '[{"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]}]'
# No call gets another turn in the time that a test takes.
TWO = Limit(rate=1 / 3600, burst=2, max_wait=0.2)


# --- what may be said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate-limit:10/s", Limit(10.0, 500, 0, 15.0)),
        ("rate-limit:10/2m,rate-burst:4", Limit(10 / 120, 4, 0, 15.0)),
        ("rate-limit:3.5/h rate-burst:1", Limit(3.5 / 3600, 1, 0, 15.0)),
        ("rate-limit:1/100ms", Limit(10.0, 500, 0, 15.0)),
        ("parallel-requests:4,max-wait-duration:500ms", Limit(100.0, 500, 4, 0.5)),
        ("skip-initial:4,log:true,auto-adjust:false", Limit(100.0, 500, 0, 15.0, 4, True)),
        ("", BUILT_IN[CREATE]),
    ],
)
def test_single_settings_of_the_built_in_limits_are_replaced(text: str, expected: Limit) -> None:
    limits = limits_of({CREATE: text})
    assert limits[CREATE] == expected
    assert {call: each for call, each in limits.items() if call != CREATE} == {
        call: each for call, each in BUILT_IN.items() if call != CREATE
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("endpoint-make=rate-limit:1/s", "endpoint-make.*endpoint-create"),
        ("endpoint-patch=rate-limit:1/s", "endpoint-patch.*labels do not change"),
        ("endpoint-create=rate-limit:0/s", "rate-limit is '0/s'"),
        ("endpoint-create=rate-limit:-1/s", "rate-limit is '-1/s'"),
        ("endpoint-create=rate-limit:10", "rate-limit is '10'.*10/s"),
        ("endpoint-create=rate-limit:10/0s", "rate-limit"),
        ("endpoint-create=rate-limit:10/fortnight", "rate-limit is '10/fortnight'"),
        ("endpoint-create=rate-limit:٣/s", "rate-limit"),
        ("endpoint-create=rate-limit:9999999/s", "a million a second"),
        ("endpoint-create=rate-burst:0", "rate-burst is '0'"),
        (f"endpoint-create=rate-burst:{'9' * 5000}", "rate-burst"),
        ("endpoint-create=parallel-requests:many", "parallel-requests is 'many'"),
        ("endpoint-create=max-wait-duration:soon", "max-wait-duration is 'soon'"),
        ("endpoint-create=max-wait-duration:16s", "up to 15s: the engine must hear"),
        ("endpoint-create=max-wait-duration:0", "up to 15s"),
        (f"endpoint-get=max-wait-duration:{'9' * 400}s", "up to 3600s"),
        ("endpoint-delete=rate-burst:4", "no use without rate-limit"),
        ("endpoint-create=rate-limit:1/s,rate-limit:2/s", "given twice"),
        ("endpoint-create=rate-limit:1/s,endpoint-create=rate-limit:2/s", "given twice"),
        ("endpoint-create=rate-limit", "has no ':'"),
        ("rate-limit:1/s", "has no '='"),
        ("endpoint-create=colour:red", "unknown setting 'colour'"),
        ("endpoint-create=auto-adjust:true", "auto-adjust is refused: limits do not adjust"),
        ("endpoint-create=mean-over:10", "mean-over is refused"),
        ("endpoint-create=estimated-processing-duration:2s", "estimated-processing-duration is refused"),
        ("endpoint-create=min-wait-duration:1s", "min-wait-duration is refused.*idle"),
        ("endpoint-create=log:perhaps", "log is 'perhaps'"),
        ('{"endpoint-create": ', "api-rate-limit"),
    ],
)
def test_what_can_not_be_used_is_refused_by_name_and_origin(text: str, named: str) -> None:
    with pytest.raises(OptionError, match=named) as refused:
        load_config(["--api-rate-limit", text], {})
    assert "api-rate-limit=" in str(refused.value)
    assert "from command line" in str(refused.value)


@pytest.mark.parametrize(
    "document",
    [
        "api-rate-limit: endpoint-get=rate-limit:1/s,rate-burst:4,endpoint-list=log:true",
        'api-rate-limit: {"endpoint-get": "rate-limit:1/s,rate-burst:4", "endpoint-list": "log:true"}',
        "api-rate-limit:\n  endpoint-get: {rate-limit: 1/s, rate-burst: 4}\n  endpoint-list: {log: true}",
    ],
)
def test_a_file_may_say_it_in_each_form(tmp_path: Path, document: str) -> None:
    path = tmp_path / "agent.yaml"
    path.write_text(document)
    limits = limits_of(load_config(["--config", str(path)], {})["api-rate-limit"])
    assert (limits["endpoint-get"].rate, limits["endpoint-get"].burst) == (1.0, 4)
    assert limits["endpoint-list"] == replace(BUILT_IN["endpoint-list"], log=True)


def test_a_burst_is_one_where_a_rate_comes_alone() -> None:
    assert limits_of({"endpoint-delete": "rate-limit:1/s"})["endpoint-delete"] == Limit(rate=1.0, burst=1)
    with pytest.raises(LimitError):
        limits_of({"endpoint-delete": "rate-limit:"})


# --- what it does


async def calls(limits: Limits, call: str, number: int) -> None:
    """Make so many calls, one after the other."""
    for _ in range(number):
        async with limits.turn(call):
            pass


async def test_five_hundred_containers_start_at_once_and_none_waits() -> None:
    limits = Limits({CREATE: replace(BUILT_IN[CREATE], max_wait=1e-9)})  # who waits is refused
    await calls(limits, CREATE, 500)
    with pytest.raises(TooManyCalls):
        await calls(limits, CREATE, 500)


async def test_so_many_are_under_way_and_the_next_waits_for_one_to_end() -> None:
    limits = Limits({"policy-apply": Limit(parallel=2)})
    begun, done = [], asyncio.Event()

    async def call(number: int) -> None:
        async with limits.turn("policy-apply"):
            begun.append(number)
            await done.wait()

    calls = [asyncio.create_task(call(number)) for number in range(5)]
    await eventually(lambda: len(begun) == 2, "two have begun")
    for _ in range(10):
        await asyncio.sleep(0)
    assert begun == [0, 1]
    assert in_flight("policy-apply") == 2
    calls[0].cancel()
    await eventually(lambda: len(begun) == 3, "who is cancelled makes room")
    done.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    assert in_flight("policy-apply") == 0


async def test_who_waits_too_long_has_kept_no_place() -> None:
    limits = Limits({"policy-apply": Limit(parallel=1, max_wait=0.05)})
    async with limits.turn("policy-apply"):
        with pytest.raises(
            TooManyCalls, match=r"policy-apply was refused after 0.05 s: more than 1 under way"
        ):
            async with limits.turn("policy-apply"):
                pass
    async with limits.turn("policy-apply"):
        assert in_flight("policy-apply") == 1


async def test_the_first_of_a_start_pass_and_waits_are_logged_if_asked_for() -> None:
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="INFO")
    try:
        limits = Limits({"endpoint-get": replace(TWO, skip_initial=3, log=True)})
        await calls(limits, "endpoint-get", 5)
        with pytest.raises(TooManyCalls):
            await calls(limits, "endpoint-get", 1)
        await calls(Limits({"endpoint-get": TWO}), "endpoint-get", 1)
    finally:
        logger.remove(sink)
    assert [each.split(" waited ")[0] for each in said] == ["endpoint-get"] * 5


def in_flight(call: str) -> float | None:
    labels = {"api_call": call, "value": "in-flight"}
    return metrics.REGISTRY.get_sample_value("cilium_api_limiter_requests_in_flight", labels)


def processed(call: str, outcome: str) -> float:
    labels = {"api_call": call, "outcome": outcome}
    return metrics.REGISTRY.get_sample_value("cilium_api_limiter_processed_requests_total", labels) or 0.0


def test_over_the_socket_the_third_policy_is_refused_and_everything_else_goes_on(tmp_path: Path) -> None:
    limits = Limits({**BUILT_IN, "policy-apply": TWO})
    path = tmp_path / "h.sock"
    client = HttpClient(path, name="the agent", hint="")
    before = processed("policy-apply", "success"), processed("policy-apply", "refused")
    with serving(FakeAgent(), path, limits=limits) as served:
        for number in range(2):
            client.request("PUT", f"/v1/policy/p{number}", {"text": RULE})
        with pytest.raises(
            CliError, match=r"policy-apply was refused after 0\.2 s: more than .* 2 at once"
        ) as refused:
            client.request("PUT", "/v1/policy/p2", {"text": RULE})
        assert "api-rate-limit" in refused.value.hint
        assert status_of(client, "DELETE", "/v1/policy/p0") == 429
        assert client.request("GET", "/v1/endpoint/373")
        assert client.request("GET", "/v1/healthz")
        assert sorted(served.view.local) == ["p0", "p1"]
    after = processed("policy-apply", "success"), processed("policy-apply", "refused")
    assert (after[0] - before[0], after[1] - before[1]) == (2, 2)


@pytest.mark.parametrize(
    ("call", "method", "path"),
    [
        ("endpoint-list", "GET", "/v1/endpoint"),
        ("endpoint-get", "GET", "/v1/endpoint/373"),
        ("endpoint-get", "GET", "/v1/endpoint/373/log"),
        ("endpoint-get", "GET", "/v1/endpoint/373/healthz"),
        ("endpoint-create", "PUT", "/v1/endpoint/373"),
        ("endpoint-delete", "DELETE", "/v1/endpoint/1"),
    ],
)
def test_each_route_has_its_limit(tmp_path: Path, call: str, method: str, path: str) -> None:
    socket = tmp_path / "h.sock"
    client = HttpClient(socket, name="the agent", hint="")
    with serving(FakeAgent(), socket, limits=Limits({**BUILT_IN, call: TWO})):
        found = [status_of(client, method, path) for _ in range(3)]
    assert 429 not in found[:2]
    assert found[2] == 429


def status_of(client: HttpClient, method: str, path: str) -> int:
    with client._send(method, path, {"netns": "/x"} if method == "PUT" else None, 20) as answer:
        body: Any = json.loads(answer.read())
        assert answer.status < 500, body
        return answer.status


async def test_the_engine_is_told_which_limit_it_met_and_may_always_delete(tmp_path: Path) -> None:
    async with driver_host(tmp_path) as host:
        limits = Limits({**BUILT_IN, CREATE: TWO, "endpoint-delete": TWO})
        host.driver = driver_module.Driver(host.socket, host.manager, host.engine, host.checkpoint, limits)
        await host.stop_agent()
        await host.serve()
        answers = [await host.on("CreateEndpoint", f"e-{number}") for number in range(3)]
        assert [sorted(each) for each in answers] == [["Interface"], ["Interface"], ["Err"]]
        assert "endpoint-create was refused after 0.2 s" in answers[2]["Err"]
        assert host.manager.by_engine_id("e-2") is None
        assert [await host.on("DeleteEndpoint", f"e-{number}") for number in range(3)] == [{}, {}, {}]
