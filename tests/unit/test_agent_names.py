# SPDX-License-Identifier: Apache-2.0
"""Name → addresses: from labels and addresses in any order, the same as when all of it is looked at anew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import ipcache
from agent.ipcache import IpTable, Record
from agent.names import Name, NameIndex, Names, Records, compose_labels, name_of
from core.table import Table
from identity.labels import Labels
from identity.numbers import LOCAL_FLAG
from tests.support.eventually import eventually

WEB = Name(b"web", b"shop")


def labels(service: str, project: str = "shop", **others: str) -> Labels:
    given_ = {
        "com.docker.compose.project": project,
        "com.docker.compose.service": service,
        "holdfast.network": "holdfast",
        **others,
    }
    return Labels.of([f"{key}={value}" for key, value in given_.items()], source="container")


def addresses(found: Records | None) -> set[str]:
    """Return the addresses of a name as text; they are the end of each record."""
    if found is None:
        return set()
    sized = [(4, each) for each in found.v4] + [(16, each) for each in found.v6]
    return {str(ip_address(record[-size:])) for size, record in sized}


# --- names


@pytest.mark.parametrize(
    ("service", "project", "name"),
    [
        ("web", "shop", WEB),
        ("Web", "SHOP", WEB),
        ("db_1", "my-shop", Name(b"db_1", b"my-shop")),
        ("_x_", "0", Name(b"_x_", b"0")),
        ("x" * 63, "y", Name(b"x" * 63, b"y")),
    ],
)
def test_services_have_names(service: str, project: str, name: Name) -> None:
    assert name_of(service, project) == name


@pytest.mark.parametrize("wrong", ["a.b", "-a", "a-", "ä", "a b", "x" * 64, "", "a\n", "\u0131", "\u212a"])
def test_what_can_be_no_label_of_dns_makes_no_name(wrong: str) -> None:
    assert name_of(wrong, "shop") is None
    assert name_of("web", wrong) is None


def test_only_a_containers_own_labels_of_both_kinds_name_it() -> None:
    assert compose_labels(labels("web")) == ("web", "shop")
    assert compose_labels(Labels.of(["com.docker.compose.service=web"], source="container")) is None
    both = ["com.docker.compose.service=web", "com.docker.compose.project=shop"]
    assert compose_labels(Labels.of(both, source="k8s")) is None
    assert compose_labels(labels("", "")) is None


# --- the index

KNOWN = [
    labels("web"),
    labels("WEB", env="x"),
    labels("db"),
    labels("web", "other"),
    labels("a.b"),
    labels(""),
]
Change = tuple[str, int, int | None]
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("labels"), st.integers(256, 260), st.none() | st.integers(0, len(KNOWN) - 1)),
        st.tuples(
            st.just("address"),
            st.integers(1, 6),
            st.none() | st.integers(255, 260) | st.just(LOCAL_FLAG | 256),
        ),
    ),
    max_size=40,
)


def prefix(number: int) -> str:
    return {5: "fd00::5/128", 6: "10.0.6.0/24"}.get(number, f"10.0.0.{number}/32")


class Reference:
    """The slow, obvious one: everything is looked at for each question."""

    def __init__(self) -> None:
        self.labels: dict[int, Labels] = {}
        self.owners: dict[str, int] = {}

    def take(self, change: Change) -> None:
        kind, key, value = change
        if kind == "labels":
            self.labels.pop(key, None)
            if value is not None:
                self.labels[key] = KNOWN[value]
        else:
            self.owners.pop(prefix(key), None)
            if value is not None:
                self.owners[prefix(key)] = value

    def named(self) -> dict[Name, set[str]]:
        found: dict[Name, set[str]] = {}
        for each, owner in self.owners.items():
            pair = compose_labels(self.labels.get(owner, Labels()))
            name = name_of(*pair) if pair else None
            if name and 256 <= owner < LOCAL_FLAG and not each.endswith("/24"):
                found.setdefault(name, set()).add(each.partition("/")[0])
        return found

    def unusable(self) -> set[int]:
        pairs = {number: compose_labels(each) for number, each in self.labels.items()}
        return {number for number, pair in pairs.items() if pair and name_of(*pair) is None}


@given(CHANGES)
def test_the_index_says_what_a_look_at_everything_says(changes: list[Change]) -> None:
    names, reference = Names(), Reference()
    everything = {name_of(*pair) for each in KNOWN if (pair := compose_labels(each))} - {None}
    for change in changes:
        kind, key, value = change
        if kind == "labels":
            names.set_labels(key, None if value is None else KNOWN[value])
        else:
            names.set_identity(prefix(key), value)
        reference.take(change)
        expected = reference.named()
        found = {name: addresses(names.get(name)) for name in everything if name and names.get(name)}
        assert found == expected
        assert len(names) == len(expected)
        for project in (b"shop", b"other"):
            assert names.has_project(project) == any(name.project == project for name in expected)
        assert set(names.unusable) == reference.unusable()


def test_an_address_that_may_be_gone_is_told_where_there_is_no_other() -> None:
    names, name = Names(), Name(b"web", b"shop")
    names.set_labels(300, labels("web"))
    names.set_identity("10.0.0.1/32", 300)
    names.set_identity("10.0.0.2/32", 300)
    assert addresses(names.get(name)) == {"10.0.0.1", "10.0.0.2"}
    names.set_identity("10.0.0.1/32", 300, doubtful=True)
    assert addresses(names.get(name)) == {"10.0.0.2"}
    names.set_identity("10.0.0.2/32", 300, doubtful=True)
    assert addresses(names.get(name)) == {"10.0.0.1", "10.0.0.2"}
    names.set_identity("10.0.0.1/32", 300)
    assert addresses(names.get(name)) == {"10.0.0.1"}
    names.set_identity("10.0.0.2/32", None)
    names.set_identity("10.0.0.1/32", None)
    assert names.get(name) is None
    names.set_labels(300, None)
    assert not any(vars(names).values())


def test_what_is_gone_leaves_nothing() -> None:
    names = Names()
    for number in range(100):
        names.set_labels(256 + number, labels(f"s{number}"))
        names.set_identity(f"10.0.0.{number}/32", 256 + number)
        assert addresses(names.get(Name(b"s%d" % number, b"shop"))) == {f"10.0.0.{number}"}
    for number in range(100):
        names.set_labels(256 + number, None)
        names.set_identity(f"10.0.0.{number}/32", None)
    assert not any(vars(names).values())


# --- following


class Cluster:
    """The two tables and the index that follows them."""

    def __init__(self) -> None:
        self.identities: Table[int, Labels] = Table("identities", ("kvstore",))
        self.addresses: IpTable = ipcache.new_table()
        self.index = NameIndex(self.identities, self.addresses)
        self.source = self.addresses.source(ipcache.KVSTORE_SOURCE)

    def put(self, number: int, found: Labels, *prefixes: str) -> None:
        self.identities.source("kvstore").upsert(number, found)
        for each in prefixes:
            self.source.upsert(each, Record(number))

    def all_listed(self) -> None:
        for table in (self.identities, self.addresses):
            for source in table.sources:
                source.mark_in_sync()

    def at(self, name: Name = WEB) -> set[str]:
        return addresses(self.index.get(name))

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(each)
            for each in (self.index.follow_identities(), self.index.follow_addresses())
        ]
        try:
            yield
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_names_come_and_go_with_their_addresses() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.put(300, labels("web"), "10.0.0.1/32", "10.0.0.2/32", "fd00::1/128")
        await eventually(lambda: cluster.at() == {"10.0.0.1", "10.0.0.2", "fd00::1"}, "all three")
        cluster.source.delete("10.0.0.1/32")
        await eventually(lambda: cluster.at() == {"10.0.0.2", "fd00::1"}, "one less")
        cluster.source.upsert("10.0.0.2/32", Record(301))
        cluster.put(301, labels("db"))
        await eventually(lambda: cluster.at(Name(b"db", b"shop")) == {"10.0.0.2"}, "the other's")
        assert cluster.at() == {"fd00::1"}


async def test_a_no_counts_once_both_tables_are_complete_and_ever_after() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.put(300, labels("web"), "10.0.0.1/32")
        await eventually(lambda: cluster.at() == {"10.0.0.1"}, "known before all is listed")
        cluster.identities.source("kvstore").mark_in_sync()
        await asyncio.sleep(0.05)
        assert not cluster.index.complete
        cluster.all_listed()
        await eventually(lambda: cluster.index.complete, "complete")


async def test_following_begun_again_misses_nothing() -> None:
    cluster = Cluster()
    cluster.put(300, labels("web"), "10.0.0.1/32", "10.0.0.2/32")
    cluster.put(301, labels("db"), "10.0.0.3/32")
    async with cluster.followed():
        await eventually(lambda: len(cluster.index.names) == 2, "both")
    cluster.source.delete("10.0.0.2/32")
    cluster.identities.source("kvstore").delete(301)
    cluster.put(302, labels("cache"), "10.0.0.4/32")
    async with cluster.followed():
        await eventually(lambda: cluster.at(Name(b"cache", b"shop")) == {"10.0.0.4"}, "what came")
        await eventually(lambda: cluster.at() == {"10.0.0.1"}, "what went")
        await eventually(lambda: cluster.at(Name(b"db", b"shop")) == set(), "the name that went")


async def test_an_endpoint_of_this_host_counts_as_this_host_knows_it() -> None:
    cluster = Cluster()
    async with cluster.followed():
        cluster.put(300, labels("web"), "10.0.0.1/32")
        cluster.put(301, labels("db"))
        cluster.addresses.source(ipcache.LOCAL_SOURCE).upsert("10.0.0.1/32", Record(301))
        await eventually(lambda: cluster.at(Name(b"db", b"shop")) == {"10.0.0.1"}, "this host's word")
        assert cluster.at() == set()
