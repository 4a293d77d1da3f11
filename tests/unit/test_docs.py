# SPDX-License-Identifier: Apache-2.0
"""The pages keep up with the code: links lead somewhere, shown commands exist, metrics are current."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import prometheus_client
import pytest

from cli.main import main
from core import metrics
from tests.support.cli import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Where a command may begin: a line (after a prompt or variables), a pipe, a list, a substitution.
BEGIN = re.compile(r"(?:^\s*(?:[#$] )?(?:[A-Z_]+=\S+ )*|\| |&& |; |\$\()holdfast (?=[a-z-])", re.MULTILINE)
SPAN = re.compile(r"(?<!`)`(?:make down && )?holdfast ([a-z-][^`\n]*)`")
TARGET = re.compile(r"^\s*(?:[#$] )?(?:[A-Z_]+=\S+ )*make ([a-z]+)", re.MULTILINE)


class Shown(NamedTuple):
    """A command of a page; in a sentence it may lack its arguments."""

    words: tuple[str, ...]
    whole: bool


def fences(text: str) -> list[str]:
    """Return the blocks of code, with lines that a backslash continues joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\\\n\s*", "", block) for block in blocks]


def words(text: str) -> tuple[str, ...]:
    """Return the words of one command: up to a pipe, a redirection, a comment or the line's end."""
    line = re.sub(r"\$\([a-z]+\)", "substituted", text.partition("\n")[0])
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    found: list[str] = []
    for token in lexer:
        if set(token) <= set("|&;<>()"):
            break
        found.append(token)
    return tuple(each for each in found if each != "…")


def shown(page: Path) -> Iterator[Shown]:
    text = page.read_text(encoding="utf-8")
    for block in fences(text):
        for match in BEGIN.finditer(block):
            yield Shown(words(block[match.end() :]), whole=True)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for match in SPAN.finditer(prose):
        yield Shown(words(match[1].split("…")[0]), whole=False)


def check(command: Shown) -> None:
    """Parse a command as `holdfast` would, without running it; AssertionError says what is wrong."""
    current: click.Command = main
    context = main.make_context("holdfast", ["status"])
    rest = list(command.words)
    while isinstance(current, click.Group) and rest and not rest[0].startswith("-"):
        found = current.get_command(context, rest[0])
        assert found is not None, f"holdfast {shlex.join(command.words)}: no command {rest[0]}"
        current, rest = found, rest[1:]
    try:
        current.make_context(current.name, rest, parent=context)
    except click.exceptions.Exit:
        return  # --help
    except click.exceptions.NoArgsIsHelpError:
        assert not command.whole
    except click.UsageError as error:
        if isinstance(error, click.MissingParameter) and not command.whole:
            return
        raise AssertionError(f"holdfast {shlex.join(command.words)}: {error.format_message()}") from error


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_shown_is_one(page: Path) -> None:
    for command in shown(page):
        check(command)


def test_commands_are_found_and_bad_ones_are_refused() -> None:
    assert len(list(shown(ROOT / "docs" / "guide.md"))) > 20
    for bad in ("statuz", "endpoint list --no-such", "policy apply", "bpf policy frob 3"):
        with pytest.raises(AssertionError):
            check(Shown(words(bad), whole=True))
    check(Shown(words("policy apply -f a.yaml --wait  # all | hosts"), whole=True))


def slug(heading: str) -> str:
    """Return the anchor of a heading, as renderers make it."""
    kept = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert not re.match(r"[a-z]+:", link), f"{link} is not of this repository"
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_can_be_reached_from_the_index() -> None:
    seen: set[Path] = set()
    queue = [ROOT / "docs" / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        queue += [(page.parent / link).resolve() for link in links]
    assert {page for page in PAGES if page.parent != ROOT} <= seen


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_make_target_shown_is_one(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {name for block in fences(page.read_text(encoding="utf-8")) for name in TARGET.findall(block)}
    assert used <= targets


def test_every_scenario_named_is_one() -> None:
    page = (ROOT / "docs" / "chaos.md").read_text(encoding="utf-8")
    files = {each.name: each for each in (ROOT / "tests").rglob("test_*.py")}
    defined = set(re.findall(r"def (test_\w+)\(", "\n".join(each.read_text() for each in files.values())))
    named = re.findall(r"`(?:tests/\w+/)?(test_\w+)(\.py)?(?:\[\w+\])?`", page)
    assert len(named) > 30
    assert not [f"{name}.py" for name, ending in named if ending and f"{name}.py" not in files]
    assert not [name for name, ending in named if not ending and name not in defined]


def test_metrics_page_is_current() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == metrics.docs_page(), "run: python -m core.metrics > docs/metrics.md"


def test_a_scrape_holds_no_times_of_creation() -> None:
    """A histogram and a counter that were used have their own series, and none that says since when."""
    metrics.TASK_DEATHS.labels("a task").inc()
    metrics.DRIVER_SECONDS.labels("Join").observe(0.001)
    text = prometheus_client.generate_latest(metrics.REGISTRY).decode()
    assert 'holdfast_driver_seconds_count{method="Join"}' in text
    assert 'holdfast_task_deaths_total{task="a task"}' in text
    assert "_created" not in text


def test_every_metric_is_described_once() -> None:
    names = [each.name for described in metrics.DESCRIBED.values() for each in described]
    assert len(names) == len(set(names))
    registered = {family.name for family in metrics.REGISTRY.collect()}
    assert registered <= {name.removesuffix("_total") for name in names}
