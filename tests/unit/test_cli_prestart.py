# SPDX-License-Identifier: Apache-2.0
"""`holdfast prestart simulate`: what it prints and draws, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageColor

from cli import chart
from cli.chart import COLOURS, HEIGHT, PAPER, WIDTH, Panel, highest, ticks
from cli.main import main
from tests.support.cli import run


def simulate(*words: str) -> Result:
    return CliRunner().invoke(main, ["prestart", "simulate", *words])


def test_the_tables_say_how_many_ask_by_each_way() -> None:
    lines = simulate("--nodes", "5000").output.splitlines()
    assert lines[0].startswith("5000 hosts after a power cut, booted within 1m0s; ")
    assert "First contact (window 1m0s, 83.3 a second if even)" in lines
    begin = lines.index("Full lists (window 1h0m, 1.39 a second if even, 28.5 MB each)")
    assert lines[begin + 2].split()[0] == "WAY"
    table = {line[:16].strip(): line[16:].split() for line in lines[begin + 3 : begin + 6]}
    assert list(table) == ["start window", "random jitter", "none"]
    *_, peak, ratio, megabytes = table["start window"]
    assert (peak, ratio) == ("1.4", "1.01")
    # 1.4 lists a second of 150 000 entries of 190 bytes.
    assert float(megabytes) == pytest.approx(1.4 * 150_000 * 190 / 1e6, rel=0.01)
    assert lines[begin + 7].split()[0] == "FROM"
    assert lines[begin + 9].split()[:2] == ["10m0s", "1.39"]


def test_json_has_every_figure_and_the_rates() -> None:
    words = ("--nodes", "300", "--outage", "racks", "--racks", "6", "--history", "lost", "--entries", "1000")
    found = json.loads(simulate(*words, "--entry-bytes", "200", "-o", "json").output)
    (phase,) = found.pop("phases")
    assert found == {
        "nodes": 300,
        "outage": "racks",
        "history": "lost",
        "seed": 1,
        "list-bytes": 200_000,
        "chart": "",
    }
    assert phase["ask"] == "list"
    assert list(phase["ways"]) == ["window", "jitter", "none"]
    for way in phase["ways"].values():
        assert way["starts"] == 300
        assert sum(way["rates"]) * phase["step"] == pytest.approx(300)
        assert way["ratio"] == pytest.approx(way["peak"] / phase["even"])
        assert way["bytes-per-second"] == round(way["peak"] * 200_000)


def test_agents_that_live_through_an_outage_of_etcd_are_said_to_back_off() -> None:
    result = simulate("--nodes", "200", "--outage", "etcd", "--history", "kept", "--over", "10m")
    assert result.output.startswith("200 hosts after etcd was away for 10m0s; the watch resumes")
    assert "back-off, full jitter" in result.output
    assert "MB/S" not in result.output


def test_agents_that_live_list_a_restored_etcd_in_their_slots() -> None:
    result = simulate("--nodes", "200", "--outage", "etcd", "--over", "10m", "--window", "1h")
    first, lists = result.output.split("Full lists (window 1h0m,")
    assert "back-off, full jitter" in first
    assert "start window" in lists
    assert "back-off" not in lists


def test_a_seed_draws_other_boots_and_the_same_one_the_same() -> None:
    first, again, other = (simulate("--nodes", "50", "--seed", seed).output for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize("history", ["kept", "compacted"])
def test_the_chart_is_a_picture_of_every_way(tmp_path: Path, history: str) -> None:
    path = tmp_path / "starts.png"
    result = simulate("--nodes", "1000", "--history", history, "--chart", str(path))
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"Chart: {path}\n")
    assert path.stat().st_mode & 0o777 == 0o644
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (WIDTH, HEIGHT))
        counted = {colour: count for count, colour in picture.convert("RGB").getcolors(WIDTH * HEIGHT) or ()}
    assert counted[rgb(PAPER)] > WIDTH * HEIGHT / 2
    for colour in COLOURS:
        # More than its line in the legend.
        assert counted[rgb(colour)] > 400, colour


def rgb(colour: str) -> tuple[int, ...]:
    return ImageColor.getrgb(colour)


def test_a_line_is_drawn_where_its_rates_are() -> None:
    """A rate that doubles halfway: the line's right half lies twice as high above the axis as its left."""
    picture = chart.draw("two steps", [Panel("hosts a second", 10, {"a": [1.0, 2.0]})])
    column = {
        x: [y for y in range(HEIGHT) if picture.getpixel((x, y)) == rgb(COLOURS[0])] for x in (300, 900)
    }
    axis = HEIGHT - chart.BOTTOM
    heights = [axis - sum(ys) / len(ys) for ys in column.values()]
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.05)


def test_what_towers_over_the_rest_leaves_the_panel_but_never_its_subject() -> None:
    assert highest(Panel("", 1, {"a": [1.4], "b": [2.9], "c": [83.0]}, 1.4)) == 2.9
    assert highest(Panel("", 1, {"a": [83.0], "b": [1.0], "c": [1.0]}, 1.4)) == 83
    assert highest(Panel("", 1, {"a": [1.0], "b": [1.0], "c": [1.0]}, 80.0)) == 1


@pytest.mark.parametrize("most", [0.03, 0.9, 1.0, 7.0, 59.0, 1234.0])
def test_ticks_are_round_and_few(most: float) -> None:
    found = ticks(most)
    assert 3 <= len(found) <= 7
    assert found[-1] <= most < found[-1] + found[1] * 1.001


def test_without_pillow_a_chart_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    result = simulate("--nodes", "100000", "--chart", str(tmp_path / "a.png"))
    assert result.exit_code == 1
    assert "needs the Python package Pillow" in result.output
    assert "pip install 'holdfast[chart]'" in result.output


def test_a_chart_that_can_not_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    inside = run("prestart", "simulate", "--nodes", "9", "--chart", "/proc/self/a.png")
    assert inside.returncode == 1
    assert inside.stderr.startswith("Error: /proc/self/a.png can not be written: ")
    taken = simulate("--chart", str(tmp_path / "a.png"))
    assert taken.exit_code == 2
    assert "is a directory" in taken.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nodes 0", "0 is not in the range 1<=x<=100000"),
        ("--nodes 100001", "100001 is not in the range"),
        ("--nodes many", "'many' is not a valid integer"),
        ("--outage flood", "'flood' is not one of 'power-cut', 'racks', 'rolling', 'etcd'"),
        ("--history some", "'some' is not one of"),
        ("--boot-spread -5s", "'-5s' is not a duration"),
        ("--boot-spread 2d", "--boot-spread 172800s is longer than a day"),
        ("--outage rolling --over 0s", "hosts that boot together are --outage power-cut"),
        ("--outage racks --racks 0", "0 is not in the range"),
        ("--outage racks --nodes 3", "--racks 20 are more than --nodes 3"),
        ("--racks 5", "--racks says nothing of --outage power-cut; it is for racks"),
        ("--over 5m", "--over says nothing of --outage power-cut; it is for racks, rolling, etcd"),
        ("--outage etcd --boot-spread 5s", "--boot-spread says nothing of --outage etcd"),
        ("--outage etcd --history kept --window 5m", "--window says nothing of agents that live"),
        ("--outage etcd --history none", "in --outage etcd agents live and keep their view"),
        ("--window 3d", "'3d': it must be auto or a duration"),
        ("--window 25h", "'25h': it must be at most 24h"),
        ("--entries 0", "0 is not in the range x>=1"),
        ("--chart starts.jpg", "'starts.jpg' does not end in .png"),
        ("--chart /nowhere/starts.png", "there is no directory '/nowhere'"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage_with_the_reason(words: str, said: str) -> None:
    result = simulate(*words.split())
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
