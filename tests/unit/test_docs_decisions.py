# SPDX-License-Identifier: Apache-2.0
"""The decision pages keep up with the project: every dependency has its reason, every page its place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "decisions"


def test_every_dependency_has_a_reason_and_no_other_has_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.split(r"[<>=\[; ]", each, maxsplit=1)[0] for each in declared}
    used = (PAGES / "dependencies.md").read_text().split("## Refused")[0]
    rows = re.findall(r"^\| ([A-Za-z0-9, -]+) \|", used, flags=re.MULTILINE)
    described = {name for row in rows if row != "package" for name in row.split(", ")}
    assert described == names


def test_every_page_is_in_the_index_and_every_link_leads_somewhere() -> None:
    index = (PAGES / "README.md").read_text()
    pages = {page.name for page in PAGES.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\(([a-z-]+\.md)\)", index)) == pages
    for page in (*PAGES.glob("*.md"), ROOT / "docs" / "architecture.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
