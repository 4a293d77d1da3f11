# SPDX-License-Identifier: Apache-2.0
"""The client against a real etcd: reading, writing, transactions, leases, TLS, failover, errors."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from kvstore import listing as lists
from kvstore.client import Client
from kvstore.config import EtcdConfig
from kvstore.errors import (
    Compacted,
    ConfigError,
    LeaseNotFound,
    PermissionDenied,
    RequestRefused,
    Unavailable,
)
from kvstore.ops import (
    absent,
    delete_op,
    exists,
    get_op,
    lease_is,
    list_op,
    mod_is,
    put_op,
    range_absent,
    value_is,
)
from kvstore.schema.external import MAX_POLICY
from kvstore.watch import Kind, WatchBatch, WatchStream
from tests.support.etcd import EtcdCluster, EtcdServer
from tests.support.eventually import eventually


@pytest.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[Client]:
    client = Client(etcd.config, timeout=5)
    yield client
    await client.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EtcdCluster]:
    cluster = EtcdCluster(tmp_path / "cluster")
    try:
        yield cluster.start()
    finally:
        cluster.stop()


# --- reading and writing


async def test_put_get_delete(client: Client) -> None:
    revision = await client.put("a", "1")
    found = await client.get("a")
    assert found is not None
    assert (found.key, found.value, found.mod_revision, found.version) == ("a", b"1", revision, 1)
    assert await client.delete("a")
    assert not await client.delete("a")
    assert await client.get("a") is None


async def test_list_is_paged_at_one_revision(client: Client) -> None:
    await client.write_many(put_op(f"k/{index:04}", f"{index}") for index in range(250))
    await client.put("l", "outside")
    pages = lists.pages(client.transport, "k/", 100)
    first = await anext(pages)
    await client.delete("k/0249")
    await client.put("k/9999", "new")
    rest = [answer async for answer in pages]
    keys = [kv.key for answer in (first, *rest) for kv in answer.kvs]
    assert [len(answer.kvs) for answer in (first, *rest)] == [100, 100, 50]
    assert keys == [b"k/%04d" % index for index in range(250)]
    listing = await client.list("k/", page=7)
    assert len(listing.items) == 250
    assert listing.items[-1].key == "k/9999"
    assert (await client.snapshot("k/", page=7)).items == {item.key: item.value for item in listing.items}
    assert await client.count("k/") == 250


async def test_list_starts_again_when_its_revision_is_compacted(etcd: EtcdServer, client: Client) -> None:
    await client.write_many(put_op(f"k/{index}", "x") for index in range(5))
    plain, calls = client.transport.call, 0

    async def compacting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # between the first and the second page
            etcd.ctl("put", "k/0", "y")
            etcd.compact()
        return await plain(*arguments, **options)

    client.transport.call = compacting  # type: ignore[method-assign]
    listing = await client.list("k/", page=2)
    assert [item.value for item in listing.items] == [b"y", b"x", b"x", b"x", b"x"]
    assert calls == 5


async def test_a_page_of_a_large_prefix_is_waited_for_longer_than_an_answer(etcd: EtcdServer) -> None:
    """etcd reads a page that was given up to its end all the same; what a person asks for is given up."""
    client = Client(etcd.config, timeout=0.5)
    etcd.ctl("put", "k/a", "1")

    async def connected() -> bool:
        with suppress(Unavailable):
            return bool((await client.list("k/")).items)
        return False

    await eventually(connected, "an answer within half a second")
    etcd.pause()
    try:
        followed = asyncio.create_task(client.snapshot("k/"))
        with pytest.raises(Unavailable):
            await client.list("k/")
        await asyncio.sleep(0.5)
        assert not followed.done()
        etcd.resume()
        assert (await followed).items == {"k/a": b"1"}
    finally:
        etcd.resume()
        await client.close()


async def test_values_of_a_megabyte_come_in_smaller_pages(client: Client) -> None:
    value = b"x" * 1_000_000
    for index in range(70):
        await client.put(f"big/{index:02}", value)
    listing = await client.list("big/")
    assert [len(item.value) for item in listing.items] == [1_000_000] * 70


async def test_value_that_etcd_never_takes_is_refused_with_its_key(client: Client) -> None:
    for size in (1_600_000, 5_000_000):
        with pytest.raises(RequestRefused, match="big") as refused:
            await client.put("big", b"x" * size)
        assert "--max-request-bytes" in refused.value.hint
    await client.put("big", b"x" * MAX_POLICY)


async def test_transaction(client: Client) -> None:
    conditions = [absent("id/1"), range_absent("value/a/")]
    operations = [put_op("id/1", "a"), put_op("value/a/n", "1"), get_op("id/1")]
    done = await client.txn(conditions, operations, [list_op("value/a/")])
    assert done.succeeded
    assert done.responses[2].items[0].value == b"a"
    again = await client.txn(conditions, operations, [list_op("value/a/")])
    assert not again.succeeded
    assert [item.key for item in again.responses[0].items] == ["value/a/n"]
    found = again.responses[0].items[0]
    for condition, holds in (
        (exists("id/1"), True),
        (exists("id/2"), False),
        (mod_is(found.key, found.mod_revision), True),
        (mod_is(found.key, 1), False),
        (value_is("id/1", b"a"), True),
        (lease_is("id/1", 5), False),
        (range_absent("value/"), False),
    ):
        assert (await client.txn([condition], [])).succeeded == holds
    assert (await client.txn([], [delete_op("id/1")])).responses[0].deleted == 1


async def test_many_writes_are_batched(etcd: EtcdServer, client: Client) -> None:
    before = etcd.revision()
    revision = await client.write_many(put_op(f"k/{index}", "x") for index in range(1000))
    assert revision == before + 8
    assert await client.delete_prefix("k/") == 1000
    assert await client.write_many([]) == 0
    with pytest.raises(ValueError, match="everything"):
        await client.delete_prefix("")


async def test_requests_in_flight_are_limited(etcd: EtcdServer) -> None:
    client = Client(etcd.config, max_in_flight=3)
    active = peak = 0
    plain = client.transport.call_peer

    async def counted(*arguments: Any) -> Any:
        nonlocal active, peak
        active += 1
        peak = max(peak, active)
        try:
            return await plain(*arguments)
        finally:
            active -= 1

    client.transport.call_peer = counted  # type: ignore[method-assign, assignment]
    await asyncio.gather(*(client.put(f"k{index}", "x") for index in range(30)))
    await client.close()
    assert peak == 3


async def test_garbage_keys_are_read_back(client: Client, etcd: EtcdServer) -> None:
    key = b"bad/\xff\xfe\n".decode("utf-8", "surrogateescape")
    await client.put(key, b"\x00\xff")
    assert [(item.key, item.value) for item in (await client.list("bad/")).items] == [(key, b"\x00\xff")]
    assert await client.delete(key)


# --- leases


async def test_lease(client: Client) -> None:
    lease = await client.lease_grant(60)
    await client.put("a", "1", lease=lease)
    assert await client.lease_keepalive(lease) == 60
    await client.lease_revoke(lease)
    assert await client.get("a") is None
    for gone in (
        client.lease_keepalive(lease),
        client.lease_revoke(lease),
        client.put("a", "1", lease=lease),
        client.txn([], [put_op("a", "1", lease)]),
    ):
        with pytest.raises(LeaseNotFound, match=f"{lease:016x}"):
            await gone


# --- watching


async def take(batches: AsyncIterator[WatchBatch], count: int) -> list[tuple[Kind, str, bytes]]:
    """Return the next `count` events."""
    events: list[tuple[Kind, str, bytes]] = []
    while len(events) < count:
        batch = await asyncio.wait_for(anext(batches), 20)
        events += [
            (Kind.DELETE if each.value is None else Kind.PUT, each.key, each.value or b"")
            for each in batch.changes
        ]
    return events


async def test_watch_delivers_from_a_past_revision_on(client: Client) -> None:
    await client.put("k/old", "0")
    revision = await client.put("k/a", "1")
    await client.put("other", "x")
    await client.delete("k/a")
    async with aclosing(client.watch("k/", revision)) as batches:
        created = await anext(batches)
        assert created.created
        assert not created.changes
        assert await take(batches, 2) == [(Kind.PUT, "k/a", b"1"), (Kind.DELETE, "k/a", b"")]
        await client.put("k/b", "2")
        assert await take(batches, 1) == [(Kind.PUT, "k/b", b"2")]


async def test_watch_of_one_key_does_not_see_longer_ones(client: Client) -> None:
    async with aclosing(client.watch("k", 0, single=True)) as batches:
        await anext(batches)
        await client.put("kk", "no")
        await client.put("k", "yes")
        assert await take(batches, 1) == [(Kind.PUT, "k", b"yes")]


async def test_watch_from_compacted_history(etcd: EtcdServer, client: Client) -> None:
    for value in "abc":
        await client.put("k/a", value)
    compacted = etcd.compact()
    with pytest.raises(Compacted) as caught:
        async with aclosing(client.watch("k/", 2)) as batches:
            await take(batches, 1)
    assert (caught.value.prefix, caught.value.compact_revision) == ("k/", compacted)


async def test_watch_from_a_future_that_a_wiped_store_does_not_know(etcd: EtcdServer, client: Client) -> None:
    with pytest.raises(Compacted, match="wiped or restored"):
        async with aclosing(client.watch("k/", 5000)) as batches:
            await take(batches, 1)


async def test_idle_watch_of_a_quiet_store_is_not_taken_for_a_hung_one(etcd: EtcdServer) -> None:
    client = Client(etcd.config, idle=0.2, hang=3)
    revision = await client.put("k/a", "1")
    async with aclosing(client.watch("k/", revision + 1)) as batches:
        for _ in range(6):
            await asyncio.wait_for(anext(batches), 10)
    await client.close()


async def test_watch_whose_progress_is_withheld_is_not_taken_for_a_hung_one(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer etcd answers no progress request for a watch from the future; the second question helps."""

    async def unanswered(stream: WatchStream) -> None:
        return None

    monkeypatch.setattr(WatchStream, "ask_progress", unanswered)
    client = Client(etcd.config, idle=0.2, hang=2)
    revision = await client.put("k/a", "1")
    async with aclosing(client.watch("k/", revision + 1)) as batches:
        assert (await anext(batches)).created
        for _ in range(2):
            assert (await asyncio.wait_for(anext(batches), 10)).changes == []
        await client.put("k/", "2")
        assert await take(batches, 1) == [(Kind.PUT, "k/", b"2")]
        await client.put("k/b", "3")
        assert await take(batches, 1) == [(Kind.PUT, "k/b", b"3")]
    await client.close()


async def test_hung_server_is_noticed_by_the_watchdog(etcd: EtcdServer) -> None:
    client = Client(etcd.config, idle=0.3, hang=0.7)
    try:
        async with aclosing(client.watch("k/", 0)) as batches:
            await anext(batches)
            etcd.pause()
            with pytest.raises(Unavailable, match="no sign of life"):
                await take(batches, 1)
    finally:
        etcd.resume()
        await client.close()


# --- who may, and how


async def test_denied_names_the_key(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd", tls=True)
    try:
        server.start().enable_auth("agent", "mine/")
        client = Client(server.config_for("agent"))
        await client.put("mine/a", "1")
        for denied in (client.put("yours/a", "1"), client.get("yours/a"), client.list("yours/")):
            with pytest.raises(PermissionDenied, match="yours/"):
                await denied
        with pytest.raises(PermissionDenied) as caught:
            async with aclosing(client.watch("yours/", 0)) as batches:
                await anext(batches)
        assert caught.value.key == "yours/"
        async with aclosing(client.watch("mine/", 0)) as batches:
            assert (await anext(batches)).created
        await client.close()
    finally:
        server.stop()


async def test_tls_without_or_with_rotated_certificate(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd", tls=True)
    try:
        server.start()
        assert server.pki is not None
        good = server.config_for("agent")
        naked = Client(EtcdConfig(good.endpoints, good.ca), timeout=3)
        with pytest.raises(Unavailable, match="127"):
            await naked.get("a")
        await naked.close()
        files = tmp_path / "client"
        files.mkdir()
        config = EtcdConfig(good.endpoints, good.ca, files / "a.crt", files / "a.key")
        with pytest.raises(ConfigError, match=r"a\.(crt|key)"):
            await Client(config).get("a")
        (files / "a.crt").write_bytes((server.directory / "root.crt").read_bytes())
        (files / "a.key").write_bytes((server.directory / "agent.key").read_bytes())  # does not fit
        client = Client(config, timeout=3)
        with pytest.raises(Unavailable):
            await client.get("a")
        shutil.copy(server.directory / "agent.crt", files / "a.crt")

        async def answers() -> bool:
            try:
                return await client.get("a") is None
            except Unavailable:
                return False

        await eventually(answers, "the rotated certificate is used")
        await client.close()
    finally:
        server.stop()


# --- endpoints


async def test_no_endpoint_is_unavailable_and_named(etcd: EtcdServer, client: Client) -> None:
    etcd.stop()
    with pytest.raises(Unavailable, match=f"127.0.0.1:{etcd.client_port}"):
        await client.get("a")
    assert [status.error != "" for status in await client.status()] == [True]
    etcd.start()

    async def answers() -> bool:
        try:
            return await client.get("a") is None
        except Unavailable:
            return False

    await eventually(answers, "the client is connected again")


async def test_requests_fail_over_when_a_member_is_killed(cluster: EtcdCluster) -> None:
    client = Client(cluster.config, timeout=2)
    await client.put("a", "1")
    cluster.member_at(client.transport.current.target).kill()

    async def works() -> bool:
        try:
            await client.put("a", "2")
            found = await client.get("a")
        except Unavailable:
            return False
        return found is not None and found.value == b"2"

    await eventually(works, "another member serves")
    status = await client.status()
    assert sorted(member.error == "" for member in status) == [False, True, True]
    assert sum(member.leader for member in status) == 1
    await client.close()


async def test_reads_fail_over_when_a_member_hangs(cluster: EtcdCluster) -> None:
    client = Client(cluster.config, timeout=1)
    await client.put("a", "1")
    hung = cluster.member_at(client.transport.current.target)
    hung.pause()

    async def read() -> bool:
        try:
            return await client.get("a") is not None
        except Unavailable:
            return False  # the others elect a leader first

    try:
        await eventually(read, "another member serves")
        assert client.transport.current.target != hung.endpoint.removeprefix("http://")
    finally:
        hung.resume()
        await client.close()


async def test_endpoints_are_shuffled() -> None:
    config = EtcdConfig(tuple(f"http://10.0.0.{last}:2379" for last in range(1, 21)))
    orders = {tuple(peer.target for peer in Client(config).transport.peers) for _ in range(5)}
    assert len(orders) > 1


async def test_nothing_is_asked_before_the_gate_opens(etcd: EtcdServer, client: Client) -> None:
    opened = asyncio.Event()

    async def gate() -> None:
        await opened.wait()

    gated = Client(etcd.config, gate=gate)
    try:
        asked = [asyncio.create_task(gated.put(f"k/{number}", "1")) for number in range(3)]
        await asyncio.wait(asked, timeout=0.5)
        assert not any(each.done() for each in asked)
        assert (await client.list("k/")).items == []
        opened.set()
        await asyncio.wait_for(asyncio.gather(*asked), 10)
        assert len((await client.list("k/")).items) == 3
    finally:
        await gated.close()
