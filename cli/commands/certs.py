# SPDX-License-Identifier: Apache-2.0
"""`holdfast certs`: the verbs of the certificate library, with the help that the other commands have."""

from __future__ import annotations

import copy

import click

from certs import commands
from cli.base import examples

EXAMPLES = {
    "init": examples(
        "holdfast certs init --etcd-name etcd --agent $(hostname) --operator",
        "holdfast certs init --agent $(hostname) --dry-run",
    ),
    "issue": examples(
        "holdfast certs issue agent host7 --into host7/",
        "holdfast certs issue operator alice --renew",
    ),
    "fleet": examples("holdfast certs fleet fleet/inventory.yaml --dry-run"),
    "list": examples("holdfast certs list", "holdfast certs list -o json"),
    "check": examples("holdfast certs check --dir /etc/holdfast/pki"),
}


def _with_examples(name: str, command: click.Command) -> click.Command:
    copied = copy.copy(command)
    copied.epilog = EXAMPLES.get(name, copied.epilog)
    return copied


certs = click.Group(
    "certs",
    {name: _with_examples(name, command) for name, command in commands.certs.commands.items()},
    help=commands.certs.help,
    epilog=examples(
        "holdfast certs init --etcd-name etcd --agent $(hostname) --operator", "holdfast certs list"
    ),
)
