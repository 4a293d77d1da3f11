# SPDX-License-Identifier: Apache-2.0
"""A place in a document: the value, its path and line, and typed access that names both in errors.

Called by `policy.language`, `policy.rules`, `policy.peers` and `policy.ports`; pure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from core.errors import shorten
from policy.document import Node, Scalar
from policy.errors import FieldError, UnknownField, UnsupportedField
from policy.fields import SECTIONS, Status

# No leading zero: Cilium reads 010 as octal.
_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,8})\Z", re.ASCII)

# Names that stand in a path as they are.
_PLAIN = frozenset(each.name for fields in SECTIONS.values() for each in fields)
_KNOWN = {section: {each.name: each for each in fields} for section, fields in SECTIONS.items()}


class Place(NamedTuple):
    """One value of a document, where it stands (`path`, as ``spec.ingress[0]``) and whose it is."""

    node: Node
    path: str
    origin: str

    @property
    def absent(self) -> bool:
        """True for null, which means the same as leaving the field out."""
        return self.node.value is None

    def error(self, problem: str, *, hint: str = "") -> FieldError:
        return FieldError(self.origin, self.node.line, self.path, problem, hint=hint)

    def unsupported(self, problem: str, *, hint: str) -> UnsupportedField:
        return UnsupportedField(self.origin, self.node.line, self.path, problem, hint=hint)

    def fields(self, section: str) -> dict[str, Place]:
        """Return the given fields of a mapping of `section` (of `policy.fields`), null ones left out.

        Raises UnknownField, UnsupportedField, FieldError for what is no mapping.
        """
        known = _KNOWN[section]
        given = {}
        for name, place in self.members().items():
            entry = known.get(name)
            if entry is None:
                raise self._unknown(name, place, known)
            if place.absent:
                continue
            if entry.status is Status.REFUSED:
                raise place.unsupported("this field is not supported", hint=entry.note)
            given[name] = place
        return given

    def _unknown(self, name: str, place: Place, known: Iterable[str]) -> UnknownField:
        hint = _near(name, known) or f"known here: {', '.join(sorted(known))}"
        return UnknownField(self.origin, place.node.line, place.path, "no such field", hint=hint)

    def members(self) -> dict[str, Place]:
        """Return the members of a mapping with any keys; FieldError for what is none."""
        value = self.node.value
        if not isinstance(value, dict):
            raise self._wrong_type("a mapping")
        prefix = f"{self.path}." if self.path else ""
        return {
            key: Place(node, f"{prefix}{key if key in _PLAIN else shorten(key)}", self.origin)
            for key, node in value.items()
        }

    def items(self) -> list[Place]:
        """Return the elements of a list; FieldError for what is none."""
        value = self.node.value
        if not isinstance(value, list):
            raise self._wrong_type("a list")
        return [Place(node, f"{self.path}[{at}]", self.origin) for at, node in enumerate(value)]

    def text(self) -> str:
        """Return a text; FieldError for anything else (a number or true may want quotes)."""
        value = self.node.value
        if isinstance(value, str):
            return value
        hint = "" if value is None or isinstance(value, list | dict) else "put it in quotes"
        raise self._wrong_type("text", hint=hint)

    def flag(self) -> bool:
        """Return true or false; FieldError for anything else."""
        value = self.node.value
        if isinstance(value, bool):
            return value
        raise self._wrong_type("true or false")

    def number(self, low: int, high: int, what: str) -> int:
        """Return a whole number, given as such or as decimal text, of at least `low` and at most `high`."""
        value = self.node.value
        if isinstance(value, str) and _DECIMAL.match(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(f"{what}, a number from {low} to {high}")
        if not low <= value <= high:
            raise self.error(f"{value} is no {what}; it is a number from {low} to {high}")
        return value

    def choice(self, names: Iterable[str], what: str) -> str:
        """Return a text that is one of `names`; FieldError with a close match otherwise."""
        known = list(names)
        given = self.text()
        if given in known:
            return given
        hint = _near(given, known) or f"known: {', '.join(known)}"
        raise self.error(f"{shorten(given)} is no {what}", hint=hint)

    def _wrong_type(self, wanted: str, *, hint: str = "") -> FieldError:
        return self.error(f"{_describe(self.node.value)} where {wanted} is expected", hint=hint)


def _near(given: str, known: Iterable[str]) -> str:
    """Return the question for the known name that `given` may be meant to be, empty if there is none."""
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given[:64].lower(), folded, n=1)
    return f"did you mean {folded[close[0]]}?" if close else ""


def _describe(value: Scalar | list[Node] | dict[str, Node]) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    return f"text {shorten(value)!r}" if isinstance(value, str) else f"{shorten(value)}"
