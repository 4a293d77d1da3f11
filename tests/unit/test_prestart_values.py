# SPDX-License-Identifier: Apache-2.0
"""The hook's own named tuples behave as those that a type checker takes them for."""

from __future__ import annotations

import subprocess
import typing
from typing import Any

import pytest

from prestart import values
from tests.support.starts import FOLDER, INTERPRETER


class Light(values.NamedTuple):
    name: str
    number: int = 0
    names: tuple[str, ...] = ()

    @property
    def twice(self) -> int:
        return self.number * 2


class Original(typing.NamedTuple):
    name: str
    number: int = 0
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("places", "named"),
    [(("a",), {}), (("a", 1), {"names": ("b",)}), ((), {"names": (), "name": "c"}), (("a", 1, ("b",)), {})],
)
def test_as_the_original(places: tuple[Any, ...], named: dict[str, Any]) -> None:
    light, original = Light(*places, **named), Original(*places, **named)
    assert light == tuple(original)
    assert repr(light) == repr(original).replace("Original", "Light")
    assert (light.name, light.number, light.names) == tuple(original)
    assert light._replace(number=7) == tuple(original._replace(number=7))
    assert type(light._replace(number=7)) is Light
    assert light._replace(number=7).twice == 14


@pytest.mark.parametrize(
    ("places", "named"),
    [((), {}), ((), {"number": 1}), (("a",), {"name": "b"}), (("a",), {"other": 1}), (("a", 1, (), 2), {})],
)
def test_wrong_fields_are_refused(places: tuple[Any, ...], named: dict[str, Any]) -> None:
    for each in (Light, Original):
        with pytest.raises(TypeError):
            each(*places, **named)


def test_no_field_can_be_set() -> None:
    with pytest.raises(AttributeError):
        Light("a").number = 1  # type: ignore[misc]


def test_the_hook_loads_neither_typing_nor_pathlib() -> None:
    code = "import sys, prestart.main; print({'typing', 'pathlib', 'runpy'} & sys.modules.keys())"
    found = subprocess.run(
        [*INTERPRETER, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True, timeout=30
    )
    assert found.stdout.strip() == "set()"
