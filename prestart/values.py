# SPDX-License-Identifier: Apache-2.0
"""Tuples with named fields, as light as the start hook needs them: to a type checker `typing.NamedTuple`.

Loading `typing`, and having it make the hook's classes, would take a sixth of the hook's start
(docs/decisions/start-window.md).
"""

from __future__ import annotations

from operator import itemgetter

# Type checkers take it for true.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:

    class NamedTuple(tuple):
        """What the hook and its tests use of the original: fields, defaults, `_replace`, a readable repr."""

        __slots__ = ()

        def __init_subclass__(cls) -> None:
            cls._fields = tuple(cls.__annotations__)
            cls._defaults = {name: vars(cls)[name] for name in cls._fields if name in vars(cls)}
            for place, name in enumerate(cls._fields):
                setattr(cls, name, property(itemgetter(place)))

        def __new__(cls, *values, **named):
            rest = cls._fields[len(values) :]
            given = {**cls._defaults, **named}
            if (
                len(values) > len(cls._fields)
                or not named.keys() <= set(rest)
                or not given.keys() >= set(rest)
            ):
                raise TypeError(f"{cls.__name__} has the fields {', '.join(cls._fields)}")
            return tuple.__new__(cls, [*values, *(given[name] for name in rest)])

        def _replace(self, **named):
            return type(self)(**{**dict(zip(self._fields, self, strict=True)), **named})

        def __repr__(self) -> str:
            pairs = zip(self._fields, self, strict=True)
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in pairs)})"
