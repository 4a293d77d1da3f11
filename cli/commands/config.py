# SPDX-License-Identifier: Apache-2.0
"""`holdfast config`: the options in force, all there are, a sample, and a check before a restart."""

from __future__ import annotations

from typing import Any

import click

from cli.base import LazyGroup, Settings, examples, output_option
from cli.errors import Missing
from cli.output import print_done, print_json, print_table, printable

Json = dict[str, Any]
_HERE = "cli.commands.config"


@click.group(
    cls=LazyGroup,
    lazy={
        "get": (f"{_HERE}:get", "Show one option in force"),
        "generate-sample": (f"{_HERE}:generate_sample", "Print a file with every option"),
        "validate": (f"{_HERE}:validate", "Check a configuration without starting"),
    },
    invoke_without_command=True,
    epilog=examples(
        "holdfast config",
        "holdfast config --list-options",
        "holdfast config generate-sample > holdfast.yaml",
        "holdfast config validate --config holdfast.yaml",
    ),
)
@click.option(
    "-n", "--list-options", is_flag=True, help="Every option: its default and meaning. Needs no agent."
)
@output_option
@click.pass_context
def config(ctx: click.Context, list_options: bool, output: str | None) -> None:
    """Show the options in force and where each value came from."""
    if ctx.invoked_subcommand is not None:
        return
    if list_options:
        show_options(output)
        return
    settings: Settings = ctx.obj
    found: Json = settings.agent().get("config")
    if output:
        print_json(found)
        return
    rows = ((name, each["value"], each["origin"]) for name, each in found["options"].items())
    print_table(("OPTION", "VALUE", "FROM"), rows)


def show_options(output: str | None) -> None:
    """Print the agent's table of options."""
    from agent.options import OPTIONS
    from core.options import render

    if output:
        keys = ("name", "default", "section", "help")
        print_json(
            [dict(zip(keys, (o.name, render(o.default), o.section, o.help), strict=True)) for o in OPTIONS]
        )
        return
    for section in dict.fromkeys(option.section for option in OPTIONS):
        click.echo(f"{section}:")
        for option in (each for each in OPTIONS if each.section == section):
            click.echo(f"  --{option.name}={render(option.default)}")
            click.echo(f"        {option.help}")


@click.command(epilog=examples("holdfast config get cluster-name"))
@click.argument("name")
@output_option
@click.pass_obj
def get(settings: Settings, name: str, output: str | None) -> None:
    """Show the value of one option in force."""
    found: Json | None = settings.agent().get("config")["options"].get(name)
    if found is None:
        raise Missing(
            f"there is no option {printable(name)}", hint="holdfast config --list-options shows all"
        )
    if output:
        print_json(found)
        return
    click.echo(printable(found["value"]))


@click.command(
    "generate-sample", epilog=examples("holdfast config generate-sample > /etc/holdfast/holdfast.yaml")
)
@output_option
def generate_sample(output: str | None) -> None:
    """Print a YAML file with every option at its default, each commented out.

    As JSON nothing is commented out: it is a file that says what is so without it.
    """
    from agent.options import OPTIONS
    from core.options import render, sample

    defaults = {option.name: render(option.default) for option in OPTIONS}
    print_done(output, defaults, sample(OPTIONS).rstrip("\n"))


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog=examples(
        "holdfast config validate",
        "holdfast config validate --config holdfast.yaml",
        "holdfast config validate --config-dir /etc/holdfast/config --mtu 1400",
    ),
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@output_option
def validate(options: tuple[str, ...], output: str | None) -> None:
    """Check a configuration as the agent would on its start, from the same places.

    Names the option, its value and where it came from if one is refused.
    """
    from agent.configuration import load_config

    checked = load_config(list(options))
    changed = sum(value.origin != "default" for value in checked.values.values())
    said = f"The configuration is valid: {changed} of {len(checked.values)} options differ from the default."
    print_done(output, {"valid": True, "options": checked.shown()}, said)
