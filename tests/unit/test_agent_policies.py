# SPDX-License-Identifier: Apache-2.0
"""Where policies come from: directory and etcd, names and conflicts, what is refused and what stays."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.policies import (
    DIRECTORY,
    KVSTORE,
    Document,
    PolicyNames,
    Refusals,
    new_documents,
    new_policies,
)
from agent.policy_sources import PolicyDirectory, PolicyKeys
from kvstore import schema
from kvstore.schema import external
from policy.language import MAX_STORED
from policy.model import Policy
from tests.support.lists import deliver_list

PREFIX = schema.POLICIES


def text(name: str, app: str = "web") -> str:
    return (
        "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\n"
        f"metadata: {{name: {name}}}\n"
        f"spec: {{endpointSelector: {{matchLabels: {{app: {app}}}}}, ingress: [{{}}]}}\n"
    )


class Sources:
    """Both sources over one pair of tables."""

    def __init__(self, directory: Path) -> None:
        self.documents, self.policies, self.refusals = new_documents(), new_policies(), Refusals()
        self.names = PolicyNames(self.documents, self.policies, self.refusals)
        self.directory = PolicyDirectory(directory, self.documents, self.names, self.refusals)
        self.keys = PolicyKeys(self.documents, self.refusals, grace=60.0)

    def write(self, name: str, content: str | bytes) -> Path:
        """Put a file into the directory and scan."""
        self.directory.directory.mkdir(exist_ok=True)
        path = self.directory.directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.scan()
        return path

    def scan(self) -> None:
        asyncio.run(self.directory.rescan())

    def remove(self, name: str) -> Path | None:
        return asyncio.run(self.directory.remove(name))

    def put(self, name: str, content: str | bytes) -> None:
        """Have etcd's watch deliver a policy."""
        self.keys.put(PREFIX + name, content if isinstance(content, bytes) else content.encode())
        self.names.settle()

    def in_force(self) -> dict[str, str]:
        """Return name → origin."""
        return {name: policy.origin for name, policy in self.policies.items()}

    def refused(self) -> set[str]:
        return {each.origin for each in self.refusals.all()}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "policies")


# --- the directory


def test_a_file_comes_changes_and_goes(sources: Sources) -> None:
    path = sources.write("web.yaml", text("web"))
    assert sources.in_force() == {"web": f"file {path}"}
    before = sources.policies.get("web")
    sources.write("web.yaml", text("web", app="db"))
    assert sources.policies.get("web") != before
    path.unlink()
    sources.scan()
    assert sources.in_force() == {}


def test_a_file_with_two_policies_is_taken_whole(sources: Sources) -> None:
    path = sources.write("two.yaml", text("one") + "---\n" + text("two"))
    assert sources.in_force() == {"one": f"file {path}", "two": f"file {path}"}
    sources.write("two.yaml", text("one") + "---\n" + "kind: Nonsense\n")
    assert set(sources.in_force()) == {"one", "two"}
    assert sources.refused() == {f"file {path}"}
    sources.write("two.yaml", text("two"))
    assert set(sources.in_force()) == {"two"}
    assert sources.refused() == set()


def test_other_files_are_ignored(sources: Sources) -> None:
    sources.write("notes.txt", "nothing")
    sources.write(".web.yaml.12.tmp", text("web"))
    (sources.directory.directory / "folder.yaml").mkdir()
    sources.scan()
    assert (sources.in_force(), sources.refused()) == ({}, set())


BAD = {
    "no YAML": b"{[",
    "not UTF-8": b"\xff\xfe\x00",
    "empty": b"",
    "another kind": b"kind: Deployment\n",
    "unknown field": text("web").encode().replace(b"ingress", b"ingresss"),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_the_last_good_one_stays_in_force(sources: Sources, content: bytes) -> None:
    path = sources.write("web.yaml", text("web"))
    good = sources.policies.get("web")
    sources.write("web.yaml", content)
    assert sources.policies.get("web") == good
    assert sources.refused() == {f"file {path}"}
    sources.write("web.yaml", text("web"))
    assert sources.refused() == set()
    sources.write("other.yaml", content)
    assert set(sources.in_force()) == {"web"}
    (sources.directory.directory / "other.yaml").unlink()
    sources.scan()
    assert sources.refused() == set()


def test_a_directory_that_never_was_is_empty_and_in_sync(sources: Sources) -> None:
    sources.scan()
    assert sources.policies.source(DIRECTORY).in_sync


def test_a_directory_that_went_deletes_nothing(sources: Sources) -> None:
    sources.write("web.yaml", text("web"))
    shutil.rmtree(sources.directory.directory)
    sources.scan()
    assert set(sources.in_force()) == {"web"}
    assert sources.refused() == {f"file {sources.directory.directory}"}
    sources.directory.directory.mkdir()
    sources.scan()
    assert (sources.in_force(), sources.refused()) == ({}, set())


def test_a_directory_that_can_not_be_read_is_not_in_sync(tmp_path: Path) -> None:
    """Without its policies everything would be allowed that they deny."""
    (tmp_path / "file").write_text("no directory")
    sources = Sources(tmp_path / "file")
    sources.scan()
    assert not sources.policies.source(DIRECTORY).in_sync
    assert len(sources.refused()) == 1


def test_a_file_that_vanishes_during_the_scan(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    sources.write("web.yaml", text("web"))
    gone = sources.write("gone.yaml", text("gone"))
    real = Path.is_file

    def vanish(path: Path) -> bool:
        found = real(path)
        if path == gone:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", vanish)
    sources.scan()
    assert set(sources.in_force()) == {"web"}


def test_a_dangling_link_is_no_file(sources: Sources) -> None:
    sources.write("web.yaml", text("web"))
    os.symlink("/nowhere", sources.directory.directory / "link.yaml")
    sources.scan()
    assert set(sources.in_force()) == {"web"}


# --- long texts


def long_text(name: str, rules: int = 400) -> str:
    rule = {"endpointSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]}
    return json.dumps({"kind": "CiliumNetworkPolicy", "metadata": {"name": name}, "specs": [rule] * rules})


async def turns_during(work: Awaitable[object]) -> int:
    """Return how often somebody else in the loop gets a turn until `work` is done."""
    turns = 0
    waiting = asyncio.ensure_future(work)
    while not waiting.done():
        turns += 1
        await asyncio.sleep(0)
    await waiting
    return turns


def test_a_long_file_is_read_while_the_loop_goes_on(sources: Sources) -> None:
    sources.directory.directory.mkdir()
    (sources.directory.directory / "long.yaml").write_text(long_text("long"))
    assert asyncio.run(turns_during(sources.directory.rescan())) > 10
    assert set(sources.in_force()) == {"long"}


def test_scans_that_are_asked_for_during_one_see_what_came_meanwhile(sources: Sources) -> None:
    async def story() -> None:
        directory = sources.directory.directory
        directory.mkdir()
        (directory / "long.yaml").write_text(long_text("long"))
        first = asyncio.create_task(sources.directory.rescan())
        await asyncio.sleep(0)
        (directory / "web.yaml").write_text(text("web"))
        (directory / "long.yaml").unlink()
        await sources.directory.rescan()
        assert first.done()
        assert set(sources.in_force()) == {"web"}

    asyncio.run(story())


def test_a_file_of_gigabytes_is_not_read(sources: Sources) -> None:
    sources.directory.directory.mkdir()
    with (sources.directory.directory / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    sources.scan()
    (refusal,) = sources.refusals.all()
    assert f"{1 << 40} bytes are more than" in refusal.error


def test_a_long_value_of_etcd_is_read_before_it_is_taken(sources: Sources) -> None:
    items = [(PREFIX + "long", long_text("long").encode()), (PREFIX + "web", text("web").encode())]
    assert asyncio.run(turns_during(sources.keys.prepare(items))) > 10
    sources.keys.take(items)
    sources.names.settle()
    assert set(sources.in_force()) == {"long", "web"}
    assert sources.keys.text(PREFIX + "long") == long_text("long")


def test_what_was_prepared_counts_for_that_value_only(sources: Sources) -> None:
    key = PREFIX + "long"
    asyncio.run(sources.keys.prepare([(key, long_text("old").encode())]))
    sources.keys.take([(key, long_text("new").encode())])
    sources.names.settle()
    assert set(sources.in_force()) == {"new"}


def test_a_long_value_that_is_refused_is_named_like_a_short_one(sources: Sources) -> None:
    bad = [(PREFIX + "long", long_text("long").replace('"ingress"', '"ingres"').encode())]
    sources.put("long", long_text("long", rules=1))
    asyncio.run(sources.keys.prepare(bad))
    sources.keys.take(bad)
    sources.names.settle()
    (refusal,) = sources.refusals.all()
    assert (refusal.name, refusal.origin) == ("long", PREFIX + "long")
    assert "did you mean ingress?" in refusal.error
    assert set(sources.in_force()) == {"long"}


def test_what_is_too_large_for_etcd_is_too_large_for_the_directory(sources: Sources) -> None:
    large = {**json.loads(long_text("large")), "status": {"note": "x" * MAX_STORED}}
    path = sources.write("large.yaml", json.dumps(large))
    assert sources.refused() == {f"file {path}"}
    assert "bytes as it is stored" in sources.refusals.all()[0].error
    assert MAX_STORED == external.MAX_POLICY


def test_written_and_removed_by_the_api(sources: Sources) -> None:
    for name in ("web", "team/web", "x" * 80):
        sources.directory.write(name, text("p"))
        sources.scan()
        path = sources.directory.path_of(name)
        assert path.parent == sources.directory.directory
        assert sources.in_force() == {"p": sources.directory.origin_of(name)}
        assert sources.remove(name) == path
        assert sources.in_force() == {}
        assert sources.remove(name) is None


# --- etcd


def test_keys_come_change_and_go(sources: Sources) -> None:
    sources.put("web", text("web"))
    assert sources.in_force() == {"web": PREFIX + "web"}
    sources.put("web", b"\xff")
    assert sources.refused() == {PREFIX + "web"}
    assert set(sources.in_force()) == {"web"}
    sources.keys.deleted(PREFIX + "web")
    sources.names.settle()
    assert (sources.in_force(), sources.refused()) == ({}, set())


def test_a_bare_rule_is_named_after_its_key(sources: Sources) -> None:
    sources.put("bare", '[{"endpointSelector": {}, "ingress": [{}]}]')
    assert set(sources.in_force()) == {"bare"}


def test_a_relist_that_lacks_a_policy_keeps_it_for_the_grace(sources: Sources) -> None:
    sources.put("web", text("web"))
    sources.put("db", text("db"))
    sources.put("bad", "kind: Nonsense")
    deliver_list(sources.keys, {PREFIX + "db": text("db").encode()}, 7)
    sources.names.settle()
    assert set(sources.in_force()) == {"web", "db"}
    assert set(sources.keys.source.missing) == {PREFIX + "web"}
    assert sources.refused() == set()
    deadline = sources.keys.source.missing[PREFIX + "web"]
    assert sources.keys.source.expire(deadline - 1) == []
    assert sources.keys.source.expire(deadline) == [PREFIX + "web"]
    sources.names.settle()
    assert set(sources.in_force()) == {"db"}


def test_a_relist_with_a_damaged_policy_keeps_the_last_good_one(sources: Sources) -> None:
    sources.put("web", text("web"))
    deliver_list(sources.keys, {PREFIX + "web": b"{["}, 7)
    assert sources.keys.source.missing == {}
    sources.names.settle()
    assert set(sources.in_force()) == {"web"}
    assert sources.refused() == {PREFIX + "web"}


def test_in_sync_needs_both(sources: Sources) -> None:
    sources.scan()
    assert not sources.policies.in_sync
    sources.keys.in_sync()
    assert not sources.policies.source(KVSTORE).in_sync  # documents are not policies yet
    sources.names.settle()
    assert sources.policies.in_sync


# --- names


def test_the_one_in_force_first_keeps_its_place(sources: Sources) -> None:
    path = sources.write("web.yaml", text("web"))
    sources.put("web", text("web", app="db"))
    assert sources.in_force() == {"web": f"file {path}"}
    (refusal,) = sources.refusals.all()
    assert refusal.origin == PREFIX + "web"
    assert f"exists already, from file {path}" in refusal.error
    path.unlink()
    sources.scan()
    assert sources.in_force() == {"web": PREFIX + "web"}
    assert sources.refused() == set()


def test_the_other_way_round(sources: Sources) -> None:
    sources.put("web", text("web"))
    path = sources.write("web.yaml", text("web", app="db"))
    assert sources.in_force() == {"web": PREFIX + "web"}
    sources.keys.deleted(PREFIX + "web")
    sources.names.settle()
    assert sources.in_force() == {"web": f"file {path}"}
    assert sources.policies.owner("web") == DIRECTORY


def test_a_file_that_is_renamed(sources: Sources) -> None:
    old = sources.write("old.yaml", text("web"))
    new = old.rename(old.with_name("new.yaml"))
    sources.scan()
    assert sources.in_force() == {"web": f"file {new}"}
    assert sources.refused() == set()


def test_a_policy_that_is_renamed_frees_its_name(sources: Sources) -> None:
    sources.put("a", text("shared"))
    sources.put("b", text("shared"))
    sources.put("a", text("own"))
    assert sources.in_force() == {"own": PREFIX + "a", "shared": PREFIX + "b"}


def test_a_conflict_does_not_end_by_a_bad_text(sources: Sources) -> None:
    sources.put("a", text("shared"))
    sources.put("b", text("shared"))
    sources.put("b", "kind: Nonsense")
    assert len(sources.refusals.all()) == 2
    sources.put("b", text("shared"))
    assert {each.origin for each in sources.refusals.all()} == {PREFIX + "b"}
    assert "exists already" in sources.refusals.all()[0].error


NAMES = st.sampled_from(("a", "b", "c", "d"))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("o1", "o2", "o3", "o4")),
        st.one_of(st.none(), st.sets(NAMES, min_size=1, max_size=3)),
        st.booleans(),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(STEPS)
def test_names_against_a_table_of_who_came_first(
    steps: Iterable[tuple[str, set[str] | None, bool]],
) -> None:
    """Every name has one owner; a document is in force whole; one that is not lacks a name for a reason."""
    documents, policies = new_documents(), new_policies()
    names = PolicyNames(documents, policies, Refusals())
    wanted: dict[str, Document] = {}
    for version, (origin, content, settle) in enumerate(steps):
        source = documents.source(DIRECTORY if origin < "o3" else KVSTORE)
        if content is None:
            source.delete(origin)
            wanted.pop(origin, None)
        else:
            document = tuple(Policy(name, f"{origin} {version}", ()) for name in sorted(content))
            source.upsert(origin, document)
            wanted[origin] = document
        if settle:
            names.settle()
    names.settle()
    in_force = dict(policies.items())
    for origin, document in wanted.items():
        lacking = [each.name for each in document if in_force.get(each.name) != each]
        if lacking:
            holders = {each.name: names.holder(each.name) for each in document}
            assert any(holder not in (None, origin) for holder in holders.values()), (origin, holders)
        else:
            assert all(names.holder(each.name) == origin for each in document)
    for name, policy in in_force.items():
        holder = names.holder(name)
        assert holder in wanted
        assert policy.origin.startswith(holder)
        assert policies.owner(name) == (DIRECTORY if holder < "o3" else KVSTORE)
