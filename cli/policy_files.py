# SPDX-License-Identifier: Apache-2.0
"""Policy documents from files, directories and standard input, checked as the agent will check them.

Called by `holdfast policy apply` and `validate`.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.errors import CliError, Missing

if TYPE_CHECKING:
    from policy.warnings import PolicyWarning

STDIN = "-"
SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class PolicyFiles:
    """Policies by name: `documents` as JSON would load them, `origins` where each came from.

    `warnings` are doubts about them, which keep nothing from being applied.
    """

    documents: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    warnings: list[PolicyWarning] = field(default_factory=list)

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """Return name → the document as it is stored."""
        from policy.language import stored_text

        return {name: stored_text(document) for name, document in self.documents.items()}


def read_files(names: Iterable[str], default_name: str = "") -> PolicyFiles:
    """Read and check everything; PolicyError names the field, CliError a name that comes twice."""
    from policy.language import parse_policies
    from policy.warnings import find_warnings

    gc.disable()  # half the time of 10 000 rules would go into looking for cycles, and a command ends soon
    found = PolicyFiles()
    for origin, text in read_texts(names):
        for policy in parse_policies(text, origin, name=default_name):
            if policy.name in found.documents:
                raise CliError(
                    f"policy {policy.name} comes twice: in {found.origins[policy.name]} and in {origin}",
                    hint="a policy's name is unique",
                )
            found.documents[policy.name] = policy.document
            found.origins[policy.name] = origin
        found.warnings.extend(find_warnings(text, origin))
    return found


def read_texts(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (origin, text) of each file; a directory stands for the policy files in it."""
    for name in names:
        if name == STDIN:
            yield "standard input", sys.stdin.read()
            continue
        path = Path(name)
        files = sorted(members(path)) if path.is_dir() else [path]
        for file in files:
            yield str(file), read(file)


def members(directory: Path) -> list[Path]:
    """Return the policy files of a directory; CliError when it has none."""
    found = [file for file in directory.iterdir() if file.suffix in SUFFIXES and file.is_file()]
    if not found:
        raise CliError(f"{directory} has no policy file", hint=f"their names end in {', '.join(SUFFIXES)}")
    return found


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Missing(f"there is no file {path}") from error
    except OSError as error:
        raise CliError(f"{path} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(f"{path} is not UTF-8 text: byte {error.start}") from error
