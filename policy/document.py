# SPDX-License-Identifier: Apache-2.0
"""Text to trees of nodes that remember their lines: YAML and JSON, with limits.

Policies come from people, from etcd and from files, so the reader trusts nothing: no tags, no
anchors or aliases (a few lines of them expand to gigabytes), no key twice (the second would win in
silence), limits on size, depth and number of values.  Each is a `DocumentError` with the line.

Plain scalars are read as in YAML 1.2: ``null``, ``true``, ``false``, decimal integers and decimal
fractions; ``yes``, ``on`` and ``0x10`` are text.  Called by `policy.language`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from core.errors import shorten
from policy.errors import DocumentError

# A text may hold many policies, each of which has a limit of its own (`policy.language`).  10 000 rules of
# one selector and one port are 1.7 MB of JSON and 160 000 values, and take 2.6 s.  The worst that was found
# to fit these limits takes 4.5 s: one CIDR with 95 000 exceptions, which is refused then.
MAX_CHARACTERS = 4 * 1024 * 1024
# One document nests about 12 deep at most: items, spec, ingress, toPorts, ports, port.
MAX_DEPTH = 32
MAX_VALUES = 200_000

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}\Z")
_FRACTION = re.compile(r"[-+]?[0-9]{1,18}\.[0-9]{0,18}\Z")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "false": False}
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")

_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class Node:
    """One value of a document and the line it starts on (from 1; 0 in JSON, which has no lines)."""

    value: Scalar | list[Node] | dict[str, Node]
    line: int

    def plain(self) -> Any:
        """Return the value as JSON would load it."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def read_documents(text: str, origin: str) -> list[Node]:
    """Return the documents of `text`, which `origin` (a file, a key) names in errors.

    YAML may hold several documents; empty ones are left out.  Raises DocumentError.
    """
    if len(text) > MAX_CHARACTERS:
        raise DocumentError(
            origin, 0, f"{len(text)} characters are more than the {MAX_CHARACTERS} a text may have"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(origin, 0, f"character {error.start} is no valid Unicode") from error
    if text.lstrip()[:1] in ("{", "["):
        node = _read_json(text, origin)
        if node is not None:
            return [node]
    return [node for node in _read_yaml(text, origin) if node.value is not None]


def _read_json(text: str, origin: str) -> Node | None:
    """Return the JSON document, or None if the text is no JSON (it may be YAML in flow style)."""
    try:
        value = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_no_constant)
    except RecursionError as error:
        raise _too_deep(origin, 0) from error
    except ValueError:
        return None
    return _JsonTree(origin).node(value, 1)


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object in order, repeated ones included."""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class _JsonTree:
    """Turns what `json` loaded into nodes, counting and checking on the way."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.count = 0

    def node(self, value: Any, depth: int) -> Node:
        self.count += 1
        if depth > MAX_DEPTH:
            raise _too_deep(self.origin, 0)
        if self.count > MAX_VALUES:
            raise _too_many(self.origin, 0)
        if isinstance(value, _Pairs):
            return Node(self.members(value, depth), 0)
        if isinstance(value, list):
            return Node([self.node(child, depth + 1) for child in value], 0)
        return Node(value, 0)

    def members(self, pairs: _Pairs, depth: int) -> dict[str, Node]:
        members: dict[str, Node] = {}
        for key, child in pairs:
            if key in members:
                raise _repeated(self.origin, 0, key)
            members[key] = self.node(child, depth + 1)
        return members


def _read_yaml(text: str, origin: str) -> Iterator[Node]:
    builder = _YamlTree(origin)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "not readable"
        raise DocumentError(origin, mark.line + 1 if mark else 0, f"no valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DocumentError(origin, 0, f"no valid YAML: {shorten(str(error))}") from error
    return iter(builder.roots)


class _YamlTree:
    """Builds nodes from parser events with a stack of its own: depth costs no recursion."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.roots: list[Node] = []
        self.count = 0
        self._open: list[Node] = []
        self._keys: list[str | None] = []

    def take(self, event: yaml.Event) -> None:
        """Add one event.  Raises DocumentError for what policies must not contain."""
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise DocumentError(
                self.origin, line, f"alias *{shorten(event.anchor)} is not allowed", hint="write it out"
            )
        if isinstance(event, yaml.NodeEvent):
            self._check(event, line)
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event, line)
        elif isinstance(event, yaml.MappingStartEvent):
            self._push(Node({}, line))
        elif isinstance(event, yaml.SequenceStartEvent):
            self._push(Node([], line))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
            self._keys.pop()

    def _check(self, event: yaml.NodeEvent, line: int) -> None:
        if event.anchor is not None:
            raise DocumentError(
                self.origin, line, f"anchor &{shorten(event.anchor)} is not allowed", hint="write it out"
            )
        tag = getattr(event, "tag", None)
        if tag is not None and not (isinstance(event, yaml.ScalarEvent) and tag in _TEXT_TAGS):
            raise DocumentError(self.origin, line, f"tag {shorten(tag)} is not allowed", hint="remove it")
        self.count += 1
        if self.count > MAX_VALUES:
            raise _too_many(self.origin, line)

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        if self._open and isinstance(self._open[-1].value, dict) and self._keys[-1] is None:
            if event.value in self._open[-1].value:
                raise _repeated(self.origin, line, event.value)
            self._keys[-1] = event.value
            return
        plain = event.implicit[0] and event.tag is None
        self._place(Node(_resolve(event.value) if plain else event.value, line))

    def _push(self, node: Node) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise _too_deep(self.origin, node.line)
        if self._open and isinstance(self._open[-1].value, dict) and self._keys[-1] is None:
            raise DocumentError(self.origin, node.line, "a key must be text, not a mapping or list")
        self._place(node)
        self._open.append(node)
        self._keys.append(None)

    def _place(self, node: Node) -> None:
        if not self._open:
            self.roots.append(node)
            return
        parent = self._open[-1].value
        if isinstance(parent, list):
            parent.append(node)
        elif isinstance(parent, dict):
            parent[self._keys[-1] or ""] = node
            self._keys[-1] = None


def _resolve(text: str) -> Scalar:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text):
        return int(text)
    return float(text) if _FRACTION.match(text) else text


def _repeated(origin: str, line: int, key: str) -> DocumentError:
    return DocumentError(origin, line, f"key {shorten(key)} is given twice", hint="keep one of them")


def _too_deep(origin: str, line: int) -> DocumentError:
    return DocumentError(origin, line, f"values are nested more than {MAX_DEPTH} deep")


def _too_many(origin: str, line: int) -> DocumentError:
    return DocumentError(origin, line, f"the text holds more than {MAX_VALUES} values", hint="split it")
