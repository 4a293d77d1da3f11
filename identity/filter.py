# SPDX-License-Identifier: Apache-2.0
"""The label filter: which labels make the identity, and which are only information.

An expression is ``[source:][!]regex``, the regex anchored at the start of the label's key, as Cilium's
option `labels` has it.  A label joins the identity when

* the filter is no allow-list and no ``!`` expression matches it, or
* its longest matching inclusive expression matched more characters than its shortest ``!`` one.

Holdfast's own list is an allow-list: 64 K identities a cluster are soon gone when every label counts.
Expressions of the operator are added to it; a prefix file replaces it, as in Cilium.

Called by the agent for everything that a container engine hands over.  External resources are not
filtered: what a person gives them is meant.  Pure but for `LabelFilter.from_file`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from core.errors import shorten
from identity.errors import FilterError, LabelError
from identity.labels import CONTAINER, RESERVED, Label, Labels, label
from identity.numbers import NAMES


class Expression(NamedTuple):
    """One parsed expression; `source` empty matches every source, `ignore` is the ``!``."""

    source: str
    ignore: bool
    regex: re.Pattern[str]

    def matched(self, source: str, key: str) -> int:
        """Return how many characters of `key` are matched; matching none of them is no match."""
        if self.source and self.source != source:
            return 0
        match = self.regex.match(key)
        return match.end() if match else 0


class Base(NamedTuple):
    """Built-in expressions, and whether they already make the filter an allow-list."""

    expressions: tuple[str, ...]
    allow_list: bool


# Ends are anchored: com.docker.compose.project is also the start of …project.working_dir.
HOLDFAST = Base(
    (
        rf"{CONTAINER}:com\.docker\.compose\.project$",
        rf"{CONTAINER}:com\.docker\.compose\.service$",
        f"{CONTAINER}:app$",
        f"{CONTAINER}:env$",
        rf"{CONTAINER}:holdfast\.network$",
        rf"{CONTAINER}:holdfast\.port\.",
        f"{RESERVED}:.*",
        r"io\.cilium\.k8s\.policy\.cluster",
    ),
    allow_list=True,
)
# For those who want Cilium 1.11's behaviour: every label counts but these.
CILIUM = Base(
    (
        f"{RESERVED}:.*",
        r"io\.kubernetes\.pod\.namespace",
        r"io\.cilium\.k8s\.namespace\.labels",
        r"app\.kubernetes\.io",
        r"!io\.kubernetes",
        r"!kubernetes\.io",
        r"!.*beta\.kubernetes\.io",
        r"!k8s\.io",
        "!pod-template-generation",
        "!pod-template-hash",
        "!controller-revision-hash",
        r"!annotation.*",
        "!etcd_node",
    ),
    allow_list=False,
)


class Selection(NamedTuple):
    """What `LabelFilter.select` found: labels of the identity, other labels, keys that are no labels."""

    identity: Labels
    info: Labels
    unusable: tuple[str, ...]


class LabelFilter:
    """A frozen list of expressions.  Raises FilterError for one that can not be used."""

    def __init__(self, expressions: Iterable[str] = (), *, base: Base = HOLDFAST) -> None:
        added = [parse_expression(text) for text in expressions]
        self._expressions = (*map(parse_expression, base.expressions), *added)
        self.allow_list = base.allow_list or any(not each.ignore for each in added)

    @classmethod
    def from_file(cls, path: Path, expressions: Iterable[str] = ()) -> LabelFilter:
        """Read a prefix file in place of the built-in list, then add `expressions`.

        Raises FilterError when it can not be read or parsed, or does not keep every reserved label.
        """
        try:
            content = _FILE.decode(path.read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            raise FilterError(f"label prefix file {path} can not be used: {error}") from error
        if content.version != 1:
            raise FilterError(f"label prefix file {path} has version {content.version}, not 1")
        texts = tuple(_expression_text(entry, path) for entry in content.prefixes)
        inclusive = any(not entry.invert for entry in content.prefixes)
        result = cls(expressions, base=Base(texts, allow_list=inclusive))
        if not all(result.relevant(RESERVED, name) for name in NAMES.values()):
            raise FilterError(
                f"label prefix file {path} drops reserved labels", hint=f"add the prefix {RESERVED}:.*"
            )
        return result

    def relevant(self, source: str, key: str) -> bool:
        """True when a label of this source and key joins the identity; values never matter."""
        included = ignored = 0
        for each in self._expressions:
            length = each.matched(source, key)
            if not each.ignore:
                included = max(included, length)
            elif length:
                ignored = min(ignored, length) if ignored else length
        return (not self.allow_list and not ignored) or included > ignored

    def apply(self, labels: Labels) -> tuple[Labels, Labels]:
        """Split a set of labels into those of the identity and the others."""
        identity: list[Label] = []
        info: list[Label] = []
        for each in labels:
            (identity if self.relevant(each.source, each.key) else info).append(each)
        return Labels(identity), Labels(info)

    def select(self, raw: Mapping[str, str], *, source: str = CONTAINER) -> Selection:
        """Split what a container engine calls labels: any text at all, most of it for other programs.

        A bad label that would join the identity raises LabelError (leaving it out could let a deny rule
        miss the workload); any other bad one is only named in `Selection.unusable`.
        """
        identity: list[Label] = []
        info: list[Label] = []
        unusable: list[str] = []
        for key, value in raw.items():
            if self.relevant(source, key):
                identity.append(label(source, key, value))
                continue
            try:
                info.append(label(source, key, value))
            except LabelError:
                unusable.append(shorten(key))
        return Selection(Labels(identity), _as_many_as_fit(info, unusable), tuple(unusable))


def parse_expression(text: str) -> Expression:
    """Parse ``[source:][!]regex``; FilterError names the text and what is wrong with it."""
    source, colon, rest = text.partition(":")
    if not colon:
        source, rest = "", text
    ignore = rest.startswith("!")
    pattern = rest[1:] if ignore else rest
    if not pattern:
        raise FilterError(f"label expression {shorten(text)} is empty", hint="write [source:][!]regex")
    # The regular expressions of Go, which these are written for, know POSIX classes; Python's read them as
    # a set of letters, without a word.
    if "[[:" in pattern:
        raise FilterError(f"label expression {shorten(text)} uses a POSIX class", hint="write [a-z] or \\w")
    try:
        return Expression(source, ignore, re.compile(pattern))
    except re.error as error:
        raise FilterError(f"label expression {shorten(text)} is no regular expression: {error}") from error


class _FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prefix: str
    source: str = ""
    invert: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    prefixes: list[_FileEntry] = msgspec.field(name="valid-prefixes")


_FILE = msgspec.json.Decoder(_File)


def _expression_text(entry: _FileEntry, path: Path) -> str:
    if not entry.prefix or ":" in entry.source:
        raise FilterError(f"label prefix file {path} has an entry that can not be used: {entry}")
    return f"{entry.source}:{'!' if entry.invert else ''}{entry.prefix}"


def _as_many_as_fit(info: list[Label], unusable: list[str]) -> Labels:
    """Information may be cut: an image with hundreds of labels must not keep its container from starting."""
    try:
        return Labels(info)
    except LabelError:
        unusable.extend(shorten(each.key) for each in info)
        return Labels()
