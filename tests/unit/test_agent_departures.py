# SPDX-License-Identifier: Apache-2.0
"""What etcd has no record of any more: what stays, what goes, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import pytest

from agent import ipcache
from agent.departures import (
    AGAIN_S,
    BEHIND_S,
    BRIEF_S,
    DEAF_S,
    SETTLED_S,
    SOON_S,
    STAYING_S,
    THOROUGH_S,
    TRIES,
    Departures,
)
from agent.ipcache import Record
from agent.policies import Document
from core.table import Table
from identity.labels import Labels
from kvstore import schema
from kvstore.sink import HOLD_S
from kvstore.watcher import Follower, State

WEB, DB = Labels.of(["container:app=web"]), Labels.of(["container:app=db"])


def node(name: str, address: str, pool: str) -> schema.NodeRecord:
    text = (
        f'{{"Name":"{name}","Cluster":"default","IPAddresses":[{{"Type":"InternalIP","IP":"{address}"}}],'
        f'"IPv4AllocCIDR":{{"IP":"{pool}","Mask":"//8AAA=="}}}}'
    )
    return schema.parse_node(f"{schema.NODES}default/{name}", text.encode())


# Hold, spread, questions; and what is behind it.
GONE_S = HOLD_S + 2 + (TRIES + 1) * (SOON_S + 2)
BEHIND_GONE_S = HOLD_S + 2 * BEHIND_S


class Followed:
    """The follower of one prefix, to whom etcd speaks all the time while he watches, unless it is silent."""

    def __init__(self, scene: Scene, prefix: str) -> None:
        self.prefix = prefix
        self.silent_since: float | None = None
        self._scene = scene
        self._state = State.WATCHING
        self._left_at = 0.0

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._left_at = self.fresh_at
        self._state = state

    @property
    def fresh_at(self) -> float:
        if self._state is not State.WATCHING:
            return self._left_at
        return self._scene.now if self.silent_since is None else self.silent_since


class Followers(list[Followed]):
    """All of them, as they mostly are: in one state."""

    def enter(self, state: State) -> None:
        for each in self:
            each.state = state

    def fall_silent(self, since: float | None) -> None:
        for each in self:
            each.silent_since = since


class Scene:
    """Two hosts, a and b, with an address each; `answering` are the nodes whose agents answer."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.answering = {"default/a"}
        self.back_during_the_question = False
        self.asked: list[str] = []
        self.nodes: Table[str, schema.NodeRecord] = Table("nodes", ("kvstore",))
        self.addresses = ipcache.new_table(ipv6=False)
        self.identities: Table[int, Labels] = Table("identities", ("kvstore",))
        self.source = self.addresses.source(ipcache.KVSTORE_SOURCE)
        for name, host, number, labels in (("a", "192.0.2.1", 300, WEB), ("b", "192.0.2.2", 400, DB)):
            self.nodes.source("kvstore").upsert(f"default/{name}", node(name, host, f"10.{number % 256}.0.0"))
            self.source.upsert(f"10.{number % 256}.0.9/32", Record(number, host))
            self.identities.source("kvstore").upsert(number, labels)
        prefixes = (schema.NODES, schema.IPS, schema.IDENTITY_IDS, schema.POLICIES)
        self.followers = Followers(Followed(self, prefix) for prefix in prefixes)
        self.policies: Table[str, Document] = Table("documents", ("kvstore",))
        self.departures = Departures(
            self.nodes,
            self.addresses,
            self.identities.source("kvstore"),
            self.policies.source("kvstore"),
            [cast(Follower, each) for each in self.followers],
            own="default/own",
            who_answers=self._who_answers,
            rng=random.Random(1),
            clock=lambda: self.now,
        )

    async def _who_answers(self, names: Sequence[str]) -> set[str]:
        self.asked += names
        if self.back_during_the_question:
            self.followers.fall_silent(None)
        return self.answering & set(names)

    def questions(self, name: str) -> int:
        return self.asked.count(name)

    def lose(self, *, node: bool = True, address: bool = True, identity: bool = False) -> None:
        """Have deletions of what is host b's come from etcd."""
        until = self.now + HOLD_S
        if node:
            self.nodes.source("kvstore").hold("default/b", until)
        if address:
            self.source.hold("10.144.0.9/32", until)
        if identity:
            self.identities.source("kvstore").hold(400, until)

    async def after(self, seconds: float) -> None:
        """Look as often as an agent does meanwhile."""
        end = self.now + seconds
        while self.now < end:
            self.now += 2.0
            await self.departures.look()

    @property
    def known(self) -> tuple[bool, bool, bool]:
        return "default/b" in self.nodes, "10.144.0.9/32" in self.addresses, 400 in self.identities


async def test_a_container_that_ended_goes_once_its_deletion_was_held() -> None:
    scene = Scene()
    scene.lose(node=False)
    await scene.after(HOLD_S - 2)
    assert scene.known == (True, True, True)
    await scene.after(4)
    assert scene.known == (True, False, True)
    assert scene.asked == []


async def test_what_its_owner_writes_again_was_never_gone() -> None:
    scene = Scene()
    changes = scene.addresses.subscribe()
    changes.take()
    scene.lose()
    await scene.after(HOLD_S - 2)
    scene.nodes.source("kvstore").upsert("default/b", node("b", "192.0.2.2", "10.144.0.0"))
    scene.source.upsert("10.144.0.9/32", Record(400, "192.0.2.2"))
    await scene.after(300)
    assert scene.known == (True, True, True)
    assert (scene.source.held, scene.source.missing) == ({}, {})
    assert scene.asked == []


async def test_a_host_without_a_lease_stays_for_as_long_as_it_answers() -> None:
    scene = Scene()
    scene.answering |= {"default/b"}
    scene.lose(identity=True)
    await scene.after(3600)
    assert scene.known == (True, True, True)
    assert list(scene.nodes.source("kvstore").missing) == ["default/b"]
    assert scene.questions("default/b") < 2 * 3600 / AGAIN_S
    scene.answering -= {"default/b"}
    await scene.after(STAYING_S)
    assert scene.known[0], "it may be starting anew"
    await scene.after(3 * AGAIN_S)
    assert not scene.known[0], "silent for minutes"
    await scene.after(BEHIND_GONE_S)
    assert not scene.known[1], "what was behind it goes with it"
    await scene.after(2 * AGAIN_S + THOROUGH_S)
    assert scene.known == (False, False, False)
    assert "default/a" in scene.nodes
    assert "10.44.0.9/32" in scene.addresses


async def test_a_host_that_is_silent_once_is_not_gone() -> None:
    scene = Scene()
    scene.lose()
    while not scene.asked:
        await scene.after(2)
    scene.answering |= {"default/b"}
    await scene.after(600)
    assert scene.known == (True, True, True)


async def test_a_host_that_left_goes_with_all_it_had() -> None:
    scene = Scene()
    scene.lose()
    await scene.after(GONE_S)
    assert scene.known[0] is False
    assert scene.questions("default/b") == TRIES + 1
    await scene.after(BEHIND_GONE_S)
    assert scene.known == (False, False, True)


async def test_a_host_whose_own_network_is_down_judges_nobody() -> None:
    """That etcd is away is noticed later than that nobody answers."""
    scene = Scene()
    scene.lose()
    await scene.after(HOLD_S)
    await scene.after(2)
    scene.answering = {"default/a"}  # as one that has a way of its own
    scene.followers.fall_silent(scene.now)
    await scene.after(120)
    assert scene.questions("default/b") > TRIES + 1
    scene.answering = {"default/a", "default/b"}
    scene.followers.fall_silent(None)
    await scene.after(600)
    assert scene.known == (True, True, True)


async def test_the_last_question_is_asked_after_etcd_has_spoken_again() -> None:
    """One that was asked into the own outage is no silence, though etcd speaks before it ends."""
    scene = Scene()
    scene.lose()
    while scene.questions("default/b") < TRIES:
        await scene.after(2)
    scene.followers.fall_silent(scene.now)
    asked = scene.questions("default/b")
    while scene.questions("default/b") == asked:
        scene.back_during_the_question = True
        await scene.after(2)
    scene.answering |= {"default/b"}
    await scene.after(600)
    assert scene.known == (True, True, True)


async def test_a_host_that_hears_none_of_the_others_judges_nobody_for_an_hour() -> None:
    """etcd may be in another network than the one that is down."""
    scene = Scene()
    scene.answering = set()
    scene.lose()
    await scene.after(DEAF_S)
    assert scene.known == (True, True, True)
    assert 1 < scene.questions("default/b") < 2 * DEAF_S / AGAIN_S
    scene.answering = {"default/a", "default/b"}
    await scene.after(600)
    assert scene.known == (True, True, True)
    scene.answering = set()
    await scene.after(2 * DEAF_S)
    assert not scene.known[0], "where probes never pass nobody would ever go"


@pytest.mark.parametrize("listed", [False, True])
async def test_one_that_came_back_and_is_lost_again_is_asked_as_often_as_the_first_time(listed: bool) -> None:
    scene = Scene()
    scene.lose()
    while scene.questions("default/b") < TRIES:
        await scene.after(2)
    source = scene.nodes.source("kvstore")
    source.upsert("default/b", node("b", "192.0.2.2", "10.144.0.0"))
    if listed:
        source.mark_missing(["default/b"], scene.now + 60)
    else:
        await scene.after(600)
        scene.lose()
    asked = scene.questions("default/b")
    while scene.known[0]:
        await scene.after(2)
    assert scene.questions("default/b") - asked == TRIES + 1


async def test_in_a_large_cluster_a_host_that_stays_is_not_asked_by_all_at_once() -> None:
    scene = Scene()
    for number in range(5000):
        address, pool = f"198.18.{number // 250}.{number % 250}", f"{100 + number // 250}.{number % 250}.0.0"
        scene.nodes.source("kvstore").upsert(f"default/n{number}", node(f"n{number}", address, pool))
    scene.answering |= {"default/b", *(f"default/n{number}" for number in range(5000))}
    scene.lose()
    await scene.after(3600)
    assert 2 < scene.questions("default/b") < 3600 / (5000 / 20) * 1.2, "of 5000 hosts 20 a second ask"
    assert scene.known[0]


async def test_one_that_came_back_and_left_while_etcd_was_away_is_asked_anew() -> None:
    """What happened meanwhile comes as one deletion."""
    scene = Scene()
    scene.answering |= {"default/b"}
    scene.lose()
    await scene.after(600)
    scene.followers.enter(State.RETRYING)
    await scene.after(60)
    scene.answering -= {"default/b"}
    scene.lose()
    scene.followers.enter(State.WATCHING)
    await scene.after(SETTLED_S + GONE_S)
    assert not scene.known[0]


async def test_what_a_list_may_still_bring_does_not_go() -> None:
    """Nor what was held when history was lost: that its owner wrote it again may be in the list."""
    scene = Scene()
    scene.source.mark_missing(["10.44.0.9/32"], scene.now + 60)
    scene.lose(node=False)
    scene.followers.enter(State.WAITING)
    await scene.after(3600)
    assert scene.known == (True, True, True)
    assert "10.44.0.9/32" in scene.addresses
    scene.followers.enter(State.WATCHING)
    await scene.after(THOROUGH_S + 2)
    assert scene.known == (True, False, True)
    assert "10.44.0.9/32" not in scene.addresses


async def test_what_is_held_goes_only_after_etcd_has_spoken_again() -> None:
    """An etcd that hangs is found out later than a hold lasts; its owner's word may be on its way."""
    scene = Scene()
    scene.lose(node=False, identity=True)
    scene.followers.fall_silent(scene.now + HOLD_S - 1)
    await scene.after(300)
    assert scene.known == (True, True, True)
    scene.followers.fall_silent(None)
    await scene.after(4)
    assert scene.known == (True, False, True)


@pytest.mark.parametrize("prefix", [schema.POLICIES, schema.IDENTITY_IDS])
async def test_a_prefix_that_etcd_denies_keeps_nothing_of_others(prefix: str) -> None:
    scene = Scene()
    for each in scene.followers:
        if each.prefix == prefix:
            each.state = State.DENIED
    scene.lose()
    scene.source.mark_missing(["10.44.0.9/32"], scene.now + 60)
    await scene.after(GONE_S + BEHIND_GONE_S)
    assert scene.known == (False, False, True)
    assert "10.44.0.9/32" not in scene.addresses


async def test_a_machine_behind_a_host_that_stays_goes_all_the_same() -> None:
    scene = Scene()
    scene.answering = {"default/b"}
    scene.source.upsert("192.0.2.77/32", Record(500, "192.0.2.2", metadata="vm:legacy"))
    scene.lose()
    scene.source.mark_missing(["192.0.2.77/32"], scene.now + 60)
    await scene.after(600)
    assert "192.0.2.77/32" not in scene.addresses
    assert scene.known == (True, True, True)


@pytest.mark.parametrize(
    ("address", "pool"), [("192.0.2.2", "10.9.0.0"), ("192.0.2.9", "10.144.0.0")], ids=["address", "pool"]
)
async def test_a_host_that_was_renamed_or_replaced_is_gone_though_somebody_answers(
    address: str, pool: str
) -> None:
    scene = Scene()
    scene.answering = {"default/b", "default/new"}
    scene.nodes.source("kvstore").upsert("default/new", node("new", address, pool))
    scene.lose(address=False)
    await scene.after(HOLD_S + 4)
    assert "default/b" not in scene.nodes
    assert "default/new" in scene.nodes
    assert scene.asked == []


async def test_addresses_of_a_host_that_is_back_have_time_to_come_behind_its_node() -> None:
    scene = Scene()
    scene.answering = {"default/b"}
    scene.lose()
    await scene.after(600)
    scene.nodes.source("kvstore").upsert("default/b", node("b", "192.0.2.2", "10.144.0.0"))
    deadline = scene.source.missing["10.144.0.9/32"]
    scene.source.keep(["10.144.0.9/32"], scene.now)  # as the clock may have it
    await scene.after(HOLD_S - 2)
    assert scene.known[1]
    assert deadline > 0
    scene.source.keep(["10.144.0.9/32"], scene.now)
    await scene.after(HOLD_S + 4)
    assert not scene.known[1], "its owner does not want it any more"


async def test_an_identity_stays_while_an_address_has_it() -> None:
    scene = Scene()
    scene.lose(node=False, address=False, identity=True)
    await scene.after(600)
    assert scene.known == (True, True, True)
    scene.source.delete("10.144.0.9/32")
    await scene.after(2 * AGAIN_S + THOROUGH_S)
    assert scene.known == (True, False, False)


async def test_an_identity_of_an_endpoint_here_stays() -> None:
    scene = Scene()
    scene.source.delete("10.144.0.9/32")
    scene.addresses.source(ipcache.LOCAL_SOURCE).upsert("10.1.0.5/32", Record(400))
    scene.lose(node=False, address=False, identity=True)
    await scene.after(600)
    assert 400 in scene.identities


async def test_what_a_list_lacked_is_asked_for_after_its_grace() -> None:
    """A wipe looks the same to everybody: a host that answers is not gone because of one."""
    scene = Scene()
    scene.answering = {"default/a"}
    for source, keys in (
        (scene.nodes.source("kvstore"), ["default/a", "default/b"]),
        (scene.source, list(scene.source.entries())),
    ):
        source.mark_missing(keys, scene.now + 60)
    await scene.after(58)
    assert len(scene.nodes) == 2
    await scene.after(300)
    assert [name for name, _ in scene.nodes.items()] == ["default/a"]
    assert set(scene.source.entries()) == {"10.44.0.9/32"}


@pytest.mark.parametrize("away", [State.RETRYING, State.LISTING, State.CATCHING_UP])
async def test_nothing_goes_while_etcd_is_away_and_until_everybody_is_back(away: State) -> None:
    """Who is asked to write again what it has must be able to."""
    scene = Scene()
    scene.policies.source("kvstore").upsert("allow", Document())
    scene.lose(identity=True)
    scene.policies.source("kvstore").mark_missing(["allow"], scene.now + 60)
    await scene.departures.look()
    scene.followers.enter(away)
    await scene.after(3 * 3600)
    assert scene.known == (True, True, True)
    assert scene.asked == []
    scene.followers.enter(State.WATCHING)
    await scene.after(SETTLED_S - 2)
    assert (scene.known, len(scene.policies)) == ((True, True, True), 1)
    await scene.after(GONE_S + BEHIND_GONE_S + 2 * AGAIN_S + 2 * THOROUGH_S)
    assert (scene.known, len(scene.policies)) == ((False, False, False), 0)


async def test_a_watch_that_is_made_anew_now_and_then_puts_nothing_off() -> None:
    scene = Scene()
    scene.lose(node=False)
    for _ in range(4):
        scene.followers.enter(State.RETRYING)
        await scene.after(BRIEF_S)
        scene.followers.enter(State.WATCHING)
        await scene.after(4)
    assert scene.known == (True, False, True)


async def test_an_agent_that_starts_while_etcd_is_away_waits_for_the_others_too() -> None:
    scene = Scene()
    scene.followers.enter(State.RETRYING)
    scene.lose(node=False)
    await scene.after(60)
    scene.followers.enter(State.WATCHING)
    await scene.after(SETTLED_S - 2)
    assert scene.known == (True, True, True)


async def test_a_policy_goes_at_the_end_of_its_grace() -> None:
    scene = Scene()
    scene.policies.source("kvstore").upsert("allow", Document())
    scene.policies.source("kvstore").mark_missing(["allow"], scene.now + 60)
    await scene.after(58)
    assert len(scene.policies) == 1
    await scene.after(THOROUGH_S + 4)
    assert len(scene.policies) == 0


async def test_where_nobody_is_probed_what_is_not_written_again_goes() -> None:
    scene = Scene()
    scene.departures._who_answers = None
    scene.lose()
    await scene.after(GONE_S)
    assert not scene.known[0]


def many(scene: Scene, count: int) -> list[str]:
    """Have etcd lose `count` more nodes; return their names."""
    source = scene.nodes.source("kvstore")
    names = [f"default/n{number}" for number in range(count)]
    for number, name in enumerate(names):
        address, pool = f"198.18.{number // 250}.{number % 250}", f"{100 + number // 250}.{number % 250}.0.0"
        source.upsert(name, node(name.removeprefix("default/"), address, pool))
        source.hold(name, scene.now)
    return names


async def test_not_everybody_asks_in_the_moment_in_which_all_notice() -> None:
    scene = Scene()
    for number in range(1000):
        address, pool = f"198.18.{number // 250}.{number % 250}", f"{100 + number // 250}.{number % 250}.0.0"
        scene.nodes.source("kvstore").upsert(f"default/n{number}", node(f"n{number}", address, pool))
    scene.lose()
    await scene.after(HOLD_S + 2)
    (until,) = scene.nodes.source("kvstore").missing.values()
    assert 2 < until - scene.now < 1000 / 20, "1000 nodes, 20 a second"


async def test_of_many_each_gets_its_turn() -> None:
    """Those that stay are due again and again, and do not keep the last one from being found gone."""
    scene = Scene()
    names = many(scene, 1000)
    scene.answering |= set(names[:-1])
    await scene.after(600)
    assert len(scene.nodes) == 1001
    assert set(scene.asked) >= set(names)
    assert names[-1] not in scene.nodes
