# SPDX-License-Identifier: Apache-2.0
"""The entry point of `holdfast`: global options and the table of commands."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cli.base import DEFAULT_SOCKET, LazyGroup, Settings, examples, state_dir

COMMANDS = {
    "allow-all": ("cli.commands.allow_all:allow_all", "Emergency: let everything pass, for a time"),
    "agent": ("cli.commands.agent:agent", "Run the agent in the foreground"),
    "bpf": ("cli.commands.bpf:bpf", "Read the pinned BPF maps; works with the agent dead"),
    "bugtool": ("cli.commands.bugtool:bugtool", "Collect statuses, maps and logs in an archive"),
    "certs": ("cli.commands.certs:certs", "Make and list certificates"),
    "cleanup": ("cli.commands.cleanup:cleanup", "Remove what the agent put on this host"),
    "config": ("cli.commands.config:config", "Show, sample and check the agent's options"),
    "endpoint": ("cli.commands.endpoint:endpoint", "Show and make endpoints"),
    "health": ("cli.commands.health:health", "Show which nodes this host reaches"),
    "identity": ("cli.commands.identity:identity", "Show identities"),
    "ip": ("cli.commands.node:ip", "Show which address has which identity"),
    "kvstore": ("cli.commands.kv:kvstore", "See how etcd is, read and write its keys"),
    "map": ("cli.commands.maps:map_", "Show the agent's view of the BPF maps"),
    "metrics": ("cli.commands.metrics:metrics", "Show the agent's metrics"),
    "monitor": ("cli.commands.monitor:monitor", "Follow drops, verdicts and traces"),
    "network": ("cli.commands.network:network", "Create and list docker networks"),
    "node": ("cli.commands.node:node", "Show the nodes of the cluster"),
    "policy": ("cli.commands.policy:policy", "Apply, show, check and trace policy"),
    "prestart": ("cli.commands.prestart:prestart", "Show what the start window does to etcd"),
    "start-now": ("cli.commands.start_now:start_now", "End this start's wait for its slot"),
    "status": ("cli.commands.status:status", "Show how the agent is"),
    "version": ("cli.commands.status:version", "Show the versions of command and agent"),
    "vm": ("cli.commands.vm:vm", "Give VMs and bare metal an identity"),
}

# Every other command says on stderr that this host is open to all by an operator's order.
SAY_IT_THEMSELVES = ("allow-all", "status", "agent")

EXAMPLES = examples(
    "holdfast status",
    "holdfast policy apply -f policies/",
    "holdfast endpoint list -o json",
    "holdfast monitor -t drop",
)


CONTEXT = {"max_content_width": 80, "help_option_names": ["-h", "--help"]}


@click.group(cls=LazyGroup, lazy=COMMANDS, epilog=EXAMPLES, context_settings=CONTEXT)
@click.option(
    "-H",
    "--host",
    "socket",
    type=click.Path(path_type=Path),
    default=DEFAULT_SOCKET,
    envvar="HOLDFAST_SOCK",
    show_default=True,
    help="The agent's socket.",
)
@click.pass_context
def main(ctx: click.Context, socket: Path) -> None:
    """Identity-based policy for the workloads of this host.

    Exit codes: 0 done; 1 refused, failed or not healthy; 2 wrong usage; 3 agent, etcd or engine
    not reachable; 4 no such thing.
    """
    ctx.obj = Settings(Path(str(socket).removeprefix("unix://")))
    if ctx.invoked_subcommand not in SAY_IT_THEMSELVES and is_readable(state_dir() / "allow-all.json"):
        from cli.commands.allow_all import announce

        announce()


def is_readable(path: Path) -> bool:
    """True for a file that is there and that this user may see."""
    return os.access(path, os.R_OK)


if __name__ == "__main__":
    main(prog_name="holdfast")
