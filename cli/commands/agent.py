# SPDX-License-Identifier: Apache-2.0
"""`holdfast agent`: the daemon in the foreground; its options are the agent's own table."""

from __future__ import annotations

import click

from cli.base import examples


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog=examples(
        "holdfast agent --config-dir /etc/holdfast/config",
        "holdfast agent --cluster-name dc1 --cluster-id 3 --debug",
        "holdfast config --list-options     # every option",
    ),
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def agent(ctx: click.Context, options: tuple[str, ...]) -> None:
    """Run the agent in the foreground until it is stopped.

    Options are written --name value; they also come from config-dir, a YAML file and the
    environment.
    """
    from agent.start import main

    ctx.exit(main(list(options)))
