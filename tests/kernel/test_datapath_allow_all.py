# SPDX-License-Identifier: Apache-2.0
"""`holdfast allow-all` and the packets, with no agent anywhere: what passes, how long, what still wins."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from core.files import set_aside
from datapath import allowall, syscall
from datapath.allowall import FILE, LOCK, WHOLE_HOST, Now
from datapath.mapspec import policy_map_name
from datapath.records import PolicyEntry, PolicyKey
from datapath.testrun import ACT_OK, ACT_SHOT
from tests.support import frames
from tests.support.bpf import own_bpffs
from tests.support.bpflab import EGRESS, INGRESS, VM_IDENTITY, WORLD, Lab, lab_with_neighbours
from tests.support.cli import run
from tests.support.families import NETS, Net
from tests.support.host import run as host_run
from tests.support.host import wait_for
from tests.support.stopped import stopped_command

BALLAST = "ballast"
IN, OUT = PolicyKey(0, 0, 0, INGRESS), PolicyKey(0, 0, 0, EGRESS)


class Emergency:
    """Two endpoints that nobody may reach, with their maps pinned, and the command."""

    def __init__(self, host: Lab, root: Path, state: Path) -> None:
        self.host, self.root, self.state = host, root, state
        root.mkdir(parents=True, exist_ok=True)
        for number, policy in host.policies.items():
            syscall.obj_pin(policy.fd, root / policy_map_name(number))
        (state / "endpoints").mkdir(parents=True)
        (state / "endpoints" / "00001.json").write_text(
            json.dumps({"id": 1, "container_name": "web", "container_id": "abc123", "ipv4": "10.0.0.1"})
        )
        self._ports = iter(range(10_000, 60_000))

    @property
    def kept(self) -> list[int]:
        """For which endpoints the file tells an agent of an order in force."""
        return [each.endpoint for each in allowall.in_force(allowall.read(self.state), Now.read())]

    def holdfast(self, *words: str) -> CompletedProcess[str]:
        where = ("--state-dir", str(self.state), "--bpf-root", str(self.root.parents[1]))
        return run("allow-all", *words, *where)

    def ordered(self, *words: str) -> str:
        done = self.holdfast(*words, "--reason", "incident 4711", "--by", "alice")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def passes(self, number: int, net: Net, *, source: str = "") -> bool:
        """Send a new flow to an endpoint; True if it arrives."""
        frame = frames.tcp(source or net.vm, net.endpoint(number), next(self._ports), 80)
        return self.host.deliver(number, frame).verdict == ACT_OK

    def ends(self, number: int) -> set[int]:
        """Return the seconds at which the entries of an endpoint's map end."""
        return {entry.until for _, entry in self.host.policies[number].items()}  # type: ignore[attr-defined]

    def leaves(self, number: int, net: Net) -> bool:
        frame = frames.tcp(net.endpoint(number), net.vm, next(self._ports), 80)
        return self.host.send(number, frame).verdict != ACT_SHOT


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Emergency]:
    with lab_with_neighbours() as host, own_bpffs(tmp_path) as root:
        yield Emergency(host, root, tmp_path / "state")


@pytest.fixture
def full(scene: Emergency, small_disk: Path) -> Emergency:
    """The scene with an order for the host, a longer one for endpoint 2, and no room for another word."""
    scene.state = small_disk
    scene.ordered("--host")
    scene.ordered("--endpoint", "2", "--for", "2h")
    fill(small_disk)
    return scene


def fill(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (disk / BALLAST).write_bytes(bytes(2 << 20))


def mount(disk: Path, mode: str) -> None:
    host_run(["mount", "-o", f"remount,{mode}", str(disk)])


@pytest.mark.parametrize("net", NETS, ids=lambda net: f"IPv{net.family}")
def test_an_endpoint_is_open_at_once_and_no_other(scene: Emergency, net: Net) -> None:
    assert not scene.passes(1, net)
    assert "ALL IS ALLOWED for 30m0s, to and from 1 endpoint" in scene.ordered("--endpoint", "1")
    assert scene.passes(1, net)
    assert scene.leaves(1, net)
    assert not scene.passes(2, net)
    assert not scene.leaves(2, net)


def test_the_whole_host_is_open(scene: Emergency) -> None:
    assert "2 endpoints" in scene.ordered("--host", "--for", "2h")
    assert all(scene.passes(number, net) and scene.leaves(number, net) for number in (1, 2) for net in NETS)


def test_the_kernel_ends_it_with_nobody_there(scene: Emergency) -> None:
    began = time.monotonic()
    scene.ordered("--endpoint", "1", "--for", "10s")
    assert scene.passes(1, NETS[0])
    wait_for(lambda: not scene.passes(1, NETS[0]), "end of the order")
    assert not scene.leaves(1, NETS[0])
    assert time.monotonic() - began >= 9.0  # not before its time
    held = dict(scene.host.policies[1].items())
    assert held.keys() == {IN, OUT}, "nobody has touched the map"
    assert all(entry.until <= time.monotonic() for entry in held.values())  # type: ignore[attr-defined]


def test_it_is_taken_back(scene: Emergency) -> None:
    scene.ordered("--host")
    scene.ordered("--endpoint", "2", "--for", "1h")
    assert "no longer allowed by order: 1 endpoint" in scene.holdfast("--end", "--endpoint", "2").stdout
    assert scene.passes(2, NETS[0]), "the order for the host is still in force"
    assert scene.holdfast("--end").returncode == 0
    assert not scene.passes(1, NETS[0])
    assert not scene.passes(2, NETS[0])
    assert dict(scene.host.policies[1].items()) == {}
    assert scene.holdfast().stdout == "nothing is allowed by order\n"


def test_who_is_denied_by_name_stays_denied(scene: Emergency) -> None:
    scene.host.allow(1, INGRESS, WORLD, deny=True)
    net = NETS[0]
    assert "1 denial by name still in force: holdfast bpf policy get 1" in scene.ordered("--endpoint", "1")
    assert scene.passes(1, net, source=net.vm)
    assert not scene.passes(1, net, source=net.outside)


def test_what_policy_allows_and_denies_to_all(scene: Emergency) -> None:
    """A direction that is open for ever stays so; one that is closed to all is opened."""
    forever = scene.host.allow(1, INGRESS)
    scene.host.allow(1, EGRESS, deny=True)
    scene.ordered("--endpoint", "1")
    assert scene.host.policies[1].get(forever) == PolicyEntry(False)
    assert scene.leaves(1, NETS[0])
    assert scene.holdfast("--end").returncode == 0
    assert scene.passes(1, NETS[0])
    assert not scene.leaves(1, NETS[0])


def test_an_endpoint_is_found_by_what_its_container_is_called(scene: Emergency) -> None:
    for reference in ("container-name:web", "container-id:abc", "ipv4:10.0.0.1"):
        scene.ordered("--endpoint", reference)
        assert scene.passes(1, NETS[0])
        scene.holdfast("--end")
        assert not scene.passes(1, NETS[0])


def test_it_is_shown_everywhere(scene: Emergency, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.ordered("--endpoint", "1")
    shown = scene.holdfast().stdout
    assert "to and from endpoint 1" in shown
    assert "alice" in shown
    assert "incident 4711" in shown
    [found] = json.loads(scene.holdfast("-o", "json").stdout)
    assert (found["endpoint"], found["by"], found["reason"]) == (1, "alice", "incident 4711")
    root = str(scene.root.parents[1])
    table = run("bpf", "--bpf-root", root, "policy", "get", "1").stdout
    assert table.count("Allow, by order, for 29m") == 2
    assert (scene.state / FILE).stat().st_mode & stat.S_IRWXO == 0


def test_every_command_says_it(scene: Emergency) -> None:
    scene.ordered("--host")
    where = {"HOLDFAST_STATE_DIR": str(scene.state)}
    said = run("bpf", "--bpf-root", str(scene.root.parents[1]), "policy", "list", env=where)
    assert said.returncode == 0
    assert said.stderr.startswith("ALL IS ALLOWED to and from every endpoint of this host for 29m")
    assert "by alice: incident 4711" in said.stderr


def test_maps_are_opened_when_the_orders_can_not_be_kept(scene: Emergency) -> None:
    """A full disk, or a directory that is gone, in the middle of an emergency."""
    scene.state = scene.state / "gone"
    done = scene.holdfast("--endpoint", "1", "--reason", "r")
    assert done.returncode == 0
    assert f"{scene.state / FILE} can not be written (No such file or directory)" in done.stderr
    assert scene.passes(1, NETS[0])


def test_an_emergency_does_not_wait_for_a_command_that_was_stopped(scene: Emergency) -> None:
    """Neither to open nor to close; and an agent learns of it."""
    with stopped_command(scene.state):
        done = scene.holdfast("--endpoint", "1", "--reason", "r")
        assert done.returncode == 0
        assert f"Warning: another command holds {scene.state / LOCK}" in done.stderr
        assert scene.passes(1, NETS[0])
        assert scene.kept == [1]
        done = scene.holdfast("--end")
        assert done.returncode == 0
        assert f"Warning: another command holds {scene.state / LOCK}" in done.stderr
    assert not scene.passes(1, NETS[0])
    assert scene.kept == []


def test_all_orders_end_on_a_full_disk(full: Emergency) -> None:
    """There is no room for a file without orders, but for none."""
    done = full.holdfast("--end")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (full.state / FILE).exists()
    assert not full.passes(1, NETS[0])
    assert not full.passes(2, NETS[0])


@pytest.mark.parametrize(
    ("words", "whose", "still_open"),
    [
        pytest.param(["--host"], "every endpoint of this host", {2}, id="the host's"),
        pytest.param(["--host", "-o", "json"], "every endpoint of this host", {2}, id="the host's, as JSON"),
        pytest.param(["--endpoint", "2"], "endpoint 2", {1, 2}, id="an endpoint's"),
    ],
)
def test_one_of_two_orders_ends_on_a_full_disk(
    full: Emergency, words: list[str], whose: str, still_open: set[int]
) -> None:
    """The maps follow, whatever else is ordered, and it is said that an agent will not."""
    done = full.holdfast("--end", *words)
    assert done.returncode == 1
    assert (
        f"Error: the order to allow all to and from {whose} is still in {full.state / FILE}"
        " (No space left on device): a running or starting agent puts the entries back until it ends, in "
    ) in done.stderr
    assert "make room on the disk" in done.stderr
    assert {number for number in (1, 2) if full.passes(number, NETS[0])} == still_open
    assert full.kept == [WHOLE_HOST, 2]
    (full.state / BALLAST).unlink()
    assert full.holdfast("--end", *words).returncode == 0
    assert len(full.kept) == 1


def test_an_order_on_a_full_disk_shortens_no_other(full: Emergency) -> None:
    """The host's holds for an endpoint with a shorter one, and an endpoint's beside a shorter one for all."""
    before = full.ends(1), full.ends(2)
    for words, longer in ((["--endpoint", "1"], 1), (["--host"], 2)):
        done = full.holdfast(*words, "--for", "1m", "--reason", "r")
        assert done.returncode == 0
        assert f"Warning: {full.state / FILE} can not be written (No space left on device)" in done.stderr
        assert full.ends(longer) == before[longer - 1]
    assert full.kept == [WHOLE_HOST, 2]


def test_orders_in_a_directory_that_is_read_only(scene: Emergency, small_disk: Path) -> None:
    scene.state = small_disk
    scene.ordered("--endpoint", "1")
    mount(small_disk, "ro")
    done = scene.holdfast("--end", "--endpoint", "2")
    assert done.returncode == 0, "there is no such order"
    assert "it holds no such order" in done.stderr
    assert scene.passes(1, NETS[0])
    done = scene.holdfast("--end", "-o", "json")
    assert done.returncode == 1
    assert f"is still in {small_disk / FILE} (Read-only file system)" in done.stderr
    assert [each["endpoint"] for each in json.loads(done.stdout)] == [1, 2]
    assert not scene.passes(1, NETS[0])
    mount(small_disk, "rw")
    assert scene.holdfast("--end").returncode == 0
    assert scene.kept == []


@pytest.mark.parametrize("agent", [True, False], ids=["set aside by an agent", "no agent"])
def test_orders_that_nobody_can_read_end_on_a_full_disk(
    scene: Emergency, small_disk: Path, agent: bool
) -> None:
    """An agent that has set the file aside goes on by what it knew, until there is one again."""
    scene.state = small_disk
    scene.ordered("--host")
    (small_disk / FILE).write_text("{")
    if agent:
        set_aside(small_disk / FILE)
    fill(small_disk)
    done = scene.holdfast("--end")
    assert done.returncode == int(agent)
    assert ("a running agent may go on by orders" in done.stderr) == agent
    assert not (small_disk / FILE).exists()
    assert not scene.passes(1, NETS[0])


def test_orders_that_can_not_be_read_are_named_and_replaced(scene: Emergency) -> None:
    (scene.state / FILE).write_text("{")
    done = scene.holdfast("--endpoint", "1", "--reason", "r")
    assert f"Warning: {scene.state / FILE}: " in done.stderr
    assert [each.endpoint for each in allowall.in_force(allowall.read(scene.state), Now.read())] == [1]
    assert scene.passes(1, NETS[0])


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--endpoint", "1"], 2, "--reason is missing"),
        (["--endpoint", "1", "--reason", " "], 2, "--reason is missing"),
        (["--endpoint", "1", "--host", "--reason", "r"], 2, "exclude each other"),
        (["--host", "--for", "soon", "--reason", "r"], 2, "--for soon is not a duration"),
        (["--host", "--for", "25h", "--reason", "r"], 2, "--for 25h is not between 1s and 24h"),
        (["--host", "--for", "0s", "--reason", "r"], 2, "--for 0s is not between"),
        (
            ["--endpoint", "web", "--reason", "r"],
            2,
            "web is no endpoint: give its number, or",
        ),
        (["--endpoint", "70000", "--reason", "r"], 2, "70000 is no endpoint"),
        (["--endpoint", "container-name:db", "--reason", "r"], 4, "no endpoints of this host are"),
        (["--endpoint", "9", "--reason", "r"], 4, "there is no endpoint 9 on this host"),
    ],
)
def test_what_makes_no_sense_opens_nothing(
    scene: Emergency, words: list[str], code: int, reason: str
) -> None:
    done = scene.holdfast(*words)
    assert done.returncode == code
    assert reason in done.stderr
    assert not (scene.state / FILE).exists()
    assert all(dict(policy.items()) == {} for policy in scene.host.policies.values())


def test_a_map_that_is_full_is_named(scene: Emergency) -> None:
    size = scene.host.policies[1].handle.info.max_entries
    entries = [(PolicyKey(VM_IDENTITY, port + 1, 6, INGRESS), PolicyEntry(False)) for port in range(size)]
    assert not scene.host.policies[1].upsert(entries)
    done = scene.holdfast("--host", "--reason", "r")
    assert done.returncode == 1
    assert "Error: endpoint 1: map cilium_policy_00001" in done.stderr
    assert scene.passes(2, NETS[0]), "the others are open"
