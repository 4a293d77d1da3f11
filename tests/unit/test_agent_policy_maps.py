# SPDX-License-Identifier: Apache-2.0
"""Policy maps: nothing before all is known, merged changes equal sequential ones, retries are whole."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from agent.api import models
from agent.endpoint import Endpoint
from agent.parts import Parts
from agent.policy_maps import PolicyMaps, merge
from agent.report_endpoints import _policy
from datapath.errors import DatapathError
from datapath.policy_order import RawPolicyMap
from identity.labels import Labels
from policy.engine import PolicyEngine
from policy.language import parse_policies
from policy.model import MAX_ENTRIES, Direction, MapChange, Policy, PolicyEntry, PolicyKey

WEB, DB, CLIENT = (Labels.parse(f"container:app={name};") for name in ("web", "db", "client"))
ALLOW_CLIENT = """
- endpointSelector: {matchLabels: {app: web}}
  ingress: [{fromEndpoints: [{matchLabels: {app: client}}]}]
"""
ALLOW_ALL_IN = PolicyKey(0, 0, 0, Direction.INGRESS)


class ModelMaps:
    """The kernel's policy maps as dicts.

    `full` are endpoints whose map refuses every write, `slow` those whose changes wait for programs.
    """

    def __init__(self) -> None:
        self.maps: dict[int, dict[PolicyKey, PolicyEntry]] = {}
        self.full: set[int] = set()
        self.slow: set[int] = set()
        self.whole = 0  # times a whole map was compared

    def applying(
        self, endpoint_id: int, upserts: Mapping[PolicyKey, PolicyEntry], deletes: set[PolicyKey]
    ) -> Iterator[None]:
        yield from self._pauses(endpoint_id)
        state = self.maps.setdefault(endpoint_id, {})
        self._refuse(endpoint_id, state, upserts)
        state.update(upserts)
        for key in deletes:
            state.pop(key, None)

    def replacing(self, endpoint_id: int, wanted: Mapping[PolicyKey, PolicyEntry]) -> Iterator[None]:
        wanted = dict(wanted)
        yield from self._pauses(endpoint_id)
        self.whole += 1
        self._refuse(endpoint_id, self.maps.setdefault(endpoint_id, {}), wanted)
        self.maps[endpoint_id] = wanted

    def held(self, endpoint_id: int) -> RawPolicyMap:
        return dict(self.maps.get(endpoint_id, {}).items())

    def _pauses(self, endpoint_id: int) -> Iterator[None]:
        while endpoint_id in self.slow:
            yield

    def _refuse(
        self,
        endpoint_id: int,
        state: dict[PolicyKey, PolicyEntry],
        upserts: Mapping[PolicyKey, PolicyEntry],
    ) -> None:
        if endpoint_id in self.full:
            state.update(dict(list(upserts.items())[:1]))  # a batch that stops in the middle
            raise DatapathError(f"map of {endpoint_id} is full")


class Host:
    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self.kernel = ModelMaps()
        self.engine = PolicyEngine(limit=limit)
        self.maps = PolicyMaps(self.engine, self.kernel)
        self.engine.upsert_identity(300, WEB)
        self.engine.upsert_identity(301, CLIENT)

    def policy(self, text: str, name: str = "p") -> None:
        self.engine.upsert_policy(parsed(text, name))
        self.maps.flush()

    async def idle(self) -> None:
        await self.maps.reconciler.wait_idle()


@functools.cache
def parsed(text: str, name: str) -> Policy:
    (policy,) = parse_policies(text, "test", name=name)
    return policy


def run(test: Callable[[Host], Coroutine[Any, Any, None]], limit: int = MAX_ENTRIES) -> None:
    async def main() -> None:
        host = Host(limit)
        task = asyncio.create_task(host.maps.reconciler.run())
        try:
            await asyncio.wait_for(test(host), 20)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_nothing_is_written_before_the_gate_opens() -> None:
    """A map that denies must not become "not enforced" because its policies are not known yet."""

    async def story(host: Host) -> None:
        denying = {PolicyKey(301, 0, 0, Direction.INGRESS): PolicyEntry(True, 0)}
        host.kernel.maps[1] = dict(denying)
        host.maps.add_endpoint(1, WEB)
        host.maps.flush()
        await asyncio.sleep(0.05)
        assert host.kernel.maps == {1: denying}
        assert not host.maps.table.in_sync
        host.policy(ALLOW_CLIENT)
        host.maps.open_gate()
        await host.idle()
        assert host.kernel.maps[1] == dict(host.engine.map_state(1))
        assert ALLOW_ALL_IN not in host.kernel.maps[1]
        host.maps.open_gate()
        assert host.maps.table.in_sync

    run(story)


def test_changes_are_written_as_changes() -> None:
    async def story(host: Host) -> None:
        host.maps.open_gate()
        host.maps.add_endpoint(1, WEB)
        await host.idle()
        whole = host.kernel.whole
        host.policy(ALLOW_CLIENT)
        host.engine.upsert_identity(302, CLIENT)
        host.maps.flush()
        await host.idle()
        assert host.kernel.whole == whole
        assert host.kernel.maps[1] == dict(host.engine.map_state(1))
        assert PolicyKey(302, 0, 0, Direction.INGRESS) in host.kernel.maps[1]

    run(story)


def test_a_write_that_failed_is_repeated_as_a_whole() -> None:
    async def story(host: Host) -> None:
        host.maps.open_gate()
        host.maps.add_endpoint(1, WEB)
        host.maps.add_endpoint(2, CLIENT)
        await host.idle()
        host.kernel.full.add(1)
        host.policy(ALLOW_CLIENT)
        await host.idle()
        assert "full" in host.maps.reconciler.status(1).error
        host.engine.upsert_identity(302, CLIENT)  # arrives while the map is in trouble
        host.maps.flush()
        await host.idle()
        host.kernel.full.clear()
        whole = host.kernel.whole
        while host.maps.reconciler.errors:
            await asyncio.sleep(0.02)
        assert host.kernel.whole > whole
        for endpoint in (1, 2):
            assert host.kernel.maps[endpoint] == dict(host.engine.map_state(endpoint))

    run(story)


def test_a_removed_endpoint_is_not_written_any_more() -> None:
    async def story(host: Host) -> None:
        host.maps.open_gate()
        host.maps.add_endpoint(1, WEB)
        await host.idle()
        host.policy(ALLOW_CLIENT)
        host.maps.remove_endpoint(1)
        before = dict(host.kernel.maps[1])
        await host.idle()
        assert host.kernel.maps[1] == before
        host.maps.remove_endpoint(1)
        host.maps.add_endpoint(1, DB)
        await host.idle()
        assert host.kernel.maps[1] == dict(host.engine.map_state(1))

    run(story)


KEYS = st.builds(PolicyKey, st.integers(0, 3), st.just(0), st.just(0), st.sampled_from(Direction))
ENTRIES = st.builds(PolicyEntry, st.booleans(), st.just(0))


@st.composite
def changes(draw: st.DrawFn) -> MapChange:
    upserts = draw(st.dictionaries(KEYS, ENTRIES, max_size=4))
    return MapChange(upserts, draw(st.sets(KEYS, max_size=4)) - upserts.keys())


@given(st.dictionaries(KEYS, ENTRIES), st.lists(changes(), max_size=5))
def test_merged_changes_equal_one_after_the_other(
    start: dict[PolicyKey, PolicyEntry], steps: list[MapChange]
) -> None:
    def apply(state: dict[PolicyKey, PolicyEntry], change: MapChange) -> dict[PolicyKey, PolicyEntry]:
        kept = {key: entry for key, entry in state.items() if key not in change.deletes}
        return {**kept, **change.upserts}

    merged, state = MapChange({}, set()), start
    for step in steps:
        merged, state = merge(merged, step), apply(state, step)
        assert not merged.deletes & merged.upserts.keys()
    assert apply(start, merged) == state


RULES = (ALLOW_CLIENT, ALLOW_CLIENT.replace("client", "db"), ALLOW_CLIENT.replace("ingress", "ingressDeny"))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("policy"), st.sampled_from(RULES)),
        st.tuples(st.just("unpolicy"), st.just("")),
        st.tuples(st.just("identity"), st.sampled_from(("302 client", "303 db", "304 client"))),
        st.tuples(st.just("unidentity"), st.sampled_from(("302", "303", "304"))),
        st.tuples(st.just("endpoint"), st.sampled_from(("1 web", "1 db", "2 web"))),
        st.tuples(st.just("unendpoint"), st.sampled_from(("1", "2"))),
        st.tuples(st.just("full"), st.sampled_from(("1", "2", ""))),
        st.tuples(st.just("wait"), st.just("")),
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=60)
@given(ACTIONS)
def test_maps_follow_the_engine_whatever_happens(actions: list[tuple[str, str]]) -> None:
    async def story(host: Host) -> None:
        host.maps.open_gate()
        wanted: set[int] = set()
        for verb, argument in actions:
            await act(host, verb, argument, wanted)
        host.kernel.full.clear()
        host.maps.reconciler.poke()
        await asyncio.sleep(0)
        for endpoint in wanted:
            # A retry would come by itself, later than a test waits.
            host.maps._want(endpoint, MapChange({}, set()))
        await host.idle()
        for endpoint in wanted:
            assert host.kernel.maps[endpoint] == dict(host.engine.map_state(endpoint))

    run(story)


async def act(host: Host, verb: str, argument: str, wanted: set[int]) -> None:
    number, _, app = argument.partition(" ")
    labels = Labels.of({"app": app}, source="container") if app.isalpha() else Labels()
    if verb == "policy":
        host.policy(argument)
    elif verb == "unpolicy":
        host.engine.delete_policy("p")
    elif verb == "identity":
        host.engine.upsert_identity(int(number), labels)
    elif verb == "unidentity":
        host.engine.delete_identity(int(number))
    elif verb == "endpoint":
        wanted.add(int(number))
        host.maps.add_endpoint(int(number), labels)
    elif verb == "unendpoint":
        wanted.discard(int(number))
        host.maps.remove_endpoint(int(number))
    elif verb == "full":
        host.kernel.full = {int(number)} if number else set()
    else:
        await asyncio.sleep(0.001)
    host.maps.flush()


def shown(host: Host, endpoint_id: int) -> models.EndpointPolicy:
    """Return what `endpoint get` and `policy wait` are told."""
    parts = cast(Parts, SimpleNamespace(policy_maps=host.maps))
    return _policy(parts, cast(Endpoint, SimpleNamespace(id=endpoint_id)))


def test_overflow_keeps_the_last_map_and_is_loud() -> None:
    """Endpoint 1's policy stops to fit and fits again; endpoint 2 goes on."""

    async def story(host: Host) -> None:
        host.maps.open_gate()
        host.policy(ALLOW_CLIENT)
        for endpoint, labels in ((1, WEB), (2, DB)):
            host.maps.add_endpoint(endpoint, labels)
        await host.idle()
        fitted = dict(host.kernel.maps[1])
        assert len(fitted) == 2
        said: list[str] = []
        sink = logger.add(said.append, format="{level} {message}")
        host.engine.upsert_identity(302, CLIENT)
        host.maps.flush()
        host.maps.flush()
        await host.idle()
        assert host.kernel.maps[1] == fitted
        assert dict(host.maps.pressure) == {1: 1.5, 2: 1.0}
        late, current = (shown(host, endpoint) for endpoint in (1, 2))
        assert (late.policy_revision, current.policy_revision) == (
            host.engine.revision - 1,
            host.engine.revision,
        ), "policy wait takes an old map for the new policy"
        assert "needs 3 map entries" in late.error
        assert late.map_entries == 2
        host.engine.delete_identity(301)
        host.maps.flush()
        await host.idle()
        logger.remove(sink)
        assert PolicyKey(302, 0, 0, Direction.INGRESS) in host.kernel.maps[1]
        assert PolicyKey(301, 0, 0, Direction.INGRESS) not in host.kernel.maps[1]
        assert dict(host.maps.pressure) == {1: 1.0, 2: 1.0}
        host.maps.remove_endpoint(1)
        assert host.maps.pressure.keys() == {2}
        assert [line.split(";")[0].strip() for line in said] == [
            "ERROR the policy of endpoint 1 needs 3 map entries, its map holds 2",
            "INFO the policy of endpoint 1 fits into its map again",
        ]

    run(story, limit=2)


ON_PORTS = ALLOW_CLIENT.replace(
    "}}]}]", "}}], toPorts: [{ports: [{port: '80', endPort: 83, protocol: TCP}]}]}]"
)
FOR_OTHERS = ALLOW_CLIENT.replace("app: web", "app: other")


def revisions(host: Host, *endpoints: int) -> list[int]:
    return [shown(host, endpoint).policy_revision for endpoint in endpoints]


def test_policy_that_does_not_fit_is_never_reported_as_enforced() -> None:
    """Whatever comes after it; not until it fits, be that without a change of the map."""

    async def story(host: Host) -> None:
        host.maps.open_gate()
        host.policy(ALLOW_CLIENT)
        for endpoint, labels in ((1, WEB), (2, DB)):
            host.maps.add_endpoint(endpoint, labels)
        await host.idle()
        fitted = host.engine.revision
        assert revisions(host, 1, 2) == [fitted, fitted]
        host.policy(ON_PORTS)
        too_much = host.engine.revision
        for number in range(3):
            host.policy(FOR_OTHERS, f"other-{number}")
            await host.idle()
            assert revisions(host, 1, 2) == [fitted, too_much + number + 1]
        assert "needs 5 map entries" in shown(host, 1).error
        host.policy(ALLOW_CLIENT)
        await host.idle()
        assert revisions(host, 1, 2) == [host.engine.revision] * 2
        assert shown(host, 1).error == ""

    run(story, limit=4)


def test_revision_stays_behind_while_a_map_can_not_be_written() -> None:
    async def story(host: Host) -> None:
        host.maps.open_gate()
        for endpoint, labels in ((1, WEB), (2, DB)):
            host.maps.add_endpoint(endpoint, labels)
        assert revisions(host, 1, 2) == [0, 0]
        await host.idle()
        written = host.engine.revision
        host.kernel.full.add(1)
        host.policy(ALLOW_CLIENT)
        host.policy(FOR_OTHERS, "other")
        await host.idle()
        assert revisions(host, 1, 2) == [written, written + 2]
        assert "full" in shown(host, 1).error
        host.kernel.full.clear()
        while host.maps.reconciler.errors:
            await asyncio.sleep(0.02)
        assert revisions(host, 1, 2) == [written + 2] * 2

    run(story)


def test_change_that_waits_for_programs_holds_nobody_else_up() -> None:
    """What comes for the endpoint meanwhile is written after it, and its revision goes up then."""

    async def story(host: Host) -> None:
        host.maps.open_gate()
        for endpoint, labels in ((1, WEB), (2, CLIENT)):
            host.maps.add_endpoint(endpoint, labels)
        await host.idle()
        before, first = dict(host.kernel.maps[1]), host.engine.revision
        host.kernel.slow.add(1)
        host.policy(ALLOW_CLIENT)
        host.policy(ALLOW_CLIENT.replace("app: web", "app: client"), "q")
        while host.kernel.maps[2] == before:
            await asyncio.sleep(0.001)
        host.engine.upsert_identity(302, CLIENT)
        host.policy(FOR_OTHERS, "other")
        await asyncio.sleep(0.01)
        assert host.kernel.maps[1] == before
        assert revisions(host, 1) == [first]
        host.kernel.slow.clear()
        await host.idle()
        assert host.kernel.maps[1] == dict(host.engine.map_state(1))
        assert PolicyKey(302, 0, 0, Direction.INGRESS) in host.kernel.maps[1]
        assert revisions(host, 1, 2) == [first + 3] * 2

    run(story)


def test_endpoint_that_goes_while_its_change_waits_is_not_written() -> None:
    async def story(host: Host) -> None:
        host.maps.open_gate()
        host.maps.add_endpoint(1, WEB)
        await host.idle()
        before = dict(host.kernel.maps[1])
        host.kernel.slow.add(1)
        host.policy(ALLOW_CLIENT)
        await asyncio.sleep(0.005)
        host.maps.remove_endpoint(1)
        await host.idle()
        assert host.kernel.maps[1] == before
        assert not host.maps.reconciler.errors

    run(story)


def test_map_of_a_former_life_is_kept_while_the_policy_does_not_fit() -> None:
    """Without those who are gone; the map of an endpoint that never had one stays empty, in error."""

    async def story(host: Host) -> None:
        keys = [PolicyKey(number, 0, 0, Direction.INGRESS) for number in (0, 300, 399)]
        host.kernel.maps[1] = dict.fromkeys(keys, PolicyEntry(False, 0))
        host.policy(ON_PORTS)
        for endpoint in (1, 2):
            host.maps.add_endpoint(endpoint, WEB)
        host.maps.open_gate()
        await host.idle()
        assert host.kernel.maps[1].keys() == set(keys[:2])
        assert 2 not in host.kernel.maps
        assert host.maps.reconciler.errors.keys() == {2}
        assert revisions(host, 1, 2) == [0, 0]
        assert all("needs 5 map entries" in shown(host, endpoint).error for endpoint in (1, 2))
        host.engine.delete_identity(300)
        host.engine.upsert_identity(300, DB)
        host.maps.flush()
        await host.idle()
        assert host.kernel.maps[1].keys() == {keys[0]}

    run(story, limit=4)
