# SPDX-License-Identifier: Apache-2.0
"""Every command of `holdfast` explains itself: examples, 80 columns, and no import before it is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from agent.options import OPTIONS
from cli.base import DEFAULT_SOCKET, LazyGroup
from cli.main import main
from tests.support.cli import ROOT, run

Path = tuple[str, ...]


def commands(group: click.Group = main, path: Path = ()) -> Iterator[tuple[Path, click.Command]]:
    """Yield every group and command with the words that name it."""
    yield path, group
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ALL = dict(commands())
# Options of these two are the agent's table, which checks them itself.
PASSING_ON = {("agent",), ("config", "validate")}
STRICT = [path for path, each in ALL.items() if not isinstance(each, click.Group) and path not in PASSING_ON]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_examples_and_fits(path: Path) -> None:
    result = CliRunner().invoke(main, [*path, "--help"])
    assert result.exit_code == 0, result.output
    assert "Examples:" in result.output
    examples = result.output.split("Examples:")[1].strip().splitlines()
    assert any("holdfast" in line for line in examples)
    too_long = [line for line in result.output.splitlines() if len(line) > 80]
    assert not too_long


# The one command that answers nothing: it is the agent.
ANSWERING = [path for path, each in ALL.items() if not isinstance(each, click.Group) and path != ("agent",)]


@pytest.mark.parametrize("path", ANSWERING, ids=" ".join)
def test_every_command_answers_in_json(path: Path) -> None:
    (option,) = (each for each in ALL[path].params if "-o" in each.opts)
    assert "--output" in option.opts
    assert isinstance(option.type, click.Choice)
    assert "json" in option.type.choices


@pytest.mark.parametrize(
    "path", [path for path, command in ALL.items() if isinstance(command, LazyGroup)], ids=" ".join
)
def test_the_short_help_of_lazy_commands_is_there(path: Path) -> None:
    result = CliRunner().invoke(main, [*path, "--help"])
    group = ALL[path]
    assert isinstance(group, LazyGroup)
    for name, (_, text) in group.lazy.items():
        assert name in result.output
        assert text


@pytest.mark.parametrize("path", STRICT, ids=" ".join)
def test_an_unknown_option_is_wrong_usage(path: Path) -> None:
    result = CliRunner().invoke(main, [*path, "--no-such-option"])
    assert result.exit_code == 2, result.output


def test_an_unknown_command_is_wrong_usage() -> None:
    result = run("florp")
    assert (result.returncode, "florp" in result.stderr) == (2, True)


def test_the_socket_is_the_agents() -> None:
    (option,) = (option for option in OPTIONS if option.name == "socket-path")
    assert option.default == DEFAULT_SOCKET


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["status"], {"grpc", "aiohttp", "rich", "yaml", "msgspec", "asyncio", "kvstore", "policy"}),
        (["endpoint", "list"], {"grpc", "aiohttp", "yaml", "msgspec", "kvstore", "policy"}),
        (["policy", "get"], {"grpc", "aiohttp", "kvstore"}),
        (["bpf", "ipcache", "list"], {"grpc", "aiohttp", "kvstore", "pyroute2"}),
        (["prestart", "simulate", "--nodes", "9"], {"grpc", "aiohttp", "kvstore", "PIL", "policy"}),
        (["monitor"], {"grpc", "aiohttp", "rich", "kvstore"}),
    ],
)
def test_nothing_is_imported_before_it_is_needed(words: list[str], unwanted: set[str]) -> None:
    program = (
        "import sys\nfrom cli.main import main\n"
        f"try: main(['-H', '/nonexistent', *{words!r}])\n"
        "except SystemExit: pass\n"
        f"print(sorted({unwanted!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
