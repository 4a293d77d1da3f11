# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: libraries know nothing of the agent, the pure ones nothing of the world."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

# Package → the packages of this repository that it may import, besides itself.  Everybody may use `core`.
ALLOWED: dict[str, frozenset[str]] = {
    "core": frozenset(),
    "kvstore": frozenset(),
    "identity": frozenset({"kvstore"}),
    "policy": frozenset({"identity"}),
    "datapath": frozenset(),
    "certs": frozenset({"kvstore"}),
    "prestart": frozenset(),
    "external_resources": frozenset({"kvstore", "identity"}),
    "cli": frozenset(
        {"certs", "datapath", "external_resources", "identity", "kvstore", "policy", "prestart", "agent"}
    ),
    "agent": frozenset({"datapath", "identity", "kvstore", "policy", "prestart"}),
}
# Outside of the standard library, for the packages that must stay pure or thin.
THIRD_PARTY: dict[str, frozenset[str]] = {
    "policy": frozenset({"yaml", "msgspec", "loguru"}),
    "identity": frozenset({"msgspec", "loguru"}),
    "prestart": frozenset(),
}
# What no module of the agent may load: 20 MB and blocking calls.
NEVER_IN_AGENT = frozenset({"docker", "bcc"})


def packages() -> list[str]:
    return sorted(path.parent.name for path in REPO.glob("*/__init__.py") if path.parent.name != "tests")


def imports(package: str) -> Iterator[tuple[str, str]]:
    """Yield (where, top-level name) of every absolute import of a package."""
    for path in sorted((REPO / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} is a relative import"
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield f"{path.relative_to(REPO)}:{node.lineno}", name.partition(".")[0]


def test_every_package_is_in_the_table() -> None:
    assert set(packages()) - {"bench"} == set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_it_may(package: str) -> None:
    ours = set(packages()) | {"tests"}
    allowed = ALLOWED[package] | {package, "core"}
    wrong = [f"{where} imports {name}" for where, name in imports(package) if name in ours - allowed]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(THIRD_PARTY))
def test_pure_packages_stay_pure(package: str) -> None:
    ours = set(packages())
    allowed = THIRD_PARTY[package] | ours | sys.stdlib_module_names
    wrong = [f"{where} imports {name}" for where, name in imports(package) if name not in allowed]
    assert wrong == []


def test_the_agent_asks_the_engine_itself() -> None:
    found = [each for package in ("agent", "core") for each in imports(package)]
    assert [where for where, name in found if name in NEVER_IN_AGENT] == []


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_says_what_it_is_and_is_typed(package: str) -> None:
    module = ast.parse((REPO / package / "__init__.py").read_text(encoding="utf-8"))
    assert len(ast.get_docstring(module) or "") > 40
    assert [type(node) for node in module.body] == [ast.Expr], "an __init__ holds its docstring alone"
    assert (REPO / package / "py.typed").exists()
