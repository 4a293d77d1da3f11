# SPDX-License-Identifier: Apache-2.0
"""Pauses come from core.backoff: retries have full jitter, periods are jittered; others are named here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
PACKAGES = ("kvstore", "identity", "agent", "external_resources")
DRAWN = ("jittered(", ".next()", "random.uniform(")

# (module, pause) → why it needs no jitter.
OTHERS = {
    ("kvstore/former.py", "pause"): "a back-off's, told in the log before",
    ("identity/gc.py", "self._pause"): "the rate of deletions by the one leader",
    ("agent/renumbering.py", "min(LOOK_S, self._pause)"): "a look at this process's own memory",
    ("agent/remembered.py", "POLICIES_S"): "this host's disk",
    ("agent/remembered.py", "WRITE_S"): "this host's disk",
    ("agent/tasks.py", "CHECKPOINT_S"): "this host's disk",
    ("agent/staleness.py", "max(self.look(), LOOK_S)"): "a look at this process's own memory",
    ("agent/engine_watch.py", "SETTLE_S"): "news of this host's engine are let come together",
    (
        "agent/engine_watch.py",
        "min(max(SETTLE_S, PAUSE_OF_LISTS * self._list_took_s), SETTLE_CAP_S)",
    ): "a share of what this host's engine takes for a list",
    ("agent/listener.py", "ACCEPT_PAUSE_S"): "this host has no descriptor to spare",
    ("agent/listener.py", "self._allowance.spend(time.monotonic())"): "the rate at which others are served",
    ("agent/names_server.py", "PAUSE_S"): "this host has no memory to spare",
    ("agent/names_server.py", "self._reads.spend(time.monotonic(), len(read))"): "as above, a rate",
}


def pauses() -> Iterator[tuple[str, str]]:
    """Yield (module, argument) of every asyncio.sleep that lets time pass."""
    for package in PACKAGES:
        for path in sorted((REPO / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "asyncio.sleep":
                    pause = ast.unparse(node.args[0])
                    if pause != "0":
                        yield str(path.relative_to(REPO)), pause


def test_pauses_are_drawn_at_random_or_have_a_reason() -> None:
    found = list(pauses())
    assert len(found) > 20
    fixed = {(module, pause) for module, pause in found if not any(each in pause for each in DRAWN)}
    assert fixed == OTHERS.keys()


def test_whoever_was_slower_than_somebody_else_pauses_before_the_next_attempt() -> None:
    """Loops over attempts: one without a pause makes contenders meet again and again."""
    without = {
        f"{path.relative_to(REPO)}:{node.lineno}"
        for package in PACKAGES
        for path in sorted((REPO / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.For)
        and "ATTEMPTS" in ast.unparse(node.iter)
        and "asyncio.sleep(" not in ast.unparse(node)
    }
    assert without == set()
