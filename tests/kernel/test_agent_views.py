# SPDX-License-Identifier: Apache-2.0
"""The file of views on real disks: killed in the middle of a write, and full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import ipcache, remembered, sinks, viewfile
from agent.remembered import AddressView, Remembered
from agent.viewfile import ViewFile
from kvstore import schema
from tests.support.host import REPO, wait_for
from tests.support.lives import follower
from tests.support.saved import Saved

OWNER = "default/host-1"
KILLS, ADDRESSES = 12, 2000

# Every address gets the number of the round, and so does the place: a file that is whole has one number.
WRITER = """
import asyncio, sys
from pathlib import Path
from tests.kernel.test_agent_views import ADDRESSES, Life
async def main():
    life = Life(Path(sys.argv[1]))
    await life.memory.open()
    await life.memory.restore(life.view)
    while True:
        life.write_round(life.view.follower.revision + 1)
        await life.memory.write()
        print(life.memory.trouble, flush=True)
asyncio.run(main())
"""


class Life:
    """Addresses and their file."""

    def __init__(self, directory: Path) -> None:
        self.sink = sinks.IpSink(ipcache.new_table().source(ipcache.KVSTORE_SOURCE), 60.0)
        self.view = AddressView(follower(schema.IPS, self.sink), self.sink)
        self.memory = Remembered(ViewFile(directory / viewfile.NAME, OWNER, remembered.SHAPES), grace=60.0)

    def write_round(self, number: int, addresses: int = ADDRESSES) -> None:
        items = []
        for index in range(addresses):
            address = f"10.0.{index >> 8}.{index & 255}"
            record = schema.ip_record(address, 1000 + number, metadata="x" * 100)
            items.append((schema.ip_key(schema.DEFAULT_SPACE, address), schema.encode_ip(record)))
        self.sink.take(items)
        self.view.follower.cursor.listed(number)


@pytest.mark.parametrize("filling", [True, False], ids=["first life", "later"])
def test_an_agent_that_is_killed_while_it_writes_leaves_one_whole_view(tmp_path: Path, filling: bool) -> None:
    """In its first life it writes the file's pages themselves, later a log of them."""
    last = 0
    for kill in range(KILLS):
        if filling:
            tmp_path, last = tmp_path / "next", 0
            tmp_path.mkdir()
        saved = Saved(tmp_path)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: saved.revision("addresses") > last, "a round of this life")  # noqa: B023
            time.sleep(kill * 0.013)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        file = ViewFile(saved.path, OWNER, remembered.SHAPES)
        assert file.open(), "what was broken off is undone by the next life"
        file.close()
        last = saved.revision("addresses")
        identities = {row[1] for row in saved.rows("addresses")}
        assert identities == {1000 + last}
        assert len(saved.rows("addresses")) == ADDRESSES


async def test_a_full_disk_keeps_the_last_view_and_is_written_when_there_is_room(small_disk: Path) -> None:
    life = Life(small_disk)
    try:
        await life.memory.open()
        await life.memory.restore(life.view)
        life.write_round(1, 100)
        await life.memory.write()
        assert life.memory.trouble == ""
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(2 << 20))
        life.write_round(2)
        for _ in range(2):
            await life.memory.write()
            assert "full" in life.memory.trouble
        assert Saved(small_disk).revision("addresses") == 1
        assert len(Saved(small_disk).rows("addresses")) == 100
        ballast.unlink()
        await life.memory.write()
        assert life.memory.trouble == ""
    finally:
        life.memory.close()
    assert Saved(small_disk).revision("addresses") == 2
    assert {row[1] for row in Saved(small_disk).rows("addresses")} == {1002}


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
async def test_what_was_known_is_restored_though_the_disk_is_full(small_disk: Path, killed: bool) -> None:
    ballast = small_disk / "ballast"
    first = Life(small_disk)
    await first.memory.open()
    await first.memory.restore(first.view)
    for number in (1, 2):
        first.write_round(number, 100)
        await first.memory.write()
    if killed:  # what it leaves, without what the end of a life takes over
        log = (small_disk / "views.db-wal").read_bytes()
        assert log
    first.memory.close()
    if killed:
        (small_disk / "views.db-wal").write_bytes(log)
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(2 << 20))
    second = Life(small_disk)
    try:
        await second.memory.open()
        assert await second.memory.restore(second.view)
        assert second.view.place.revision == 2
        assert {record.identity for record in second.view.source.entries().values()} == {1002}
        assert "can not be opened" in second.memory.trouble
        second.write_round(3, 100)
        await second.memory.write()
        assert second.memory.trouble
        ballast.unlink()
        await second.memory.write()
        assert second.memory.trouble == ""
    finally:
        second.memory.close()
    assert Saved(small_disk).revision("addresses") == 3
    assert {row[1] for row in Saved(small_disk).rows("addresses")} == {1003}
